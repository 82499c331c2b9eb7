"""Random models of known shapes, batches of mixed tasks, and the loss row by row."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ckf.packed_attention import PACKED_ATTENTION, PackedRows

SCALING = 0.5
LAYOUTS = ("padded", "packed", "labels")
ANSWERS = (1, 1, 2, 24)  # tokens: yes or no, a star, a letter, an explanation


@dataclass(frozen=True)
class ModelShape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def config(self, length: int = 8192) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )


SHAPES = {
    "8B": ModelShape(4096, 14336, 32, 32, 8, 128256),
    "8B, 8 layers": ModelShape(4096, 14336, 8, 32, 8, 128256),
    "1B": ModelShape(2048, 8192, 16, 32, 8, 128256),
    "135M": ModelShape(576, 1536, 30, 9, 3, 49152),
    "135M, 4 layers": ModelShape(576, 1536, 4, 9, 3, 49152),
    "tiny": ModelShape(64, 96, 2, 4, 2, 256),
}


def make_base(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of this shape, frozen, its weights random at a scale that keeps activations sane.

    Packed rows attend within themselves, whoever's LoRAs are in the linears.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(shape.config())
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    # buffers (rotary frequencies) are not parameters: built anew where the weights are
    rotary = type(model.model.rotary_emb)(config=model.config)
    model.model.rotary_emb = rotary.to(device)
    model.set_attn_implementation(PACKED_ATTENTION)
    return model.requires_grad_(False).eval()


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same parameters, so that many providers fit in memory."""
    memo = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, memo)


def make_adapters(
    base: nn.Module, tasks: int, rank: int, dtype: torch.dtype
) -> dict[tuple[str, str, str], Tensor]:
    """(linear, "A" or "B", expert) to a random tensor; every linear but the output layer."""
    device = next(base.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    adapters = {}
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear) or module is base.get_output_embeddings():
            continue
        n, k = module.weight.shape
        for expert in expert_names(tasks):
            for half, size, scale in (("A", (rank, k), k**-0.5), ("B", (n, rank), 0.1 / rank)):
                values = torch.randn(*size, generator=generator, device=device) * scale
                adapters[name, half, expert] = values.to(dtype)
    return adapters


def expert_names(tasks: int) -> list[str]:
    return ["shared", *(f"task_{t}" for t in range(tasks))]


@dataclass(frozen=True)
class Row:
    """One example: its task, its tokens (prompt, then answer) and the length of the answer."""

    task: int
    tokens: Tensor
    answer: int


