"""The CF model's score beside what else is known of user and item, by a regression.

    score = w p_u . q_i + user part + item part + z_i . taste of the user + bias

The regression (ckf.cf.effects) is fitted on train rows; an item's part and axes z_i come from its
release year, its popularity and, with ``cf.titles``, its title as the language model reads it, so
that an item without train rows has a score too. A train row is scored as if it were new, by a CF
model and a regression fitted without the row's fold; otherwise the language model after it would
trust scores that know the answer. Rows of one pair of user and item tell of one another: they are
left out together. Those scores of train pairs are kept: training sees what new rows will show.
With ``cf.history`` a row's last liked items count as well (ckf.cf.history).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ckf.baselines import release_years
from ckf.cf.effects import Effects, ItemSide, Observations, fit_effects
from ckf.cf.folds import Folds, without
from ckf.cf.history import HistoryTerm, Sides, fit_weights, points_of, scored

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors
    from ckf.data.prepared import PreparedData

_KNOWN_AXIS = 0.35  # length of the axes of year and popularity; a title's have 1 together
REGRESSION = 3  # the regression's version: scores of another are not these
_STATES_AT_ONCE = 65_536
_HISTORY = "history."  # begins the names of its tensors in a file


@dataclass(frozen=True)
class Blend:
    """users (U,) and items (I,): what is added to ``weight`` x p . q; zero for unknown users.

    tastes (U, k) and axes (I, k): their product is added too.
    pairs (L,): user * n_items + item of the train rows, ascending; pair_scores (L,): their scores
    from without the pair, the first row's where a pair repeats. scalars (2,): weight and bias.
    history: what a row's last liked items add, or None.
    """

    users: Tensor
    items: Tensor
    tastes: Tensor
    axes: Tensor
    pairs: Tensor
    pair_scores: Tensor
    scalars: Tensor
    history: HistoryTerm | None = None

    @classmethod
    def of(cls, tensors: dict[str, Tensor], n_users: int, n_items: int) -> Blend | None:
        """From a file's tensors, None without any; ValueError where they do not fit."""
        if not tensors:
            return None
        count = len(tensors.get("pairs", ()))
        if not {"tastes", "axes"} & tensors.keys():  # a file of before they were there
            tensors |= {"tastes": torch.zeros(n_users, 0), "axes": torch.zeros(n_items, 0)}
        width = _width(tensors, "axes")
        expected = {"users": (n_users,), "items": (n_items,), "scalars": (2,)}
        expected |= {"tastes": (n_users, width), "axes": (n_items, width)}
        expected |= {"pairs": (count,), "pair_scores": (count,)}
        parts = [name for name in tensors if name.startswith(_HISTORY)]
        if parts:
            width = _width(tensors, f"{_HISTORY}items")
            shapes = (n_items, width), (n_items, width), (2, width), (2, 2)
            names = [_HISTORY + part.name for part in fields(HistoryTerm)]
            expected |= dict(zip(names, shapes, strict=True))
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != expected or tensors["pairs"].dtype != torch.int64:
            raise ValueError(
                f"a blend of shapes {found}, expected {expected}: fit the vectors anew"
            )
        history = {name.removeprefix(_HISTORY): tensors.pop(name) for name in parts}
        return cls(**tensors, history=HistoryTerm(**history) if parts else None)

    def tensors(self) -> dict[str, Tensor]:
        """What `of` reads."""
        found = {name: value for name, value in vars(self).items() if name != "history"}
        if self.history is not None:
            found |= {_HISTORY + name: value for name, value in vars(self.history).items()}
        return found

    def score(
        self,
        user_idx: Tensor,
        item_idx: Tensor,
        dots: Tensor,
        known: Tensor,
        history: Tensor | None = None,
    ) -> Tensor:
        """Scores of pairs in the broadcast shape of both.

        Args:
            user_idx: -1 for a stranger.
            dots: p . q of each, biases left out; zero where the user is not known.
            known: whether the user has train rows, in the shape of user_idx.
            history: user_idx.shape + (H,), padded with -1; needed where the blend has a term of it.
        """
        weight, bias = self.scalars
        index = user_idx.clamp(min=0)
        users = torch.where(known, self.users[index], 0.0)
        tastes = torch.where(known.unsqueeze(-1), self.tastes[index], 0.0)
        scores = weight * dots + users + self.items[item_idx] + bias
        scores = scores + (tastes * self.axes[item_idx]).sum(-1)
        if self.history is not None:
            scores = self.history.added(scores, item_idx, known, history)
        if len(self.pairs) == 0:
            return scores
        wanted = user_idx * len(self.items) + item_idx  # below 0 for strangers: no pair
        place = torch.searchsorted(self.pairs, wanted.contiguous()).clamp(max=len(self.pairs) - 1)
        return torch.where(self.pairs[place] == wanted, self.pair_scores[place], scores)


