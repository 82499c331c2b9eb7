"""Packed batches and steps for the tests of decoder layers as CUDA graphs."""

import torch

from ckf.packed_attention import PackedRows
from tests.tiny import tokens as random_tokens

TASKS = ["ctr", "topk", "rating"]


def batch_of(lengths, seed=0):
    """Packed rows of the tasks in turn, one of them without."""
    total = sum(lengths)
    tasks = [(i + seed) % (len(TASKS) + 1) - 1 for i in range(len(lengths))]
    ids = torch.repeat_interleave(torch.tensor(tasks), torch.tensor(lengths)).unsqueeze(0)
    words = random_tokens(1, total + seed)[:, seed:]
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    rows = PackedRows.of(lengths)
    return {"input_ids": words, "labels": words, "position_ids": positions, "task_ids": ids,
            "use_cache": False, **rows.inputs()}  # fmt: skip


def step(model, batch, seed=0):
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
