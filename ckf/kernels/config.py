"""Which backend computes a call, and why: measured tables per GPU, no run-time tuning."""

import importlib.util
import os
import sys
from functools import lru_cache

import torch

from ckf.kernels import cpu, cuda
from ckf.kernels.dispatch import Call, Choice, load_table, measured_choice
from ckf.kernels.launch import CUDA_PLANS, PLANS

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
_ASKED = {name: (name, "") for name in BACKENDS}
_PLANS = {"triton": PLANS, "cuda": CUDA_PLANS}
_ASKED |= {f"{name}:{plan}": (name, plan) for name, plans in _PLANS.items() for plan in plans}
_GPU = "cuda"
_BY_CPU_KERNELS = Choice("cpu", "each row with its own experts alone")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def usable_backends() -> dict[str, tuple[bool, str]]:
    """For each backend: whether it can run here, and the reason if not."""
    return {
        "torch": (True, "dense-gated matrix products, any device"),
        "cpu": cpu.available(),
        "triton": _triton_usable(),
        "cuda": cuda.available(),
    }


def explain_auto() -> str:
    """What "auto" goes by on this machine, in words."""
    if not torch.cuda.is_available():
        usable, why = cpu.available()
        what = "cpu, and torch for learned gates and dtypes other than float32"
        return f"{what}: there is no GPU" if usable else f"torch: there is no GPU, and {why}"
    device = torch.cuda.get_device_name()
    table = load_table(device)
    if table is None:
        return f"torch: nothing was measured on {device} yet; ckf tune does"
    return (
        f"the fastest at the nearest of {len(table['rows'])} shapes measured on {table['gpu']} "
        f"({table['record']['commit']}, torch {table['record'].get('torch', '?')}); "
        "each choice is logged once (logger ckf.kernels, level INFO)"
    )


def check_backend(backend: str) -> None:
    """ValueError for a backend that is unknown or cannot run on this machine."""
    name, _ = _split(backend)
    usable, why = usable_backends().get(name, (True, ""))
    if not usable:
        raise ValueError(f"backend={backend!r} cannot run here: {why}")


def choose_backend(backend: str, x: torch.Tensor, call: Call) -> Choice:
    """The backend for a call on x (..., k).

    Args:
        backend: one of BACKENDS; "triton:PLAN" and "cuda:PLAN" ask for one of ``PLANS`` or of
            ``CUDA_PLANS`` as well.

    Raises:
        ValueError: an unknown backend, or one that cannot run this call.
    """
    name, plan = _split(backend)
    if name == "auto":
        return _automatic(x, call)
    refusal = _refusal(name, plan, x, call)
    if refusal is not None:
        raise ValueError(f"backend={backend!r} cannot compute this call: {refusal}")
    return Choice(name, "asked for", plan or _PLANS.get(name, PLANS)[0])


def _split(backend: str) -> tuple[str, str]:
    """The name and the plan asked for, if any."""
    if not isinstance(backend, str) or backend not in _ASKED:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(_ASKED)}")
    return _ASKED[backend]


def _automatic(x: torch.Tensor, call: Call) -> Choice:
    if x.device.type != _GPU:
        why = _why_not_cpu(x, call)
        return _BY_CPU_KERNELS if why is None else Choice("torch", why)
    if torch.compiler.is_compiling():
        call = _bucketed(call)
    return Choice(*_measured(x.device.index, x.dtype, *call))


@torch.compiler.assume_constant_result  # neither device names nor tables can be traced
def _measured(index: int, dtype: torch.dtype, *call) -> tuple[str, str, str]:
    """The fields of the choice for a call on a GPU."""
    return _measured_once(index, dtype, Call(*call))


def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache(maxsize=4096)
def _measured_once(index: int, dtype: torch.dtype, call: Call) -> tuple[str, str, str]:
    usable, floats = ["torch"], dtype in _FLOATS
    if floats and _triton_usable()[0]:
        usable.append("triton")
    if floats and _outside_cuda(call) is None and _cuda_usable(index)[0]:
        usable.append("cuda")
        if _outside_linear(dtype, call) is None:
            usable.append("cuda:linear")
    return tuple(measured_choice(_device_name(index), call, tuple(usable)))


