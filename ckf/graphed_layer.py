"""A decoder layer as two CUDA graphs, and what runs in its place; layer_graphs.py has them all."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from ckf.layers import MultiLoRALinear
from ckf.packed_attention import PackedRows
from ckf.routing import Route

if TYPE_CHECKING:
    from ckf.layer_graphs import LayerGraphs


class CudaCapture:
    """A layer's forward and its backward as two graphs, in a pool of memory that all layers share.

    Replays come in the order of the captures: all forwards, then backwards from the last.
    """

    def __init__(self, pool, stream: torch.cuda.Stream) -> None:
        self.pool, self.stream = pool, stream
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def forward(self, run: Callable[[], Tensor]) -> Tensor:
        """What ``run`` returns, its values those of the last replay."""
        with self._capturing(self.graphs[0]):
            return run()

    def backward(self, gradients: Callable[[Tensor], Sequence], output: Tensor) -> Sequence:
        """What ``gradients(output)`` returns, likewise."""
        with self._capturing(self.graphs[1]):
            return gradients(output)

    def replay_forward(self) -> None:
        self.graphs[0].replay()

    def replay_backward(self) -> None:
        self.graphs[1].replay()

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()


class GraphedLayer:
    """One decoder layer: called in place of its ``forward``."""

    def __init__(self, stage: LayerGraphs, index: int, module: nn.Module) -> None:
        self.stage, self.index, self.module = stage, index, module
        self.as_ever, self.own = module.forward, module.__dict__.get("forward")
        self.template: tuple | None = None
        self.places = _places(module)
        self.drop()
        module.forward = self

    def remove(self) -> None:
        if self.module.__dict__.get("forward") is self:
            del self.module.forward
            if self.own is not None:  # a hook's, of who wrapped it before
                self.module.forward = self.own

    def __deepcopy__(self, memo: dict):
        """A copy of the model runs as ever."""
        return copy.deepcopy(self.as_ever, memo)

    def __reduce__(self):
        raise ValueError("this model's decoder layers are CUDA graphs; remove() them to pickle it")

    def seen(self) -> Iterator[tuple]:
        """What a capture depends on, of every parameter as it is now."""
        for holder, name in self.places:
            parameter = holder[name]
            yield id(parameter), parameter.data_ptr(), parameter.requires_grad

    def drop(self) -> None:
        self.parameters, self.leaves, self.held, self.spent = [], [], [], None
        self.graphs = self.x = self.output = self.dy = self.found = None

    def __call__(self, x: Tensor, *args, **kwargs):
        stage, route = self.stage, self.stage.router.route
        rows = kwargs.get("packed_rows")
        if not self._takes(x, rows, route):
            return self.as_ever(x, *args, **kwargs)
        if self.index == 0:
            stage.begins(rows, route)
        if stage.current is not route:  # of a pass that did not begin with the first layer
            return self.as_ever(x, *args, **kwargs)
        if stage.mode == "noting":
            return self._note(x, args, kwargs)
        if stage.mode != "replaying" or stage.rows is not rows or not self._fits(x, args, kwargs):
            return self.as_ever(x, *args, **kwargs)
        return _Replay.apply(self, x, *(p for _, _, p in self.parameters))

    def _takes(self, x: Tensor, rows: PackedRows | None, route: Route | None) -> bool:
        return (
            torch.is_grad_enabled()
            and self.module.training
            and rows is not None
            and rows.windows is None
            and route is not None
            and x.dim() == 3
            and x.shape[:2] == (1, rows.scatter.shape[0])
            and not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() == -1  # no recomputation in a backward pass
        )

    # ---- what it is handed

    def _note(self, x: Tensor, args: tuple, kwargs: dict):
        output = self.as_ever(x, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != x.shape or output.dtype != x.dtype:
            self.stage.give_up("a decoder layer gives something else than its input's like")
            return output
        if not output.requires_grad:
            self.stage.give_up("nothing trains in a decoder layer, nor before it")
            return output
        leaves, structure = tree_flatten((args, kwargs))
        kinds = [self._kind(leaf, x.shape[1]) for leaf in leaves]
        if None in kinds:
            shape = tuple(leaves[kinds.index(None)].shape)
            self.stage.give_up(
                f"a decoder layer is handed a tensor of shape {shape}, which has no place for each "
                "token (leave return_flash_attn_kwargs out of the collator)"
            )
        else:
            self.template = structure, kinds, x.requires_grad, x.shape[2], x.dtype
        return output

    def _kind(self, leaf: object, tokens: int) -> tuple | None:
        """("rows",), ("tensor", number) or ("value", it); None for what cannot be copied."""
        if isinstance(leaf, PackedRows):
            return ("rows",)
        if not isinstance(leaf, Tensor):
            return "value", leaf
        a_token = leaf.dim() > 1 and leaf.shape[1] == tokens
        if leaf.requires_grad or not (a_token or (leaf.numel() == 1 and leaf.dim() > 1)):
            return None
        return "tensor", self.stage.note(leaf)

    def _fits(self, x: Tensor, args: tuple, kwargs: dict) -> bool:
        """Whether it is handed what it was captured with; tensors are copied."""
        structure, kinds, trained, width, dtype = self.template
        leaves, own = tree_flatten((args, kwargs))
        if own != structure:
            self.stage.misfit("set of arguments")
            return False
        if (x.requires_grad, x.shape[2], x.dtype) != (trained, width, dtype):
            return False  # as before vectors come into the prompts
        for (kind, *known), leaf in zip(kinds, leaves, strict=True):
            if kind == "value" and not (known[0] is leaf or known[0] == leaf):
                self.stage.misfit(f"{type(leaf).__name__} ({leaf!r}, not {known[0]!r})")
                return False
            if kind == "tensor" and not (
                isinstance(leaf, Tensor) and self.stage.copied(known[0], leaf)
            ):
                return False
        return True

    # ---- capture

    def prepare(self, copies: list[Tensor], rows: PackedRows, tokens: int, graphs) -> None:
        """What it is handed in the capture, and inputs of its own."""
        structure, kinds, trained, width, dtype = self.template
        made = {"rows": lambda: rows, "tensor": copies.__getitem__, "value": lambda value: value}
        leaves = [made[kind](*known) for kind, *known in kinds]
        self.graphs, self.arguments = graphs, tree_unflatten(leaves, structure)
        # the first layer's serves all until they are captured, each on the output before it
        first = self.stage.layers[0].x if self.index else None
        options = {"dtype": dtype, "device": self.stage.device}
        zeros = torch.zeros(1, tokens, width, **options) if first is None else first.detach()
        self.x = zeros.requires_grad_(trained)
        # gates and slots, which a module that is moved to where it lies makes anew
        patched = [m for m in self.module.modules() if isinstance(m, MultiLoRALinear)]
        self.held = [(m._constant, m._slots) for m in patched]
        found = [(holder, name, holder[name]) for holder, name in self.places]
        self.parameters = [entry for entry in found if entry[2].requires_grad]
        # leaves of their own: what accumulates into the parameters belongs to another stream
        self.leaves = [p.detach().requires_grad_() for _, _, p in self.parameters]

    def run(self) -> Tensor:
        args, kwargs = self.arguments
        with _in_place(self.parameters, self.leaves):
            return self.as_ever(self.x, *args, **kwargs)

    def gradients(self, output: Tensor, dy: Tensor) -> list[Tensor | None]:
        """Of x (None where it needs none) and of every trained parameter."""
        inputs = [self.x, *self.leaves] if self.x.requires_grad else self.leaves
        found = list(torch.autograd.grad(output, inputs, dy, allow_unused=True))
        return found if self.x.requires_grad else [None, *found]

    def capture_forward(self) -> None:
        before = self.stage.layers[self.index - 1].output if self.index else None
        if before is not None:  # nothing to copy on the way
            self.x = before.detach().requires_grad_(self.x.requires_grad)
        self.output = self.graphs.forward(self.run)

    def capture_backward(self, dy: Tensor) -> Tensor:
        """dy: the gradient that the layer after it computes; its own input's gradient."""
        self.dy = dy
        self.found = self.graphs.backward(lambda y: self.gradients(y, dy), self.output)
        self.output = self.output.detach()
        dx = self.found[0]
        return torch.zeros_like(self.x) if dx is None else dx

    # ---- replay

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        if x.data_ptr() != self.x.data_ptr():
            self.x.detach()[:, :tokens].copy_(x)
        self.graphs.replay_forward()
        return _first(self.output, tokens)

    def keep_gradients(self) -> None:
        """Those of an earlier part of the batch lie in memory that any replay may write."""
        for (_, _, parameter), own in zip(self.parameters, self.found[1:], strict=True):
            kept = parameter.grad
            if own is not None and kept is not None and kept.data_ptr() == own.data_ptr():
                parameter.grad = kept.clone()

    def backward(self, dy: Tensor, generation: int) -> list[Tensor | None]:
        if generation != self.stage.generation:
            raise RuntimeError(
                "a later forward pass, or remove(), has taken the memory of this one's "
                "activations; with CUDA graphs call backward before the next forward pass"
            )
        if self.spent == generation:
            raise RuntimeError(
                "with CUDA graphs a forward pass has one backward pass; remove() them for more"
            )
        self.spent, tokens = generation, dy.shape[1]
        if dy.data_ptr() != self.dy.data_ptr() or dy.stride() != self.dy[:, :tokens].stride():
            self.dy[:, :tokens].copy_(dy)
            self.dy[:, tokens:].zero_()
        self.graphs.replay_backward()
        dx, *rest = self.found
        if dx is not None:  # the first layer's may be kept, as the gradient of what was embedded
            dx = dx[:, :tokens].clone() if self.index == 0 else _first(dx, tokens)
        return [dx, *(None if g is None else g.detach() for g in rest)]


