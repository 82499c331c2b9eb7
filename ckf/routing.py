"""Task ids on their way from ``model(..., task_ids=...)`` to every patched layer.

A forward pass makes one :class:`Route`; layers find it through the model's :class:`Router`. Routes
are kept per thread, so threads may call one model with different ids; recomputation (gradient
checkpointing) runs later and elsewhere, so the checkpointed function carries its route along.
"""

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ckf.kernels.checks import check_id_range

BASE_ONLY = -1
_SEED_STEP = 0x9E3779B97F4A7C15
_SEED_RANGE = 2**63 - 1


class OneTask(NamedTuple):
    """One id for all rows, (), in a tuple: ``generate`` multiplies the rows of tensors alone."""

    id: Tensor


TaskIds = Tensor | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | str | int


class Route:
    """What the layers of one forward pass need: an id per token or row, or one for all, and the
    dropout seed.

    The seed is an int; a one-element tensor where torch.compile traces, so that the compiled code
    draws afresh at every call. None is drawn at its first use: by layers that train in a model
    that does not.
    """

    def __init__(
        self, ids: Tensor, shape: tuple[int, int], base_only: bool, seed: int | Tensor | None
    ) -> None:
        self.rows, self.tokens_per_row = shape
        self.one = ids if ids.dim() == 0 else None  # one task for all: any rows in any order
        self.by_row = ids if ids.dim() == 1 else None  # (rows,): one task for all a row holds
        tokens = ids if self.by_row is None else ids.unsqueeze(1)
        self.ids = tokens.expand(shape).reshape(-1)  # (rows * tokens_per_row,)
        self.base_only = base_only
        self._seed = seed
        self._last_input: tuple[weakref.ref, int, int] | None = None
        self._ready: dict[int, tuple[weakref.ref, int, tuple, Tensor]] = {}
        self._views: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self.may_hold = True  # outputs of siblings, while torch.compile traces
        self._traced: dict[int, tuple[Tensor, tuple, Tensor]] = {}

    @property
    def seed(self) -> int | Tensor:
        """The pass's own, the same at every use."""
        if self._seed is None:
            self._seed = _draw_seed(self.ids.device)
        return self._seed

    def ids_for(self, x: Tensor, layer: str = "a patched layer") -> Tensor:
        """Ids of x's leading shape; x may be (batch, seq, k), flattened, or one vector a row.

        ``layer`` is named in errors.
        """
        if torch.compiler.is_compiling():
            return self._fitted(x, layer)
        key = (x.shape[:-1], x.device)  # layers may lie on several devices
        if key not in self._views:
            self._views[key] = self._fitted(x, layer)
        return self._views[key]

    def _fitted(self, x: Tensor, layer: str) -> Tensor:
        lead = x.shape[:-1]
        if self.one is not None:
            return self.one.to(x.device, non_blocking=x.is_cuda).expand(lead).contiguous()
        count = lead.numel()
        ids = self.ids.to(x.device, non_blocking=x.is_cuda)
        if self._in_order(lead):  # other orders of as many rows, as in (seq, batch, k), would mix
            if count == ids.numel():
                return ids.view(lead)
            if count * self.tokens_per_row == ids.numel():
                return ids.view(-1, self.tokens_per_row)[:, -1].view(lead)
        if self.by_row is not None and len(lead) > 1 and lead[0] == self.rows:
            rows = self.by_row.to(x.device, non_blocking=x.is_cuda)  # as of a whole cache
            return rows.view(-1, *[1] * (len(lead) - 1)).expand(lead).contiguous()
        raise ValueError(
            f"{layer} got {count} rows of shape {tuple(x.shape)}, but the forward pass "
            f"has task ids for {self.ids.numel()} tokens, {self.tokens_per_row} a row; leave this "
            "layer out of target_modules"
        )

    def _in_order(self, lead: torch.Size) -> bool:
        """Whether rows come one after another, as far as a shape can tell.

        It cannot where batch and seq are equal, nor for a selection that is as large as the whole.
        """
        if len(lead) < 2 or self.rows == 1 or lead[0] == self.rows:
            return True
        return sum(size != 1 for size in lead) < 2

    def seed_for(self, x: Tensor, layer: int) -> int | Tensor:
        """One dropout seed per input tensor: siblings (q, k, v) fed the same tensor share it."""
        drawn = self.seed
        if isinstance(drawn, Tensor):
            return drawn + _signed(_SEED_STEP * (layer + 1))
        if self._last_input is not None:
            reference, version, seed = self._last_input
            if reference() is x and version == _version(x):
                return seed
        seed = _signed(drawn + _SEED_STEP * (layer + 1))
        self._last_input = (weakref.ref(x), _version(x), seed)
        return seed

    def keep(self, x: Tensor, layers: Sequence[int], outputs: Sequence[Tensor]) -> None:
        """Hold the outputs of layers for x, computed together with a sibling's."""
        modes = _modes(x)
        if torch.compiler.is_compiling():  # no weak references and versions in a traced graph
            if self.may_hold:
                for layer, y in zip(layers, outputs, strict=True):
                    self._traced[layer] = (x, modes, y)
            return
        reference, version = weakref.ref(x), _version(x)
        for layer, y in zip(layers, outputs, strict=True):
            self._ready[layer] = (reference, version, modes, y)

    def take(self, x: Tensor, layer: int) -> Tensor | None:
        """The output held for a layer, if it was computed from this very tensor, unchanged, and
        as this call would: with gradients or without, under the same autocast."""
        if torch.compiler.is_compiling():
            if not self.may_hold:
                return None
            held, modes, y = self._traced.pop(layer, (None, (), None))
            return y if held is x and modes == _modes(x) else None
        held = self._ready.pop(layer, None)
        if held is None:
            return None
        reference, version, modes, y = held
        same = reference() is x and version == _version(x) and modes == _modes(x)
        return y if same else None


