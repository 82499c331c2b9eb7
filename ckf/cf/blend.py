"""The CF model's score beside what else is known of user and item, by a regression.

    score = w p_u . q_i + user part + item part + z_i . taste of the user + bias

The regression (ckf.cf.effects) is fitted on train rows; an item's part and axes z_i come from its
release year, its popularity and, with ``cf.titles``, its title as the language model reads it, so
that an item without train rows has a score too. A train row is scored as if it were new, by a CF
model and a regression fitted without the row's fold; otherwise the language model after it would
trust scores that know the answer. Rows of one pair of user and item tell of one another: they are
left out together. Those scores of train pairs are kept: training sees what new rows will show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ckf.baselines import pair_numbers, release_years
from ckf.cf.effects import ItemSide, Observations, fit_effects

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors
    from ckf.data.prepared import PreparedData

_KNOWN_AXIS = 0.35  # length of the axes of year and popularity; a title's have 1 together
REGRESSION = 2  # the regression's version: scores of another are not these
_STATES_AT_ONCE = 65_536
_LEFT_OUT = 3  # a split that no model reads


@dataclass(frozen=True)
class Blend:
    """users (U,) and items (I,): what is added to ``weight`` x p . q; zero for unknown users.

    tastes (U, k) and axes (I, k): their product is added too.
    pairs (L,): user * n_items + item of the train rows, ascending; pair_scores (L,): their scores
    from without the pair. scalars (2,): weight and bias.
    """

    users: Tensor
    items: Tensor
    tastes: Tensor
    axes: Tensor
    pairs: Tensor
    pair_scores: Tensor
    scalars: Tensor

    @classmethod
    def of(cls, tensors: dict[str, Tensor], n_users: int, n_items: int) -> Blend | None:
        """From a file's tensors, None without any; ValueError where they do not fit."""
        if not tensors:
            return None
        count = len(tensors.get("pairs", ()))
        if not {"tastes", "axes"} & tensors.keys():  # a file of before they were there
            tensors |= {"tastes": torch.zeros(n_users, 0), "axes": torch.zeros(n_items, 0)}
        width = tensors["axes"].shape[1] if tensors.get("axes", torch.empty(0)).ndim == 2 else 0
        expected = {"users": (n_users,), "items": (n_items,), "scalars": (2,)}
        expected |= {"tastes": (n_users, width), "axes": (n_items, width)}
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
        scores = scores + (self.tastes[user_idx] * self.axes[item_idx]).sum(-1)
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
    titles: Tensor | None = None,
) -> CFVectors:
    """The vectors with a blend.

    Args:
        refit: the same model, fitted on other data.
        titles: (I, c) principal components of the items' titles.

    Raises:
        ValueError: the train rows have not both labels.
    """
    train = np.flatnonzero((data.split == 0) & (data.label >= 0))
    labels = data.label[train].astype(np.float64)
    if len(np.unique(labels)) < 2:
        raise ValueError(
            f"cf.blend is {folds}, but the train rows have not both labels, which its regression "
            "needs: set cf.blend to 0"
        )
    pair = pair_numbers(data, train)
    fold = np.random.default_rng([seed, 0xB1E2D]).permutation(pair.max() + 1)[pair] % folds
    dots = np.zeros(len(train))
    for number in range(folds):
        rows = train[fold == number]
        split = data.split.copy()
        split[rows] = _LEFT_OUT
        dots[fold == number] = _dots(refit(replace(data, split=split)), data, rows)
    centre, scale = dots.mean(), float(spread(dots.std()))
    seen = Observations(
        users=torch.from_numpy(data.user[train].astype(np.int64)),
        items=torch.from_numpy(data.item[train].astype(np.int64)),
        dots=torch.from_numpy((dots - centre) / scale),
        labels=torch.from_numpy(labels),
    )
    if titles is None:
        titles = torch.zeros(data.n_items, 0)
    titles = titles.double()
    years = torch.from_numpy(release_years(data)).double()
    pair_scores = torch.zeros(len(train), dtype=torch.float64)
    for number in range(folds):
        new = torch.from_numpy(fold == number)
        others = _chosen(seen, ~new)
        side = _item_side(others, years, titles)
        found = fit_effects(others, side, data.n_users)
        pair_scores[new] = found.logits(_chosen(seen, new), side)
    side = _item_side(seen, years, titles)
    found = fit_effects(seen, side, data.n_users)
    keys = seen.users * data.n_items + seen.items
    order = torch.argsort(keys, stable=True)
    weight, bias = found.scalars
    blend = Blend(
        users=found.users.float(),
        items=found.items.float(),
        tastes=found.tastes.float(),
        axes=side.axes.float(),
        pairs=keys[order],
        pair_scores=pair_scores[order].float(),
        scalars=torch.stack([weight / scale, bias - weight * centre / scale]).float(),
    )
    return replace(vectors, blend=blend)


def _item_side(rows: Observations, years: Tensor, titles: Tensor) -> ItemSide:
    """Features and axes of all items; year and popularity standardised over the rows."""
    count = torch.bincount(rows.items, minlength=len(years))
    # an item that nobody saw counts as one seen once, which the regression has met
    known = torch.stack([years, count.clamp(min=1).double().log1p()], 1)  # (I, 2)
    met = known[rows.items]
    known = known.clamp(met.min(0).values, met.max(0).values)  # a parabola goes far beyond
    known = (known - met.mean(0)) / torch.from_numpy(spread(met.std(0, correction=0)))
    features = torch.cat([titles, known, known.square() / 3], 1)
    return ItemSide(features, torch.cat([titles, known * _KNOWN_AXIS], 1))


def _chosen(rows: Observations, mask: Tensor) -> Observations:
    return Observations(*(values[mask] for values in vars(rows).values()))


def _dots(vectors: CFVectors, data: PreparedData, rows: np.ndarray) -> np.ndarray:
    users = vectors.users[torch.from_numpy(data.user[rows].astype(np.int64))]
    items = vectors.items[torch.from_numpy(data.item[rows].astype(np.int64))]
    return (users[:, :-1] * items[:, :-1]).sum(1).double().numpy()


def principal_components(states: Tensor, count: int) -> Tensor:
    """Principal components (I, count) float32 of states (I, width), of mean squared length 1.

    Signs are fixed, so that the same states give the same.

    Raises:
        ValueError: more components than states or their width have.
    """
    if count > min(states.shape):
        raise ValueError(
            f"cf.titles is {count}, but {len(states)} titles of width {states.shape[1]} have "
            f"{min(states.shape)} components: lower it"
        )
    mean = states.mean(0, dtype=torch.float64)
    parts = states.split(_STATES_AT_ONCE)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for part in parts:
        centred = part - mean
        scatter += centred.T @ centred
    _, axes = torch.linalg.eigh(scatter)  # ascending
    axes = axes[:, -count:].flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * largest.sign()
    found = torch.cat([(part - mean) @ axes for part in parts])
    length = found.square().sum(1).mean().sqrt()
    return (found / length if length > 1e-9 else torch.zeros_like(found)).float()


def spread(deviations: ArrayLike) -> np.ndarray:
    """What to divide by: 1 where all is equal up to rounding, which says nothing of other rows."""
    return np.where(np.asarray(deviations) < 1e-9, 1.0, deviations)