class _Replay(torch.autograd.Function):
    """A layer's two graphs; its trained parameters are inputs, so that they get their gradients."""

    @staticmethod
    def forward(ctx, layer: GraphedLayer, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.generation = layer, layer.stage.generation
        return layer.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return None, *ctx.layer.backward(dy, ctx.generation)


def _first(tensor: Tensor, tokens: int) -> Tensor:
    """Its first tokens, the same memory, and to autograd no view: replays change it unseen."""
    size = (tensor.shape[0], tokens, *tensor.shape[2:])
    place = tensor.untyped_storage(), tensor.storage_offset(), size, tensor.stride()
    return tensor.new_empty(0).set_(*place)


def _places(module: nn.Module) -> list[tuple[dict, str]]:
    """Where the parameters of a layer stand, its learned gates among them: holder and name."""
    gates = [m._gate[0] for m in module.modules() if isinstance(m, MultiLoRALinear)]
    holders = {id(m): m for m in itertools.chain(module.modules(), filter(None, gates))}
    return [
        (holder._parameters, name)
        for holder in holders.values()
        for name, parameter in holder._parameters.items()
        if parameter is not None
    ]


@contextmanager
def _in_place(parameters, others: Sequence[Tensor]) -> Iterator[None]:
    """Others in the place of the parameters."""
    for (holder, name, _), other in zip(parameters, others, strict=True):
        holder[name] = other
    try:
        yield
    finally:
        for holder, name, parameter in parameters:
            holder[name] = parameter
