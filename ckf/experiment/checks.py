"""Checks that must hold in every cell, made on the trained model itself."""

from __future__ import annotations

import torch

from ckf.assembly import Assembly
from ckf.patch import patched_layers
from ckf.scoring import Scorer

_ROWS = 6


def check_run(assembly: Assembly, split: str) -> dict[str, bool]:
    """{check: holds}; checks that do not apply to the cell are left out.

    every_adapter_trained: no B, which starts at zero, is zero still. vectors_reach_their_row_only:
    another user vector changes the scores of its row and of no other in the batch.
    """
    found = {"every_adapter_trained": _every_adapter_trained(assembly)}
    if assembly.uses_vectors:
        found["vectors_reach_their_row_only"] = _vectors_reach_their_row_only(assembly, split)
    return found


def _every_adapter_trained(assembly: Assembly) -> bool:
    return all(
        bool(layer.lora_B[expert].detach().abs().max() > 0)
        for layer in patched_layers(assembly.model.backbone).values()
        for expert in layer.experts
    )


@torch.no_grad()
def _vectors_reach_their_row_only(assembly: Assembly, split: str) -> bool:
    task = assembly.tasks[0]
    examples = assembly.maker.examples(task, split)[:_ROWS]
    prompts = [assembly.batcher.encode(e, split, True) for e in examples]
    rows = [e.row for e in examples]
    data, collator = assembly.data, Scorer(assembly).collator
    batch = collator(prompts, data.user[rows], data.history[rows])
    device = assembly.model.device
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    def scores() -> torch.Tensor:
        return assembly.model.answer_logits(batch)

    assembly.model.eval()
    before = scores()
    batch["user_vectors"] = batch["user_vectors"].clone()
    batch["user_vectors"][0] += 3.0  # deviations
    moved = (scores() - before).abs().amax(1)
    others = float(moved[1:].max()) if len(rows) > 1 else 0.0
    return float(moved[0]) > 0 and others <= float(moved[0]) / 100
