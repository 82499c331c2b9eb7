"""The CF score in its regression: held out for train pairs, fitted on train rows alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ckf.baselines import ctr_scores, pair_numbers
from ckf.cf import CFConfig, CFVectors, fit_cf
from ckf.match import MatchScores
from ckf.metrics import auc
from tests.prepared_data import prepared

FOLDS = 3
SMALL = {"dim": 4, "epochs": 20, "batch_size": 256, "blend": FOLDS}


def quiet(_line):
    pass


def made(n_users=150, n_items=60, per_user=30, seed=0):
    """Labels from item quality, user mildness and a taste; the last tenth of users are new."""
    rng = np.random.default_rng(seed)
    p, q = rng.normal(size=(n_users, 2)), rng.normal(size=(n_items, 2))
    mild, good = rng.normal(size=n_users), rng.normal(size=n_items)
    user = np.repeat(np.arange(n_users), per_user)
    item = np.concatenate([rng.permutation(n_items)[:per_user] for _ in range(n_users)])
    logit = (p[user] * q[item]).sum(1) + mild[user] + good[item]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(int)
    split = np.where(np.tile(np.arange(per_user), n_users) < 0.7 * per_user, 0, 2)
    split[np.tile(np.arange(per_user), n_users) == per_user - 1] = 1
    split[(user >= 0.9 * n_users) & (split == 0)] = 2
    titles = [f"T ({1950 + int(i)})" for i in rng.integers(0, 50, n_items)]
    return prepared(user, item, label, split, titles=titles)


@pytest.fixture(scope="module")
def data():
    return made()


@pytest.fixture(scope="module")
def blended(data):
    return fit_cf(CFConfig(**SMALL), data, quiet)


def scored(vectors, data, rows):
    return vectors.score(data.user[rows], data.item[rows]).numpy()


def test_a_year_beyond_those_of_the_train_rows_counts_as_their_last(data):
    """A parabola in the year would carry such an item away."""
    new_item = (data.split == 0) & (data.item == 0)
    data = replace(data, split=np.where(new_item, 2, data.split))
    found = []
    for year in (1999, 2999):
        titles = [f"T ({year})"] + [t if t != "T (1999)" else "T (1998)" for t in data.titles[1:]]
        titles[1] = "T (1999)"
        found.append(fit_cf(CFConfig(**SMALL), replace(data, titles=titles), quiet).blend)
    assert found[0].items[0] != 0
    assert torch.equal(found[0].items, found[1].items)


def test_the_blend_beats_the_model_and_the_means_alone():
    """On average: one sample of 1,080 rows has a standard error of .015."""
    found = []
    for seed in range(4):
        data = made(seed=seed)
        rows = np.flatnonzero((data.split == 2) & (data.user < 135))
        blended = fit_cf(CFConfig(**SMALL), data, quiet)
        alone = scored(replace(blended, blend=None), data, rows)
        means = ctr_scores(data, rows)["item_user_mean"]
        scores = (scored(blended, data, rows), alone, means)
        found.append([auc(each, data.label[rows]) for each in scores])
    ours, alone, means = np.mean(found, 0)
    assert ours > alone + 0.002 and ours > means + 0.01


@pytest.mark.parametrize("titles", [0, 3])
def test_a_train_rows_own_label_does_not_raise_its_score(data, titles):
    """Flipped to "liked", a row must not look better to itself: only others may learn from it.

    Without leaving the row out, its effects and vectors rise with the label.
    """
    rows = np.flatnonzero((data.split == 0) & (data.label == 0))[::97]
    config = CFConfig(**SMALL, titles=titles)
    states = torch.randn(data.n_items, 4, generator=torch.Generator().manual_seed(0))
    before = fit_cf(config, data, quiet, states)
    label = data.label.copy()
    label[rows] = 1
    changed = fit_cf(config, replace(data, label=label), quiet, states)
    own = scored(changed, data, rows) - scored(before, data, rows)
    new, old = (
        scored(replace(v, blend=replace(v.blend, pairs=torch.empty(0))), data, rows)
        for v in (changed, before)
    )
    knowing = (new - old).mean()
    assert knowing > 0.2
    assert abs(own.mean()) < knowing / 4


def test_a_pair_that_repeats_does_not_tell_its_label():
    """Noise, the same in all three rows of a pair: nothing is known, unless another row tells."""
    rng = np.random.default_rng(0)
    pairs = np.argwhere(np.ones((150, 30), bool))
    label = rng.integers(0, 2, len(pairs))
    order = rng.permutation(np.tile(np.arange(len(pairs)), 3))
    (user, item), label = pairs[order].T, label[order]
    split = np.r_[1, 1, 2, np.zeros(len(order) - 3)]
    noise = prepared(user, item, label, split)
    vectors = fit_cf(CFConfig(**SMALL | {"batch_size": 2048}), noise, quiet)
    rows = np.flatnonzero(noise.split == 0)
    found = auc(scored(vectors, noise, rows), noise.label[rows])
    # standard error .009 over 4,500 pairs
    assert abs(found - 0.5) < 0.05
    assert auc(scored(replace(vectors, blend=None), noise, rows), noise.label[rows]) > 0.7


def test_where_no_pair_repeats_the_folds_are_those_of_the_rows(data):
    train = np.flatnonzero(data.split == 0)
    assert (pair_numbers(data, train) == np.arange(len(train))).all()
    twice = np.r_[train[:5], train[:3], train[5:7]]
    assert pair_numbers(data, twice).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]


def test_held_out_scores_are_those_of_new_rows_in_quality(data, blended):
    """In-sample scores of train rows look better than new ones are; the held-out ones do not."""
    train = np.flatnonzero(data.split == 0)
    test = np.flatnonzero((data.split == 2) & (data.user < 135))
    alone = replace(blended, blend=None)
    new = auc(scored(blended, data, test), data.label[test])
    held_out = auc(scored(blended, data, train), data.label[train])
    in_sample = auc(scored(alone, data, train), data.label[train])
    assert abs(held_out - new) < (in_sample - new) / 2


def test_test_rows_and_valid_labels_never_shape_the_blend(data, blended):
    label = data.label.copy()
    label[data.split == 2] = 1 - label[data.split == 2]
    other = fit_cf(CFConfig(**SMALL), replace(data, label=label), quiet)
    for name, value in blended.blend.tensors().items():
        assert torch.equal(value, getattr(other.blend, name))


def test_the_vectors_keep_their_own_biases(data, blended):
    plain = fit_cf(CFConfig(**SMALL | {"blend": 0}), data, quiet)
    assert torch.equal(plain.users, blended.users) and torch.equal(plain.items, blended.items)
    assert plain.blend is None and blended.standardised().blend is None


def test_saved_and_read_again(data, blended, tmp_path):
    blended.save(tmp_path / "cf.safetensors")
    again = CFVectors.load(tmp_path / "cf.safetensors")
    assert again.blend.pairs.dtype == torch.int64
    rows = np.arange(len(data))
    assert np.array_equal(scored(again, data, rows), scored(blended, data, rows))
    users, items = data.user[:4, None], np.array([[0, 1, 2]])
    assert blended.score(users, items).shape == (4, 3)


def test_a_new_user_has_the_items_part(data, blended):
    items = np.arange(data.n_items)
    stranger = np.full(data.n_items, data.n_users - 1)  # no train row
    expected = blended.blend.items + blended.blend.scalars[1]
    assert torch.equal(blended.score(stranger, items), expected)
    history = np.full((data.n_items, 3), -1)
    with pytest.raises(ValueError, match="blend.*without history"):
        blended.score(stranger, items, history)
    matches = MatchScores(blended, data)
    unknown = matches(np.full(data.n_items, -1), history, items)
    assert torch.equal(unknown, matches(stranger, history, items))


def test_matches_have_the_spread_of_held_out_scores(data, blended):
    train = np.flatnonzero(data.split == 0)
    own = MatchScores(blended, data)(data.user[train], data.history[train], data.item[train])
    assert float(own.mean()) == pytest.approx(0, abs=1e-4)
    kept = scored(blended, data, train)
    assert np.allclose(own[:, 0].numpy(), (kept - kept.mean()) / kept.std(), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"blend": 1}, "cf.blend is 1"),
        ({"blend": -1}, "cf.blend is -1"),
        ({"beside": ["svd"]}, "cf.beside names 'svd'"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        CFConfig(**settings)


def test_one_label_is_named(data, blended):
    liked = replace(data, label=np.ones_like(data.label))
    with pytest.raises(ValueError, match="not both labels"):
        fit_cf(CFConfig(**SMALL), liked, quiet)


@pytest.mark.parametrize(
    "parts",
    [
        {"users": torch.zeros(3)},
        {"axes": torch.zeros(60)},
        {"axes": torch.zeros(60, 5)},
        {"tastes": torch.zeros(3, 2)},
    ],
)
def test_foreign_parts_of_a_file_are_named(blended, tmp_path, parts):
    broken = replace(blended, blend=replace(blended.blend, **parts))
    broken.save(tmp_path / "cf.safetensors")
    with pytest.raises(ValueError, match="blend"):
        CFVectors.load(tmp_path / "cf.safetensors")
