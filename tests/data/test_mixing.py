"""Task mixing: every task in every batch, shares by temperature, epochs, determinism."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.data.errors import DataError
from ckf.data.mixing import task_order

sizes_of = st.dictionaries(
    st.sampled_from(["ctr", "topk", "rating", "explain"]), st.integers(1, 5000), min_size=1
)


def batches(order, batch_size):
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@settings(max_examples=100, deadline=None)
@given(sizes_of, st.integers(1, 9), st.integers(0, 12), st.sampled_from([0.1, 1.0, 2.0, 5.0]))
def test_every_batch(sizes, batch_size, steps, temperature):
    order = task_order({**sizes, "none": 0}, batch_size, steps, temperature)
    assert len(order) == batch_size * steps
    for batch in batches(order, batch_size):
        tasks = {task for task, _ in batch}
        assert tasks <= set(sizes)
        assert batch_size < len(sizes) or tasks == set(sizes)


@settings(max_examples=50, deadline=None)
@given(sizes_of)
def test_tasks_walk_in_epochs(sizes):
    order = task_order(sizes, 8, 60)
    for task, size in sizes.items():
        rows = [row for name, row in order if name == task]
        for start in range(0, len(rows), size):
            epoch = rows[start : start + size]
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(size))


@pytest.mark.parametrize(
    ("temperature", "shares"), [(1.0, (0.8, 0.2)), (2.0, (2 / 3, 1 / 3)), (1e9, (0.5, 0.5))]
)
@pytest.mark.parametrize("batch_size", [1, 5, 7, 32])
def test_shares(temperature, shares, batch_size):
    steps = 200
    order = task_order({"a": 4000, "b": 1000}, batch_size, steps, temperature)
    found = Counter(task for task, _ in order)
    lowest = 1 / batch_size if batch_size >= 2 else 0
    expected_b = max(shares[1], lowest)
    assert abs(found["b"] - expected_b * batch_size * steps) <= 2


def test_a_tiny_task_takes_one_place_and_the_others_share_the_rest():
    order = task_order({"a": 30_000, "b": 10_000, "c": 1}, 9, 100)
    assert Counter(task for task, _ in order) == {"a": 600, "b": 200, "c": 100}


def test_epochs_differ():
    rows = [row for _, row in task_order({"a": 50}, 10, 10)]
    assert rows[:50] != rows[50:] and sorted(rows[:50]) == sorted(rows[50:])


def test_the_same_seed_gives_the_same_order_and_tasks_do_not_disturb_each_other():
    sizes = {"a": 70, "b": 30}
    assert task_order(sizes, 4, 50, seed=3) == task_order(sizes, 4, 50, seed=3)
    assert task_order(sizes, 4, 50, seed=3) != task_order(sizes, 4, 50, seed=4)
    alone = [row for task, row in task_order({"a": 70}, 4, 10, seed=3)]
    mixed = [row for task, row in task_order(sizes, 4, 50, seed=3) if task == "a"]
    assert alone[:40] == mixed[:40]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (({}, 4, 1), "at least one task needs rows"),
        (({"a": 0}, 4, 1), "at least one task needs rows"),
        (({"a": 5}, 0, 1), "batch_size is 0"),
        (({"a": 5}, 4, 1, 0.0), "temperature is 0.0"),
        (({"a": 5}, 4, 1, float("nan")), "temperature is nan"),
    ],
)
def test_wrong_arguments(arguments, said):
    with pytest.raises(DataError, match=said):
        task_order(*arguments)
