"""Train, valid and test; and each row's history. Rows are sorted by (user, time, input order)."""

from __future__ import annotations

import numpy as np

from ckf.data.config import SPLITS, SplitConfig
from ckf.data.errors import DataError

TRAIN, VALID, TEST = range(3)


def assign_splits(
    user: np.ndarray, time: np.ndarray, given: np.ndarray, config: SplitConfig
) -> np.ndarray:
    """(N,) int8, 0 train, 1 valid, 2 test, as `SplitConfig` says. DataError if one is empty."""
    if config.kind == "given":
        split = given.astype(np.int8)
        if (split < 0).any():
            raise DataError(
                f"{int((split < 0).sum())} rows have no split although data.split.kind is "
                "'given'; choose another kind for this format"
            )
    elif config.kind == "global_time":
        split = _global_time(time, config)
    else:
        split = _per_user(user, time, config)
    for value, name in enumerate(SPLITS):
        if not (split == value).any():
            raise DataError(
                f"split {name!r} is empty ({len(user)} rows, kind {config.kind!r}, valid "
                f"{config.valid:g}, test {config.test:g}, min_rows {config.min_rows}); use another "
                "kind, larger shares or more data"
            )
    return split


def _global_time(time: np.ndarray, config: SplitConfig) -> np.ndarray:
    n = len(time)
    n_test = max(1, round(n * config.test))
    n_train = max(1, n - n_test - max(1, round(n * config.valid)))
    in_order = np.sort(time)
    last_train, last_valid = in_order[n_train - 1], in_order[n - n_test - 1]
    return ((time > last_train).astype(np.int8) + (time > last_valid)).astype(np.int8)


def _per_user(user: np.ndarray, time: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Each user's last rows; a cut inside a second moves back to its first row."""
    start, size = user_runs(user)
    if config.kind == "leave_last_out":
        n_test = (size >= 3).astype(np.int64)
        n_valid = n_test
    else:
        enough = size >= config.min_rows
        # rounded, at least one; a train row and a valid row are always left
        n_test = np.minimum(np.maximum(np.floor(size * config.test + 0.5), 1), size - 2) * enough
        n_valid = np.maximum(np.floor(size * config.valid + 0.5), 1)
        n_valid = np.minimum(n_valid, size - n_test - 1) * enough
    rows = np.arange(len(user))
    tied = np.r_[False, (user[1:] == user[:-1]) & (time[1:] == time[:-1])]
    first_of_second = np.maximum.accumulate(np.where(tied, 0, rows))
    test = first_of_second[np.minimum(start + size - n_test, start + size - 1).astype(np.int64)]
    valid = first_of_second[np.maximum(test - n_valid, start).astype(np.int64)]
    split_up = (n_test > 0) & (valid > start)  # else no earlier row is left to train on
    valid, test = np.repeat(valid, size), np.repeat(test, size)
    split = (rows >= valid).astype(np.int8) + (rows >= test)
    return np.where(np.repeat(split_up, size), split, TRAIN).astype(np.int8)


def user_runs(user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of every run of equal values."""
    start = np.flatnonzero(np.r_[True, user[1:] != user[:-1]])
    return start, np.diff(np.r_[start, len(user)])


def split_histories(
    user: np.ndarray,
    time: np.ndarray,
    item: np.ndarray,
    liked: np.ndarray,
    split: np.ndarray,
    length: int,
) -> np.ndarray:
    """`histories` in which a row sees rows of its own and earlier splits alone.

    In a split in order of time that is every earlier row; a given one may have test rows before
    train rows, and what they like must not reach training.
    """
    out = np.full((len(user), length), -1, dtype=np.int32)
    for value in range(len(SPLITS)):
        own = split == value
        out[own] = histories(user, time, item, liked & (split <= value), length)[own]
    return out


def histories(
    user: np.ndarray, time: np.ndarray, item: np.ndarray, liked: np.ndarray, length: int
) -> np.ndarray:
    """(N, length) int32: the user's last liked items strictly earlier than the row, oldest first.

    Rows of the same second do not see each other. Padded on the left with -1. `liked` is (N,) bool.
    """
    n = len(user)
    liked_items = item[liked]
    before = np.concatenate([[0], np.cumsum(liked)])  # liked rows among rows 0..i-1
    start, size = user_runs(user)
    first_of_user = np.repeat(before[start], size)
    moment = np.flatnonzero(
        np.r_[True, (user[1:] != user[:-1]) | (time[1:] != time[:-1])]
    )  # the first row of every (user, time)
    until = np.repeat(before[moment], np.diff(np.r_[moment, n]))
    out = np.full((n, length), -1, dtype=np.int32)
    for column in range(length):
        place = until - length + column
        inside = place >= first_of_user
        out[inside, column] = liked_items[place[inside]]
    return out
