"""Which backend computes a call, and why: readable rules, no run-time tuning."""

from dataclasses import dataclass

import torch

from ckf.kernels import cuda

BACKENDS = ("auto", "torch", "triton", "cuda")

@dataclass(frozen=True)
class Choice:
    """A backend and the reason for it, in words."""

    backend: str
    why: str


def usable_backends() -> dict[str, tuple[bool, str]]:
    """For each backend: whether it can run here, and the reason if not."""
    return {
        "torch": (True, "dense-gated matrix products, any device"),
        "triton": (False, "this version has no Triton kernels yet; use 'torch' or 'auto'"),
        "cuda": cuda.available(),
    }


def choose_backend(backend: str, x: torch.Tensor, needs_grad: bool, rank: int = 1) -> Choice:
    """The backend for rows x (m, k) and ``rank`` stacked columns of all experts (R).

    Raises:
        ValueError: an unknown backend, or one that cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == "torch":
        return Choice("torch", "asked for")
    refusal = _why_not_cuda(x, needs_grad, rank)
    if backend == "cuda" and refusal is None:
        return Choice("cuda", "asked for")
    if backend == "auto":
        if refusal is None:
            return Choice("cuda", f"{x.shape[0]} rows without gradients: one launch")
        return Choice("torch", refusal)
    why = refusal if backend == "cuda" else usable_backends()["triton"][1]
    raise ValueError(f"backend={backend!r} cannot compute this call: {why}")


def _why_not_cuda(x: torch.Tensor, needs_grad: bool, rank: int) -> str | None:
    if x.device.type != "cuda":
        return f"the input is on {x.device.type}; the CUDA kernel needs a GPU tensor"
    if needs_grad:
        return "gradients are needed; the CUDA kernel is forward only"
    if x.shape[0] > cuda.MAX_ROWS:
        return f"{x.shape[0]} rows; the CUDA kernel is for {cuda.MAX_ROWS} or fewer"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype {x.dtype}; the CUDA kernel takes float32, float16 and bfloat16"
    if rank > cuda.MAX_RANK:
        return f"{rank} rank columns; the CUDA kernel takes {cuda.MAX_RANK} at most"
    usable, why = cuda.available()
    return None if usable else why
