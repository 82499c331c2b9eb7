"""Train rows are shown vectors of models that did not see them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ckf.batches import Collator, RowBatcher, VectorLookup
from ckf.cf import CFConfig, CFVectors, fit_cf, fold_in_users
from ckf.cf.folds import fit_folds, train_rows
from ckf.cf.held_out import HeldOut
from ckf.cf.tables import MappedTable
from ckf.match import MatchScores
from ckf.metrics import auc
from tests.prepared_data import prepared

SMALL = {"dim": 4, "epochs": 20, "batch_size": 256}
FILES = {"kind": "file", "users": "u.npy", "items": "i.npy"}
FOLD_FILES = {"fold_users": ["a.npy", "b.npy"], "fold_items": ["c.npy", "d.npy"]}


def quiet(_line):
    pass


def noise(n_users=150, n_items=60, per_user=30, seed=0):
    """Labels that nothing foretells: what a train row's vectors know of them, its own row told."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users), per_user)
    item = np.concatenate([rng.permutation(n_items)[:per_user] for _ in range(n_users)])
    split = np.where(np.arange(len(user)) % per_user < per_user - 3, 0, 2)
    split[::50] = 1
    return prepared(user, item, rng.integers(0, 2, len(user)), split)


@pytest.fixture(scope="module")
def data():
    return noise()


@pytest.fixture(scope="module")
def vectors(data):
    return fit_cf(CFConfig(**SMALL), data, quiet)


def train_of(data):
    rows = train_rows(data)
    return rows, torch.from_numpy(data.user[rows]).long(), torch.from_numpy(data.item[rows]).long()


def scores(vectors, users, items, folds=None):
    """p . q and the biases of rows (n,), as the language model could work them out."""
    p, _ = vectors.user_rows(users, folds)
    q = vectors.item_rows(items, folds)
    return (p[:, :-1] * q[:, :-1]).sum(1) + p[:, -1] + q[:, -1]


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_held_out_vectors_do_not_tell_a_train_rows_label(data, kind):
    if kind == "lightgcn":
        pytest.importorskip("torch_geometric")
    vectors = fit_cf(CFConfig(**SMALL, kind=kind), data, quiet)
    rows, users, items = train_of(data)
    own = auc(scores(vectors, users, items).numpy(), data.label[rows])
    held_out = scores(vectors, users, items, vectors.folds(users, items))
    assert own > 0.6
    # standard error .009 over 4,000 rows; a row left out lowers its user's and item's means
    assert 0.4 < auc(held_out.numpy(), data.label[rows]) < 0.52


def test_a_folds_labels_do_not_change_what_its_rows_are_shown(data):
    """Without valid rows, which choose the number of epochs by what the whole fit says of them."""
    data = replace(data, split=np.where(data.split == 1, 2, data.split))
    rows, users, items = train_of(data)
    vectors = fit_cf(CFConfig(**SMALL), data, quiet)
    folds = vectors.folds(users, items)
    first = folds == 0
    label = data.label.copy()
    label[rows[first]] = 1 - label[rows[first]]
    other = fit_cf(CFConfig(**SMALL), replace(data, label=label), quiet)
    before, after = (scores(v, users[first], items[first], folds[first]) for v in (vectors, other))
    # the same model, turned onto another whole fit: float32 products of values up to about 1
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores(vectors, users, items), scores(other, users, items))


def test_every_train_pair_has_its_fold_and_no_other(data, vectors):
    _rows, users, items = train_of(data)
    folds = vectors.folds(users, items)
    assert set(folds.tolist()) == {0, 1, 2, 3, 4}
    others = np.flatnonzero(data.split != 0)
    assert (vectors.folds(data.user[others], data.item[others]) == -1).all()
    assert (vectors.folds(np.full(4, -1), np.arange(4)) == -1).all()
    assert vectors.folds([data.n_users], [data.n_items]).tolist() == [-1]  # beyond the last pair


def test_rows_of_a_pair_share_a_fold():
    user, item = np.repeat([0, 1, 2, 3], 6), np.tile([0, 1, 2], 8)
    twice = prepared(user, item, np.arange(24) % 2, np.zeros(24))
    lines = []
    folds = fit_folds(twice, lambda part: part, 3, 0, lines.append)
    assert len(lines) == 3 and "fold 1 of 3" in lines[0]
    place = {}
    for row, fold in zip(folds.rows, folds.fold, strict=True):
        assert place.setdefault((user[row], item[row]), fold) == fold
    for number, part in enumerate(folds.models):
        assert (part.split[folds.rows[folds.fold == number]] != 0).all()
        assert (part.split[folds.rows[folds.fold != number]] == 0).all()


