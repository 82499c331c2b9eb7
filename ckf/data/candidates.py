"""Candidate lists: one liked item among items that its user liked in no split."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ckf.data.config import LISTS
from ckf.data.errors import DataError
from ckf.data.prepared import Candidates

_ROUNDS = 30  # of rejection, before a row is drawn exactly
_CELLS = 1 << 21  # drawn at a time


@dataclass
class LikedItems:
    """Which user liked which item, as sorted keys user * n_items + item."""

    keys: np.ndarray  # (L,) int64, ascending, unique
    n_items: int

    @classmethod
    def of(cls, user: np.ndarray, item: np.ndarray, n_items: int) -> LikedItems:
        """From the users and items of the liked rows."""
        return cls(np.unique(user.astype(np.int64) * n_items + item), n_items)

    def has(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """Whether the user liked the item; shapes broadcast."""
        wanted = user.astype(np.int64) * self.n_items + item
        if not len(self.keys):
            return np.zeros(wanted.shape, dtype=bool)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return self.keys[place] == wanted

    def not_liked(self, user: int) -> np.ndarray:
        """All items that the user did not like, ascending."""
        low, high = np.searchsorted(self.keys, [user * self.n_items, (user + 1) * self.n_items])
        mask = np.ones(self.n_items, dtype=bool)
        mask[self.keys[low:high] - user * self.n_items] = False
        return np.flatnonzero(mask)


def draw_negatives(
    user: np.ndarray, count: int, liked: LikedItems, rng: np.random.Generator, train_items=None
) -> np.ndarray:
    """(P, count) int32: per row distinct items that the row's user never liked.

    Uniform over the items, or with `train_items` (the item of every train row) by popularity.
    Drawn with rejection; a row that stays short is drawn from what its user leaves. Only if that
    is fewer than `count` items: DataError.
    """
    out = np.empty((len(user), count), dtype=np.int32)
    step = max(1, _CELLS // count)
    for start in range(0, len(user), step):
        part = slice(start, start + step)
        out[part] = _draw_part(user[part], count, liked, rng, train_items)
    return out


def _draw(size, n_items: int, rng: np.random.Generator, train_items) -> np.ndarray:
    if train_items is None:
        return rng.integers(0, n_items, size=size, dtype=np.int32)
    return train_items[rng.integers(0, len(train_items), size=size)]


def _draw_part(user, count, liked, rng, train_items) -> np.ndarray:
    out = _draw((len(user), count), liked.n_items, rng, train_items).astype(np.int32)
    rows = np.arange(len(user))
    for _ in range(_ROUNDS):
        wrong = liked.has(user[rows, None], out[rows]) | _repeated(out[rows])
        unfit = wrong.any(axis=1)
        if not unfit.any():
            return out
        rows, wrong = rows[unfit], wrong[unfit]
        row, column = np.nonzero(wrong)
        out[rows[row], column] = _draw(len(row), liked.n_items, rng, train_items)
    weights = None
    if train_items is not None:
        weights = np.bincount(train_items, minlength=liked.n_items)
    for row in rows:
        out[row] = _draw_exactly(int(user[row]), count, liked, rng, weights)
    return out


def _repeated(items: np.ndarray) -> np.ndarray:
    """(P, C) bool: whether the item stands further left in its row already."""
    order = np.argsort(items, axis=1, kind="stable")
    in_order = np.take_along_axis(items, order, axis=1)
    again = np.zeros(items.shape, dtype=bool)
    again[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    out = np.empty_like(again)
    np.put_along_axis(out, order, again, axis=1)
    return out


def _draw_exactly(user: int, count: int, liked: LikedItems, rng, weights) -> np.ndarray:
    """Without replacement from all items that are left; weight 0 only when the others are used."""
    left = liked.not_liked(user)
    if len(left) < count:
        raise DataError(
            f"a user liked all but {len(left)} of {liked.n_items} items, so {count} negatives "
            "cannot be drawn; use a shorter list (data.train_list, data.test_lists)"
        )
    if weights is None:
        return rng.permutation(left)[:count]
    # exponential races: the first to arrive are a weighted draw without replacement
    weight = weights[left]
    arrival = rng.exponential(size=len(left)) / np.maximum(weight, 1)
    return left[np.lexsort((arrival, weight == 0))[:count]]


def build_list(
    name: str,
    split: str,
    rows: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    liked: LikedItems,
    train_items: np.ndarray,
    seed: int,
) -> Candidates:
    """The list `name` for the positive `rows` of a split, columns shuffled; a pure function."""
    count, kind = LISTS[name]
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}.{name}".encode())])
    drawn = draw_negatives(
        user[rows], count, liked, rng, train_items if kind == "popular" else None
    )
    items = np.concatenate([item[rows, None].astype(np.int32), drawn], axis=1)
    positive = np.empty(len(rows), dtype=np.int64)
    step = max(1, _CELLS // items.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        order = np.argsort(rng.random(items[part].shape), axis=1, kind="stable")
        items[part] = np.take_along_axis(items[part], order, axis=1)
        positive[part] = np.argmin(order, axis=1)  # where column 0 went
    return Candidates(rows=rows.astype(np.int64), items=items, positive=positive)
