"""From rows of the data to batches of tensors: questions, vectors, packing or padding.

Packed (the default where the model computes it right): all rows one after the other in a single
sequence, positions starting anew at each row, a task id per token; no padding, and rows of one
task are neighbours. Padded: one row each, padding on the left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ckf.cf import CFVectors, fold_in_users
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData
from ckf.match import MatchScores
from ckf.packed_attention import PackedRows
from ckf.prompts import USER_SLOT, Encoded, PromptEncoder, Question, matched_item

if TYPE_CHECKING:
    from ckf.prior import AnswerPrior


@dataclass(frozen=True)
class Example:
    """A row to train on or to score. place: index into ``candidates`` of a top-K list."""

    task: str
    row: int
    place: int = -1


class QuestionMaker:
    """Questions about rows of the prepared data, with their true answers."""

    def __init__(self, data: PreparedData, config: RunConfig) -> None:
        self.data, self.config = data, config

    def examples(self, task: str, split: str, list_name: str | None = None) -> list[Example]:
        """Every prepared row of a task and split; top-K rows with their place in a list."""
        rows, places = self.rows_and_places(task, split, list_name)
        return [Example(task, r, p) for r, p in zip(rows.tolist(), places.tolist(), strict=True)]

    def rows_and_places(
        self, task: str, split: str, list_name: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows (N,) of ``examples`` and their places (N,) in a list, -1 where there is none."""
        rows = self.data.rows(task, split)
        if task != "topk":
            return rows, np.full(len(rows), -1)
        listed = self.candidates(split, list_name).rows
        places = np.flatnonzero(np.isin(listed, rows))
        return listed[places], places

    def candidates(self, split: str, list_name: str | None = None):
        default = self.config.data.train_list if split == "train" else self._main_list()
        return self.data.candidates(split, list_name or default)

    def _main_list(self) -> str:
        return self.config.data.test_lists[0]

    def question(
        self, example: Example, split: str, list_name: str | None = None, answered: bool = True
    ) -> Question:
        """The question of one example; ``answered`` adds the true answer."""
        data, row, task = self.data, example.row, example.task
        item = int(data.item[row])
        history = [int(i) for i in data.history[row] if i >= 0]
        question = Question(task, history, item)
        if task == "topk":
            lists = self.candidates(split, list_name)
            question.candidates = lists.items[example.place].tolist()
            letter = chr(ord("A") + int(lists.positive[example.place]))
            question.answer = data.title(item) if self.ranks_by_title else letter
        elif task == "ctr":
            question.answer = "Yes" if data.label[row] == 1 else "No"
        elif task in ("rating", "review_rating"):
            question.answer = str(stars(data.rating[row], row))
            question.review = data.text(row) if task == "review_rating" else ""
        else:
            question.answer = data.explanation(row)
        if not answered:
            question.answer = None
        return question

    @property
    def ranks_by_title(self) -> bool:
        return self.config.prompt.rank_by == "title"


def stars(ratings: ArrayLike, rows: ArrayLike) -> np.ndarray:
    """Ratings (n,) of rows (n,), by index, as one of the five stars, int64.

    What lies between two goes up or down by its row's number, in shares that keep the mean: 3.5
    is 3 in half of the rows and 4 in the others.
    """
    share = np.asarray(rows, np.uint64) * np.uint64(0x9E3779B9) % np.uint64(2**32) / 2**32
    found = np.floor(np.asarray(ratings, np.float64) + share)
    return found.clip(1, 5).astype(np.int64)


def expected_stars(logits: np.ndarray) -> np.ndarray:
    """Mean rating (..,) under the softmax of logits over the five stars (.., 5)."""
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    return (chances @ np.arange(1, 6)) / chances.sum(-1)


