"""Prepared data from arrays, without files, for tests of what reads it."""

from pathlib import Path

import numpy as np

from ckf.data.prepared import PreparedData

SPLITS = ("train", "valid", "test")


def prepared(user, item, label, split, rating=None, history=None, titles=None, **sizes):
    """PreparedData whose task rows are all eligible rows; row r happens at second r."""
    user, item = np.asarray(user, np.int32), np.asarray(item, np.int32)
    label, split = np.asarray(label, np.int8), np.asarray(split, np.int8)
    n = len(user)
    n_users = sizes.get("n_users", int(user.max()) + 1)
    n_items = sizes.get("n_items", int(item.max()) + 1)
    rating = np.full(n, np.nan, np.float32) if rating is None else np.asarray(rating, np.float32)
    eligible = {"ctr": label >= 0, "topk": label == 1, "rating": np.isfinite(rating)}
    rows = {
        f"{task}.{name}": np.flatnonzero(mask & (split == k))
        for task, mask in eligible.items()
        for k, name in enumerate(SPLITS)
    }
    return PreparedData(
        folder=Path("nowhere"),
        manifest={"settings": {"data": {"train_list": "uniform9", "test_lists": ["uniform9"]}}},
        n_users=n_users,
        n_items=n_items,
        user=user,
        item=item,
        rating=rating,
        label=label,
        time=np.arange(n, dtype=np.int64),
        split=split,
        not_cold=np.asarray(sizes.get("not_cold", np.full(n, -1)), np.int8),
        history=np.full((n, 3), -1, np.int32) if history is None else np.asarray(history, np.int32),
        has_text=np.zeros(n, bool),
        user_ids=[f"u{k}" for k in range(n_users)],
        item_ids=[f"i{k}" for k in range(n_items)],
        titles=[""] * n_items if titles is None else list(titles),
        _texts=None,
        _rows=rows,
        _candidates={},
    )