def test_a_model_is_turned_onto_the_whole_fit(data, vectors):
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def turned(table):
        return torch.cat([table[:, :-1] @ turn, table[:, -1:]], 1)

    plain = replace(vectors, held_out=None)
    other = replace(plain, users=turned(plain.users), items=turned(plain.items))
    folds = fit_folds(data, lambda part: other, 2, 0)
    found = HeldOut.of_models(folds, data, plain)
    # float32 products of values up to about 1
    torch.testing.assert_close(found.users, plain.users.repeat(2, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.items, plain.items.repeat(2, 1), rtol=1e-4, atol=1e-5)


def test_standardised_with_the_scale_of_the_whole_fit(data, vectors):
    found = vectors.standardised()
    _rows, users, items = train_of(data)
    folds = vectors.folds(users, items)
    known = vectors.user_known
    mean, std = vectors.users[known].mean(0), vectors.users[known].std(0, correction=0)
    own, there = found.user_rows(users, folds)
    assert there.all()
    expected = (vectors.user_rows(users, folds)[0] - mean) / std
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.folds(users, items), folds)


def test_the_folds_have_the_spread_of_the_whole_fit():
    """Fits that stop by themselves have factors of any size: these began small and grow."""
    rng = np.random.default_rng(2)
    p, q = rng.normal(size=(120, 2)), rng.normal(size=(80, 2))
    user, item = np.repeat(np.arange(120), 40), np.tile(np.arange(80), 60)
    logit = (p[user] * q[item]).sum(1)
    split = np.where(rng.random(len(user)) < 0.15, 1, 0)
    planted = prepared(user, item, rng.random(len(user)) < 1 / (1 + np.exp(-logit)), split)
    found = fit_cf(CFConfig(**SMALL, weight_decay=0.01), planted, quiet).standardised()
    known = found.held_out.user_known.view(5, -1)
    for users, there in zip(found.held_out.users.view(5, 120, -1), known, strict=True):
        spread = users[there].square().mean().sqrt()
        assert 0.5 < spread < 1.5


def shown_as_new(vectors, data, rows, items):
    """Scores of items (n, c) beside the held-out ones of rows (n,)."""
    users, history = np.repeat(data.user[rows], items.shape[1]), None
    if vectors.takes_history:
        history = np.repeat(data.history[rows], items.shape[1], 0)
    folds = vectors.folds(data.user[rows], data.item[rows]).repeat_interleave(items.shape[1])
    own = vectors.score(users, items.flatten(), history)
    return own.view(items.shape), vectors.score(users, items.flatten(), history, folds).view(
        items.shape
    )


@pytest.mark.parametrize("history", [False, True])
def test_a_blend_scores_a_whole_list_without_its_row(history):
    """Noise labels: an item of the user's is no better than any other, though the row says so.

    The row's own item has a score from without it in any case; the others' users know the row.
    """
    data = noise(per_user=20)
    past = np.tile([-1, -1, -1], (len(data), 1))
    past[:, 2] = np.r_[-1, data.item[:-1]]
    data = replace(data, history=past.astype(np.int32))
    vectors = fit_cf(CFConfig(**SMALL, blend=5, history=history), data, quiet)
    assert len(vectors.held_out.blends) == 5
    rows = np.flatnonzero((data.split == 0) & (data.label == 1))
    seen = np.zeros((data.n_users, data.n_items), bool)
    seen[data.user, data.item] = True
    rng = np.random.default_rng(3)
    other = np.array([rng.choice(np.flatnonzero(~seen[u])) for u in data.user[rows]])
    own, held_out = shown_as_new(vectors, data, rows, np.stack([data.item[rows], other], 1))
    # the pair's own score is the same either way, where the user has rows outside the fold
    torch.testing.assert_close(own[:, 0], held_out[:, 0], rtol=1e-4, atol=1e-4)
    better = [float((s[:, 0] > s[:, 1]).float().mean()) for s in (own, held_out)]
    # standard error .013 over 1,300 rows: left out, a like lowers its item's mean a little
    assert history or better[0] < better[1] - 0.02
    assert abs(better[1] - 0.5) < 0.06