tables_read = 0  # counts the changes of tables, for whoever remembers a choice


def forget_choices() -> None:
    """After a table has changed."""
    global tables_read
    tables_read += 1
    _measured_once.cache_clear()


def _bucketed(call: Call) -> Call:
    """With m rounded up to a power of four: a traced m would make a graph for every length."""
    bucket = 1
    while bucket < 4**12 and call.m > bucket:
        bucket *= 4
    return Call(bucket, *call[1:])


def _refusal(backend: str, plan: str, x: torch.Tensor, call: Call) -> str | None:
    if backend == "cpu":
        return _why_not_cpu(x, call)
    if backend == "triton":
        return _why_not_triton(x)
    if backend != "cuda":
        return None
    why = _why_not_cuda(x, call)
    owns_base = plan not in ("", CUDA_PLANS[0])
    return _outside_linear(x.dtype, call) if why is None and owns_base else why


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _cpu_usable() -> tuple[bool, str]:
    return cpu.available()


@torch.compiler.assume_constant_result
def _cuda_usable(index: int | None) -> tuple[bool, str]:
    return cuda.available(index)


@torch.compiler.assume_constant_result
def _triton_usable() -> tuple[bool, str]:
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; pip install triton, or use 'torch' or 'auto'"
    if _interpreting():
        return True, "Triton's interpreter (TRITON_INTERPRET=1), for tests: slow"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device; use 'torch' or 'auto'"
    return True, "forward and backward"


def _why_not_cpu(x: torch.Tensor, call: Call) -> str | None:
    if x.device.type != "cpu":
        return f"the input is on {x.device.type}; the CPU kernels need a CPU tensor"
    if x.dtype is not cpu.DTYPE:
        return f"dtype {x.dtype}; the CPU kernels take float32"
    if call.learned:
        return "gates need a gradient; the CPU kernels take constant ones"
    usable, why = _cpu_usable()
    return None if usable else why


def _why_not_triton(x: torch.Tensor) -> str | None:
    usable, why = _triton_usable()
    if not usable:
        return why
    if x.device.type != ("cpu" if _interpreting() else "cuda"):
        return f"the input is on {x.device.type}; the Triton kernels need a GPU tensor"
    if x.dtype not in _FLOATS:
        return f"dtype {x.dtype}; the Triton kernels take float32, float16 and bfloat16"
    return None


def _why_not_cuda(x: torch.Tensor, call: Call) -> str | None:
    if x.device.type != "cuda":
        return f"the input is on {x.device.type}; the CUDA kernel needs a GPU tensor"
    outside = _outside_cuda(call)
    if outside is not None:
        return outside
    if x.dtype not in _FLOATS:
        return f"dtype {x.dtype}; the CUDA kernel takes float32, float16 and bfloat16"
    usable, why = _cuda_usable(x.device.index)
    return None if usable else why


def _outside_linear(dtype: torch.dtype, call: Call) -> str | None:
    """Why csrc's kernels that own the base are not for a call of these sizes."""
    if dtype.itemsize != 2:
        return f"dtype {dtype}; this plan takes float16 and bfloat16"
    most = cuda.most_linear_rank(call.m)
    if most == 0:
        return f"{call.m} rows; this plan is for {cuda.MAX_LINEAR_ROWS} or fewer"
    if call.linear_rank > most:
        return f"{call.linear_rank} rank columns of a linear; this plan takes {most}"
    return f"k is {call.k}; this plan takes multiples of 8" if call.k % 8 else None


def _outside_cuda(call: Call) -> str | None:
    """Why the CUDA kernel is not for a call of these sizes."""
    if call.train or call.dropout:
        return "gradients are needed; the CUDA kernel is forward only"
    if call.m > cuda.MAX_ROWS:
        return f"{call.m} rows; the CUDA kernel is for {cuda.MAX_ROWS} or fewer"
    if call.rank > cuda.MAX_RANK:
        return f"{call.rank} rank columns; the CUDA kernel takes {cuda.MAX_RANK} at most"
    return None
