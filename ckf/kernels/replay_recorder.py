"""How a pass is written down (``replay.py``): torch's dispatcher and the launchers are listened to.

Every address is kept as a place in an input or in an allocation, by the views that led there, so
that two inputs in one storage, or the same tensor given twice, stay apart.
"""

import weakref
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from ckf.kernels.replay import Place, Recording, Step

_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}
_CONSTANTS = (int, float, str, tuple, type(None))  # bool is an int
_ARENA_ALIGNMENT = 512  # bytes, as torch's allocator on a GPU


class _Allocation(NamedTuple):
    buffer: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        if 0 in self.size:
            return 0
        last = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    def step(self) -> Step:
        buffer, size, stride, dtype, device = self

        def step(buffers, addresses) -> None:
            buffers[buffer] = made = torch.empty_strided(size, stride, dtype=dtype, device=device)
            addresses[buffer] = made.data_ptr()

        return step


class _Address(NamedTuple):
    """As much of a tensor as a descriptor of one is launched by."""

    address: int

    def data_ptr(self) -> int:
        return self.address


class _Launch(NamedTuple):
    """``pointers``: argument, buffer, bytes on. ``tuples``: argument, and those of its tensors.
    ``descriptors``: argument, one without its base, and that of its base."""

    send: Callable[..., None]
    constants: list
    pointers: list[tuple[int, int, int]]
    tuples: list[tuple[int, list[tuple[int, int]]]]
    descriptors: list[tuple]

    def step(self) -> Step:
        send, constants, pointers, tuples, descriptors = self

        def step(buffers, addresses) -> None:
            values = constants.copy()
            for at, descriptor, buffer, offset in descriptors:
                values[at] = own = copy(descriptor)
                own.base = _Address(addresses[buffer] + offset)
            for at, buffer, offset in pointers:
                values[at] = addresses[buffer] + offset
            for at, parts in tuples:
                values[at] = tuple([addresses[buffer] + offset for buffer, offset in parts])
            send(*values)

        return step


class _Op(NamedTuple):
    """``results``: the buffer of each, -1 for a tensor that is there already."""

    function: Callable
    args: tuple
    kwargs: dict
    results: tuple[int, ...]

    def step(self) -> Step:
        function, args, kwargs, results = self

        def step(buffers, addresses) -> None:
            given = [_filled(arg, buffers) for arg in args]
            named = {name: _filled(arg, buffers) for name, arg in kwargs.items()}
            made = function(*given, **named)
            made = [made] if isinstance(made, Tensor) else made
            for buffer, one in zip(results, made, strict=True):
                if buffer >= 0:
                    buffers[buffer] = one
                    addresses[buffer] = one.data_ptr()

        return step


def _filled(argument, buffers: list[Tensor]):
    """An op's argument with tensors for places, also in lists."""
    if type(argument) is list:
        return [_filled(one, buffers) for one in argument]
    return argument.of(buffers) if type(argument) is Place else argument


