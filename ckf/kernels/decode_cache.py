"""What a group of linears keeps between decoding calls.

One new token a row is so little work that stacking the experts again would cost more than the
update itself.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ckf.kernels import cuda
from ckf.kernels.group import GroupShape

# What is made: tensors, lists of them, or objects whose ``kept()`` gives them (on a GPU).
Make = Callable[[GroupShape, Any, Any, Any, torch.dtype], Any]
MOST_WAYS = 256  # prompts bring a new m each


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

    Changes in place are seen by the tensors' version counters, replaced tensors by their addresses
    or ranks, steps of optimizers by a hook on all of them. A change through ``parameter.data``, or
    by a step replayed in a CUDA graph, shows in none: ``clear`` after one. A CUDA graph captured
    with what is kept replays the adapters of that moment.
    """

    def __init__(self) -> None:
        self._captured: list[Any] = []  # graphs hold their addresses
        self.clear()

    def clear(self) -> None:
        # by maker: key, what was made, where, and its inputs, so that no address of the key is
        # given out again; one tuple, as threads may replace it between two reads
        self._kept: dict[Make, tuple[tuple, Any, Made | None, list]] = {}
        self._ways: dict[tuple, Way] = {}

    def get(self, make: Make, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> Any:
        """``make(shape, gates, a, b, dtype)``, or what it made before of the same tensors."""
        _STEPS.watch()
        key = _key(gates, a, b, dtype)  # before anything is made: what changes meanwhile is seen
        made = self._again(make, key, gates[0])
        if made is not None:
            return made
        parts = [[t.detach() for t in tensors] for tensors in (gates, a, b)]  # no new .data seen
        made = make(shape, *parts, dtype)
        if key is None or capturing(gates[0]):
            return made  # its inputs count no versions; or only replays of the graph compute it
        where = Made.here(gates[0]) if gates[0].is_cuda else None
        self._ways = {}  # of experts with other ranks, perhaps
        self._kept[make] = (key, made, where, parts)
        return made

    def _again(self, make: Make, key: tuple | None, tensor: Tensor) -> Any | None:
        """What was made at this key; ``tensor``: one of its inputs."""
        kept = self._kept.get(make)
        if kept is None or kept[0] != key:
            return None
        _, made, where, _ = kept
        if capturing(tensor):
            if not any(made is other for other in self._captured):
                self._captured.append(made)
        elif where is not None:
            where.wait(made)
        return made

    def remember(self, call: tuple, way: "Way") -> None:
        """That calls of this kind go this way, as long as what it made is kept."""
        if way.make not in self._kept:
            return
        if len(self._ways) >= MOST_WAYS:
            self._ways = {}
        self._ways[call] = way

    def way(self, call: tuple, gates, a, b, dtype: torch.dtype) -> "tuple[Way, Any] | None":
        """The way of an earlier call, and what it made of the same tensors; None: ask anew."""
        way = self._ways.get(call)
        if way is None or (not way.in_graphs and capturing(gates[0])):
            return None
        made = self._again(way.make, _key(gates, a, b, dtype), gates[0])
        return None if made is None else (way, made)


class Way(NamedTuple):
    """How a backend computes calls of one kind.

    run: takes what ``make`` makes, x, weights, biases and ids; gives the outputs. in_graphs:
    whether a CUDA graph may read what is kept; else it makes its own.
    """

    backend: str
    make: Make
    run: Callable[..., list[Tensor]]
    in_graphs: bool = True


_version = attrgetter("_version")


def _key(gates, a, b, dtype: torch.dtype) -> tuple | None:
    """Equal for the same tensors, unchanged, of the same ranks; None where that cannot be told."""
    tensors = (*gates, *a, *b)
    try:
        versions = tuple(map(_version, tensors))
    except RuntimeError:
        if any(t.is_inference() for t in tensors):  # they count no versions
            return None
        raise
    sizes = tuple(map(Tensor.numel, a))  # a part of the same memory is of another rank
    return dtype, _STEPS.count, versions, sizes, tuple(map(Tensor.data_ptr, tensors))
