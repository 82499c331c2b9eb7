"""The Hopper GEMM of the CUDA extension: y = x W^T + bias + H B^T as one product, and dx.

Experimental, not yet run on a chip: compiled for sm_90a, and run on the host against a model of
what the chip may do (csrc/hopper_host.h). Nothing takes it unless asked by name. The maths and the
layouts are those of triton_gemm.py; csrc/hopper_gemm.h says how. No autograd: for use inside ops.
"""

import torch
from torch import Tensor

from ckf.kernels import cuda

CAPABILITY = (9, 0)  # WGMMA is of this one alone, not of what came after
ARCH = "sm_90a"
_MAX_SIZE = 1 << 30
_DTYPES = (torch.float16, torch.bfloat16)


def available(device: torch.device | int | None = None) -> tuple[bool, str]:
    """Whether a device can run the kernel, and if not, why."""
    usable, reason = cuda.available()
    if not usable:
        return False, reason
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return False, f"compute capability {capability}; the Hopper GEMM needs {CAPABILITY}"
    archs = cuda.build_info()["archs"]
    if ARCH not in archs:
        return False, f"ckf._C was built for {', '.join(archs)}; rebuild with CKF_CUDA_ARCHS={ARCH}"
    return True, f"ckf._C for {ARCH}; not yet measured"


def why_not_gemm(x: Tensor, weight: Tensor, h: Tensor, b: Tensor, dx: bool = False) -> str | None:
    """None where the kernel takes these operands; else the reason.

    Args:
        x, weight, h, b: as :func:`gemm` takes them; with ``dx`` dy, weight, dS, A of
            :func:`gemm_dx`.
    """
    operands = {"x": x, "W": weight, "H": h, "B^T": b}
    for name, tensor in operands.items():
        if (reason := _why_not_matrix(name, tensor, x)) is not None:
            return reason
    (m, k), (r, n) = x.shape, b.shape
    expected = {"W": (k, n) if dx else (n, k), "H": (m, r)}
    for name, shape in expected.items():
        if operands[name].shape != shape:
            return f"{name} has shape {tuple(operands[name].shape)}; expected {shape}"
    if n % 8:
        return f"n is {n}; rows of y need a multiple of 16 bytes"
    if max(m, n, k, r) > _MAX_SIZE or (m // 256 + 1) * (n // 256 + 1) > _MAX_SIZE:
        return f"m {m}, n {n}, k {k}, R {r}; expected at most {_MAX_SIZE} each, and so many tiles"
    usable, reason = available(x.device)
    return None if usable else reason


def gemm(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
    """x W^T + bias + H B^T, summed in float32 and rounded once.

    Args:
        x: (m, k) float16 or bfloat16; ``weight``: (n, k); ``bias``: (n,) or None; ``h``: (m, R);
            ``b``: (R, n). Rows start at multiples of 16 bytes, elements of a row side by side.

    Returns:
        (m, n), contiguous.

    Raises:
        ValueError: operands that the kernel cannot take (see :func:`why_not_gemm`).
        RuntimeError: CUDA refused the launch.
    """
    _require(why_not_gemm(x, weight, h, b))
    n = b.shape[1]
    if bias is not None:
        cuda._check_plain("bias", bias, x.dtype, x.device)
        if bias.shape != (n,) or not bias.is_contiguous() or bias.data_ptr() % 4:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} and strides {bias.stride()}; expected ({n},), "
                "contiguous, starting at a multiple of 4 bytes"
            )
    return _launch(x, weight, bias, h, b, None, dx=False)


def gemm_dx(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    a: Tensor,
    dropout: tuple[Tensor, int, float] | None = None,
) -> Tensor:
    """drop'(dS A) + dy W, summed in float32 and rounded once.

    Args:
        dy: (m, n); ``weight``: (n, k); ``ds``: (m, R); ``a``: (R, k); layouts as in :func:`gemm`.
        dropout: seed (one int64 on dy's device), threshold, scale; the mask of dS A.

    Returns:
        (m, k), contiguous.

    Raises:
        ValueError, RuntimeError: as :func:`gemm`.
    """
    _require(why_not_gemm(dy, weight, ds, a, dx=True))
    if dropout is not None:
        seed, threshold, _ = dropout
        cuda._check_plain("seed", seed, torch.int64, dy.device)
        if seed.numel() != 1 or not 0 <= threshold < 65536:
            raise ValueError(
                f"seed has {seed.numel()} elements, the threshold is {threshold}; expected one "
                "and 0 to 65535"
            )
    return _launch(dy, weight, None, ds, a, dropout, dx=True)


def _require(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"the Hopper GEMM cannot take these operands: {reason}")


def _why_not_matrix(name: str, tensor: Tensor, x: Tensor) -> str | None:
    if type(tensor) not in cuda._PLAIN or tensor.layout is not torch.strided:
        return f"{name} is a {type(tensor).__name__}; expected a strided torch.Tensor"
    if tensor.dtype not in _DTYPES or tensor.dtype is not x.dtype:
        return f"{name} is {tensor.dtype}; expected float16 or bfloat16, all alike"
    if tensor.device.type != cuda._DEVICE_TYPE or tensor.device != x.device:
        return f"{name} is on {tensor.device}; expected one CUDA device for all"
    if tensor.dim() != 2 or 0 in tensor.shape:
        return f"{name} has shape {tuple(tensor.shape)}; expected two dimensions, none empty"
    rows, columns = tensor.shape
    fits = (columns == 1 or tensor.stride(1) == 1) and tensor.data_ptr() % 16 == 0
    if rows > 1:  # the stride of a single row means nothing
        fits = fits and tensor.stride(0) % 8 == 0 and tensor.stride(0) >= columns
    if not fits:
        return f"{name} has strides {tensor.stride()}; rows must start at multiples of 16 bytes"
    return None


def _pitch(tensor: Tensor) -> int:
    rows, columns = tensor.shape
    return tensor.stride(0) if rows > 1 else -(-columns // 8) * 8


def _launch(x, weight, bias, h, b, dropout, dx: bool) -> Tensor:
    extension, reason = cuda._load_extension()
    if extension is None:
        raise RuntimeError(f"hopper_gemm: {reason}")
    (m, k), (r, n) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    index = x.device.index or 0
    arguments = dict(
        x=x.data_ptr(),
        w=weight.data_ptr(),
        h=h.data_ptr(),
        b=b.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        seed=0 if seed is None else seed.data_ptr(),
        y=y.data_ptr(),
        m=m,
        n=n,
        k=k,
        r=r,
        x_stride=_pitch(x),
        w_stride=_pitch(weight),
        h_stride=_pitch(h),
        b_stride=_pitch(b),
        y_stride=n,
        threshold=threshold,
        scale=scale,
        dx=dx,
        dtype=cuda._DTYPES[x.dtype],
        device=index,
    )
    if torch.cuda.current_device() == index:
        extension.hopper_gemm(**arguments, stream=cuda._raw_stream(index))
    else:
        with torch.cuda.device(index):
            extension.hopper_gemm(**arguments, stream=cuda._raw_stream(index))
    return y
