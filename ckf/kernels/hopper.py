"""The Hopper GEMM of the CUDA extension: y = x W^T + bias + H B^T as one product, and dx.

H itself can be made by the same launch (:class:`Shrink`): x is then read for both. The maths and
the layouts are those of triton_gemm.py and triton_shrink.py; csrc/hopper_gemm.h says how. On the
host it runs against a model of what the chip may do (csrc/hopper_host.h). No autograd: for use
inside ops. CKF_HOPPER_GEMM=0 leaves it out.
"""

import os
import struct
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from ckf.kernels import cuda, replay

CAPABILITY = (9, 0)  # WGMMA is of this one alone, not of what came after
ARCH = "sm_90a"
_MAX_SIZE = 1 << 30
_DTYPES = (torch.float16, torch.bfloat16)
MAX_SHRINK = 256  # rank columns that are made inside; up to 128 at half the cost
_TILE_ROWS, _TILE_COLUMNS = 256, 256  # of a pair of blocks
# With a mask the update comes before the base, so the first tiles wait for dS: pairs of tiles from
# which on that is less than a launch of its own. On an H100 512 pairs were ahead of all other
# plans (1.32 x the frozen linear, the next 1.41), 128 behind (1.76, the best 1.60).
FEWEST_MASKED_TILES = 256


@dataclass(frozen=True)
class Shrink:
    """H = gates * (x A^T) of :func:`gemm`, or dS of :func:`gemm_dx`, made by their launch.

    Ranks of the experts are multiples of eight, so that eight columns have one gate and
    neighbouring slots.

    Args:
        a: (R, k), R at most MAX_SHRINK and a multiple of eight.
        gates: (T, R) float32; ``task_ids``: (m,) int64.
        gated: (m, R), gets H or dS.
        slots, compact: (T, R) int32 and (m, C), or None both. Forward, ``compact`` gets H in
            compact form; for dx it holds what forward wrote.
        restored: for dx: (m, R), gets the H of the forward from ``compact``; or None.
    """

    a: Tensor
    gates: Tensor
    task_ids: Tensor
    gated: Tensor
    slots: Tensor | None = None
    compact: Tensor | None = None
    restored: Tensor | None = None


def available(device: torch.device | int | None = None) -> tuple[bool, str]:
    """Whether a device can run the kernel, and if not, why."""
    if os.environ.get("CKF_HOPPER_GEMM") == "0":
        return False, "CKF_HOPPER_GEMM=0"
    return _usable(device)


@lru_cache
def _usable(device: torch.device | int | None) -> tuple[bool, str]:
    """Asked once a device: a pass has many products, and torch takes its time to answer."""
    if isinstance(device, torch.device) and device.type != cuda._DEVICE_TYPE:
        return False, f"the input is on {device.type}"
    usable, reason = cuda.available(device)
    if not usable:
        return False, reason
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return False, f"compute capability {capability}; the Hopper GEMM needs {CAPABILITY}"
    archs = cuda.build_info()["archs"]
    if ARCH not in archs:
        return False, f"ckf._C was built for {', '.join(archs)}; rebuild with CKF_CUDA_ARCHS={ARCH}"
    return True, f"ckf._C for {ARCH}"