def test_folded_and_shuffled_users_are_scored_without_the_row_too(data):
    vectors = fit_cf(CFConfig(**SMALL, blend=5), data, quiet)
    rows, users, items = train_of(data)
    folds = vectors.folds(users, items)
    for shown in (torch.full_like(users, -1), users.roll(29)):
        own = auc(vectors.score(shown, items).numpy(), data.label[rows])
        held_out = auc(vectors.score(shown, items, folds=folds).numpy(), data.label[rows])
        assert own > 0.53 and held_out < 0.52


def test_batches_show_train_rows_held_out_vectors(small_run):
    made = small_run.assembly
    tasks, old = made.tasks, made.batcher.collator
    lookup = VectorLookup(CFVectors.load(small_run.folder / "cf.safetensors"))
    batcher = RowBatcher(
        made.maker, made.batcher.encoder, Collator(tasks, lookup, old.filler, True)
    )
    examples = made.maker.examples("topk", "train")[:3] + made.maker.examples("topk", "test")[:3]
    rows = [example.row for example in examples]
    data, table = made.data, lookup.vectors
    prompts = [
        made.batcher.encode(e, s, True)
        for e, s in zip(examples, ["train"] * 3 + ["test"] * 3, strict=True)
    ]
    batch = batcher.batch(examples, prompts)
    folds = table.folds(data.user[rows], data.item[rows])
    assert (folds[:3] >= 0).all() and (folds[3:] == -1).all()
    users = torch.from_numpy(data.user[rows]).long()
    own, known = table.user_rows(users, folds)
    assert torch.equal(batch["user_vectors"][known], own[known])
    assert not torch.equal(batch["user_vectors"][:3], table.users[users[:3]])
    shown, place = batch["item_vectors"], 0
    for row, prompt in enumerate(prompts):
        for _, what in prompt.slots:
            if what >= 0:
                start = int(folds[row]) * data.n_items
                items = table.held_out.items[start:] if folds[row] >= 0 else table.items
                assert torch.equal(shown[place], items[what])
                place += 1
    assert place == len(shown) > 0
    for row in range(6):
        past = torch.from_numpy(data.history[rows[row]]).long()
        expected = table.item_rows(past.clamp(min=0)[None], folds[row : row + 1])[0]
        assert torch.equal(batch["history_vectors"][row], expected * (past >= 0)[:, None])


def test_who_has_no_row_outside_the_fold_is_shown_as_new():
    """User 3 and item 5 have one train row, each other's."""
    rng = np.random.default_rng(1)
    user, item = np.r_[np.repeat([0, 1, 2], 30), 3], np.r_[np.tile(np.arange(5), 18), 5]
    few = prepared(
        user, item, rng.integers(0, 2, 91), np.zeros(91), history=np.tile([-1, 0, 2], (91, 1))
    )
    vectors = fit_cf(CFConfig(**SMALL), few, quiet)
    lookup = VectorLookup(vectors)
    folds, history = vectors.folds([3], [5]), np.array([[-1, 0, 2]])
    assert vectors.user_known[3] and vectors.item_known[5] and folds[0] >= 0
    shown = lookup.users(np.array([3]), history, folds)
    assert torch.equal(shown, fold_in_users(lookup.vectors, history)) and shown.abs().max() > 0
    assert (lookup.items([5], folds) == 0).all() and (lookup.items([5]) != 0).any()


def test_a_score_without_a_blend_does_not_tell_the_label_either(data, vectors):
    rows, users, items = train_of(data)
    matches, past = MatchScores(vectors, data), data.history[rows]
    held_out = matches(data.user[rows], past, data.item[rows], vectors.folds(users, items))
    assert float(held_out.mean()) == pytest.approx(0, abs=1e-4)
    assert float(held_out.std(correction=0)) == pytest.approx(1, abs=1e-3)
    own = matches(data.user[rows], past, data.item[rows])
    assert auc(own.flatten().numpy(), data.label[rows]) > 0.6
    assert auc(held_out.flatten().numpy(), data.label[rows]) < 0.52


