"""Training with each decoder layer as two CUDA graphs: what a small model waits for is the host.

``LayerGraphs(model)`` takes the decoder layers of a patched model whose rows come packed. The first
forward pass with gradients runs as ever and notes what each layer is handed; before the second all
layers are captured, forward and backward, for that many tokens and some more; from then on a step
launches two graphs a layer. A batch is copied into their inputs: what is left of their tokens are
rows of their own without a task (-1), whose outputs nobody reads. A batch that does not fit has the
graphs made anew, larger; a much smaller one, a padded one and a pass without gradients run as ever.

Activations of the graphs stay in memory, once: a backward pass must come before the next forward.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from ckf import packed_attention
from ckf.layers import MultiLoRALinear
from ckf.packed_attention import PackedRows
from ckf.patch import patch_state
from ckf.routing import BASE_ONLY, Route
from ckf.targets import decoder_layers

logger = logging.getLogger("ckf.train")
_TOKENS, _LONGEST = 64, 64  # graphs are made for multiples of these
_SPARE = 16  # one part in so many more than the batch at hand, of tokens and of rows
_LEAST = 0.5  # of the graphs' tokens; a smaller batch runs as ever


@dataclass(frozen=True)
class Sizes:
    """Of a batch of packed rows, or the most that graphs hold."""

    tokens: int
    rows: int
    longest: int

    @classmethod
    def of(cls, rows: PackedRows) -> Sizes:
        return cls(rows.scatter.shape[0], rows.starts.shape[0] - 1, rows.longest)

    def holds(self, batch: Sizes) -> bool:
        return (
            batch.tokens <= self.tokens
            and batch.longest <= self.longest
            and batch.rows + self.padding_rows(batch) <= self.rows
        )

    def padding_rows(self, batch: Sizes) -> int:
        """Rows, none longer than the longest, of the tokens that the batch leaves."""
        return -(-(self.tokens - batch.tokens) // self.longest)

    def and_more(self, batch: Sizes) -> Sizes:
        """Room for the batch, and for what came before."""
        tokens = max(self.tokens, _up(batch.tokens + batch.tokens // _SPARE, _TOKENS))
        longest = max(self.longest, _up(batch.longest, _LONGEST))
        least = min(batch.tokens, int(tokens * _LEAST))
        padding = -(-(tokens - least) // longest)
        return Sizes(tokens, max(self.rows, batch.rows + batch.rows // _SPARE + padding), longest)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


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


def why_not_graphed(model: PreTrainedModel) -> str | None:
    """Why the layers of a patched model cannot be captured; None where nothing speaks against."""
    device, dtype = model.device, model.dtype
    if device.type != packed_attention.VARLEN_DEVICE:
        return f"the model is on {device}"
    if not packed_attention.attends_packed(model):
        return "its attention does not take packed rows"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "several processes train it"
    try:
        layers = decoder_layers(model)[2]
    except ValueError as error:
        return str(error)
    if getattr(model.config.get_text_config(), "attention_dropout", 0):
        return "its attention has dropout"
    width = getattr(model.config.get_text_config(), "head_dim", None)
    config = model.config.get_text_config()
    width = width or config.hidden_size // config.num_attention_heads
    if not packed_attention.runs_varlen(device, dtype, width):
        return "PyTorch's attention over rows of any lengths does not run there"
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return "its activations are recomputed in the backward pass"
    if not any(isinstance(m, MultiLoRALinear) for m in layers.modules()):
        return "no decoder layer has a patched linear"
    if any(isinstance(vars(layer).get("forward"), _Layer) for layer in layers):
        return "another LayerGraphs has them; call its remove() first"
    return None


class LayerGraphs:
    """The decoder layers of a patched model, captured; until :meth:`remove`.

    Args:
        model: a model after ``ckf.patch_model`` whose attention takes packed rows
            (``ckf.packing.attend_packed``), on a GPU.
        capture: makes what captures one layer; for tests.

    Raises:
        ValueError: it cannot be captured, and why.
    """

    def __init__(self, model: PreTrainedModel, capture: Callable | None = None) -> None:
        why = why_not_graphed(model)
        if why is not None:
            raise ValueError(f"the decoder layers cannot run as CUDA graphs: {why}")
        self.router, self.device = patch_state(model).router, model.device
        self._make_capture = capture
        self.sizes, self.generation = Sizes(0, 0, 0), 0
        self.mode, self.off, self._said = "as ever", False, False
        self.current: Route | None = None
        self._noted: list[Tensor] = []  # what layers were handed by the pass that notes
        self._filled: list[Tensor | None] = []  # what the graphs' own copies hold
        self._copies: list[Tensor] = []
        self._parameters: list[tuple] = []  # as they were when captured
        self.captures = 0  # of all layers, so far
        self.layers = [_Layer(self, i, m) for i, m in enumerate(decoder_layers(model)[2])]

    def remove(self) -> None:
        """The layers as they were, and the graphs' memory given back."""
        self._drop()
        for layer in self.layers:
            layer.remove()

    # ---- one forward pass

    def begins(self, batch: Sizes, rows: PackedRows, route: Route) -> None:
        """At the first layer: whether this pass is noted, replayed, or neither."""
        self.mode, self.current = "as ever", route
        if self.off:
            return
        ready = self.captures > 0 and self._parameters == self._seen_parameters()
        if ready and self.sizes.holds(batch):
            if batch.tokens >= _LEAST * self.sizes.tokens:
                self._fill(batch, rows, route)
            return
        if all(layer.template is not None for layer in self.layers):
            if self._captured(self.sizes.and_more(batch), rows):
                self._fill(batch, rows, route)
            return
        self.mode, self._noted = "noting", []
        for layer in self.layers:
            layer.template = None

    def note(self, tensor: Tensor) -> int:
        """The number of a tensor that a layer is handed; layers that share it get one number."""
        for number, known in enumerate(self._noted):
            if known is tensor:
                return number
        self._noted.append(tensor)
        return len(self._noted) - 1

    def copied(self, number: int, tensor: Tensor) -> bool:
        """Whether the graphs' copy holds this tensor; where none was copied in this pass, it does
        now. Backward reads the copies again, so they change once a pass."""
        if self._filled[number] is None:
            self._copies[number][:, : tensor.shape[1]].copy_(tensor)
            self._filled[number] = tensor
        return self._filled[number] is tensor

    def _fill(self, batch: Sizes, rows: PackedRows, route: Route) -> None:
        """Into the graphs' inputs: task ids, seed, and where rows begin."""
        self.mode, self.batch = "replaying", batch
        self.generation += 1
        for layer in self.layers:
            layer.keep_gradients()
        self._filled = [None] * len(self._copies)
        count = batch.rows + 1
        self._starts[:count].copy_(rows.starts)
        rest = self._starts[count:]
        torch.clamp(self._ramp[: len(rest)] + batch.tokens, max=self.sizes.tokens, out=rest)
        self._ids[batch.tokens :].fill_(BASE_ONLY)
        self._ids[: batch.tokens].copy_(route.ids)
        if isinstance(route.seed, Tensor):
            self._seed.copy_(route.seed)
        else:
            self._seed.fill_(route.seed)

    def _seen_parameters(self) -> list[tuple]:
        return [seen for layer in self.layers for seen in layer.seen()]

    # ---- capture

    def _captured(self, sizes: Sizes, rows: PackedRows) -> bool:
        """All layers, for up to ``sizes``; False, and never again, where that fails."""
        self._drop()
        try:
            self._capture_all(sizes, rows)
        except Exception as error:  # out of memory among them
            self._drop()
            self.give_up(f"capturing failed ({str(error).partition(chr(10))[0]})")
            return False
        return True

    def give_up(self, why: str) -> None:
        """For good: the pass goes on as ever, and so do all others."""
        self.off, self.mode = True, "as ever"
        logger.warning("training goes on without CUDA graphs: %s", why)

    def misfit(self, what: str) -> None:
        """A layer runs as ever in this pass; said once."""
        if not self._said:
            self._said = True
            logger.warning(
                "a decoder layer is handed another %s than when its CUDA graphs were captured, so "
                "it runs without them where that happens", what,
            )  # fmt: skip

    def _capture_all(self, sizes: Sizes, rows: PackedRows) -> None:
        options = {"device": self.device}
        ramp = sizes.longest * torch.arange(1, sizes.rows + 2, **options)
        self._ramp = ramp.int()
        self._starts = torch.clamp(self._ramp - sizes.longest, max=sizes.tokens)
        self._ids = torch.full((sizes.tokens,), BASE_ONLY, **options)
        self._seed = torch.zeros(1, dtype=torch.int64, **options)
        self._copies = [
            t.new_zeros(t.shape[0], sizes.tokens, *t.shape[2:])
            if t.dim() > 1 and t.shape[1] > 1
            else t.clone()
            for t in self._noted
        ]
        self._filled = [None] * len(self._copies)
        places = torch.zeros(sizes.tokens, dtype=torch.int64, **options)
        own = replace(
            rows, gather=places, scatter=places, groups=(), starts=self._starts,
            longest=sizes.longest,
        )  # fmt: skip
        self.route = Route(self._ids.unsqueeze(0), (1, sizes.tokens), False, self._seed)
        make = self._make_capture or self._cuda_captures()
        with torch.enable_grad(), self.router.following(self.route):
            for layer in self.layers:
                layer.prepare(self._copies, own, sizes.tokens, make())
            self._warm_up()
            for layer in self.layers:
                layer.capture_forward()
            dy = torch.zeros_like(self.layers[-1].output)
            for layer in reversed(self.layers):
                dy = layer.capture_backward(dy)
        self.sizes, self.captures = sizes, self.captures + 1
        self._parameters = self._seen_parameters()

    def _cuda_captures(self) -> Callable[[], CudaCapture]:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what passes without graphs have used
        self._stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        return lambda: CudaCapture(pool, self._stream)

    def _warm_up(self) -> None:
        """Every kernel of the capture once: what is compiled or allocated by a first call."""
        if self._make_capture is not None:
            return
        main = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            for layer in self.layers:
                output = layer.run()
                layer.gradients(output, torch.zeros_like(output))
        main.wait_stream(self._stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def _drop(self) -> None:
        self.generation += 1  # a backward pass that is still to come finds nothing
        for layer in self.layers:
            layer.drop()
        self._copies, self._filled, self._parameters = [], [], []
        self._starts = self._ids = self._seed = self._ramp = None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()


class _Layer:
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
        batch = Sizes.of(rows)
        if self.index == 0:
            stage.begins(batch, rows, route)
        if stage.current is not route:  # of a pass that did not begin with the first layer
            return self.as_ever(x, *args, **kwargs)
        if stage.mode == "noting":
            return self._note(x, args, kwargs)
        if stage.mode != "replaying" or stage.batch != batch or not self._fits(x, args, kwargs):
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
            and not torch.is_autocast_enabled(x.device.type)
            and not getattr(self.module, "gradient_checkpointing", False)
            and not torch.compiler.is_compiling()
            and torch._C._current_graph_task_id() == -1  # no recomputation in a backward pass
        )

    # ---- what it is handed

    def _note(self, x: Tensor, args: tuple, kwargs: dict):
        output = self.as_ever(x, *args, **kwargs)
        if not isinstance(output, Tensor) or output.shape != x.shape or output.dtype != x.dtype:
            self.stage.give_up("a decoder layer gives something else than its input's like")
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
        options = {"dtype": dtype, "device": self.stage.device}
        self.x = torch.zeros(1, tokens, width, **options).requires_grad_(trained)
        # leaves of their own: what accumulates into the parameters belongs to another stream
        # gates and slots, which a module that is moved to where it lies makes anew
        patched = [m for m in self.module.modules() if isinstance(m, MultiLoRALinear)]
        self.held = [(m._constant, m._slots) for m in patched]
        found = [(holder, name, holder[name]) for holder, name in self.places]
        self.parameters = [entry for entry in found if entry[2].requires_grad]
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
        self.keep_gradients()
        self.graphs.replay_backward()
        dx, *rest = self.found
        if dx is not None:  # the first layer's may be kept, as the gradient of what was embedded
            dx = dx[:, :tokens].clone() if self.index == 0 else _first(dx, tokens)
        return [dx, *(None if g is None else g.detach() for g in rest)]


class _Replay(torch.autograd.Function):
    """A layer's two graphs; its trained parameters are inputs, so that they get their gradients."""

    @staticmethod
    def forward(ctx, layer: _Layer, x: Tensor, *parameters: Tensor) -> Tensor:
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
