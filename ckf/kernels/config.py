"""Which backend computes a call, and why: readable rules, no run-time tuning."""

import importlib.util
import os
from dataclasses import dataclass

import torch

from ckf.kernels import cuda

BACKENDS = ("auto", "torch", "triton", "cuda")


@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words."""

    backend: str
    why: str
    plan: str = "expand"


def usable_backends() -> dict[str, tuple[bool, str]]:
    """For each backend: whether it can run here, and the reason if not."""
    return {
        "torch": (True, "dense-gated matrix products, any device"),
        "triton": _triton_usable(),
        "cuda": cuda.available(),
    }


def choose_backend(
    backend: str, m: int, x: torch.Tensor, needs_grad: bool, rank: int = 1
) -> Choice:
    """The backend for m rows of x (..., k) and ``rank`` stacked columns of all experts (R).

    Raises:
        ValueError: an unknown backend, or one that cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "auto":  # the GPU kernels are chosen by name until a record on a GPU speaks
        return Choice("torch", "no other backend was measured on this kind of device yet")
    refusal = None
    if backend == "triton":
        refusal = _why_not_triton(x)
    elif backend == "cuda":
        refusal = _why_not_cuda(m, x, needs_grad, rank)
    if refusal is not None:
        raise ValueError(f"backend={backend!r} cannot compute this call: {refusal}")
    return Choice(backend, "asked for")


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_usable() -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed; pip install triton, or use 'torch' or 'auto'"
    if _interpreting():
        return True, "Triton's interpreter (TRITON_INTERPRET=1), for tests: slow"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device; use 'torch' or 'auto'"
    return True, "forward and backward; 'auto' does not choose it yet: no measurement"


def _why_not_triton(x: torch.Tensor) -> str | None:
    usable, why = _triton_usable()
    if not usable:
        return why
    if x.device.type != ("cpu" if _interpreting() else "cuda"):
        return f"the input is on {x.device.type}; the Triton kernels need a GPU tensor"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}; the Triton kernels take float32, float16 and bfloat16"
    return None


def _why_not_cuda(m: int, x: torch.Tensor, needs_grad: bool, rank: int) -> str | None:
    if x.device.type != "cuda":
        return f"the input is on {x.device.type}; the CUDA kernel needs a GPU tensor"
    if needs_grad:
        return "gradients are needed; the CUDA kernel is forward only"
    if m > cuda.MAX_ROWS:
        return f"{m} rows; the CUDA kernel is for {cuda.MAX_ROWS} or fewer"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}; the CUDA kernel takes float32, float16 and bfloat16"
    if rank > cuda.MAX_RANK:
        return f"{rank} rank columns; the CUDA kernel takes {cuda.MAX_RANK} at most"
    usable, why = cuda.available()
    return None if usable else why