class VectorLookup:
    """Standardised CF vectors of users, items and histories.

    A user without train rows is folded in from the items of the history. Rows are shown the vectors
    of a model that did not see them by their ``folds``, as ``CFVectors.folds`` gives them.
    """

    def __init__(self, vectors: CFVectors) -> None:
        self.vectors = vectors.standardised()
        self.dim = self.vectors.items.shape[1]

    def profiles(self, users: np.ndarray, history: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose vectors and whose history rows are shown with: their own."""
        return users, history

    def users(self, users: np.ndarray, history: np.ndarray, folds: Tensor | None = None) -> Tensor:
        """User indices (b,), -1 for a stranger, and histories (b, h) padded with -1: (b, d)."""
        own, known = self.vectors.user_rows(torch.as_tensor(users, dtype=torch.int64), folds)
        if bool(known.all()):
            return own
        folded = fold_in_users(self.vectors, torch.as_tensor(history, dtype=torch.int64))
        return torch.where(known.unsqueeze(1), own, folded.to(own.dtype))

    def items(self, items: Sequence[int], folds: Tensor | None = None) -> Tensor:
        """(p, d)."""
        return self.vectors.item_rows(torch.as_tensor(items, dtype=torch.int64), folds)

    def histories(self, history: np.ndarray, folds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Vectors (b, h, d) and mask (b, h) of histories (b, h) padded with -1."""
        index = torch.as_tensor(history, dtype=torch.int64)
        mask = index >= 0
        return self.vectors.item_rows(index.clamp(min=0), folds) * mask.unsqueeze(2), mask


class Collator:
    """Encoded prompts to a batch of tensors.

    Args:
        tasks: task names in the order of their ids.
        lookup: CF vectors, or None for text only.
        filler: token id for padding.
        packed: one sequence, or one row each.
        one_lora: route all tasks to LoRA 0, for models with a single one.
        matches: CF scores of user and item for the match slots, or None.
        prior: log-odds of the answers from those scores, or None.
        tells_rows: tell packed attention the rows (``ckf.packing.attend_packed``).
    """

    def __init__(
        self,
        tasks: Sequence[str],
        lookup: VectorLookup | None,
        filler: int,
        packed: bool,
        one_lora: bool = False,
        matches: MatchScores | None = None,
        prior: AnswerPrior | None = None,
        tells_rows: bool = False,
    ) -> None:
        self.tasks, self.lookup = list(tasks), lookup
        self.filler, self.packed, self.tells_rows = filler, packed, tells_rows
        self.one_lora, self.matches, self.prior = one_lora, matches, prior

    def padded(self) -> Collator:
        """The same collator for one row each."""
        tasks, lookup, filler = self.tasks, self.lookup, self.filler
        return Collator(tasks, lookup, filler, False, self.one_lora, self.matches, self.prior)

    def __call__(
        self,
        prompts: Sequence[Encoded],
        users: Sequence[int],
        histories,
        folded=None,
        folds: Tensor | None = None,
    ) -> dict:
        """The batch. users: user index per prompt; histories (b, h) padded with -1; folded (b,)
        bool or None: users whose vectors come from their history, own ones or not; folds (b,):
        which held-out vectors a row is shown, as ``CFVectors.folds`` gives them.

        Returns:
            input_ids, position_ids, task_ids (B, S); attention_mask (B, S), padded only; slots (p,)
            flat positions of vectors with slot_rows (p,), -1 for items; user_vectors (b, d),
            history_vectors (b, h, d), history_mask (b, h), item_vectors (p_items, d); match_slots
            (p_match,) and match_scores (p_match, 1) where there are matches; prior_rows,
            prior_tokens and prior_values (p_prior,) where there is a prior
            (``AnswerPrior.entries``); packed_rows, a ``PackedRows``, where attention is told;
            label_slots (q,) flat positions that predict, label_tokens (q,) and label_rows (q,);
            row_tasks (b,); last_slots (b,) flat positions that predict each row's first answer
            token; first_column, an int, padded only: no predicting position lies before it.
        """
        batch = self._packed(prompts) if self.packed else self._padded(prompts)
        starts = batch.pop("starts")
        batch |= self._labels(prompts, starts)
        if self.one_lora:
            batch["task_ids"] = torch.zeros_like(batch["task_ids"])
        batch["row_tasks"] = torch.tensor([self.tasks.index(p.task) for p in prompts])
        if self.lookup is not None:
            users, histories = self.lookup.profiles(np.asarray(users), np.asarray(histories))
            if folded is not None:
                users = np.where(folded, -1, users)
            batch |= self._vectors(prompts, starts, users, histories, folds)
        return batch

    def _packed(self, prompts: Sequence[Encoded]) -> dict:
        pieces = [[*p.tokens, *p.answer] for p in prompts]
        lengths = [len(p) for p in pieces]
        ids = [self.tasks.index(p.task) for p in prompts]
        rows = {"packed_rows": PackedRows.of(lengths)} if self.tells_rows else {}
        return rows | {
            "input_ids": torch.tensor([[t for piece in pieces for t in piece]]),
            "position_ids": torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0),
            "task_ids": torch.repeat_interleave(torch.tensor(ids), torch.tensor(lengths)).unsqueeze(
                0
            ),
            "starts": np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(int).tolist(),
        }

    def _padded(self, prompts: Sequence[Encoded]) -> dict:
        width = max(p.length for p in prompts)
        pads = [width - p.length for p in prompts]
        rows = [
            [self.filler] * pad + p.tokens + p.answer for p, pad in zip(prompts, pads, strict=True)
        ]
        column = torch.arange(width).unsqueeze(0)
        pad = torch.tensor(pads).unsqueeze(1)
        ids = torch.tensor([self.tasks.index(p.task) for p in prompts]).unsqueeze(1)
        return {
            "first_column": width - 1 - max(len(p.answer) for p in prompts),
            "input_ids": torch.tensor(rows),
            "attention_mask": (column >= pad).long(),
            "position_ids": (column - pad).clamp(min=0),
            "task_ids": ids.expand(len(prompts), width).contiguous(),
            "starts": [i * width + p for i, p in enumerate(pads)],
        }

    def _labels(self, prompts: Sequence[Encoded], starts: list[int]) -> dict:
        slots, tokens, rows = [], [], []
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            first = start + len(prompt.tokens) - 1  # this position predicts the first answer token
            slots += range(first, first + len(prompt.answer))
            tokens += prompt.answer
            rows += [row] * len(prompt.answer)
        last = [s + len(p.tokens) - 1 for p, s in zip(prompts, starts, strict=True)]
        named = {"label_slots": slots, "label_tokens": tokens, "label_rows": rows}
        named["last_slots"] = last
        return {k: torch.tensor(v, dtype=torch.int64) for k, v in named.items()}

    def _vectors(
        self, prompts, starts, users: np.ndarray, histories: np.ndarray, folds: Tensor | None
    ) -> dict:
        slots, slot_rows, items, item_rows = [], [], [], []
        match_slots, match_rows, match_items = [], [], []
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            for position, what in prompt.slots:
                matched = matched_item(what)
                if matched is not None:
                    match_slots.append(start + position)
                    match_rows.append(row)
                    match_items.append(matched)
                    continue
                slots.append(start + position)
                slot_rows.append(row if what == USER_SLOT else -1)
                if what != USER_SLOT:
                    items.append(what)
                    item_rows.append(row)

        def of_rows(rows: list[int]) -> Tensor | None:
            return None if folds is None else folds[rows]

        vectors, mask = self.lookup.histories(histories, folds)
        matches = {}
        if self.matches is not None and match_slots:
            pairs = (users[match_rows], histories[match_rows], match_items)
            scores = self.matches(*pairs, of_rows(match_rows))
            matches = {"match_slots": torch.tensor(match_slots), "match_scores": scores}
            if self.prior is not None:
                names = [prompt.task for prompt in prompts]
                known = self.prior.features(*pairs, scores)
                matches |= self.prior.entries(names, np.array(match_rows), known)
        return matches | {
            "slots": torch.tensor(slots, dtype=torch.int64),
            "slot_rows": torch.tensor(slot_rows, dtype=torch.int64),
            "user_vectors": self.lookup.users(users, histories, folds),
            "history_vectors": vectors,
            "history_mask": mask,
            "item_vectors": self.lookup.items(items, of_rows(item_rows)),
        }


class RowBatcher:
    """Examples of the prepared data to batches.

    cache: where encoded prompts are taken from instead, as ``ckf.experiment`` sets it.
    """

    def __init__(self, maker: QuestionMaker, encoder: PromptEncoder, collator: Collator) -> None:
        self.maker, self.encoder, self.collator = maker, encoder, collator
        self.cache = None

    def encode(self, example: Example, split: str, vectors: bool, list_name=None) -> Encoded:
        if self.cache is not None:
            return self.cache.prompt(self.maker, self.encoder, example, split, vectors, list_name)
        return self.encoder.encode(self.maker.question(example, split, list_name), vectors)

    def batch(self, examples: Sequence[Example], prompts: Sequence[Encoded], folded=None) -> dict:
        """The batch of encoded examples; ``folded`` as for the collator."""
        rows = [e.row for e in examples]
        data, lookup = self.maker.data, self.collator.lookup
        users = data.user[rows]
        folds = None if lookup is None else lookup.vectors.folds(users, data.item[rows])
        return self.collator(prompts, users, data.history[rows], folded, folds)


def is_drawn(seed: int, position: int, probability: float) -> bool:
    """Whether a draw for a position of the run, which needs no state, falls below a probability."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < probability
