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
