"""Slices of CTR rows: by what is known of the user, the length of the history, the popularity."""

from __future__ import annotations

import numpy as np

from ckf.data.prepared import PreparedData

BY_USER_ROWS = "user's train rows"
_USER_ROWS = ((0, 0), (1, 9), (10, 49), (50, None))
_LIKED = ((0, 2), (3, 9), (10, None))


def slices(data: PreparedData, rows: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """{group: {slice: mask (N,)}} of row ids (N,); empty slices are left out.

    "user's train rows": 0 are cold users. "liked before": items in the row's history, at most
    data.history of them. "popularity decile": of the rows by their item's train rows, 1 the least
    popular; rows of one item may fall into two.
    """
    train = data.split == 0
    user_rows = np.bincount(data.user[train], minlength=data.n_users)[data.user[rows]]
    item_rows = np.bincount(data.item[train], minlength=data.n_items)[data.item[rows]]
    liked = (data.history[rows] >= 0).sum(1)
    place = np.empty(len(rows), np.int64)
    place[np.argsort(item_rows, kind="stable")] = np.arange(len(rows))
    decile = place * 10 // max(1, len(rows)) + 1
    groups = {
        BY_USER_ROWS: {_name(*r): _within(user_rows, *r) for r in _USER_ROWS},
        "liked before": {_name(*r): _within(liked, *r) for r in _LIKED},
        "popularity decile": {str(d): decile == d for d in range(1, 11)},
    }
    return {
        group: {name: mask for name, mask in masks.items() if mask.any()}
        for group, masks in groups.items()
    }


def _name(low: int, high: int | None) -> str:
    if high is None:
        return f"{low} or more"
    return str(low) if low == high else f"{low} to {high}"


def _within(values: np.ndarray, low: int, high: int | None) -> np.ndarray:
    return (values >= low) & (values <= (high if high is not None else values.max(initial=low)))
