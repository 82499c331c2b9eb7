"""Models that leave a part of the train rows out; rows of a user and an item stay together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ckf.baselines import pair_numbers

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
    rows, fold = _dealt(data, count, seed)
    pairs = int(pair_numbers(data, rows).max()) + 1
    models = []
    for number in range(min(count, pairs)) if pairs > 1 else ():
        log(f"cf: fitting without fold {number + 1} of {min(count, pairs)} of the train rows")
        models.append(refit(without(data, rows[fold == number])))
    return Folds(rows, fold, models)


def fold_numbers(data: PreparedData, count: int) -> np.ndarray:
    """The fold of each row of the data, for vectors of one's own (``cf.fold_users``).

    The same data and count give the same folds. Rows of a pair of user and item share one.

    Returns:
        (rows,) int64: 0 to count - 1, and -1 for rows that no CF model may be fitted on.
    """
    found = np.full(len(data.user), -1)
    rows, fold = _dealt(data, count)
    found[rows] = fold
    return found


def files_of_folds(data: PreparedData, models: list[CFVectors]) -> Folds:
    """Models that were fitted elsewhere, each without its fold of ``fold_numbers``."""
    return Folds(*_dealt(data, len(models)), models)


def _dealt(data: PreparedData, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The train rows (L,) and their folds (L,)."""
    rows = train_rows(data)
    pair = pair_numbers(data, rows)
    order = np.random.default_rng([seed, 0xB1E2D]).permutation(int(pair.max()) + 1)
    return rows, order[pair] % count


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