def _draw_seed(device: torch.device) -> int | Tensor:
    if torch.compiler.is_compiling():
        return torch.randint(_SEED_RANGE, (1,), device=device)
    return int(torch.randint(_SEED_RANGE, ()))


def _signed(word: int) -> int:
    """The low 64 bits as a signed integer, as int64 tensors hold them."""
    return (word + 2**63) % 2**64 - 2**63


def _version(x: Tensor) -> int:
    """Counts in-place changes; tensors made in inference mode do not count theirs."""
    return 0 if x.is_inference() else x._version


def _modes(x: Tensor) -> tuple[bool, bool, torch.dtype | None]:
    """Whether gradients are kept, or never can be, and what autocast makes of x (None: nothing)."""
    kind = x.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    compiling = torch.compiler.is_compiling()  # which cannot trace the question
    never = not compiling and torch.is_inference_mode_enabled()
    return torch.is_grad_enabled(), never, cast


class Router:
    """The tasks of a patched model and, per thread, the route of the forward pass under way."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.traced: Route | None = None  # while torch.compile traces: no thread-locals there
        self.generations = 0  # under way in any thread, for what torch.compile traces
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {"tasks": self.tasks}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["tasks"])

    @property
    def route(self) -> Route | None:
        if torch.compiler.is_compiling():
            return self.traced
        return getattr(self._local, "route", None)

    @property
    def default_task(self) -> int | Tensor | None:
        return getattr(self._local, "default_task", None)

    @contextmanager
    def following(self, route: Route | None) -> Iterator[None]:
        """Layers called inside take this route."""
        if torch.compiler.is_compiling():
            self.traced = route
            yield
            self.traced = None
            return
        before = self.route
        self._local.route = route
        try:
            yield
        finally:
            self._local.route = before

    @contextmanager
    def defaulting_to(self, task: str | Tensor) -> Iterator[None]:
        """Forward passes inside that name no task ids take this task for all rows, or these ids."""
        before = self.default_task
        self._local.default_task = task if isinstance(task, Tensor) else self.index(task)
        try:
            yield
        finally:
            self._local.default_task = before

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Ids of the prompt's tokens go on with their last column, for passes of any length."""
        before = getattr(self._local, "generating", False)
        self._local.generating = True
        self.generations += 1
        try:
            yield
        finally:
            self._local.generating = before
            self.generations -= 1

    def index(self, task: str | int) -> int:
        """The id of a task name; ints pass through."""
        if not isinstance(task, str):
            if isinstance(task, bool) or not hasattr(task, "__index__"):
                raise ValueError(
                    f"task id {task!r} is a {type(task).__name__}; expected an int or one of "
                    f"{', '.join(self.tasks)}"
                )
            return int(task)
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; this model knows {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def tensor(self, task_ids: TaskIds, device: torch.device | str | None = None) -> Tensor:
        """Names or ints as an int64 tensor, range-checked where the ids lie on the host."""
        if isinstance(task_ids, Tensor):
            if task_ids.is_floating_point() or task_ids.dtype == torch.bool:
                raise ValueError(f"task_ids are {task_ids.dtype}; expected integers or names")
            ids = task_ids.long()
        else:
            ids = torch.tensor(self._indices(task_ids), dtype=torch.int64)
        check_id_range(ids, len(self.tasks))
        return ids if device is None else ids.to(device, non_blocking=True)

    def _indices(self, task_ids) -> int | list:
        """Names and ints as ints, in lists of one length a level."""
        if hasattr(task_ids, "tolist"):  # an array
            task_ids = task_ids.tolist()
        if isinstance(task_ids, str) or not isinstance(task_ids, Iterable):
            return self.index(task_ids)
        found = [self._indices(t) for t in task_ids]
        lengths = {len(t) if isinstance(t, list) else -1 for t in found}
        if len(lengths) > 1:
            raise ValueError(
                "task_ids have rows of different lengths; pad them, or give one task a row"
            )
        return found

    def make_route(
        self,
        task_ids: TaskIds | None,
        shape: tuple[int, int],
        device: torch.device,
        training: bool,
        past: Callable[[], int] = lambda: 0,
    ) -> Route:
        """The route of a forward pass over ``shape`` = (batch, seq) new tokens.

        ``past`` tells how many tokens the cache holds; only per-token ids need to ask. They are of
        the new tokens, or of those in the cache as well.
        """
        if isinstance(task_ids, OneTask):
            task_ids = task_ids.id
        if torch.compiler.is_compiling():
            return self._traced_route(task_ids, shape, device, training, past)
        if task_ids is None:
            task_ids = self._default_for(shape[0])
        if task_ids is None:
            raise ValueError(
                "this model is patched for several tasks and got no task_ids; pass "
                f"task_ids=[...] with one of {', '.join(self.tasks)} for each row (-1 for the "
                "base alone; in Trainer by data_collator=ckf.TaskCollator(model, collator)), or "
                "call it inside ckf.use_task(model, task), or undo the patch with "
                "ckf.unpatch_model(model)"
            )
        ids = self.tensor(task_ids)
        base_only = ids.device.type == "cpu" and bool((ids == BASE_ONLY).all())
        tokens = _token_ids(ids, shape, past, self._growing).to(device, non_blocking=True)
        seed = _draw_seed(device) if training else None
        return Route(tokens, shape, base_only, seed)

    def _default_for(self, rows: int) -> int | Tensor | None:
        """The default task; one a row for as many rows as ``generate`` makes of each."""
        ids = self.default_task
        if not isinstance(ids, Tensor) or ids.dim() == 0 or rows % len(ids):
            return ids
        return ids.repeat_interleave(rows // len(ids), dim=0)

    def _growing(self) -> bool:
        if torch.compiler.is_compiling():
            return self.generations > 0
        return getattr(self._local, "generating", False)

    def _traced_route(self, task_ids, shape, device, training, past) -> Route:
        if not isinstance(task_ids, Tensor):
            raise ValueError(
                f"task_ids are {task_ids!r}; under torch.compile they must be a tensor, for names "
                "would make a graph for each mix of tasks: pass ckf.task_ids(model, [...])"
            )
        tokens = _token_ids(task_ids.long(), shape, past, self._growing).to(device)
        seed = _draw_seed(device) if training else None
        return Route(tokens, shape, False, seed)


def _token_ids(
    ids: Tensor, shape: tuple[int, int], past: Callable[[], int], growing: Callable[[], bool]
) -> Tensor:
    """An id for every new token, (batch, seq), for every row, (batch,), or one for all, ().
    Per-token ids may begin with those in the cache.

    growing: whether they are a prompt's, of which this may be a part, or the prompt and more
    (``generate``); they go on with their last column.
    """
    batch, length = shape
    if ids.dim() == 0 or (ids.shape == (1,) and batch == 1):
        return ids.reshape(())
    if ids.shape == (batch,):
        return ids
    expected = f"({batch},) for one task a row or ({batch}, {length}) for one a token"
    if ids.dim() == 2 and ids.shape[0] == batch:
        before, width = past(), ids.shape[1]
        if before == 0 and width == length:
            return ids
        if width > 0 and growing():
            columns = torch.arange(before, before + length, device=ids.device)
            return ids[:, columns.clamp(max=width - 1)]
        if width == length:
            return ids
        if width == before + length:
            return ids[:, before:]
        if before > 0:
            expected += f", or ({batch}, {before + length}) with those of the cache"
    raise ValueError(
        f"task_ids have shape {tuple(ids.shape)} for inputs of {batch} rows and {length} tokens; "
        f"expected {expected}"
    )


@torch.compiler.disable(reason="ckf: this graph knows no task ids, the forward pass around it does")
def outside_the_graph(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A patched layer whose graph did not begin with the forward pass that has the task ids."""
    warnings.warn(
        "torch.compile broke the forward pass of a patched model into several graphs, so its "
        "patched layers run outside of them: right, but no faster; "
        "torch.compile(model, fullgraph=True) shows where, and names for task_ids break it: "
        "pass ckf.task_ids(model, [...])",
        stacklevel=2,
    )
    return layer.forward(x)


class CarriedRoute:
    """A function that runs on the route of the moment it was made, whenever and wherever called."""

    def __init__(self, router: Router, function) -> None:
        self.router, self.route, self.function = router, router.route, function

    def __call__(self, *args, **kwargs):
        with self.router.following(self.route):
            return self.function(*args, **kwargs)


class RoutedCheckpoint:
    """Wraps a checkpoint function so that recomputation finds the ids of its forward pass."""

    def __init__(self, router: Router, checkpoint) -> None:
        self.router, self.checkpoint = router, checkpoint

    def __call__(self, function, *args, **kwargs):
        route = self.router.route
        if route is not None:
            _ = route.seed  # drawn here: a recomputation would not draw it, and drop otherwise
        if torch.compiler.is_compiling():  # the compiler recomputes; nothing runs later
            route.may_hold = False
            result = self.checkpoint(function, *args, **kwargs)
            route.may_hold = True
            return result
        return self.checkpoint(CarriedRoute(self.router, function), *args, **kwargs)
