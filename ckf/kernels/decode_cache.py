"""What a group of linears keeps between decoding calls.

One new token a row is so little work that stacking the experts again would cost more than the
update itself.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ckf.kernels import cuda
from ckf.kernels.group import GroupShape

# What is made: tensors, lists of them, or objects whose ``kept()`` gives them (on a GPU).
Make = Callable[[GroupShape, Any, Any, Any, torch.dtype], Any]


class _Steps:
    """Counts the steps of every optimizer in the process: fused ones change parameters in place
    without their version counters showing it."""

    def __init__(self) -> None:
        self.count, self._watched, self._lock = 0, False, threading.Lock()

    def watch(self) -> None:
        with self._lock:
            if not self._watched:
                register_optimizer_step_post_hook(self._stepped)
                self._watched = True

    def _stepped(self, *_) -> None:
        self.count += 1


_STEPS = _Steps()


@dataclass(frozen=True)
class Made:
    """A place in the work of a CUDA stream, which other streams of its GPU have to wait for.

    Its GPU is that of the tensors: it need not be the process' current one.
    """

    device: int
    stream: int
    event: torch.cuda.Event

    @classmethod
    def here(cls, tensor: Tensor) -> "Made":
        """On the stream that works on the tensor now."""
        device = tensor.get_device()
        stream = torch.cuda.current_stream(device)
        return cls(device, stream.cuda_stream, stream.record_event())

    def wait(self, made: Any) -> None:
        """Before the current stream reads what was made; its memory is not given out again before
        that stream is done with it."""
        if cuda._raw_stream(self.device) != self.stream:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.event)
            for tensor in _tensors(made):
                tensor.record_stream(stream)


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, list | tuple):
        for part in made:
            yield from _tensors(part)
    else:
        yield from _tensors(made.kept())


def capturing(tensor: Tensor) -> bool:
    """Whether what is done with the tensor now is kept in a CUDA graph."""
    if not tensor.is_cuda:
        return False
    device = tensor.get_device()
    if torch.cuda.current_device() == device:  # a guard takes longer than the question
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class DecodeCache:
    """What one backend made of the experts of a group, made anew where an adapter or gate changed.

    Changes in place are seen by the tensors' version counters, replaced tensors by their addresses,
    steps of optimizers by a hook on all of them. A change through ``parameter.data``, or by a step
    replayed in a CUDA graph, shows in none: ``clear`` after one. A CUDA graph captured with what is
    kept replays the adapters of that moment.
    """

    def __init__(self) -> None:
        self._captured: list[Any] = []  # graphs hold their addresses
        self.clear()

    def clear(self) -> None:
        # by maker: key, what was made, where, and its inputs, so that no address of the key is
        # given out again; one tuple, as threads may replace it between two reads
        self._kept: dict[Make, tuple[tuple, Any, Made | None, tuple]] = {}

    def get(self, make: Make, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> Any:
        """``make(shape, gates, a, b, dtype)``, or what it made before of the same tensors."""
        tensors = (*gates, *a, *b)
        try:
            key = (dtype, _STEPS.count, *[(t.data_ptr(), t._version, t.shape) for t in tensors])
        except RuntimeError:
            if any(t.is_inference() for t in tensors):  # they count no versions
                return make(shape, gates, a, b, dtype)
            raise
        in_graph = capturing(tensors[0])
        kept = self._kept.get(make)
        if kept is None or kept[0] != key:
            made = make(shape, gates, a, b, dtype)
            if not in_graph:  # else only replays of the graph compute it
                _STEPS.watch()
                where = Made.here(tensors[0]) if tensors[0].is_cuda else None
                self._kept[make] = (key, made, where, tuple(t.detach() for t in tensors))
            return made
        if kept[2] is not None and not in_graph:
            kept[2].wait(kept[1])
        if in_graph and not any(made is kept[1] for made in self._captured):
            self._captured.append(kept[1])
        return kept[1]
