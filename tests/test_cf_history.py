"""The last liked items in the blend: they place new users, show no length, and old files load."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits

import ckf.cf.history as history_module
from ckf.baselines import ctr_scores
from ckf.cf import CFConfig, CFVectors, fit_cf
from ckf.cf.effects import Observations
from ckf.cf.history import fit_weights, means, scored, together
from ckf.data.splits import histories
from ckf.experiment.parts import shared_vectors
from ckf.match import MatchScores
from ckf.metrics import auc
from tests.ckf_fixtures import small_config
from tests.prepared_data import prepared as prepared_arrays

SMALL = {"dim": 4, "epochs": 15, "batch_size": 512, "blend": 3}
WITH = SMALL | {"history": True}


def quiet(_line):
    pass


def by_taste(seed=0, n_users=150, n_items=60, per_user=30):
    """Users like items of one of two kinds; the last third of the users have no train row."""
    rng = np.random.default_rng(seed)
    kind, taste = rng.choice([-1, 1], n_items), rng.choice([-1, 1], n_users)
    user = np.repeat(np.arange(n_users), per_user)
    item = np.concatenate([rng.permutation(n_items)[:per_user] for _ in range(n_users)])
    logit = 2.0 * taste[user] * kind[item] + rng.normal(size=n_items)[item]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(int)
    place = np.tile(np.arange(per_user), n_users)
    new = user >= n_users * 2 // 3
    split = np.select([new, place >= 25, place >= 20], [2, 2, 1], 0)
    past = histories(user, np.arange(len(user)), item, label == 1, 5)
    return prepared_arrays(user, item, label, split, history=past)


@pytest.fixture(scope="module")
def data():
    return by_taste()


@pytest.fixture(scope="module")
def fitted(data):
    return fit_cf(CFConfig(**WITH), data, quiet)


def of_rows(vectors, data, rows):
    past = data.history[rows] if vectors.takes_history else None
    return vectors.score(data.user[rows], data.item[rows], past).numpy()


def test_the_history_places_users_without_train_rows(data, fitted):
    rows = np.flatnonzero((data.user >= 100) & ((data.history >= 0).sum(1) >= 3))
    plain = fit_cf(CFConfig(**SMALL), data, quiet)
    assert auc(of_rows(plain, data, rows), data.label[rows]) < 0.68  # the items' part
    assert auc(of_rows(fitted, data, rows), data.label[rows]) > 0.78
    others = np.random.default_rng(0).permutation(rows)
    wrong = fitted.score(data.user[rows], data.item[rows], data.history[others]).numpy()
    assert auc(wrong, data.label[rows]) < 0.68  # of somebody else
    own = np.flatnonzero((data.user < 100) & (data.split == 2))
    gain = auc(of_rows(fitted, data, own), data.label[own])
    assert gain > auc(of_rows(plain, data, own), data.label[own]) - 0.005


def test_how_many_items_a_history_has_is_not_seen(data, fitted):
    items = np.arange(data.n_items)

    def scores(user, *past):
        padded = np.array([-1] * (5 - len(past)) + list(past))
        rows = np.full(len(items), user)
        return fitted.score(rows, items, np.tile(padded, (len(items), 1))).double()

    train = data.split == 0
    share = torch.from_numpy(np.bincount(data.item[train], minlength=data.n_items) / train.sum())
    for user in (120, -1):
        assert torch.allclose(scores(user, 3, 8), scores(user, 8, 3, 8, 3), atol=1e-5)
        different = scores(user, 3, 8) - scores(user)
        assert different.abs().max() > 0.1
        # over the train rows' items a history of any length moves scores by zero on average
        for past in ((), (3,), (3, 8, 20, 41, 5)):
            moved = share @ (scores(user, *past) - scores(user))
            assert moved.abs() < 1e-5 * different.abs().max() + 1e-6


def test_an_empty_history_adds_nothing(data, fitted):
    items, empty = np.arange(data.n_items), np.full((data.n_items, 5), -1)
    for user, which in ((120, 1), (-1, 1), (0, 0)):
        found = fitted.score(np.full(len(items), user), items, empty)
        slope, bias = fitted.blend.history.lines[which]
        bare = replace(fitted, blend=replace(fitted.blend, history=None))
        plain = slope * bare.score(np.full(len(items), user), items) + bias
        new = ~np.isin(max(user, 0) * data.n_items + items, fitted.blend.pairs) | (user < 0)
        torch.testing.assert_close(found[new], plain[new])


def test_a_list_of_candidates_is_scored_as_its_items_are(data, fitted):
    rows = np.flatnonzero(data.split == 2)[:6]
    items = np.arange(12).reshape(6, 2)
    found = fitted.score(data.user[rows][:, None], items, data.history[rows][:, None])
    for column in range(2):
        one = fitted.score(data.user[rows], items[:, column], data.history[rows])
        torch.testing.assert_close(found[:, column], one)


def test_everything_that_shows_the_score_reads_the_history(data, fitted):
    rows = np.flatnonzero(data.split == 2)
    ours = of_rows(fitted, data, rows)
    assert np.array_equal(ctr_scores(data, rows, fitted)["cf"], ours)
    matches = MatchScores(fitted, data)
    made = matches(data.user[rows], data.history[rows], data.item[rows]).flatten().numpy()
    assert np.allclose(made * matches.std + matches.mean, ours, atol=1e-4)
    past, user = data.history[rows], np.full(len(rows), 120)
    stranger = matches(user * 0 - 1, past, data.item[rows])
    assert torch.equal(stranger, matches(user, past, data.item[rows]))
    train = np.flatnonzero(data.split == 0)
    shown = matches(data.user[train], data.history[train], data.item[train])
    assert float(shown.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_train_rows_own_label_does_not_raise_its_score(data, fitted):
    """Flipped to "liked" it does, where the pair is not looked up and all rows have a say."""
    rows = np.flatnonzero((data.split == 0) & (data.label == 0))[::41]
    label = data.label.copy()
    label[rows] = 1
    changed = fit_cf(CFConfig(**WITH), replace(data, label=label), quiet)
    own = of_rows(changed, data, rows) - of_rows(fitted, data, rows)
    new, before = (
        of_rows(replace(v, blend=replace(v.blend, pairs=torch.empty(0))), data, rows)
        for v in (changed, fitted)
    )
    knowing = (new - before).mean()
    assert knowing > 0.2
    assert abs(own.mean()) < knowing / 3


def test_the_weights_are_fitted_on_rows_and_users_left_out(data, monkeypatch):
    """A row's label changes no term of its own, as a stranger's no term of any row of its user."""
    data = replace(data, split=np.where(data.split == 1, 2, data.split))  # all of the epochs
    train = np.flatnonzero(data.split == 0)
    row = 7
    user = torch.from_numpy(data.user[train] == data.user[train[row]])
    label = data.label.copy()
    label[train[row]] = 1 - label[train[row]]
    found = []
    for other in (data, replace(data, label=label)):
        calls = []

        def noted(scores, terms, labels, calls=calls):
            calls.append(terms)
            return fit_weights(scores, terms, labels)

        monkeypatch.setattr("ckf.cf.blend.fit_weights", noted)
        fit_cf(CFConfig(**WITH), other, quiet)
        rows = [terms for terms in calls if len(terms) == len(train)]
        assert len(rows) == 2
        found.append(rows)
    (known, strange), (known_after, strange_after) = found
    assert torch.equal(known[row], known_after[row])
    assert not torch.equal(known[user], known_after[user])  # its other rows learn of it
    assert torch.equal(strange[user], strange_after[user])
    assert not torch.equal(strange[~user], strange_after[~user])


def test_the_same_at_every_fit_and_blind_to_test_labels(data, fitted):
    label = np.where(data.split == 2, 1 - data.label, data.label)
    for other in (data, replace(data, label=label)):
        again = fit_cf(CFConfig(**WITH), other, quiet).blend.tensors()
        for name, value in fitted.blend.tensors().items():
            assert torch.equal(value, again[name]), name


def test_files_with_and_without(data, fitted, tmp_path):
    fitted.save(tmp_path / "with.safetensors")
    again, rows = CFVectors.load(tmp_path / "with.safetensors"), np.arange(len(data))
    assert np.array_equal(of_rows(again, data, rows), of_rows(fitted, data, rows))
    plain = fit_cf(CFConfig(**SMALL), data, quiet)
    plain.save(tmp_path / "without.safetensors")
    assert not [name for name in load_file(tmp_path / "without.safetensors") if "history" in name]
    assert CFVectors.load(tmp_path / "without.safetensors").blend.history is None
    term = fitted.blend.history
    for wrong in ({"gains": term.gains[:1]}, {"items": term.items[:-1]}, {"liked": term.lines}):
        broken = replace(fitted.blend, history=replace(term, **wrong))
        replace(fitted, blend=broken).save(tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match="a blend of shapes"):
            CFVectors.load(tmp_path / "broken.safetensors")


def test_a_changed_setting_fits_anew(small_model, data, tmp_path, monkeypatch):
    fits = []

    def quick_fit(cf, *_others):
        fits.append(cf.history)
        return fit_cf(replace(cf, history=False, blend=0), data, quiet)

    monkeypatch.setattr("ckf.experiment.parts.fit_cf", quick_fit)
    found = []
    files = replace(data, manifest=data.manifest | {"files": {}})
    for history in (False, True, True):
        config = small_config(small_model, cf=SMALL | {"history": history})
        found.append(shared_vectors(config, tmp_path, files, None, quiet))
    assert fits == [False, True] and found[0] != found[1] == found[2]


def test_mistakes_are_named(data, fitted):
    with pytest.raises(ValueError, match="cf.history is true, which only a blend reads"):
        CFConfig(history=True)
    with pytest.raises(ValueError, match="cf.history is 1, expected true or false"):
        CFConfig(history=1, blend=3)
    with pytest.raises(ValueError, match="give score\\(\\) the last liked items"):
        fitted.score(0, 0)
    alone = replace(data, split=np.where(data.user == 0, 0, 2))
    with pytest.raises(ValueError, match="of 1 user.*set cf.history to false"):
        fit_cf(CFConfig(**WITH), alone, quiet)


def test_means_leave_the_padding_out():
    table = torch.arange(8.0).view(4, 2)
    found = means(table, torch.tensor([[[-1, -1], [-1, 2]], [[3, 0], [1, 1]]]))
    expected = torch.tensor([[[0.0, 0.0], [4.0, 5.0]], [[3.0, 4.0], [2.0, 3.0]]])
    assert torch.equal(found, expected)


def test_together_are_the_centred_cosines_of_likers(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rated = torch.rand(40, 25, generator=generator) < 0.4
    users, items = rated.nonzero().T
    labels = torch.randint(0, 2, (len(users),), generator=generator).double()
    rows = Observations(users, items, torch.zeros(len(users)), labels)
    share = torch.bincount(items, minlength=25).double() / len(items)
    x = torch.zeros(40, 25, dtype=torch.float64)
    x[users, items] = labels
    x = x / (x.sum(0) + 5.0).sqrt()
    x = x - (x @ share)[:, None]
    found = together(rows, share, 40)
    torch.testing.assert_close(found @ found.T, x.T @ x)
    monkeypatch.setattr(history_module, "_TOGETHER", 12)
    values = torch.linalg.svdvals(x)
    left = together(rows, share, 40)
    error = torch.linalg.matrix_norm(left @ left.T - x.T @ x)
    assert left.shape == (25, 12) and error < 1.05 * values[12:].pow(4).sum().sqrt()


def test_weights_are_the_likeliest():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(400, generator=generator, dtype=torch.float64)
    terms = torch.randn(400, 3, generator=generator, dtype=torch.float64) * torch.tensor([1, 9, 0])
    logits = 0.7 * scores + 0.4 * terms[:, 0] + 0.2
    labels = (torch.rand(400, generator=generator) < logits.sigmoid()).double()
    found = fit_weights(scores, terms, labels).requires_grad_()
    loss = binary_cross_entropy_with_logits(scored(scores, terms, found), labels, reduction="sum")
    spread = torch.tensor([*terms.std(0, correction=0)[:2], 1.0])
    prior = (found[:2] / 10).square().sum() + (found[2:] * spread / 0.1).square().sum()
    (loss + prior / 2).backward()
    assert found.grad.abs().max() < 1e-6
    assert found[4] == 0 and found[2] > 0.1