class Recorder(TorchDispatchMode):
    """Writes down what happens inside it; ``failed`` says why that cannot be repeated."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.failed: str | None = None
        self._nothing = len(inputs)  # a buffer at address 0, as that of an empty tensor is
        # by id, with the tensor whose id it was: what the pass lets go is not held here
        self._places: dict[int, tuple[weakref.ref, Place]] = {}
        self._origins: list[int] = []  # storage offset of every buffer
        self._notes: list[tuple[_Allocation | _Launch | _Op, set[int]]] = []  # and buffers in use
        for tensor in [*inputs, None]:
            self._add_buffer(tensor)

    def fail(self, why: str) -> None:
        self.failed = self.failed or why

    def recording(self, outputs: Sequence[Tensor]) -> Recording | None:
        """What was written down; None where that is not all."""
        places = [self._place(tensor) for tensor in outputs]
        if any(place is not None and place.buffer < self._nothing for place in places):
            self.fail("an output in the memory of an input")
        if self.failed is not None:
            return None
        last = {buffer: at for at, (_, used) in enumerate(self._notes) for buffer in used}
        whole = {place.buffer for place in places}  # buffers that must be tensors
        for what, used in self._notes:
            if isinstance(what, _Op):
                whole |= used
        arena, size = self._arena(whole, last)
        own = whole - {place.buffer for place in places} - set(range(self._nothing + 1))
        last_of_arena = max([last[buffer] for buffer, _ in arena], default=None)
        steps = []
        for at, (what, used) in enumerate(self._notes):
            if isinstance(what, _Allocation) and what.buffer not in whole:
                continue
            done = [buffer for buffer in used & own if last[buffer] == at]
            if at == last_of_arena:
                done.append(len(self._origins))
            steps.append((what.step(), tuple(done)))
        return Recording(steps, places, len(self._origins), arena, size)

    def _arena(self, whole: set[int], last: dict[int, int]) -> tuple[list[tuple[int, int]], int]:
        """Places of the other allocations in one; those in use at one time lie apart."""
        placed: list[tuple[int, int, int]] = []  # start, stop, last use; by start
        arena, size = [], 0
        for at, (what, _) in enumerate(self._notes):
            if not isinstance(what, _Allocation) or what.buffer in whole:
                continue
            need = -(-what.bytes // _ARENA_ALIGNMENT) * _ARENA_ALIGNMENT
            start = 0
            for begin, stop, until in sorted(placed):
                if until >= at and begin < start + need:
                    start = max(start, stop)
            placed.append((start, start + need, last[what.buffer]))
            arena.append((what.buffer, start))
            size = max(size, start + need)
        return arena, size

    def launch(self, send: Callable[..., None], values: Sequence) -> None:
        """Of :func:`replay.note`."""
        used: set[int] = set()

        def pointer(tensor: Tensor) -> tuple[int, int]:
            place = self._place(tensor)
            if place is None or 0 in place.size:
                return self._nothing, 0
            used.add(place.buffer)
            return place.buffer, place.offset * place.itemsize

        constants, pointers, tuples, descriptors = list(values), [], [], []
        for at, value in enumerate(values):
            if isinstance(value, Tensor):
                pointers.append((at, *pointer(value)))
                constants[at] = 0
            elif isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value):
                tuples.append((at, [pointer(one) for one in value]))
                constants[at] = ()
            elif isinstance(getattr(value, "base", None), Tensor):
                constants[at] = empty = copy(value)
                empty.base = None  # else its memory would live on
                descriptors.append((at, empty, *pointer(value.base)))
            elif not isinstance(value, _CONSTANTS):
                self.fail(f"a launch takes a {type(value).__name__}")
        self._notes.append((_Launch(send, constants, pointers, tuples, descriptors), used))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.failed is None:
            self._op(func, args, kwargs, out)
        return out

    def _op(self, func, args, kwargs, out) -> None:
        made = list(out) if isinstance(out, list | tuple) else [out]
        if not all(isinstance(one, Tensor) for one in made):
            self.fail(f"{func} returns a value")
            return
        if func in _ALLOCATIONS:
            buffer = self._add_buffer(out)
            what = _Allocation(buffer, tuple(out.shape), out.stride(), out.dtype, out.device)
            self._notes.append((what, {buffer}))
            return
        given = _tensors([*args, *kwargs.values()])
        owners = [next((t for t in given if _share(t, one)), None) for one in made]
        if func._schema.is_mutable or any(owner is None for owner in owners):
            self._computing(func, args, kwargs, made, owners)
            return
        for one, owner in zip(made, owners, strict=True):  # views
            place = self._place(owner)
            if one.dtype != owner.dtype:
                self.fail("a view of another dtype")
            elif place is not None and self._known(one) is None:
                self._put(one, place.buffer)

    def _computing(self, func, args, kwargs, made, owners) -> None:
        used: set[int] = set()

        def placed(leaf):
            place = self._place(leaf) if isinstance(leaf, Tensor) else None
            if place is None:
                return leaf
            used.add(place.buffer)
            return place

        args, kwargs = tree_map(placed, (args, kwargs))
        results = []
        for one, owner in zip(made, owners, strict=True):
            results.append(-1 if owner is not None else self._add_buffer(one))
        used.update(buffer for buffer in results if buffer >= 0)
        self._notes.append((_Op(func, args, kwargs, tuple(results)), used))

    def _add_buffer(self, tensor: Tensor | None) -> int:
        buffer = len(self._origins)
        self._origins.append(0 if tensor is None else tensor.storage_offset())
        if tensor is not None:
            self._put(tensor, buffer)
        return buffer

    def _put(self, tensor: Tensor, buffer: int) -> None:
        offset = tensor.storage_offset() - self._origins[buffer]
        place = Place(buffer, offset, tensor.shape, tensor.stride(), tensor.itemsize)
        self._places[id(tensor)] = weakref.ref(tensor), place

    def _known(self, tensor: Tensor) -> Place | None:
        reference, place = self._places.get(id(tensor), (None, None))
        return place if reference is not None and reference() is tensor else None

    def _place(self, tensor: Tensor) -> Place | None:
        place = self._known(tensor)
        if place is None:
            self.fail("a tensor that is neither an input nor made of one")
        return place


def _tensors(values: Sequence) -> list[Tensor]:
    """Those of an op's arguments, also in lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found += _tensors(value)
    return found


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether they lie in one storage."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata
