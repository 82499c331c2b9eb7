import copy
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ckf.baselines import TrainMeans
from ckf.cf import (
    CFConfig,
    CFVectors,
    fit_cf,
    fit_fold_in,
    fit_mf,
    fold_in_users,
    load_vectors,
)
from ckf.metrics import auc, rmse
from tests.prepared_data import prepared


def quiet(text):
    pass


def planted(n_users=120, n_items=80, per_user=40, rank=2, seed=0, known_share=1.0):
    """Labels from a low-rank taste; users past known_share have no train rows."""
    rng = np.random.default_rng(seed)
    p, q = rng.normal(size=(n_users, rank)), rng.normal(size=(n_items, rank))
    user = np.repeat(np.arange(n_users), per_user)
    item = np.concatenate([rng.permutation(n_items)[:per_user] for _ in range(n_users)])
    logit = 3 * (p[user] * q[item]).sum(1)
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(int)
    position = np.tile(np.arange(per_user) / per_user, n_users)
    split = np.where(position < 0.7, 0, np.where(position < 0.85, 1, 2))
    split[(user >= known_share * n_users) & (split == 0)] = 1
    history = np.full((len(user), 10), -1)
    for row in range(len(user)):
        liked = item[row - row % per_user : row][label[row - row % per_user : row] == 1][-10:]
        history[row, 10 - len(liked) :] = liked
    return prepared(user, item, label, split, rating=3 + 2 * label, history=history)


def auc_on_test(data, vectors):
    rows = data.rows("ctr", "test")
    return auc(vectors.score(data.user[rows], data.item[rows]).numpy(), data.label[rows])


SMALL = {"dim": 8, "epochs": 40, "batch_size": 256}


@pytest.fixture(scope="module")
def data():
    return planted()


@pytest.fixture(scope="module")
def vectors(data):
    return fit_mf(CFConfig(**SMALL), data, quiet)


def same(a, b):
    return torch.equal(a.users, b.users) and torch.equal(a.items, b.items)


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_learns_what_item_means_cannot(data, kind):
    if kind == "lightgcn":
        pytest.importorskip("torch_geometric")
    found = fit_cf(CFConfig(kind=kind, **SMALL, weight_decay=0.01), data, quiet)
    rows = data.rows("ctr", "test")
    means = TrainMeans.of(data, "label").item_mean(2.0)[data.item[rows]]
    assert found.kind == kind
    assert found.users.shape == (120, 9) and found.items.shape == (80, 9)
    assert found.users.dtype == torch.float32 and not found.users.requires_grad
    assert auc_on_test(data, found) > auc(means, data.label[rows]) + 0.15


def test_biases_are_the_last_dimension():
    """Users differ by how much they like and items by how well liked they are, nothing else."""
    rng = np.random.default_rng(0)
    user, item = (k.ravel() for k in np.indices((60, 40)))
    chance = 1 / (1 + np.exp(-(user / 15 - 2 + item / 10 - 2)))
    toy = prepared(
        user, item, rng.random(2400) < chance, rng.choice([0, 1, 2], 2400, p=[0.8, 0.1, 0.1])
    )
    found = fit_mf(CFConfig(**SMALL), toy, quiet)
    assert np.corrcoef(found.users[:, -1], np.arange(60))[0, 1] > 0.9
    assert np.corrcoef(found.items[:, -1], np.arange(40))[0, 1] > 0.9


