"""The whole model: backbone with Multi-LoRA, meta-network, vectors written into the prompt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ckf.metanet import MetaNetwork
from ckf.patch import patch_state

_HEAD_ROWS = 16384
_SCALED_TOKENS = 2048  # that tell what the embedding module makes of its table


class CKFModel(nn.Module):
    """A patched causal LM whose prompts carry user and item vectors.

    Args:
        backbone: a model after ``ckf.patch_model``.
        metanet: maps CF vectors to embeddings, or None for text only.
    """

    def __init__(self, backbone: PreTrainedModel, metanet: MetaNetwork | None) -> None:
        super().__init__()
        patch_state(backbone)
        self.backbone, self.metanet = backbone, metanet
        head = backbone.get_output_embeddings()
        if type(head) is nn.Linear and head.weight.dtype in (torch.bfloat16, torch.float16):
            head.register_forward_hook(_in_float32)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def forward(self, **batch: Tensor | int) -> dict[str, Tensor]:
        """Loss of a batch from ``batches.Collator``.

        A row's loss is the mean cross-entropy over its answer tokens; the loss is the mean over
        rows, so that a long answer weighs as much as a short one.

        Returns:
            loss (), row_losses (b,), row_tasks (b,).
        """
        logits, rows = self.logits(batch, batch["label_slots"]).float(), batch["label_rows"]
        if "prior_rows" in batch and rows.numel():  # a row's first answer token
            first = torch.searchsorted(rows, batch["prior_rows"]).clamp(max=rows.numel() - 1)
            own = torch.where(rows[first] == batch["prior_rows"], batch["prior_values"], 0)
            logits = _with_prior(logits, first, batch["prior_tokens"], own)
        token_losses = F.cross_entropy(logits, batch["label_tokens"], reduction="none")
        zeros = token_losses.new_zeros(batch["row_tasks"].shape[0])
        counts = zeros.index_add(0, rows, torch.ones_like(token_losses))
        row_losses = zeros.index_add(0, rows, token_losses) / counts.clamp(min=1)
        return {
            "loss": row_losses.mean(),
            "row_losses": row_losses.detach(),
            "row_tasks": batch["row_tasks"],
        }

    def answer_logits(self, batch: dict) -> Tensor:
        """Logits (b, vocabulary) float32 where each row's answer begins."""
        logits = self.logits(batch, batch["last_slots"]).float()
        if "prior_rows" not in batch:
            return logits
        return _with_prior(
            logits, batch["prior_rows"], batch["prior_tokens"], batch["prior_values"]
        )

    def logits(self, batch: dict, positions: Tensor) -> Tensor:
        """Logits of the language model alone at flat positions (q,), (q, vocabulary)."""
        embeds = self.embed(batch)
        length = embeds.shape[1]
        options = {"position_ids": batch["position_ids"], "task_ids": batch["task_ids"]}
        if "first_column" in batch:  # padded on the left: the last columns hold all positions
            first = batch["first_column"]  # by index: a slice's rows would be multiplied one by one
            options["logits_to_keep"] = torch.arange(first, length, device=positions.device)
            index = (positions // length) * (length - first) + positions % length - first
        else:
            options["logits_to_keep"] = positions
            index = slice(None)
        if "packed_rows" in batch:
            options["packed_rows"] = batch["packed_rows"]
        elif "attention_mask" in batch:
            options["attention_mask"] = batch["attention_mask"]
        output = self.backbone(inputs_embeds=embeds, use_cache=False, **options)
        return output.logits.flatten(0, 1)[index]

    def embed(self, batch: dict) -> Tensor:
        """Token embeddings (B, S, width) with every vector of every row in its place."""
        embeds = self.backbone.get_input_embeddings()(batch["input_ids"])
        if self.metanet is None or "slots" not in batch or batch["slots"].numel() == 0:
            return embeds
        dtype = next(self.metanet.parameters()).dtype
        users = self.metanet(
            batch["user_vectors"].to(dtype),
            batch["history_vectors"].to(dtype),
            batch["history_mask"],
        )  # (b, width)
        items = self.metanet.items(batch["item_vectors"].to(dtype))  # (p_items, width)
        is_item = batch["slot_rows"] < 0
        order = torch.where(
            is_item, users.shape[0] + is_item.cumsum(0) - 1, batch["slot_rows"]
        )  # rows of [users; items]
        vectors, slots = torch.cat([users, items]).index_select(0, order), batch["slots"]
        if "match_slots" in batch:
            matches = self.metanet.matches(batch["match_scores"].to(dtype))  # (p_match, width)
            vectors, slots = torch.cat([vectors, matches]), torch.cat([slots, batch["match_slots"]])
        flat = embeds.reshape(-1, embeds.shape[-1])
        return flat.index_copy(0, slots, vectors.to(embeds.dtype)).view_as(embeds)


def _with_prior(logits: Tensor, at: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """The same logits (q, vocabulary) with values (p,) added in place, at their rows and tokens."""
    return logits.index_put_((at, tokens), values.to(logits.dtype), accumulate=True)


def _in_float32(head: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Logits of a half-precision head in float32 where answers are scored, not where it trains.

    Logits near 18 are 0.125 apart in bfloat16: scores that differ by less would tie.
    """
    if head.training:
        return output
    hidden = inputs[0].float()
    bias = None if head.bias is None else head.bias.float()
    parts = head.weight.split(_HEAD_ROWS)  # no second copy of a large vocabulary
    logits = torch.cat([hidden @ part.float().T for part in parts], dim=-1)
    return logits if bias is None else logits + bias


@torch.no_grad()
def embedding_scale(backbone: PreTrainedModel) -> float:
    """Standard deviation of the token embeddings, the scale at which mapped vectors start.

    Of what the model's module gives: Gemma's multiplies its table by sqrt(width) on the way.
    """
    module = backbone.get_input_embeddings()
    scale = float(module.weight.float().std())
    step = -(-len(module.weight) // _SCALED_TOKENS)
    tokens = torch.arange(0, len(module.weight), step, device=module.weight.device)
    stored, given = module.weight[tokens].float(), module(tokens).float()
    return scale if torch.equal(stored, given) else scale * float(given.std() / stored.std())
