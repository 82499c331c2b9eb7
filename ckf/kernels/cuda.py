"""The bridge to the CUDA extension ``ckf._C``: what raw pointers cannot check is checked here.

Importing this module needs neither a GPU nor the extension, and asks the hardware nothing.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

MAX_ROWS = 256  # the kernel recomputes the shrink in every block: past this, matrix products win
MAX_RANK = 16384
_MAX_SIZE = 1 << 30
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # CkfDtype in csrc/launchers.h


def available() -> tuple[bool, str]:
    """Whether the CUDA kernels can run on the current device, and if not, why."""
    extension, reason = _load_extension()
    if extension is None:
        return False, reason
    if torch.version.hip is not None:
        return False, "torch is built for ROCm; the kernels are CUDA code"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    archs = extension.build_info()["archs"]
    if not _covers(archs, capability):
        name = f"sm_{capability[0]}{capability[1]}"
        return False, (
            f"ckf._C was built for {', '.join(archs)}, the device is {name}; "
            f"rebuild with CKF_CUDA_ARCHS={name}"
        )
    return True, f"ckf._C for {', '.join(archs)}"


def build_info() -> dict:
    """What the extension was built from: archs, nvcc, host compiler, hash of the sources.

    Without an extension: ``{"built": False, "reason": ...}``.
    """
    extension, reason = _load_extension()
    if extension is None:
        return {"built": False, "reason": reason}
    return {"built": True, **extension.build_info()}


def multi_lora_decode(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, column_gates: Tensor, task_ids: Tensor
) -> None:
    """Add the gated low-rank update to y in place, for few rows, in one launch.

    ``y[i] += sum_c column_gates[task_ids[i], c] * (a[c] . x[i]) * b[c]``, summed in float32 and
    rounded once. Columns with gate 0 are left out by selection. Same inputs, same bits.

    Args:
        y: (m, n) float32, float16 or bfloat16, m at most 256; rows may be strided.
        x: (m, k) of y's dtype; rows may be strided.
        a: (R, k) contiguous, of y's dtype, the A of all experts one below the other.
        b: (R, n) contiguous, of y's dtype, the transposed B of all experts likewise.
        column_gates: (T, R) float32 contiguous, the gate of the expert that owns column c.
        task_ids: (m,) int64 contiguous. -1 leaves the row as it is; any other id outside [0, T)
            makes it NaN.

    Raises:
        ValueError: tensors that do not fit (nothing is launched).
        RuntimeError: no extension, or CUDA refused the launch.
    """
    named = {"y": y, "x": x, "a": a, "b": b, "column_gates": column_gates, "task_ids": task_ids}
    _check_kinds(named)
    m, n, k, rank, tasks = _check_sizes(named)
    _check_layout(named)
    extension, reason = _load_extension()
    if extension is None:
        raise RuntimeError(f"multi_lora_decode: {reason}")
    if m == 0 or n == 0:
        return
    with torch.cuda.device(y.device):
        extension.multi_lora_decode(
            y=y.data_ptr(),
            x=x.data_ptr(),
            a=a.data_ptr(),
            b=b.data_ptr(),
            gates=column_gates.data_ptr(),
            task_ids=task_ids.data_ptr(),
            m=m,
            k=k,
            n=n,
            rank=rank,
            tasks=tasks,
            y_stride=y.stride(0),
            x_stride=x.stride(0),
            dtype=_DTYPES[y.dtype],
            device=y.device.index,
            stream=torch.cuda.current_stream(y.device).cuda_stream,
        )
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("ckf._C"), ""
    except ModuleNotFoundError:
        return None, (
            "the extension ckf._C is not built for this Python; with nvcc on PATH run "
            "CKF_BUILD_CUDA=1 pip install -e . (or python setup.py build_ext --inplace)"
        )
    except ImportError as error:
        return None, f"the extension ckf._C does not load ({error}); build it again"


def _covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """A cubin runs on its major version from its minor up (an 'a' one on its own device alone);
    PTX ('compute_') runs on everything newer."""
    for arch in archs:
        kind, _, number = arch.partition("_")
        major, minor = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
        if number.endswith("a"):
            fits = capability == (major, minor)
        elif kind == "compute":
            fits = capability >= (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits:
            return True
    return False


def _check_kinds(named: dict[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; expected a torch.Tensor")
    y = named["y"]
    for name, tensor in named.items():
        if tensor.device.type != "cuda" or tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a {tensor.layout} tensor on {tensor.device}; expected a strided CUDA "
                "tensor; move it, or use the 'torch' backend"
            )
        if tensor.device != y.device:
            raise ValueError(
                f"{name} is on {tensor.device}, y on {y.device}; move all to one device"
            )
    if y.dtype not in _DTYPES:
        raise ValueError(f"y is {y.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    wanted = {"x": y.dtype, "a": y.dtype, "b": y.dtype}
    wanted |= {"column_gates": torch.float32, "task_ids": torch.int64}
    for name, dtype in wanted.items():
        if named[name].dtype != dtype:
            raise ValueError(f"{name} is {named[name].dtype}; expected {dtype}; convert it")


def _check_sizes(named: dict[str, Tensor]) -> tuple[int, int, int, int, int]:
    """m, n, k, R, T."""
    for name, tensor in named.items():
        dims = 1 if name == "task_ids" else 2
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {dims} dimensions")
    m, n = named["y"].shape
    k = named["x"].shape[1]
    rank = named["a"].shape[0]
    tasks = named["column_gates"].shape[0]
    wanted = {"x": (m, k), "a": (rank, k), "b": (rank, n)}
    wanted |= {"column_gates": (tasks, rank), "task_ids": (m,)}
    for name, shape in wanted.items():
        if tuple(named[name].shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(named[name].shape)}; expected {shape} "
                f"(m={m}, n={n} from y, k={k} from x, R={rank} from a)"
            )
    if m > MAX_ROWS:
        raise ValueError(f"m is {m}; expected at most {MAX_ROWS} rows; use the 'torch' backend")
    if rank > MAX_RANK or max(k, n, tasks) > _MAX_SIZE:
        raise ValueError(
            f"R={rank}, k={k}, n={n}, T={tasks}; expected R at most {MAX_RANK} and the others at "
            f"most {_MAX_SIZE}; use the 'torch' backend"
        )
    return m, n, k, rank, tasks


def _check_layout(named: dict[str, Tensor]) -> None:
    for name in ("a", "b", "column_gates", "task_ids"):
        if not named[name].is_contiguous():
            raise ValueError(
                f"{name} has strides {named[name].stride()}; expected a contiguous tensor; "
                "call .contiguous()"
            )
    for name in ("y", "x"):
        tensor = named[name]
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; expected its last dimension contiguous; "
                "call .contiguous()"
            )
    y = named["y"]
    if y.shape[0] > 1 and y.stride(0) < y.shape[1]:
        raise ValueError(
            f"y has strides {y.stride()} for shape {tuple(y.shape)}: its rows overlap; expected a "
            "tensor that can be written; call .contiguous()"
        )