def test_score_is_the_dot_product_with_biases(vectors):
    u, i = 3, 5
    p, q = vectors.users[u].double(), vectors.items[i].double()
    expected = p[:-1] @ q[:-1] + p[-1] + q[-1] + vectors.bias
    assert vectors.score(u, i).item() == pytest.approx(expected.item(), abs=1e-6)
    table = vectors.score(np.arange(4)[:, None], np.arange(6)[None])
    assert table.shape == (4, 6)
    assert table[3, 5] == vectors.score(u, i)


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_same_seed_same_vectors(data, kind):
    if kind == "lightgcn":
        pytest.importorskip("torch_geometric")
    settings = {"kind": kind, "dim": 4, "epochs": 3}
    one = fit_cf(CFConfig(**settings), data, quiet)
    torch.manual_seed(99)  # the global generator has no part in it
    state = torch.get_rng_state()
    two = fit_cf(CFConfig(**settings), data, quiet)
    assert torch.equal(state, torch.get_rng_state())
    assert same(one, two) and torch.equal(one.fold_in, two.fold_in)
    assert not same(one, fit_cf(CFConfig(**settings, seed=1), data, quiet))


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_test_rows_never_shape_the_vectors(kind):
    if kind == "lightgcn":
        pytest.importorskip("torch_geometric")
    settings = CFConfig(kind=kind, dim=4, epochs=6, patience=1)
    before = fit_cf(settings, planted(n_users=40), quiet)
    changed = planted(n_users=40)
    test = changed.split == 2
    changed.label[test] = 1 - changed.label[test]
    changed.rating[test] = 1
    changed.item[test] = 0
    after = fit_cf(settings, changed, quiet)
    assert same(before, after)
    assert torch.equal(before.fold_in, after.fold_in)
    assert torch.equal(before.item_known, after.item_known)


def test_valid_rows_choose_the_epoch_and_nothing_else():
    settings = CFConfig(dim=4, epochs=4, patience=4)
    one, other = planted(n_users=40), planted(n_users=40)
    valid = other.split == 1
    other.label[valid] = 1 - other.label[valid]
    epochs = [fit_mf(CFConfig(dim=4, epochs=k), without_valid(one), quiet) for k in (1, 2, 3, 4)]
    for data in (one, other):
        found = fit_mf(settings, data, quiet)
        assert any(same(found, epoch) for epoch in epochs)


def without_valid(data):
    data = copy.deepcopy(data)
    data.split[data.split == 1] = 2
    return data


def test_rows_without_train_rows_are_zero_and_unknown():
    data = planted(n_users=60, known_share=0.8)
    found = fit_mf(CFConfig(**SMALL), data, quiet)
    assert found.user_known.tolist() == [True] * 48 + [False] * 12
    assert (found.users[48:] == 0).all() and (found.users[:48] != 0).any(1).all()


def test_width_and_decay_are_chosen_on_valid(data):
    lines = []
    settings = {"epochs": 15, "batch_size": 256, "held_out": False}
    found = fit_mf(CFConfig(dim=[1, 8], weight_decay=[0.01, 3.0], **settings), data, lines.append)
    assert len(lines) == 5 and "chose dim 8 and weight_decay 0.01" in lines[-1]
    assert same(found, fit_mf(CFConfig(dim=8, weight_decay=0.01, **settings), data, quiet))
    with pytest.raises(ValueError, match="no valid rows to choose on"):
        fit_mf(CFConfig(dim=[1, 8]), without_valid(planted(n_users=40)), quiet)


def test_ratings_without_labels():
    data = planted()
    data.label[:] = -1
    found = fit_mf(CFConfig(**SMALL, weight_decay=0.003), data, quiet)
    rows = data.rows("rating", "test")
    predictions = found.score(data.user[rows], data.item[rows]).numpy()
    assert rmse(predictions, data.rating[rows]) < 0.9 * np.std(data.rating[rows])
    assert (fold_in_users(found, [[1, 2]]) == 0).all()  # nothing is known to be liked


def test_likes_only_draws_negatives():
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(60), 15)
    item = np.concatenate([rng.permutation(30)[:15] + 30 * (u % 2) for u in range(60)])
    split = np.tile(np.repeat([0, 1, 2], [11, 2, 2]), 60)
    data = prepared(user, item, np.ones(900), split)
    found = fit_mf(CFConfig(**SMALL), data, quiet)
    own = found.score(
        np.arange(60)[:, None], np.arange(30)[None] + 30 * (np.arange(60) % 2)[:, None]
    )
    other = found.score(
        np.arange(60)[:, None], np.arange(30)[None] + 30 * (1 - np.arange(60) % 2)[:, None]
    )
    assert (own.mean(1) > other.mean(1)).float().mean() > 0.95


