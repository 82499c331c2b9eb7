"""Duplicates, k-core, sorting: raw interactions to the rows that are kept, with counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ckf.data.config import DataConfig
from ckf.data.errors import DataError
from ckf.data.interactions import Interactions


def clean(raw: Interactions, config: DataConfig, log: Callable[[str], None]) -> Interactions:
    """Drop exact duplicates and what the k-core leaves out, make ids dense, sort the rows.

    Rows come out sorted by (user, time, input order); users and items are numbered by first
    appearance in the input. `counts` gains what was dropped; the first broken lines are logged by
    file and line. DataError if nothing is left.
    """
    counts = dict(raw.counts)
    keep = first_of_duplicates(raw.user, raw.item, raw.time)
    counts["duplicates"] = len(raw) - len(keep)
    core = k_core(raw.user[keep], raw.item[keep], config.min_user, config.min_item)
    counts["outside_k_core"] = len(keep) - len(core)
    if not len(core):
        raise DataError(
            f"no row is left when every user needs {config.min_user} rows and every item "
            f"{config.min_item}; lower data.min_user and data.min_item"
        )
    keep = keep[core]
    user, user_ids = _dense(raw.user[keep], raw.user_ids)
    item, item_ids = _dense(raw.item[keep], raw.item_ids)
    order = np.lexsort((raw.time[keep], user))  # stable: ties stay in input order
    rows = raw.take(keep[order])
    rows.user, rows.item = user[order], item[order]
    rows.user_ids, rows.item_ids = user_ids, item_ids
    rows.label = labels(rows.rating, rows.label, config.like_threshold)
    rows.counts = counts | {"rows": len(rows), "users": len(user_ids), "items": len(item_ids)}
    log(
        f"kept {len(rows):,} rows of {len(user_ids):,} users and {len(item_ids):,} items; dropped "
        f"{counts['broken_lines']:,} broken lines, {counts['duplicates']:,} duplicates, "
        f"{counts['outside_k_core']:,} rows outside the k-core"
    )
    for line in counts["first_broken_lines"]:
        log(f"broken: {line}")
    return rows


def first_of_duplicates(user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Ascending row numbers without those whose (user, item, time) stood before."""
    order = np.lexsort((time, item, user))
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = (
        (user[order[1:]] == user[order[:-1]])
        & (item[order[1:]] == item[order[:-1]])
        & (time[order[1:]] == time[order[:-1]])
    )
    return np.sort(order[~repeated])


def k_core(user: np.ndarray, item: np.ndarray, min_user: int, min_item: int) -> np.ndarray:
    """Row numbers left when users and items with too few rows go, again and again."""
    rows = np.arange(len(user))
    while len(rows):
        fine = (np.bincount(user[rows])[user[rows]] >= min_user) & (
            np.bincount(item[rows])[item[rows]] >= min_item
        )
        if fine.all():
            break
        rows = rows[fine]
    return rows


def labels(rating: np.ndarray, given: np.ndarray, threshold: float) -> np.ndarray:
    """(N,) int8: the given label, else 1 for a rating from `threshold` up, 0 below, -1 for none."""
    made = np.where(np.isnan(rating), -1, rating >= threshold).astype(np.int8)
    return np.where(given >= 0, given, made).astype(np.int8)


def _dense(index: np.ndarray, ids: list[str]) -> tuple[np.ndarray, list[str]]:
    """Indices without gaps, in the order of the old ones, and the ids that are left."""
    used = np.flatnonzero(np.bincount(index, minlength=len(ids)))
    new = np.full(len(ids), -1, dtype=np.int32)
    new[used] = np.arange(len(used), dtype=np.int32)
    return new[index], [ids[old] for old in used]