def make_rows(
    tasks: int, count: int, mean_length: int, vocabulary: int, sigma: float = 0.5
) -> list[Row]:
    """Rows of all tasks in turn, shuffled, their lengths log-normal (sigma) about the mean."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for i in range(count):
        answer = ANSWERS[i % tasks % len(ANSWERS)]
        factor = math.exp(sigma * torch.randn((), generator=generator).item() - sigma**2 / 2)
        length = max(answer + 2, round(mean_length * factor))
        tokens = torch.randint(0, vocabulary, (length,), generator=generator)
        rows.append(Row(i % tasks, tokens, answer))
    order = torch.randperm(count, generator=generator).tolist()
    return [rows[i] for i in order]


@dataclass
class Batch:
    """Rows in one layout. total: label tokens of the whole step, that losses are divided by.

    task_ids: (B,) padded, (1, N) packed. packed_rows: None where padded. positions, targets: of the
    label tokens ("labels" only).
    """

    layout: str
    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    labels: Tensor | None
    positions: Tensor | None
    targets: Tensor | None
    task_ids: Tensor
    total: int
    packed_rows: PackedRows | None = None

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")}
        return replace(self, **moved)


def make_batch(rows: list[Row], layout: str, total: int) -> Batch:
    """The rows "padded", "packed" into one sequence, or packed with logits at "labels" only."""
    if layout == "padded":
        return _padded(rows, total)
    tokens = torch.cat([row.tokens for row in rows])
    lengths = torch.tensor([len(row.tokens) for row in rows])
    marked = torch.cat([_row_labels(row) for row in rows])
    ids = torch.repeat_interleave(torch.tensor([row.task for row in rows]), lengths)
    batch = Batch(
        layout=layout,
        input_ids=tokens.unsqueeze(0),
        attention_mask=None,
        position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()]).unsqueeze(0),
        labels=marked.unsqueeze(0),
        positions=None,
        targets=None,
        task_ids=ids.unsqueeze(0),
        total=total,
        packed_rows=PackedRows.of(lengths.tolist()),
    )
    if layout == "packed":
        return batch
    places = (marked >= 0).nonzero().squeeze(1)
    return replace(batch, labels=None, positions=places - 1, targets=marked[places])


def _padded(rows: list[Row], total: int) -> Batch:
    width = max(len(row.tokens) for row in rows)

    def fill(values: list[Tensor], filler: int) -> Tensor:
        return torch.stack([F.pad(v, (0, width - len(v)), value=filler) for v in values])

    tokens = fill([row.tokens for row in rows], 0)
    mask = fill([torch.ones(len(row.tokens), dtype=torch.int64) for row in rows], 0)
    labels = fill([_row_labels(row) for row in rows], -100)
    tasks = torch.tensor([row.task for row in rows])
    return Batch("padded", tokens, mask, None, labels, None, None, tasks, total)


def _row_labels(row: Row) -> Tensor:
    labels = torch.full_like(row.tokens, -100)
    labels[-row.answer :] = row.tokens[-row.answer :]
    return labels


def label_tokens(rows: list[Row]) -> int:
    return sum(row.answer for row in rows)


def batch_loss(call, batch: Batch, **options) -> Tensor:
    """Cross-entropy summed over the batch's label tokens, over ``batch.total``.

    call: a causal LM's forward; options go to it.
    """
    options |= {"use_cache": False}
    if batch.attention_mask is not None:
        options["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        options["position_ids"] = batch.position_ids
    if batch.packed_rows is not None:
        options |= batch.packed_rows.inputs()
    if "inputs_embeds" not in options:
        options["input_ids"] = batch.input_ids
    if batch.layout == "labels":
        logits = call(logits_to_keep=batch.positions, **options).logits[0].float()
        return F.cross_entropy(logits, batch.targets, reduction="sum") / batch.total
    return call(labels=batch.labels, num_items_in_batch=batch.total, **options).loss


@contextmanager
def adding_loras(
    base: nn.Module, adapters: dict[tuple[str, str, str], Tensor], task: int
) -> Iterator[None]:
    """Inside, every linear adds the shared LoRA and the task's: the plainest way to route a row."""

    def hook(name: str):
        def add(module, args, output):
            for expert in ("shared", f"task_{task}"):
                a, b = adapters[name, "A", expert], adapters[name, "B", expert]
                output = output + SCALING * (args[0] @ a.t() @ b.t())
            return output

        return base.get_submodule(name).register_forward_hook(add)

    hooks = [hook(name) for name in sorted({name for name, _, _ in adapters})]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def reference_gradients(
    base: nn.Module, rows: list[Row], adapters: dict[tuple[str, str, str], Tensor]
) -> tuple[Tensor, dict[tuple[str, str, str], Tensor]]:
    """Loss and gradients, one row at a time."""
    leaves = {key: t.detach().clone().requires_grad_() for key, t in adapters.items()}
    total, loss = label_tokens(rows), 0.0
    for row in rows:
        tokens = row.tokens.unsqueeze(0).to(next(base.parameters()).device)
        with adding_loras(base, leaves, row.task):
            logits = base(input_ids=tokens, use_cache=False).logits[0]
        labels = tokens[0, -row.answer :]
        loss = loss + F.cross_entropy(logits[-row.answer - 1 : -1], labels, reduction="sum")
    loss = loss / total
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    named = zip(leaves, leaves.values(), grads, strict=True)
    return loss.detach(), {k: torch.zeros_like(t) if g is None else g for k, t, g in named}