def test_standardised(vectors):
    known = vectors.user_known.clone()
    known[:3] = False
    users = vectors.users.clone()
    users[:, 2] = 7.0  # no spread
    users[~known] = 0.0
    found = CFVectors(users, vectors.items, known, vectors.item_known, "mf").standardised()
    assert found.users[known].mean(0).abs().max() < 1e-5
    spread = found.users[known].std(0, correction=0)
    assert spread[2] == 0 and torch.allclose(spread[[0, 1, *range(3, 9)]], torch.ones(8), atol=1e-5)
    assert (found.users[~known] == 0).all()
    with pytest.raises(ValueError, match="before standardised"):
        found.score(0, 0)


def test_save_and_load(tmp_path, vectors):
    path = tmp_path / "cf.safetensors"
    vectors.save(path)
    found = CFVectors.load(path)
    for name in ("users", "items", "user_known", "item_known", "fold_in", "fold_in_offset"):
        assert torch.equal(getattr(found, name), getattr(vectors, name)), name
    assert (found.kind, found.score_form, found.bias) == ("mf", "biased_dot", vectors.bias)
    plain = CFVectors(vectors.users, vectors.items, vectors.user_known, vectors.item_known, "mf")
    plain.save(path)
    assert CFVectors.load(path).fold_in is None
    save_file({"users": np.zeros((2, 3))}, path)
    with pytest.raises(ValueError, match=r"written by CFVectors\.save"):
        CFVectors.load(path)


def test_fold_in_places_new_users():
    """Users without train rows score above the biases alone, by their histories."""
    data = planted(n_users=200, known_share=0.8)
    found = fit_mf(CFConfig(**SMALL), data, quiet)
    rows = data.rows("ctr", "test")
    rows = rows[~found.user_known.numpy()[data.user[rows]]]
    user, item, label = data.user[rows], data.item[rows], data.label[rows]
    plain = auc(found.score(user, item).numpy(), label)
    folded = auc(found.score(user, item, data.history[rows]).numpy(), label)
    assert folded > plain + 0.1
    warm = np.arange(50)  # users with train rows keep their own vectors
    assert torch.equal(found.score(warm, warm % 7, data.history[:50]), found.score(warm, warm % 7))


def test_fold_in_recovers_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    items, matrix = torch.randn(30, 4, generator=generator), torch.randn(4, 4, generator=generator)
    liked = torch.randint(30, (200,), generator=generator)  # one item per user
    item_known = torch.ones(30, dtype=torch.bool)
    item_known[7] = False
    users, known = items[liked] @ matrix + 2.0, torch.ones(200, dtype=torch.bool)
    made = CFVectors(users, items, known, item_known, "file", "dot")
    made = fit_fold_in(made, torch.arange(200), liked)
    new = fold_in_users(made, np.array([[-1, 3, 4], [-1, -1, -1], [-1, -1, 7], [3, 7, 4]]))
    assert torch.allclose(new[0], items[[3, 4]].mean(0) @ matrix + 2.0, atol=1e-2)
    assert (new[1] == 0).all()  # an empty history
    assert (new[2] == 0).all()  # an item without a vector is as good as none
    assert torch.equal(new[3], new[0])


