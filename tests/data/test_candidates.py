"""Candidate lists: never a liked item, no repetition, drawn as asked, the same for a seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.data.candidates import LikedItems, build_list, draw_negatives
from ckf.data.errors import DataError


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 19)), max_size=80),
    st.integers(1, 6),
    st.integers(0, 100),
    st.booleans(),
)
def test_negatives_are_distinct_and_never_liked(pairs, count, seed, popular):
    user, item = np.array(sorted(pairs), dtype=np.int32).reshape(-1, 2).T
    liked = LikedItems.of(user, item, 20)
    asked = np.repeat(np.arange(5), 3)
    train_items = np.array([0, 0, 0, 1, 1, 2, 3], dtype=np.int32) if popular else None
    least = min(20 - sum(u == one for u, _ in pairs) for one in range(5))
    if least < count:
        with pytest.raises(DataError, match="use a shorter list"):
            draw_negatives(asked, count, liked, np.random.default_rng(seed), train_items)
        return
    drawn = draw_negatives(asked, count, liked, np.random.default_rng(seed), train_items)
    assert drawn.shape == (15, count)
    for one, items in zip(asked.tolist(), drawn.tolist(), strict=True):
        assert len(set(items)) == count
        assert not {(one, item) for item in items} & pairs


def test_has_agrees_with_a_set():
    rng = np.random.default_rng(0)
    pairs = {(int(u), int(i)) for u, i in rng.integers(0, 30, (200, 2))}
    user, item = np.array(sorted(pairs)).T
    liked = LikedItems.of(user, item, 30)
    every = np.indices((30, 30)).reshape(2, -1)
    assert liked.has(*every).tolist() == [
        pair in pairs for pair in zip(*every.tolist(), strict=True)
    ]


def test_somebody_who_liked_nearly_everything_gets_what_is_left():
    item = np.arange(1000)
    liked = LikedItems.of(np.zeros(991, int), item[item != 0][:991], 1000)
    drawn = draw_negatives(np.zeros(4, int), 9, liked, np.random.default_rng(0))
    assert all(sorted(row) == [0, *range(992, 1000)] for row in drawn.tolist())


def test_uniform_draws_are_uniform():
    liked = LikedItems.of(np.array([0]), np.array([3]), 10)
    drawn = draw_negatives(np.zeros(20_000, int), 3, liked, np.random.default_rng(0))
    shares = np.bincount(drawn.ravel(), minlength=10) / drawn.size
    assert shares[3] == 0
    assert np.abs(np.delete(shares, 3) - 1 / 9).max() < 0.005  # 5 standard errors


def test_popular_draws_follow_the_train_counts():
    liked = LikedItems.of(np.array([0]), np.array([4]), 5)
    train_items = np.repeat([0, 1, 2, 4], [60, 30, 10, 50]).astype(np.int32)
    drawn = draw_negatives(np.zeros(20_000, int), 1, liked, np.random.default_rng(0), train_items)
    shares = np.bincount(drawn.ravel(), minlength=5) / drawn.size
    assert np.abs(shares - [0.6, 0.3, 0.1, 0, 0]).max() < 0.02


def make(name: str, seed: int):
    user = np.repeat(np.arange(40), 5)
    item = np.tile(np.arange(5), 40) + np.repeat(np.arange(40), 5) * 3 % 140
    liked = LikedItems.of(user, item, 150)
    rows = np.arange(0, 200, 2)
    return build_list(name, "test", rows, user, item, liked, item, seed), item


@pytest.mark.parametrize(
    ("name", "size"), [("uniform9", 10), ("uniform19", 20), ("popular99", 100)]
)
def test_lists_hold_their_positive_once_anywhere(name, size):
    made, item = make(name, 0)
    assert made.items.shape == (100, size) and made.items.dtype == np.int32
    assert made.positive.dtype == np.int64 and made.rows.dtype == np.int64
    found = made.items[np.arange(100), made.positive]
    assert (found == item[made.rows]).all()
    assert ((made.items == item[made.rows][:, None]).sum(axis=1) == 1).all()
    assert len(np.unique(made.positive)) > size // 2  # the columns are shuffled


def test_lists_depend_on_the_seed_alone():
    first, again, other = make("uniform9", 1)[0], make("uniform9", 1)[0], make("uniform9", 2)[0]
    assert (first.items == again.items).all() and (first.positive == again.positive).all()
    assert (first.items != other.items).any()