def waits_for_ds(m: int, n: int) -> bool:
    """Whether a masked dx (m, n) is too small to make its dS itself."""
    return -(-m // _TILE_ROWS) * -(-n // _TILE_COLUMNS) < FEWEST_MASKED_TILES


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


def why_not_shrink(x: Tensor, shrink: Shrink, dx: bool = False) -> str | None:
    """None where the kernel makes H of these; else the reason. ``x``: dy for dx."""
    matrices = {"A": shrink.a, "H": shrink.gated, "compact H": shrink.compact}
    matrices["restored H"] = shrink.restored
    for name, tensor in matrices.items():
        if tensor is None and name not in ("A", "H"):
            continue
        if (reason := _why_not_matrix(name, tensor, x)) is not None:
            return reason
    (m, k), (tasks, columns) = x.shape, shrink.gates.shape
    if columns > MAX_SHRINK or columns % 8:
        return f"{columns} rank columns; expected a multiple of eight, {MAX_SHRINK} at most"
    if (shrink.slots is None) != (shrink.compact is None):
        return "slots without compact H, or the other way round"
    if shrink.restored is not None and (not dx or shrink.compact is None):
        return "H is restored for dx, from its compact form"
    width = 0 if shrink.compact is None else shrink.compact.shape[1]
    expected = {"A": (columns, k), "H": (m, columns), "compact H": (m, width)}
    expected["restored H"] = (m, columns)
    for name, shape in expected.items():
        if matrices[name] is not None and matrices[name].shape != shape:
            return f"{name} has shape {tuple(matrices[name].shape)}; expected {shape}"
    tables = {"gates": (shrink.gates, torch.float32), "slots": (shrink.slots, torch.int32)}
    for name, (table, dtype) in tables.items():
        fits = table is None or _is_like(table, (tasks, columns), dtype, x)
        if not fits or (table is not None and table.stride(1) != 1):
            return f"{name} are {_words(table)}; expected {dtype} ({tasks}, {columns})"
    ids = shrink.task_ids
    if not (_is_like(ids, (m,), torch.int64, x) and ids.is_contiguous()):
        return f"task ids are {_words(ids)}; expected torch.int64 ({m},), contiguous"
    return None


def _is_like(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x: Tensor) -> bool:
    return tensor.shape == shape and tensor.dtype is dtype and tensor.device == x.device


def _words(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, strides {tensor.stride()}"


def gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    b: Tensor,
    shrink: Shrink | None = None,
    checked: bool = False,
) -> Tensor:
    """x W^T + bias + H B^T, summed in float32 and rounded once.

    Args:
        x: (m, k) float16 or bfloat16; ``weight``: (n, k); ``bias``: (n,) or None; ``h``: (m, R);
            ``b``: (R, n). Rows start at multiples of 16 bytes, elements of a row side by side.
        shrink: makes H first; ``h`` is its ``gated``, or columns of that.
        checked: the caller has asked :func:`why_not_gemm` and :func:`why_not_shrink`.

    Returns:
        (m, n), contiguous.

    Raises:
        ValueError: operands that the kernel cannot take (see :func:`why_not_gemm`).
        RuntimeError: CUDA refused the launch.
    """
    if not checked:
        _require(why_not_gemm(x, weight, h, b))
        _require(shrink and why_not_shrink(x, shrink))
    n = b.shape[1]
    if bias is not None:
        cuda._check_plain("bias", bias, x.dtype, x.device)
        if bias.shape != (n,) or not bias.is_contiguous() or bias.data_ptr() % 4:
            raise ValueError(
                f"bias has shape {tuple(bias.shape)} and strides {bias.stride()}; expected ({n},), "
                "contiguous, starting at a multiple of 4 bytes"
            )
    return _launch(x, weight, bias, h, b, None, shrink, dx=False)


def gemm_dx(
    dy: Tensor,
    weight: Tensor,
    ds: Tensor,
    a: Tensor,
    dropout: tuple[Tensor, int, float] | None = None,
    shrink: Shrink | None = None,
    onto: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """drop'(dS A) + dy W, summed in float32 and rounded once.

    Args:
        dy: (m, n); ``weight``: (n, k); ``ds``: (m, R); ``a``: (R, k); layouts as in :func:`gemm`.
        dropout: seed (one int64 on dy's device), threshold, scale; the mask of dS A.
        shrink: makes dS first, its ``a`` being B^T (R, n); ``ds`` is its ``gated``.
        onto: (m, k), of dy's dtype, rows at multiples of 16 bytes: the result is added to it.
        checked: as in :func:`gemm`; also that ``dropout`` and ``onto`` are of the calling op.

    Returns:
        (m, k), contiguous; or ``onto``.

    Raises:
        ValueError, RuntimeError: as :func:`gemm`.
    """
    if checked:
        return _launch(dy, weight, None, ds, a, dropout, shrink, dx=True, onto=onto)
    _require(why_not_gemm(dy, weight, ds, a, dx=True))
    _require(shrink and why_not_shrink(dy, shrink, dx=True))
    if dropout is not None:
        seed, threshold, _ = dropout
        cuda._check_plain("seed", seed, torch.int64, dy.device)
        if seed.numel() != 1 or not 0 <= threshold < 65536:
            raise ValueError(
                f"seed has {seed.numel()} elements, the threshold is {threshold}; expected one "
                "and 0 to 65535"
            )
    if onto is not None:
        _require(_why_not_matrix("dx", onto, dy))
        if onto.shape != (dy.shape[0], a.shape[1]):
            raise ValueError(
                f"onto has shape {tuple(onto.shape)}; expected {(dy.shape[0], a.shape[1])}"
            )
    return _launch(dy, weight, None, ds, a, dropout, shrink, dx=True, onto=onto)


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


def _step(tensor: Tensor | None) -> int:
    """Elements from row to row, as :func:`_pitch`; 0 for none."""
    return 0 if tensor is None else _pitch(tensor)


# CkfGemm of csrc/launchers.h: seven pointers, nine sizes, the mask, four flags; and
# CkfShrink: eight pointers, eight sizes.
_ARGUMENTS = struct.Struct("=7Q9qIf4i8Q8q")
_NO_SHRINK = (0,) * 16


def _shrink_arguments(shrink: Shrink | None, done: Tensor | None) -> tuple:
    if shrink is None:
        return _NO_SHRINK
    a, gated, compact, restored = shrink.a, shrink.gated, shrink.compact, shrink.restored
    gates, slots, (tasks, columns) = shrink.gates, shrink.slots, shrink.gates.shape
    return (
        *(a, gated, compact, restored, gates, slots, shrink.task_ids, done),
        columns,
        tasks,
        *map(_step, (a, gated, compact, restored)),
        gates.stride(0),
        0 if slots is None else slots.stride(0),
    )


def _launch(
    x, weight, bias, h, b, dropout, shrink: Shrink | None, dx: bool, onto: Tensor | None = None
) -> Tensor:
    extension, reason = cuda._load_extension()
    if extension is None:
        raise RuntimeError(f"hopper_gemm: {reason}")
    (m, k), (r, n) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device) if onto is None else onto
    done = None
    if shrink is not None:  # counts of warps, which the launch sets to 0
        size = 2 * -(-m // _TILE_ROWS)
        done = x.new_empty(size, dtype=torch.int32)
    seed, threshold, scale = dropout or (None, 0, 1.0)
    index = x.device.index or 0
    values = [
        *(x, weight, h, b, bias, seed, y),
        m,
        n,
        k,
        r,
        *map(_pitch, (x, weight, h, b, y)),
        threshold,
        scale,
        dx,
        cuda._DTYPES[x.dtype],
        index,
        onto is not None,
        *_shrink_arguments(shrink, done),
    ]
    values = [0 if value is None else value for value in values]
    send = partial(_send, extension, index)
    replay.note(send, values)
    send(*[value.data_ptr() if isinstance(value, Tensor) else value for value in values])
    return y


def _send(extension, index: int, *values) -> None:
    """Launch with addresses, on the current stream of a device."""
    arguments = _ARGUMENTS.pack(*values)
    if torch.cuda.current_device() == index:
        extension.hopper_gemm(arguments, cuda._raw_stream(index))
    else:
        with torch.cuda.device(index):
            extension.hopper_gemm(arguments, cuda._raw_stream(index))
