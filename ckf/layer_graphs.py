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

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ckf import packed_attention
from ckf.graphed_layer import CudaCapture, GraphedLayer
from ckf.layers import MultiLoRALinear
from ckf.packed_attention import PackedRows
from ckf.patch import patch_state
from ckf.routing import BASE_ONLY, Route
from ckf.targets import decoder_layers

logger = logging.getLogger("ckf.train")
_TOKENS, _LONGEST = 64, 64  # graphs are made for multiples of these
_SPARE = 16  # one part in so many more than the batch at hand, of tokens and of rows
_LEAST = 0.5  # of the graphs' tokens; a smaller batch runs as ever
_RECOMPUTED = "its activations are recomputed in the backward pass"


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
    config = model.config.get_text_config()
    if getattr(config, "attention_dropout", 0):
        return "its attention has dropout"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not packed_attention.runs_varlen(device, dtype, width):
        return "PyTorch's attention over rows of any lengths does not run there"
    if any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return _RECOMPUTED
    if not any(isinstance(m, MultiLoRALinear) for m in layers.modules()):
        return "no decoder layer has a patched linear"
    if any(isinstance(vars(layer).get("forward"), GraphedLayer) for layer in layers):
        return "another LayerGraphs has them; call its remove() first"
    return None


class LayerGraphs:
    """The decoder layers of a patched model, captured; until :meth:`remove`.

    Args:
        model: a model after ``ckf.patch_model`` whose attention takes packed rows
            (``model.set_attn_implementation("ckf_packed")``), on a GPU.
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
        self.layers = [GraphedLayer(self, i, m) for i, m in enumerate(decoder_layers(model)[2])]

    def remove(self) -> None:
        """The layers as they were, and the graphs' memory given back."""
        self._drop()
        for layer in self.layers:
            layer.remove()

    # ---- one forward pass

    def begins(self, rows: PackedRows, route: Route) -> None:
        """At the first layer: whether this pass is noted, replayed, or neither."""
        self.mode, self.current, batch = "as ever", route, Sizes.of(rows)
        if self.off:
            return
        if torch.is_autocast_enabled(self.device.type):
            return self.give_up("the model runs under autocast; load it in the dtype it is to have")
        if any(getattr(layer.module, "gradient_checkpointing", False) for layer in self.layers):
            return self.give_up(_RECOMPUTED)
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
        self.mode, self.rows = "replaying", rows
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
            return True
        except Exception as error:  # out of memory among them
            why = str(error).partition("\n")[0]
        self._drop()  # past the except clause, whose traceback holds what was captured
        self.give_up(f"capturing failed ({why})")
        return False

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
