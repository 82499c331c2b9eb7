"""What a group of linears keeps between decoding calls.

One new token a row is so little work that stacking the experts again would cost more than the
update itself.
"""

from collections.abc import Callable
from typing import Any

import torch

from ckf.kernels.group import GroupShape

Make = Callable[[GroupShape, Any, Any, Any, torch.dtype], Any]


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
        self._key: tuple | None = None
        self._inputs: tuple = ()  # so that no address of the key is given out again
        self._made: Any = None

    def get(self, make: Make, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> Any:
        """``make(shape, gates, a, b, dtype)``, or what it made before of the same tensors."""
        tensors = (*gates, *a, *b)
        if any(t.is_inference() for t in tensors):  # they count no versions
            return make(shape, gates, a, b, dtype)
        key = (make, dtype, *((t.data_ptr(), t._version) for t in tensors))
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if key != self._key:
            made = make(shape, gates, a, b, dtype)
            if capturing:  # only replays of the graph compute these
                return made
            self._made, self._key = made, key
            self._inputs = tuple(t.detach() for t in tensors)
        elif capturing and not any(kept is self._made for kept in self._captured):
            self._captured.append(self._made)
        return self._made
