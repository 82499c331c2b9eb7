"""Splits and histories, against plain loops and for any data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.data.config import SplitConfig
from ckf.data.errors import DataError
from ckf.data.splits import assign_splits, histories, split_histories

rows_of_users = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 6), st.integers(0, 8), st.booleans()),
    min_size=1,
    max_size=80,
)


def in_order(rows) -> tuple[np.ndarray, ...]:
    """user, time, item, liked sorted by (user, time), input order kept."""
    rows = sorted(rows, key=lambda row: row[:2])
    user, time, item, liked = (np.array(column) for column in zip(*rows, strict=True))
    return user, time, item, liked


def split_of(user, time, **settings) -> np.ndarray | None:
    try:
        return assign_splits(user, time, np.full(len(user), -1), SplitConfig(**settings))
    except DataError as error:
        assert "is empty" in str(error)
        return None


@settings(max_examples=200, deadline=None)
@given(rows_of_users, st.integers(1, 4))
def test_histories_are_the_last_liked_items_strictly_earlier(rows, length):
    user, time, item, liked = in_order(rows)
    found = histories(user, time, item, liked, length)
    for row in range(len(user)):
        earlier = (user == user[row]) & (time < time[row]) & liked
        expected = item[earlier].tolist()[-length:]
        assert found[row].tolist() == [-1] * (length - len(expected)) + expected


@settings(max_examples=200, deadline=None)
@given(rows_of_users, st.integers(1, 4), st.randoms(use_true_random=False))
def test_histories_hold_nothing_of_later_splits(rows, length, random):
    user, time, item, liked = in_order(rows)
    split = np.array([random.randrange(3) for _ in rows])
    found = split_histories(user, time, item, liked, split, length)
    for row in range(len(user)):
        earlier = (user == user[row]) & (time < time[row]) & liked & (split <= split[row])
        expected = item[earlier].tolist()[-length:]
        assert found[row].tolist() == [-1] * (length - len(expected)) + expected


@settings(max_examples=100, deadline=None)
@given(rows_of_users, st.sampled_from(["per_user_time", "leave_last_out", "global_time"]))
def test_in_splits_by_time_histories_are_all_earlier_rows(rows, kind):
    user, time, item, liked = in_order(rows)
    split = split_of(user, time, kind=kind, min_rows=3, valid=0.2, test=0.2)
    if split is not None:
        plain = histories(user, time, item, liked, 3)
        assert (split_histories(user, time, item, liked, split, 3) == plain).all()


@settings(max_examples=200, deadline=None)
@given(rows_of_users, st.sampled_from(["per_user_time", "leave_last_out"]))
def test_per_user_splits_never_look_back(rows, kind):
    user, time, _, _ = in_order(rows)
    split = split_of(user, time, kind=kind, min_rows=3)
    if split is None:
        return
    for one in np.unique(user):
        own, when = split[user == one], time[user == one]
        assert (np.diff(own) >= 0).all()  # train, then valid, then test
        assert own[0] == 0
        assert all(len(set(own[when == second])) == 1 for second in when)  # ties stay together
        if len(own) < 3:
            assert (own == 0).all()
        else:
            assert set(own.tolist()) in ({0}, {0, 1, 2})
        if len(set(when)) == len(when) >= 3:
            assert {1, 2} <= set(own.tolist())
            assert kind != "leave_last_out" or (own > 0).sum() == 2


@settings(max_examples=200, deadline=None)
@given(rows_of_users)
def test_global_split_is_strict_in_time(rows):
    user, time, _, _ = in_order(rows)
    split = split_of(user, time, kind="global_time", valid=0.2, test=0.2)
    if split is not None:
        assert time[split == 0].max() < time[split == 1].min()
        assert time[split == 1].max() < time[split == 2].min()


def test_global_shares_and_ties():
    time = np.repeat(np.arange(10), 10)
    split = split_of(np.arange(100), time, kind="global_time", valid=0.25, test=0.1)
    # 65, 25 and 10 rows were asked for; the tied ones at a cut fall before it
    assert np.bincount(split).tolist() == [70, 20, 10]


def test_shares_per_user():
    user = np.repeat([0, 1, 2], [4, 10, 100])
    split = split_of(user, np.arange(114), valid=0.2, test=0.1)
    assert (split[user == 0] == 0).all()  # fewer than min_rows
    assert split[user == 1].tolist() == [0] * 7 + [1] * 2 + [2]
    assert np.bincount(split[user == 2]).tolist() == [70, 20, 10]


def test_a_train_row_is_always_left():
    user = np.repeat(np.arange(50), np.arange(3, 53))
    split = split_of(user, np.arange(len(user)), valid=0.5, test=0.49, min_rows=3)
    for one in range(50):
        assert np.bincount(split[user == one], minlength=3).min() >= 1


@pytest.mark.parametrize(
    ("times", "kind", "expected"),
    [
        ([0, 1, 2, 3, 3], "leave_last_out", [0, 0, 1, 2, 2]),  # both of the last second
        ([0, 1, 2, 2, 3], "leave_last_out", [0, 0, 1, 1, 2]),
        ([0, 0, 0, 1, 2], "leave_last_out", [0, 0, 0, 1, 2]),
        ([0, 0, 0, 1, 1], "leave_last_out", [0, 0, 0, 0, 0]),  # valid would take all that is left
        ([0, 0, 0, 0, 0], "leave_last_out", [0, 0, 0, 0, 0]),
        ([0, 1, 1, 2, 2], "per_user_time", [0, 1, 1, 2, 2]),
    ],
)
def test_rows_of_one_second_stay_together(times, kind, expected):
    user = np.repeat([0, 1], [len(times), 5])  # a second user, so that no split is empty
    time = np.array([*times, *range(5)])
    assert split_of(user, time, kind=kind, min_rows=3)[: len(times)].tolist() == expected


def test_given_split_must_be_there():
    with pytest.raises(DataError, match="2 rows have no split"):
        assign_splits(np.zeros(3), np.arange(3), np.array([0, -1, -1]), SplitConfig(kind="given"))


def test_an_empty_split_is_named():
    with pytest.raises(DataError, match="split 'valid' is empty.*use another kind"):
        assign_splits(np.arange(9), np.arange(9), np.full(9, -1), SplitConfig())