def test_fold_in_follows_the_standardised_scale(vectors):
    history = np.array([[-1, 2, 3], [4, 5, 6], [-1, -1, -1]])
    raw, scaled = fold_in_users(vectors, history), fold_in_users(vectors.standardised(), history)
    mean = vectors.users.mean(0)
    std = vectors.users.std(0, correction=0)
    assert torch.allclose(scaled[:2], (raw[:2] - mean) / std, atol=1e-4)
    assert (scaled[2] == 0).all()
    unfitted = CFVectors(vectors.users, vectors.items, vectors.user_known, vectors.item_known, "mf")
    with pytest.raises(ValueError, match="fit_fold_in"):
        fold_in_users(unfitted, history)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_own_vectors(tmp_path, suffix, data):
    rng = np.random.default_rng(0)
    tables = {"users": rng.normal(size=(120, 5)), "items": rng.normal(size=(80, 5))}
    tables["users"][4] = 0.0
    paths = {name: str(tmp_path / (name + suffix)) for name in tables}
    for name, table in tables.items():
        if suffix == ".npy":
            np.save(paths[name], table)
        else:
            save_file(tables if name == "users" else {"anything": table}, paths[name])
    found = fit_cf(CFConfig(kind="file", **paths), data, quiet)
    np.testing.assert_allclose(found.users, tables["users"], rtol=1e-6)
    np.testing.assert_allclose(found.items, tables["items"], rtol=1e-6)
    assert not found.user_known[4] and found.user_known.sum() == 119
    expected = tables["users"][2] @ tables["items"][3]
    assert found.score(2, 3).item() == pytest.approx(expected, abs=1e-5)
    assert found.fold_in is not None


def test_wrong_files_say_what_is_wrong(tmp_path):
    def written(name, array):
        np.save(tmp_path / name, array)
        return tmp_path / name

    users, items = written("u.npy", np.ones((3, 2))), written("i.npy", np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"u\.npy: 3 rows, expected 5 .*names\.json"):
        load_vectors(users, items, 5, 4)
    with pytest.raises(ValueError, match=r"i\.npy: 4 rows, expected 6"):
        load_vectors(users, items, 3, 6)
    with pytest.raises(ValueError, match=r"width 2, .* width 3"):
        load_vectors(users, written("w.npy", np.ones((4, 3))))
    with pytest.raises(ValueError, match="row 1 has NaN"):
        load_vectors(written("n.npy", np.array([[1.0], [np.nan]])), items)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        load_vectors(written("f.npy", np.ones(3)), items)
    with pytest.raises(ValueError, match=r"expected \.npy or \.safetensors"):
        load_vectors(tmp_path / "u.npy", written("x.npy", np.ones(2)).rename(tmp_path / "x.bin"))
    with pytest.raises(ValueError, match="no file of CF vectors"):
        load_vectors(tmp_path / "missing.npy", items)
    save_file({"a": np.ones((3, 2)), "b": np.ones((3, 2))}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"tensors \['a', 'b'\].*'users'"):
        load_vectors(tmp_path / "two.safetensors", items)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "svd"}, "kind is 'svd', expected one of mf, lightgcn, file"),
        ({"kind": "file"}, "users is None"),
        ({"dim": []}, "dim is an empty list"),
        ({"dim": [8, 0]}, "dim is 0"),
        ({"dim": "16"}, "dim is '16'"),
        ({"lr": 0}, "lr is 0"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"epochs": 2.5}, "epochs is 2.5"),
    ],
)
def test_wrong_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        CFConfig(**settings)


def test_no_train_rows_is_an_error():
    data = planted(n_users=10)
    data.split[:] = 2
    with pytest.raises(ValueError, match="train split has 0 rows"):
        fit_mf(CFConfig(), data, quiet)


def test_mf_is_fast():
    """As many rows as MovieLens-100K, one core: a few seconds."""
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(943, size=100_000))
    data = prepared(user, rng.integers(1682, size=100_000), rng.integers(2, size=100_000),
                    rng.choice([0, 1, 2], 100_000, p=[0.8, 0.1, 0.1]))  # fmt: skip
    start = time.perf_counter()
    fit_mf(CFConfig(dim=16), data, quiet)
    assert time.perf_counter() - start < 20


def test_import_needs_no_data_tools():
    code = (
        "import sys, transformers.generation.utils; theirs = set(sys.modules); "  # 5.10 has sklearn
        "import ckf.cf, ckf.baselines, ckf.metrics, ckf.text_metrics; "
        "extras = {'torch_geometric', 'sklearn', 'polars', 'sacrebleu', 'rouge_score'}; "
        "found = extras & (set(sys.modules) - theirs); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
