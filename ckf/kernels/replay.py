"""Passes that are written down once and then repeated, so that the host thinks once.

For all calls of one kind (sizes, strides, dtypes, alignments, what needs a gradient) a pass of the
Triton kernels is the same list of allocations, launches and torch ops; only addresses differ. The
layers of a model bring the same few kinds again and again, and finding out anew what to launch
takes the host longer than launching it, and in small models longer than the GPU needs.

A kind is run as it is when it is first seen, written down the second time (so that a pass that
comes once costs next to nothing), and repeated from then on. Written down is what happens
(``replay_recorder.py``). Whatever cannot be kept so leaves that kind as it was: run, not repeated.
"""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

REPLAY = True  # False: every pass is run
# Past it the kind longest unused goes; packed steps bring new ones with every new number of rows.
MOST_KINDS = 512
ALIGNMENT = 16  # bytes of addresses that launches depend on
PLAIN = {Tensor, torch.nn.Parameter, type(None)}

logger = logging.getLogger(__name__)

_SEEN, _NEVER = "seen once", "cannot be repeated"
_known: dict[Hashable, "Recording | str"] = {}
_lock = threading.Lock()
_local = threading.local()  # .recorder: of the pass that this thread writes down

Pass = Callable[[Hashable, Sequence[Tensor | None]], list[Tensor]]
Step = Callable[[list[Tensor | None], list[int]], None]  # tensors and addresses by buffer


class Place(NamedTuple):
    """Where a tensor lies: in a buffer (the inputs, then what is made), so many elements on."""

    buffer: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    itemsize: int

    def of(self, buffers: list[Tensor]) -> Tensor:
        whole = buffers[self.buffer]
        if self.offset == 0 and whole.shape == self.size and whole.stride() == self.stride:
            return whole
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)


class Recording:
    """A pass of one kind.

    Args:
        steps: in order; each with the buffers that nobody needs after it.
        outputs: of the pass.
        buffers: how many there are, inputs included.
        arena: (buffer, offset in bytes) of what launches alone use, all in one allocation, which is
            the buffer after all others.
        arena_bytes: of that.
    """

    def __init__(
        self,
        steps: list[tuple[Step, tuple[int, ...]]],
        outputs: list[Place],
        buffers: int,
        arena: list[tuple[int, int]],
        arena_bytes: int,
    ) -> None:
        self._steps, self._outputs, self._buffers = steps, outputs, buffers
        self._arena, self._arena_bytes = arena, arena_bytes

    def repeat(self, tensors: Sequence[Tensor | None], addresses: list[int]) -> list[Tensor]:
        """The outputs, from inputs of this kind."""
        missing = self._buffers - len(tensors)
        buffers, addresses = [*tensors, *[None] * missing], [*addresses, *[0] * missing]
        if self._arena:
            device = tensors[0].device
            buffers.append(torch.empty(self._arena_bytes, dtype=torch.uint8, device=device))
            start = buffers[-1].data_ptr()
            for buffer, offset in self._arena:
                addresses[buffer] = start + offset
        for step, done in self._steps:
            step(buffers, addresses)
            for buffer in done:
                buffers[buffer] = None
        return [place.of(buffers) for place in self._outputs]


def replayed(make: Pass, static: Hashable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """``make(static, tensors)``, or the same launches on memory of their own.

    Args:
        make: returns new tensors, made by launches that :func:`note` hears of and by torch ops
            alone. What it does depends on nothing but ``static`` and the tensors' shapes, strides,
            dtypes and alignment, never on values. All tensors are on the device of the first.
        static: its other arguments, and whatever else it looks at.
    """
    if not REPLAY or not PLAIN.issuperset(map(type, tensors)):
        return make(static, tensors)
    devices = {t.get_device() for t in tensors if t is not None}
    if len(devices) > 1:  # for the launchers' errors: an address says nothing of its device
        return make(static, tensors)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    key = make, static, tensors[0].device, *_kind(tensors, addresses)
    known = _known.get(key)
    if type(known) is Recording:
        if len(_known) > MOST_KINDS // 2:
            _keep(key, known)  # as the newest
        return known.repeat(tensors, addresses)
    if known is _SEEN:
        return _recorded(key, make, static, tensors)
    if known is None:
        _keep(key, _SEEN)
    return make(static, tensors)


def _kind(tensors: Sequence[Tensor | None], addresses: list[int]) -> list:
    """What launches depend on, of every tensor."""
    kind: list = [None if t is None else t.dtype for t in tensors]
    kind += [
        None if t is None else t.shape if t.is_contiguous() else (t.shape, t.stride())
        for t in tensors
    ]
    if reduce(or_, addresses) % ALIGNMENT:
        kind += [address % ALIGNMENT for address in addresses]
    return kind


def note(send: Callable[..., None], values: Sequence) -> None:
    """Of every launch, before it is made: where a pass is being written down, so is the launch.

    send: makes it on the current stream, from ``values`` with addresses in place of tensors, also
        of those in tuples; the base of a descriptor then has a ``data_ptr()`` and nothing else.
    """
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.launch(send, values)


def not_repeatable(why: str) -> None:
    """What happens now no :func:`note` tells: a pass that is being written down is not repeated."""
    recorder = getattr(_local, "recorder", None)
    if recorder is not None:
        recorder.fail(why)


def forget() -> None:
    """All kinds of passes, for tests and measurements."""
    with _lock:
        _known.clear()


def _keep(key: Hashable, what: Recording | str) -> None:
    with _lock:
        _known.pop(key, None)
        while len(_known) >= MOST_KINDS:
            del _known[next(iter(_known))]
        _known[key] = what


def _alias(tensor: Tensor) -> Tensor:
    """An object of its own for every input; torch's products ask whether it requires gradients."""
    alias = tensor.detach()
    if tensor.requires_grad and not alias.is_inference():  # of those torch allows it nowhere else
        alias.requires_grad_()
    return alias


def _recorded(key: Hashable, make: Pass, static: Hashable, tensors) -> list[Tensor]:
    from ckf.kernels.replay_recorder import Recorder  # imports this module

    inputs = [None if t is None else _alias(t) for t in tensors]
    recorder = _local.recorder = Recorder(inputs)
    try:
        with recorder:
            outputs = make(static, inputs)
    finally:
        _local.recorder = None
    recording = recorder.recording(outputs)
    if recording is None:
        logger.debug("every pass of a kind (%s) is run: %s", make.__name__, recorder.failed)
    _keep(key, recording or _NEVER)
    return outputs
