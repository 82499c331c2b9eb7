"""What a group of linears keeps between decoding calls.

One new token a row is so little work that stacking the experts again would cost more than the
update itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ckf.kernels.group import GroupShape

Make = Callable[[GroupShape, Any, Any, Any, torch.dtype], Any]


@dataclass(frozen=True)
class _Made:
    """A place in the work of a CUDA stream, which other streams have to wait for."""

    stream: int
    event: torch.cuda.Event

    @classmethod
    def here(cls) -> "_Made":
        stream = torch.cuda.current_stream()
        return cls(stream.cuda_stream, stream.record_event())

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        if stream.cuda_stream != self.stream:
            stream.wait_event(self.event)


class DecodeCache:
    """What one backend made of the experts of a group, made anew where an adapter or gate changed.

    Changes in place are seen by the tensors' version counters, replaced tensors by their addresses.
    A change through ``parameter.data`` shows in neither: ``clear`` after one. A CUDA graph captured
    with what is kept replays the adapters of that moment.
    """

    def __init__(self) -> None:
        self._captured: list[Any] = []  # graphs hold their addresses
        self.clear()

    def clear(self) -> None:
        # by maker: key, what was made, where, and its inputs, so that no address of the key is
        # given out again; one tuple, as threads may replace it between two reads
        self._kept: dict[Make, tuple[tuple, Any, _Made | None, tuple]] = {}

    def get(self, make: Make, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> Any:
        """``make(shape, gates, a, b, dtype)``, or what it made before of the same tensors."""
        tensors = (*gates, *a, *b)
        if any(t.is_inference() for t in tensors):  # they count no versions
            return make(shape, gates, a, b, dtype)
        key = (dtype, *((t.data_ptr(), t._version, t.shape) for t in tensors))
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        kept = self._kept.get(make)
        if kept is None or kept[0] != key:
            made = make(shape, gates, a, b, dtype)
            if not capturing:  # else only replays of the graph compute it
                where = _Made.here() if tensors[0].is_cuda else None
                self._kept[make] = (key, made, where, tuple(t.detach() for t in tensors))
            return made
        if kept[2] is not None and not capturing:
            kept[2].wait()
        if capturing and not any(made is kept[1] for made in self._captured):
            self._captured.append(kept[1])
        return kept[1]
