"""Bytes: kept for backward, and at the peak of a call."""

import contextlib
import ctypes
import ctypes.util
import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that ``call`` keeps for its backward, each storage once, parameters not counted."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()  # held until the count is done: a freed address could be met again
    del result
    return sum(kept.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes above what was allocated before, at the worst moment of ``call``.

    On a CPU from the kernel's high-water mark of resident memory (Linux); None where it cannot be
    set back.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    library = ctypes.util.find_library("c")
    if library is not None and hasattr(ctypes.CDLL(library), "malloc_trim"):
        ctypes.CDLL(library).malloc_trim(0)  # memory freed before is given back, not used again
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(s for s in lines if s.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def free(device: torch.device) -> None:
    """Cached memory of what is gone."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # of a broken context every later call says so
            torch.cuda.empty_cache()


def forget(device: torch.device) -> None:
    """Before the next case: graphs, compiled code and cached memory of this one."""
    torch._dynamo.reset()
    free(device)
