"""What a row's last liked items add to the blend: a second regression of few weights.

    score' = slope score + bias + sum_a c_a z_ia Z_a + c_q q_i . F + c_y y_i . Y

z_i: the item's axes of taste (year, popularity, title), Z their mean over the row's history. q_i:
its CF vector, F the vector that the history folds a user in at. y_i: who liked it, so that
y_i . y_h is the cosine of two items' likers (in ``_TOGETHER`` dimensions), Y the mean over the
history. The weights are two sets: of users with train rows, and of those without, fitted on train
rows whose users were left out.

No length of a history is shown: means, however many items there are, of tables that are centred
over the train rows' items, so that a history moves some items up and others down. Without any item
the three terms are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ckf.cf.effects import ItemSide, Observations
from ckf.newton import damped_newton

if TYPE_CHECKING:
    from ckf.cf.vectors import CFVectors

_TOGETHER = 64  # dimensions of y, at most
_LIKES = 5.0  # added to an item's likes: the cosine of items with few is small
# Deviation of the weights' prior, of terms of deviation 1. On CoLLM's valid rows half of it, ranks
# of 16 to all and 1 to 20 added likes change AUC by .0003 at most.
_WEIGHT, _LINE = 0.1, 10.0
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class HistoryTerm:
    """items and liked (I, w): multiplied by one another and ``gains`` (2, w), which are of users
    with train rows and of others; lines (2, 2): their slope and bias."""

    items: Tensor
    liked: Tensor
    gains: Tensor
    lines: Tensor

    def added(self, scores: Tensor, item_idx: Tensor, known: Tensor, history: Tensor) -> Tensor:
        """The scores with the term, in their shape.

        Args:
            known: whether the user has train rows, broadcasts with scores.
            history: ``known.shape`` + (H,), padded with -1.
        """
        which = (~known).long()
        slope, bias = self.lines[which].unbind(-1)
        wanted = self.gains[which] * means(self.liked, history)
        return slope * scores + bias + (wanted * self.items[item_idx]).sum(-1)


@dataclass(frozen=True)
class Sides:
    """The two tables of a `HistoryTerm`, float64; of (w,) columns, the term each belongs to."""

    items: Tensor
    liked: Tensor
    term: Tensor

    @classmethod
    def of(
        cls, points: tuple[Tensor, Tensor], side: ItemSide, rows: Observations, n_users: int
    ) -> Sides:
        """points: as `points_of` gives them. rows: all that the tables may know."""
        share = torch.bincount(rows.items, minlength=len(side.axes)).double() / len(rows.items)
        liked_by = together(rows, share, n_users)
        (q, folded), z = points, side.axes - share @ side.axes
        widths = [1] * z.shape[1] + [q.shape[1], liked_by.shape[1]]
        return cls(
            items=torch.cat([z, q.double() - share @ q.double(), liked_by], 1),
            liked=torch.cat([z, folded.double(), liked_by], 1),
            term=torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)),
        )

    def terms(self, items: Tensor, history: Tensor) -> Tensor:
        """(L, t) of rows with items (L,) and histories (L, H)."""
        found = []
        for some, past in zip(
            items.split(_ROWS_AT_ONCE), history.split(_ROWS_AT_ONCE), strict=True
        ):
            products = self.items[some] * means(self.liked, past)
            into = products.new_zeros(len(some), int(self.term[-1]) + 1)
            found.append(into.index_add_(1, self.term, products))
        return torch.cat(found)

    def with_weights(self, known: Tensor, strangers: Tensor) -> HistoryTerm:
        """known, strangers: weights (2 + t,) as `fit_weights` gives them."""
        weights = torch.stack([known, strangers])
        return HistoryTerm(
            items=self.items.float(),
            liked=self.liked.float(),
            gains=weights[:, 2:][:, self.term].float(),
            lines=weights[:, :2].float(),
        )


def points_of(vectors: CFVectors) -> tuple[Tensor, Tensor]:
    """Items (I, d) and what each adds to a fold-in (I, d), biases left out; with a fold-in."""
    return vectors.items[:, :-1], (vectors.fold_in + vectors.fold_in_offset)[:, :-1]


def means(table: Tensor, history: Tensor) -> Tensor:
    """Means (..., w) of rows of a table (I, w) over histories (..., H); zero without any item."""
    there = history >= 0
    weight = there / there.sum(-1, keepdim=True).clamp(min=1)
    flat, width = history.clamp(min=0).flatten(0, -2), history.shape[-1]
    found = F.embedding_bag(
        flat, table, mode="sum", per_sample_weights=weight.to(table.dtype).view(-1, width)
    )
    return found.view(*history.shape[:-1], table.shape[1])


def together(rows: Observations, share: Tensor, n_users: int) -> Tensor:
    """Vectors (I, r) whose products are the cosines of the items' likers, both ways centred.

    The largest singular vectors of likes over the root of an item's likes, by subspace iteration
    (Halko et al. 2011) from a fixed start.

    Args:
        share: (I,) of the rows, sums to 1: what the centre is.
    """
    liked = rows.labels > 0.5
    pairs = torch.unique(rows.users[liked] * len(share) + rows.items[liked])
    users, items = pairs // len(share), pairs % len(share)
    likes = torch.bincount(items, minlength=len(share)).double()
    x = torch.sparse_coo_tensor(
        torch.stack([users, items]), (likes[items] + _LIKES).rsqrt(), (n_users, len(share)),
        check_invariants=False,
    ).coalesce()  # fmt: skip
    mean, across = x @ share, x.t().coalesce()  # (U,), (I, U)

    def of_users(q: Tensor) -> Tensor:
        return torch.sparse.mm(x, q) - torch.outer(mean, q.sum(0))

    def of_items(p: Tensor) -> Tensor:
        return torch.sparse.mm(across, p) - mean @ p

    rank = min(_TOGETHER, *x.shape)
    start = torch.Generator().manual_seed(0)
    width = min(2 * rank, *x.shape)
    q = torch.randn(len(share), width, generator=start, dtype=torch.float64)
    for _ in range(4):
        q, _ = torch.linalg.qr(of_items(of_users(q)))
    found = of_users(q)
    squares, turn = torch.linalg.eigh(found.T @ found)  # ascending
    return q @ turn[:, -rank:] * squares[-rank:].clamp(min=0).sqrt()


def fit_weights(scores: Tensor, terms: Tensor, labels: Tensor) -> Tensor:
    """Slope, bias and weights of the terms (2 + t,): the likeliest, by Newton.

    Args:
        scores: (L,) the blend's, of rows that it does not know.
        terms: (L, t).
        labels: (L,) 0 or 1.
    """
    spread = terms.std(0, correction=0)
    spread = torch.where(spread < 1e-9, 1.0, spread)
    table = torch.cat([scores[:, None], torch.ones_like(scores)[:, None], terms / spread], 1)
    x, y = table.numpy(), labels.numpy()
    precision = np.full(x.shape[1], _WEIGHT**-2)
    precision[:2] = _LINE**-2

    def slope_and_curve(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = torch.sigmoid(torch.from_numpy(x @ weights)).numpy()
        curve = (x.T * (p * (1 - p))) @ x + np.diag(precision)
        return x.T @ (p - y) + precision * weights, curve

    start = np.zeros(x.shape[1])
    start[0] = 1.0
    weights = torch.from_numpy(damped_newton(start, slope_and_curve))
    return torch.cat([weights[:2], weights[2:] / spread])


def scored(scores: Tensor, terms: Tensor, weights: Tensor) -> Tensor:
    """(L,): what ``weights`` (2 + t,) make of scores (L,) and terms (L, t)."""
    return weights[0] * scores + weights[1] + terms @ weights[2:]