def fit_blend(
    vectors: CFVectors,
    data: PreparedData,
    refit: Callable[[PreparedData], CFVectors] | None,
    folds: Folds,
    seed: int,
    titles: Tensor | None = None,
    history: bool = False,
) -> CFVectors:
    """The vectors with a blend.

    Args:
        refit: the same model, fitted on other data; only a history needs it.
        folds: models that leave train rows out, as ``fit_folds`` gives them.
        titles: (I, c) principal components of the items' titles.
        history: let the last liked items count; vectors, and what refit gives, have a fold-in.

    Raises:
        ValueError: with history, where the train rows are not of two users.
    """
    train, fold = folds.rows, torch.from_numpy(folds.fold)
    labels = data.label[train].astype(np.float64)
    dots = np.zeros(len(train))
    for number, model in enumerate(folds.models):
        new = folds.fold == number
        dots[new] = _dots(model, data, train[new])
    centre, scale = dots.mean(), float(spread(dots.std()))
    seen = Observations(
        users=torch.from_numpy(data.user[train].astype(np.int64)),
        items=torch.from_numpy(data.item[train].astype(np.int64)),
        dots=torch.from_numpy((dots - centre) / scale),
        labels=torch.from_numpy(labels),
    )
    rows = _TrainRows(data, train, seen, titles)
    fits = [rows.fit(fold != n, m if history else None) for n, m in enumerate(folds.models)]
    pair_scores, terms = rows.held_out(fold, fits)
    whole = rows.fit(torch.ones_like(fold, dtype=torch.bool), vectors if history else None)
    strangers = None
    if history:
        strangers = _as_strangers(rows, refit, len(folds.models), seed, -centre / scale)
    scores, blends = pair_scores.clone(), []
    for number, fit in enumerate([*fits, whole]):
        weights, others = None, fold != number  # of the whole fit: all
        if history:
            weights = [
                fit_weights(found[others], its_terms[others], seen.labels[others])
                for found, its_terms in ((pair_scores, terms), strangers)
            ]
            scores[~others] = scored(pair_scores[~others], terms[~others], weights[0])
        blends.append(fit.blend(centre, scale, weights))
    keys = seen.users * data.n_items + seen.items
    order = torch.argsort(keys, stable=True)
    blend = replace(blends.pop(), pairs=keys[order], pair_scores=scores[order].float())
    held_out = vectors.held_out
    if held_out is not None:
        held_out = replace(held_out, blends=tuple(blends))
    return replace(vectors, blend=blend, held_out=held_out)


@dataclass(frozen=True)
class _Fit:
    """The regression on some of the rows; sides: the tables of their history's terms, or None."""

    effects: Effects
    side: ItemSide
    sides: Sides | None

    def blend(self, centre: float, scale: float, weights: Sequence[Tensor] | None) -> Blend:
        """Without pairs. weights: of the history, for users with train rows and for others."""
        weight, bias = self.effects.scalars
        return Blend(
            users=self.effects.users.float(),
            items=self.effects.items.float(),
            tastes=self.effects.tastes.float(),
            axes=self.side.axes.float(),
            pairs=torch.empty(0, dtype=torch.int64),
            pair_scores=torch.empty(0),
            scalars=torch.stack([weight / scale, bias - weight * centre / scale]).float(),
            history=None if weights is None else self.sides.with_weights(*weights),
        )


class _TrainRows:
    """Rows (L,) of the train split, what is known of their items, and fits on some of them."""

    def __init__(
        self, data: PreparedData, train: np.ndarray, seen: Observations, titles: Tensor | None
    ) -> None:
        self.data, self.train, self.seen = data, train, seen
        self.history = torch.from_numpy(data.history[train].astype(np.int64))
        self.titles = (torch.zeros(data.n_items, 0) if titles is None else titles).double()
        self.years = torch.from_numpy(release_years(data)).double()

    def fit(self, some: Tensor, model: CFVectors | None) -> _Fit:
        """On some (L,) bool of the rows. model: of the same rows, for the history's terms."""
        rows = _chosen(self.seen, some)
        side = _item_side(rows, self.years, self.titles)
        sides = None
        if model is not None:
            sides = Sides.of(points_of(model), side, rows, self.data.n_users)
        return _Fit(fit_effects(rows, side, self.data.n_users), side, sides)

    def held_out(
        self, fold: Tensor, fits: Sequence[_Fit], dot: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores (L,) and terms of the history (L, t) of all rows, by the fit without their fold.

        fold: (L,). dot: of every row, in place of its own. Without a history the terms are None.
        """
        scores, terms = torch.zeros(len(self.train), dtype=torch.float64), None
        for number, fit in enumerate(fits):
            new = fold == number
            rows = _chosen(self.seen, new)
            if dot is not None:
                rows = replace(rows, dots=torch.full_like(rows.dots, dot))
            scores[new] = fit.effects.logits(rows, fit.side)
            if fit.sides is None:
                continue
            made = fit.sides.terms(rows.items, self.history[new])
            terms = made.new_zeros(len(scores), made.shape[1]) if terms is None else terms
            terms[new] = made
        return scores, terms


def _as_strangers(
    rows: _TrainRows, refit: Callable[[PreparedData], CFVectors], folds: int, seed: int, dot: float
) -> tuple[Tensor, Tensor]:
    """Scores (L,) and terms of the history (L, t) of the train rows, as if their users had none.

    dot: of a user without a vector.
    """
    users, place = np.unique(rows.data.user[rows.train], return_inverse=True)
    if len(users) < 2:
        raise ValueError(
            f"cf.history is true, but the train rows are of {len(users)} user, and its weights for "
            "new users are fitted on users left out: set cf.history to false"
        )
    fold = np.random.default_rng([seed, 0x57A46E]).permutation(len(users))[place] % folds
    fits = []
    for number in range(min(folds, len(users))):
        model = refit(without(rows.data, rows.train[fold == number]))
        fits.append(rows.fit(torch.from_numpy(fold != number), model))
    return rows.held_out(torch.from_numpy(fold), fits, dot)


def _width(tensors: dict[str, Tensor], name: str) -> int:
    table = tensors.get(name, torch.empty(0))
    return table.shape[1] if table.ndim == 2 else 0


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
    return (users * items)[:, vectors.factors].sum(1).double().numpy()


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
