"""The CF model's score beside what simple means know, by a regression that sees no own label.

    score = w . p_u . q_i + user part + item part + bias

user part: mean of the user's train labels; item part: mean of the item's, log popularity, year. A
logistic regression finds the weights on train rows. For a train row the means leave its own label
out, and p . q comes from a model fitted without the row's fold; otherwise the regression, and the
language model after it, would trust vectors that know the answer. Rows of one pair of user and item
tell of one another: they are left out together. Those scores of train pairs are kept: training sees
what it will meet on new rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ckf.baselines import (
    ITEM_PRIOR,
    USER_PRIOR,
    TrainMeans,
    pair_numbers,
    regression_features,
    release_years,
)

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors
    from ckf.data.prepared import PreparedData

_USED = [0, 1, 2, 4]  # of the features: item mean, user mean, log popularity, year
_RIDGE = 1.0  # on weights of standardised features
_LEFT_OUT = 3  # a split that no model reads


@dataclass(frozen=True)
class Blend:
    """users (U,) and items (I,): what is added to ``weight`` x p . q; zero where nothing is known.

    pairs (L,): user * n_items + item of the train rows, ascending; pair_scores (L,): their scores
    from without the pair. scalars (2,): weight and bias.
    """

    users: Tensor
    items: Tensor
    pairs: Tensor
    pair_scores: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, tensors: dict[str, Tensor], n_users: int, n_items: int) -> Blend | None:
        """From a file's tensors, None without any; ValueError where they do not fit."""
        if not tensors:
            return None
        count = len(tensors.get("pairs", ()))
        expected = {"users": (n_users,), "items": (n_items,), "scalars": (2,)}
        expected |= {"pairs": (count,), "pair_scores": (count,)}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != expected or tensors["pairs"].dtype != torch.int64:
            raise ValueError(
                f"a blend of shapes {found}, expected {expected}: fit the vectors anew"
            )
        return cls(**tensors)

    def score(self, user_idx: Tensor, item_idx: Tensor, dots: Tensor) -> Tensor:
        """Scores of pairs in the shape of both; dots: p . q of each, biases left out."""
        weight, bias = self.scalars
        scores = weight * dots + self.users[user_idx] + self.items[item_idx] + bias
        if len(self.pairs) == 0:
            return scores
        wanted = user_idx * len(self.items) + item_idx
        place = torch.searchsorted(self.pairs, wanted.contiguous()).clamp(max=len(self.pairs) - 1)
        return torch.where(self.pairs[place] == wanted, self.pair_scores[place], scores)


def fit_blend(
    vectors: CFVectors,
    data: PreparedData,
    refit: Callable[[PreparedData], CFVectors],
    folds: int,
    seed: int,
) -> CFVectors:
    """The vectors with a blend. refit: the same model, fitted on other data.

    Raises ValueError where the train rows have not both labels.
    """
    train = np.flatnonzero((data.split == 0) & (data.label >= 0))
    labels = data.label[train].astype(np.float64)
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"cf.blend is {folds}, but the train rows have not both labels, which its regression "
            "needs: set cf.blend to 0"
        )
    means, year = TrainMeans.of(data, "label"), release_years(data)
    pair = pair_numbers(data, train)
    fold = np.random.default_rng([seed, 0xB1E2D]).permutation(pair.max() + 1)[pair] % folds
    dots = np.zeros(len(train))
    for number in range(folds):
        rows = train[fold == number]
        split = data.split.copy()
        split[rows] = _LEFT_OUT
        dots[fold == number] = _dots(refit(replace(data, split=split)), data, rows)
    known = regression_features(data, train, means, year, leave_out=True)[:, _USED]
    x = np.column_stack([known, dots])
    centre, scale = x.mean(0), spread(x.std(0))
    weights, intercept = _logistic((x - centre) / scale, labels)
    weights = weights / scale
    bias = intercept - centre @ weights
    item_mean, popularity = means.item_mean(ITEM_PRIOR), np.log1p(means.item_count)
    # what is unknown stands at zero, as in the vectors: its value belongs to the bias
    nothing = np.array([means.mean, means.mean, 0.0, year[data.item[train]].mean()])
    items = np.column_stack([item_mean, popularity, year]) - nothing[[0, 2, 3]]
    keys = data.user[train].astype(np.int64) * data.n_items + data.item[train]
    order = np.argsort(keys, kind="stable")
    blend = Blend(
        users=_tensor((means.user_mean(USER_PRIOR) - nothing[1]) * weights[1]),
        items=_tensor((items @ weights[[0, 2, 3]]) * vectors.item_known.numpy()),
        pairs=torch.from_numpy(keys[order]),
        pair_scores=_tensor((x @ weights + bias)[order]),
        scalars=_tensor(np.array([weights[4], bias + nothing @ weights[:4]])),
    )
    return replace(vectors, blend=blend)


def _dots(vectors: CFVectors, data: PreparedData, rows: np.ndarray) -> np.ndarray:
    users = vectors.users[torch.from_numpy(data.user[rows].astype(np.int64))]
    items = vectors.items[torch.from_numpy(data.item[rows].astype(np.int64))]
    return (users[:, :-1] * items[:, :-1]).sum(1).double().numpy()


def spread(deviations: ArrayLike) -> np.ndarray:
    """What to divide by: 1 where all is equal up to rounding, which says nothing of other rows."""
    return np.where(np.asarray(deviations) < 1e-9, 1.0, deviations)


def _logistic(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights and intercept of a logistic regression with a ridge on the weights, by Newton."""
    design = np.column_stack([x, np.ones(len(x))])
    ridge = np.diag([_RIDGE] * x.shape[1] + [0.0])
    found = np.zeros(design.shape[1])
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        slope = design.T @ (p - y) + ridge @ found
        step = np.linalg.solve((design * (p * (1 - p))[:, None]).T @ design + ridge, slope)
        found -= step
        if np.abs(step).max() < 1e-8:
            break
    return found[:-1], float(found[-1])


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
