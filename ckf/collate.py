"""Batches of any Hugging Face collator, with every row's task kept."""

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening

from ckf.packed_attention import PackedRows, attends_packed
from ckf.packing import packs_rows_right
from ckf.patch import patch_state
from ckf.routing import Router

IGNORED = -100  # the label that transformers' losses skip
KEYS = ("task_ids", "task_id", "task")


class TaskCollator:
    """Wraps a collator: takes each feature's task, lets it batch the rest, adds ``task_ids``.

    A feature names its task under ``task_ids``, ``task_id`` or ``task``, by name or number; -1 is
    the base alone. Trainer keeps the column ``task_ids`` by itself, the others only with
    ``remove_unused_columns=False``.

    Args:
        model: the patched model, before DDP or FSDP wraps it.
        collator: any collator that pads, one row a feature; or one that flattens, like
            ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)``: rows are then packed into
            one sequence, with an id a token and no cache, and their first labels are masked.
            A model on "ckf_packed" attention is told the rows (``ckf.packed_attention``).

    Raises:
        ValueError: an unpatched model, or a model that does not keep packed rows apart.
    """

    def __init__(self, model: nn.Module, collator: Callable[[list[dict]], Mapping]) -> None:
        self.router = Router(patch_state(model).router.tasks)
        self.collator = collator
        self.tells_rows = attends_packed(model)
        if isinstance(collator, DataCollatorWithFlattening) and not packs_rows_right(model):
            raise ValueError(
                f"{type(model).__name__} does not keep packed rows apart; give a collator that "
                "pads, for example DataCollatorForSeq2Seq(tokenizer)"
            )

    def __call__(self, features: Sequence[Mapping]) -> dict[str, object]:
        """The collator's batch and task_ids, (batch,) or packed (1, tokens), int64 on the host.

        Raises:
            ValueError: a feature without a task, an unknown name, a number out of range.
        """
        rows = [dict(feature) for feature in features]
        ids = self.router.tensor([_take_task(row, i) for i, row in enumerate(rows)])
        lengths = torch.tensor([len(row["input_ids"]) for row in rows if "input_ids" in row])
        own_positions = any("position_ids" in row for row in rows)
        batch = dict(self.collator(rows))
        tokens = batch.get("input_ids")
        if not isinstance(tokens, Tensor):
            return batch | {"task_ids": ids}
        flat = tokens.shape == (1, int(lengths.sum()))
        packed = flat and "position_ids" in batch and not own_positions  # of one row, too
        if tokens.shape[0] == len(rows) and not packed:
            return batch | {"task_ids": ids}
        if not flat:
            raise ValueError(
                f"the collator made input_ids of shape {tuple(tokens.shape)} from {len(rows)} "
                "rows; expected one row a feature, or all rows flattened into one"
            )
        if "position_ids" not in batch:
            raise ValueError(
                "the collator flattens rows without position_ids, so they would see each other; "
                "make it with return_position_ids=True"
            )
        if "labels" in batch:  # a row's last token must not learn the next row's first
            batch["labels"][0, lengths.cumsum(0) - lengths] = IGNORED
        packed_ids = ids.repeat_interleave(lengths).unsqueeze(0)
        rows = {"packed_rows": PackedRows.of(lengths.tolist())} if self.tells_rows else {}
        return batch | {"task_ids": packed_ids, "use_cache": False} | rows


def _take_task(row: dict, index: int) -> str | int:
    found = [key for key in KEYS if key in row]
    if len(found) != 1:
        raise ValueError(
            f"feature {index} has {', '.join(found) or 'no task'} among its keys "
            f"{', '.join(row)}; expected one of {', '.join(KEYS)} (Trainer drops columns other "
            "than task_ids unless remove_unused_columns=False)"
        )
    task = row.pop(found[0])
    try:
        if isinstance(task, bool):
            raise TypeError("a bool is no number of a task")
        return task if isinstance(task, str) else operator.index(task)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"feature {index} has {found[0]} {task!r}; expected a task's name or whole number"
        ) from error
