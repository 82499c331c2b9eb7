"""Vectors of one's own, a file per fold of the train rows (``cf.fold_users``)."""

import numpy as np
import pytest
import torch

from ckf.cf import CFConfig, CFVectors, fit_cf, fold_numbers
from ckf.cf.folds import without
from ckf.metrics import auc
from tests.test_blend import made
from tests.test_held_out import SMALL, noise, quiet, train_of


@pytest.fixture(scope="module")
def data():
    return noise()


def written(vectors, folder, name):
    """Files of vectors whose dot product is the model's score: biases beside a column of ones."""
    paths = []
    for kind, table in (("users", vectors.users), ("items", vectors.items)):
        ones = torch.ones(len(table), 1)
        parts = (table, ones) if kind == "users" else (table[:, :-1], ones, table[:, -1:])
        known = vectors.user_known if kind == "users" else vectors.item_known
        paths.append(str(folder / f"{kind}-{name}.npy"))
        np.save(paths[-1], (torch.cat(parts, 1) * known[:, None]).numpy())
    return paths


def own_files(data, folder, count=3):
    """What a user with a model of one's own does: fit, write; again without each fold."""
    config = CFConfig(**SMALL, held_out=False)
    fold = fold_numbers(data, count)
    users, items = written(fit_cf(config, data, quiet), folder, "all")
    parts = [
        written(fit_cf(config, without(data, np.flatnonzero(fold == n)), quiet), folder, n)
        for n in range(count)
    ]
    fold_users, fold_items = map(list, zip(*parts, strict=True))
    files = {"fold_users": fold_users, "fold_items": fold_items}
    return {"kind": "file", "users": users, "items": items, **files}


def test_files_of_folds_do_not_tell_a_train_rows_label(data, tmp_path):
    files = own_files(data, tmp_path)
    vectors = fit_cf(CFConfig(**files), data, quiet)
    rows, users, items = train_of(data)
    folds = vectors.folds(users, items)
    assert folds.tolist() == fold_numbers(data, 3)[rows].tolist()
    assert (fold_numbers(data, 3) >= 0).sum() == len(rows)
    whole, held_out = vectors.score(users, items), vectors.score(users, items, folds=folds)
    assert auc(whole.numpy(), data.label[rows]) > 0.6
    assert 0.4 < auc(held_out.numpy(), data.label[rows]) < 0.52
    own, its = (np.load(files[name][1]) for name in ("fold_users", "fold_items"))
    by_hand = (own[data.user[rows]] * its[data.item[rows]]).sum(1)
    second = folds.numpy() == 1  # turned onto the whole fit: float32 products of values up to 1
    np.testing.assert_allclose(held_out.numpy()[second], by_hand[second], rtol=1e-4, atol=1e-5)


def test_files_of_folds_make_a_blend(data, tmp_path):
    files = own_files(data, tmp_path)
    vectors = fit_cf(CFConfig(**files, blend=3), data, quiet)
    rows, users, items = train_of(data)
    held_out = vectors.score(users, items, folds=vectors.folds(users, items))
    assert 0.4 < auc(held_out.numpy(), data.label[rows]) < 0.52
    vectors.save(tmp_path / "cf.safetensors")
    again = CFVectors.load(tmp_path / "cf.safetensors")
    assert torch.equal(again.score(users, items), vectors.score(users, items))


def test_a_blend_of_files_is_that_of_the_model_they_come_from(tmp_path):
    """Likes that the users' taste decides; biases inside of p . q count as the model has them."""
    data = made()
    files = CFConfig(**own_files(data, tmp_path), blend=3)
    others = np.flatnonzero(data.split == 2)
    found = [
        auc(
            fit_cf(config, data, quiet).score(data.user[others], data.item[others]).numpy(),
            data.label[others],
        )
        for config in (files, CFConfig(**SMALL, blend=3))
    ]
    assert found[0] > 0.7 and abs(found[0] - found[1]) < 0.03


def test_a_fold_of_another_width_is_named(data, tmp_path):
    files = own_files(data, tmp_path)
    for name in ("fold_users", "fold_items"):
        np.save(files[name][2], np.load(files[name][2])[:, :3])
    with pytest.raises(ValueError, match="users-2.npy has vectors of width 3, those of all .* 6"):
        fit_cf(CFConfig(**files), data, quiet)