@pytest.mark.parametrize("above", [2**30, 0])
def test_saved_and_read_again_also_from_disk(data, vectors, tmp_path, above):
    vectors.save(tmp_path / "cf.safetensors")
    found = CFVectors.load(tmp_path / "cf.safetensors", above)
    kind = torch.Tensor if above else MappedTable
    assert isinstance(found.held_out.users, kind) and isinstance(found.users, kind)
    _, users, items = train_of(data)
    folds = found.folds(users, items)
    assert torch.equal(folds, vectors.folds(users, items))
    for one, two in ((found, vectors), (found.standardised(), vectors.standardised())):
        own, known = one.user_rows(users, folds)
        expected, also = two.user_rows(users, folds)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(known, also)
        assert torch.equal(one.item_rows(items, folds), two.item_rows(items, folds))


@pytest.mark.parametrize(
    "parts",
    [
        {"users": torch.zeros(3, 5)},
        {"items": torch.zeros(60, 5)},
        {"folds": torch.zeros(7, dtype=torch.int64)},
        {"pairs": torch.zeros(4, dtype=torch.int64)},
    ],
)
def test_foreign_parts_of_a_file_are_named(vectors, tmp_path, parts):
    replace(vectors, held_out=replace(vectors.held_out, **parts)).save(tmp_path / "cf.safetensors")
    with pytest.raises(ValueError, match="held-out vectors"):
        CFVectors.load(tmp_path / "cf.safetensors")


def test_a_fold_that_is_not_there_is_named(vectors, tmp_path):
    folds = vectors.held_out.folds + 3
    replace(vectors, held_out=replace(vectors.held_out, folds=folds)).save(
        tmp_path / "cf.safetensors"
    )
    with pytest.raises(ValueError, match="of 5 folds, but pairs of 3 to 7"):
        CFVectors.load(tmp_path / "cf.safetensors")


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_fewer_pairs_than_folds(pairs):
    tiny = prepared(np.arange(pairs), np.zeros(pairs), np.arange(pairs) % 2, np.zeros(pairs))
    vectors = fit_cf(CFConfig(**SMALL), tiny, quiet)
    found = vectors.folds(np.arange(pairs), np.zeros(pairs))
    if pairs == 1:
        assert found is None
    else:
        assert sorted(found.tolist()) == list(range(pairs))


@pytest.mark.parametrize("label", [1, -1])
def test_likes_only_and_ratings_only(data, label):
    """Every row a like; or ratings, and no label."""
    rating = np.random.default_rng(0).integers(1, 6, len(data)).astype(np.float32)
    changed = replace(data, label=np.full_like(data.label, label), rating=rating)
    vectors = fit_cf(CFConfig(**SMALL), changed, quiet)
    _, users, items = train_of(changed)
    assert (vectors.folds(users, items) >= 0).all()
    whole, parts = vectors.users[:, -1], vectors.held_out.users[:, -1].view(5, -1)
    for part in parts:
        assert part.isfinite().all() and part.any()
        if label < 0:  # biases of the same users, of four fifths of the rows
            assert np.corrcoef(whole, part)[0, 1] > 0.5


def test_the_whole_fit_is_as_it_was(data, vectors):
    plain = fit_cf(CFConfig(**SMALL, held_out=False), data, quiet)
    assert plain.held_out is None and plain.folds([0], [0]) is None
    assert torch.equal(plain.users, vectors.users) and torch.equal(plain.items, vectors.items)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 5}, "cf.held_out is 5, expected true or false"),
        (FILES | {"held_out": True}, "cannot fit again without a row: give cf.fold_users"),
        (FILES | {"blend": 2}, "cannot fit again without a row: give cf.fold_users"),
        (FILES | {"fold_users": ["a.npy", "b.npy"]}, "names 2 files and cf.fold_items 0"),
        (FILES | {"fold_users": ["a.npy"], "fold_items": ["b.npy"]}, "two each or more"),
        (FILES | FOLD_FILES | {"blend": 5}, "names 2 files: set cf.blend to 2"),
        (FILES | FOLD_FILES | {"blend": 2, "history": True}, "set cf.history to false"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CFConfig(**settings)


def test_files_of_vectors_have_none():
    assert CFConfig(**FILES).held_out is False
    assert CFConfig(**FILES, **FOLD_FILES).held_out is True
    assert CFConfig().held_out is True
