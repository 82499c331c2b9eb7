"""Vectors of train rows from models that did not see the row.

A user's vector was fitted on the answers of the user's train rows, and an item's on those of the
item. Shown in training, they tell the answer: the language model learns to trust them more than new
rows deserve. So each train row is shown the vectors of a model fitted without the row's fold, as a
new row is shown those of a model that does not know it. Rows of one pair of user and item share a
fold.

Factors may be turned at will, all of them together, and each fit has its own turn: the models'
factors are turned onto those of the whole fit (Schoenemann 1966), biases stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ckf.baselines import pair_numbers
from ckf.cf.tables import MappedTable, Scale, scaled_rows

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors
    from ckf.data.prepared import PreparedData

_LEFT_OUT = 3  # a split that no model reads


@dataclass(frozen=True)
class Folds:
    """rows (L,): the train rows that shape the vectors; fold (L,): which model did not see them."""

    rows: np.ndarray
    fold: np.ndarray
    models: list[CFVectors]


def fit_folds(
    data: PreparedData,
    refit: Callable[[PreparedData], CFVectors],
    count: int,
    seed: int,
    log: Callable[[str], None] = lambda line: None,
) -> Folds:
    """count models, or one a pair of user and item where there are fewer; none of a single pair.

    Args:
        refit: the model of the whole data, fitted on other data.
    """
    rows = train_rows(data)
    pair = pair_numbers(data, rows)
    pairs = int(pair.max()) + 1
    fold = np.random.default_rng([seed, 0xB1E2D]).permutation(pairs)[pair] % count
    models = []
    for number in range(min(count, pairs)) if pairs > 1 else ():
        log(f"cf: fitting without fold {number + 1} of {min(count, pairs)} of the train rows")
        models.append(refit(without(data, rows[fold == number])))
    return Folds(rows, fold, models)


def train_rows(data: PreparedData) -> np.ndarray:
    """Rows (L,) that shape CF vectors: with a label, or with a rating where no row has a label."""
    train = data.split == 0
    labelled = train & (data.label >= 0)
    return np.flatnonzero(labelled if labelled.any() else train & np.isfinite(data.rating))


def without(data: PreparedData, rows: np.ndarray) -> PreparedData:
    """The data with these rows in a split that no model reads."""
    split = data.split.copy()
    split[rows] = _LEFT_OUT
    return replace(data, split=split)


@dataclass(frozen=True)
class HeldOut:
    """The vectors of F models, one after the other, and which of them a train pair is shown.

    users (F * U, d) and items (F * I, d), in the space of the whole fit; user_known (F * U,) and
    item_known (F * I,) bool: has a train row outside the fold. pairs (L,): user * I + item of the
    train rows, ascending, each once; folds (L,): their model.
    """

    users: Tensor | MappedTable
    items: Tensor
    user_known: Tensor
    item_known: Tensor
    pairs: Tensor
    folds: Tensor

    @classmethod
    def of_models(cls, folds: Folds, data: PreparedData, whole: CFVectors) -> HeldOut:
        """whole: the vectors of the fit on all train rows."""
        turned = [_turned(model, whole) for model in folds.models]
        keys = data.user[folds.rows].astype(np.int64) * data.n_items + data.item[folds.rows]
        pairs, first = np.unique(keys, return_index=True)
        return cls(
            users=torch.cat([users for users, _ in turned]),
            items=torch.cat([items for _, items in turned]),
            user_known=torch.cat([model.user_known for model in folds.models]),
            item_known=torch.cat([model.item_known for model in folds.models]),
            pairs=torch.from_numpy(pairs),
            folds=torch.from_numpy(folds.fold[first].astype(np.int64)),
        )

    @classmethod
    def of(
        cls, tensors: dict[str, Tensor | MappedTable], n_users: int, n_items: int, dim: int
    ) -> HeldOut | None:
        """From a file's tensors, None without any; ValueError where they do not fit."""
        if not tensors:
            return None
        count, pairs = len(tensors.get("items", ())) // n_items, len(tensors.get("pairs", ()))
        expected = {"users": (count * n_users, dim), "items": (count * n_items, dim)}
        expected |= {"user_known": expected["users"][:1], "item_known": expected["items"][:1]}
        expected |= {"pairs": (pairs,), "folds": (pairs,)}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        numbers = [t.dtype for name, t in tensors.items() if name in ("pairs", "folds")]
        if found != expected or numbers != [torch.int64] * 2:
            raise ValueError(
                f"held-out vectors of shapes {found}, expected {expected}: fit the vectors anew"
            )
        folds = tensors["folds"]
        if pairs and not 0 <= int(folds.min()) <= int(folds.max()) < count:
            raise ValueError(
                f"held-out vectors of {count} folds, but pairs of {int(folds.min())} to "
                f"{int(folds.max())}: fit the vectors anew"
            )
        return cls(**tensors)

    def folds_of(self, users: Tensor, items: Tensor, n_items: int) -> Tensor:
        """The model (n,) that pairs of users (n,), -1 for strangers, and items (n,) are shown; -1
        where a pair has no train row and is shown the vectors of the whole fit."""
        wanted = users * n_items + items
        if len(self.pairs) == 0:
            return torch.full_like(wanted, -1)
        place = torch.searchsorted(self.pairs, wanted.contiguous()).clamp(max=len(self.pairs) - 1)
        there = (users >= 0) & (self.pairs[place] == wanted)
        return torch.where(there, self.folds[place], -1)

    def scaled(self, users: Scale, items: Scale) -> HeldOut:
        """Standardised as the vectors of the whole fit are."""
        return replace(
            self,
            users=scaled_rows(self.users, replace(users, known=self.user_known)),
            items=scaled_rows(self.items, replace(items, known=self.item_known)),
        )


def _turned(model: CFVectors, whole: CFVectors) -> tuple[Tensor, Tensor]:
    """Users (U, d) and items (I, d) of a model, turned onto those of the whole fit."""
    product = torch.zeros(model.dim - 1, model.dim - 1, dtype=torch.float64)
    for name in ("users", "items"):
        own, other = (getattr(vectors, name)[:, :-1].double() for vectors in (model, whole))
        product += own.T @ other  # unknown rows are zero
    left, _, right = torch.linalg.svd(product)
    turn = (left @ right).float()
    return tuple(
        torch.cat([table[:, :-1] @ turn, table[:, -1:]], 1) for table in (model.users, model.items)
    )
