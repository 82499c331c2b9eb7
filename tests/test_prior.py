"""The CF model's answer as log-odds: fitted without a row's own label, added where it belongs."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckf.assembly import assemble
from ckf.batches import stars
from ckf.cf import CFConfig, fit_cf
from ckf.evaluate import evaluate_run
from ckf.prior import AnswerPrior, softmax_regression
from ckf.prompts import ANSWERS
from ckf.report import metrics_table
from ckf.scoring import PriorScorer, Scorer
from tests.ckf_fixtures import TASKS, quiet, randomise, small_config
from tests.prepared_data import prepared as prepared_data

CF = {"kind": "mf", "dim": 4, "epochs": 20, "batch_size": 64, "blend": 3}
ANSWERED = [task for task in TASKS if task != "explain"]


@pytest.fixture(scope="module")
def parts(small_model, small_run):
    """The small run's parts with a prior, random weights."""
    data = small_run.assembly.data
    changes = {"metanet__match": "prior", "train__schedule": "joint", "cf": CF}
    config = small_config(small_model, **changes)
    torch.manual_seed(0)
    made = assemble(config, data, fit_cf(CFConfig(**CF), data, quiet), torch.device("cpu"))
    randomise(made.model)
    made.model.eval()
    return made


@pytest.fixture(scope="module")
def prior(parts):
    return parts.batcher.collator.prior


def test_the_regression_finds_the_weights_that_made_the_choices():
    rng = np.random.default_rng(0)
    choices, weights = rng.normal(size=(20_000, 4, 3)), np.array([1.0, -0.5, 0.0])
    chosen = (choices @ weights + rng.gumbel(size=(20_000, 4))).argmax(1)
    np.testing.assert_allclose(softmax_regression(choices, chosen), weights, atol=0.05)
    told = softmax_regression(choices, choices[:, :, 0].argmax(1))  # no finite weight is likeliest
    assert np.isfinite(told).all() and told[0] > 5


def own_batch(parts, examples, padded=False):
    prompts = [parts.batcher.encode(e, "train", True) for e in examples]
    data, rows = parts.data, [e.row for e in examples]
    collator = parts.batcher.collator.padded() if padded else parts.batcher.collator
    folds = parts.vectors.folds(data.user[rows], data.item[rows])
    return collator(prompts, data.user[rows], data.history[rows], folds=folds)


def test_a_train_row_counts_for_others_only(parts, prior):
    data = parts.data
    train = np.flatnonzero(data.split == 0)[:7]
    found = prior.features(data.user[train], data.history[train], data.item[train])
    ratings = data.rating.astype(np.float64)
    ratings -= ratings[data.split == 0].mean()
    for row, (_, popularity, of_item, of_user, one) in zip(train, found, strict=True):
        other = (data.split == 0) & (np.arange(len(data.user)) != row)
        same_item = other & (data.item == data.item[row])
        same_user = other & (data.user == data.user[row])
        assert popularity * prior.std + prior.mean == pytest.approx(np.log1p(same_item.sum()))
        assert of_item == pytest.approx(ratings[same_item].sum() / (same_item.sum() + 10), abs=1e-6)
        assert of_user == pytest.approx(ratings[same_user].sum() / (same_user.sum() + 20), abs=1e-6)
        assert one == 1
    stranger = prior.features([-1], data.history[train[:1]], data.item[train[:1]])
    assert stranger[0, 1] > found[0, 1] and stranger[0, 3] == 0


@pytest.mark.parametrize("rows_an_item", [1, 3, 4])
def test_equal_popularity_says_nothing(rows_an_item):
    """Up to rounding it is constant in training, and one row more would count 1e8 deviations."""
    rng = np.random.default_rng(0)
    items, users = 100, 60
    item = np.repeat(np.arange(items), rows_an_item)
    user = np.concatenate([rng.permutation(users)[:rows_an_item] for _ in range(items)])
    label, test = rng.integers(0, 2, len(item)), np.arange(50)
    data = prepared_data(
        np.r_[user, test], np.r_[item, test], np.r_[label, np.ones(50, int)],
        np.r_[np.zeros(len(item), int), np.full(50, 2)],
    )  # fmt: skip
    scores = torch.zeros(50, 1)
    matches = MagicMock(side_effect=lambda users, *_: torch.zeros(len(users), 1))
    found = AnswerPrior(matches, SimpleNamespace(data=data), {"ctr": [1, 2]})
    shown = found.features(test, np.full((50, 3), -1), test, scores)
    odds = shown @ (found.weights["ctr"][0] - found.weights["ctr"][1])
    assert np.abs(odds).max() < 2


def test_the_score_is_the_one_of_the_placeholder(parts, prior, mixed):
    batch = own_batch(parts, [e for e in mixed if e.task == "ctr"])
    scores = batch["match_scores"].flatten()
    data, rows = parts.data, [e.row for e in mixed if e.task == "ctr"]
    folds = parts.vectors.folds(data.user[rows], data.item[rows])
    found = prior.features(data.user[rows], data.history[rows], data.item[rows], folds=folds)
    np.testing.assert_allclose(found[:, 0], scores.numpy())


@pytest.mark.parametrize("task", ["ctr", "rating"])
def test_words_follow_the_train_rows(parts, prior, task):
    """Chances of the words over the train rows are on average what the rows say."""
    data = parts.data
    train = np.flatnonzero(data.split == 0)
    folds = parts.vectors.folds(data.user[train], data.item[train])
    x = prior.features(data.user[train], data.history[train], data.item[train], folds=folds)
    logits = x @ prior.weights[task].T
    chances = torch.from_numpy(logits).softmax(1).mean(0).numpy()
    labels = data.label[train] == 1
    words = np.where(labels, 0, 1) if task == "ctr" else stars(data.rating[train], train) - 1
    shares = np.bincount(words, minlength=logits.shape[1]) / len(train)
    np.testing.assert_allclose(chances, shares, atol=0.03)
    better = x + [1, 0, 0, 0, 0]  # a higher score
    means = [torch.from_numpy(f @ prior.weights[task].T).softmax(1).numpy() for f in (x, better)]
    value = np.array([1.0, 0.0]) if task == "ctr" else np.arange(1.0, 6.0)
    rise = (means[1] - means[0]) @ value
    assert rise.mean() > 0.05 and (rise > -0.05).all()  # few rows tell four of five stars apart
    assert task != "ctr" or (rise > 0).all()


def test_a_list_ranks_by_score_and_popularity(parts, prior):
    maker, data = parts.maker, parts.data
    lists = maker.candidates("train")
    size = lists.items.shape[1]
    rows = np.repeat(lists.rows, size)
    folds = parts.vectors.folds(data.user[rows], data.item[rows])
    x = prior.features(data.user[rows], data.history[rows], lists.items.flatten(), folds=folds)
    scores = (x @ prior.weights["topk"].T).reshape(lists.items.shape)
    liked = np.take_along_axis(scores, lists.positive[:, None].astype(int), 1)
    assert (liked > scores).sum(1).mean() > 0.6 * (size - 1)  # by chance it would be half


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_added_to_the_answers_words_and_to_nothing_else(parts, prior, mixed, padded):
    batch = own_batch(parts, mixed, padded)
    with torch.no_grad():
        plain = parts.model.logits(batch, batch["last_slots"]).float()
        added = (parts.model.answer_logits(batch) - plain).double()
    data = parts.data
    for row, example in enumerate(mixed):
        expected = torch.zeros(added.shape[1], dtype=torch.float64)
        if example.task != "explain":
            items = [int(data.item[example.row])]
            if example.task == "topk":
                items = parts.maker.candidates("train").items[example.place].tolist()
            rows = [example.row] * len(items)
            folds = parts.vectors.folds(data.user[rows], data.item[rows])
            x = prior.features(data.user[rows], data.history[rows], items, folds=folds)
            values = (x @ prior.weights[example.task].T).flatten()
            tokens = parts.batcher.encoder.answer_tokens(example.task)[1]
            for word, value in zip(ANSWERS[example.task], values, strict=False):
                expected[tokens[word]] = value - values.mean()
        torch.testing.assert_close(added[row], expected, atol=1e-5, rtol=1e-5)


def test_the_loss_is_of_both_together(parts, mixed):
    batch = own_batch(parts, mixed)
    with torch.no_grad():
        found = parts.model(**batch)["row_losses"]
        logits = parts.model.answer_logits(batch)
        free = parts.model.logits(batch, batch["label_slots"]).float()
    for row, example in enumerate(mixed):
        labels = batch["label_rows"] == row
        tokens = batch["label_tokens"][labels]
        own = logits[row : row + 1] if example.task != "explain" else free[labels]
        torch.testing.assert_close(found[row], F.cross_entropy(own, tokens))


def test_scoring_is_with_it_and_the_bare_model_without(parts, mixed):
    rows = [e for e in mixed if e.task == "rating"]
    data, index = parts.data, [e.row for e in rows]
    for base_only in (False, True):
        scorer = Scorer(parts, base_only)
        prompts = [parts.batcher.encode(e, "train", scorer.vectors) for e in rows]
        batch = parts.batcher.collator.padded()(prompts, data.user[index], data.history[index])
        assert ("prior_rows" in batch) is not base_only
        found = scorer.answers(prompts, data.user[index], data.history[index]).logits
        with torch.no_grad():
            if base_only:
                batch["task_ids"] = torch.full_like(batch["task_ids"], -1)
            expected = parts.model.answer_logits(batch)[:, prior_tokens(parts, "rating")]
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_prior_alone_is_what_is_added(parts, prior, mixed):
    data = parts.data
    for task in ANSWERED:
        examples = [e for e in mixed if e.task == task]
        rows = [e.row for e in examples]
        prompts = [parts.batcher.encode(e, "train", True) for e in examples]
        alone = PriorScorer(parts).answers(prompts, data.user[rows], data.history[rows])
        together = Scorer(parts).answers(prompts, data.user[rows], data.history[rows])
        batch = parts.batcher.collator.padded()(prompts, data.user[rows], data.history[rows])
        with torch.no_grad():
            model = parts.model.logits(batch, batch["last_slots"])[:, prior_tokens(parts, task)]
        listed = np.isfinite(alone.logits)
        assert listed.all() or (task == "topk" and listed.sum(1).tolist() == [10, 10])
        found = (together.logits - model.numpy())[listed]
        np.testing.assert_allclose(alone.logits[listed], found, atol=1e-4)
        total = torch.from_numpy(alone.logits).logsumexp(1).numpy()
        np.testing.assert_allclose(alone.log_total, total)


def test_a_run_reports_the_prior_beside_it(parts, tmp_path):
    (tmp_path / "predictions").mkdir()
    metrics = evaluate_run(parts, tmp_path, {"name": "prior"})
    for task in ANSWERED:
        assert (
            metrics["baselines"][task]["prior"].keys()
            >= metrics["baselines"][task]["item_mean"].keys()
        )
    assert metrics["baselines"]["ctr"]["prior"]["auc"]["value"] > 0.6
    assert "prior" not in metrics["baselines"]["explain"]
    columns = [str(column.header) for column in metrics_table(metrics).columns]
    assert columns[-2:] == ["CF", "prior"]


def prior_tokens(parts, task):
    words = parts.batcher.encoder.answer_tokens(task)[1]
    return [words[word] for word in ANSWERS[task]]


def test_the_same_prior_comes_back_from_the_same_data(parts, prior):
    again = assemble(parts.config, parts.data, parts.vectors, torch.device("cpu"))
    for task in ANSWERED:
        np.testing.assert_array_equal(
            again.batcher.collator.prior.weights[task], prior.weights[task]
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"metanet__match": "prior", "train__schedule": "joint"}, "set cf.blend"),
        ({"metanet__match": "prior", "cf": CF, "train__schedule": "curriculum"}, "to joint"),
        ({"metanet__match": "prior", "cf": CF, "train__fold_share": 0.5}, "shows another"),
        ({"metanet__match": "prior", "cf": CF, "metanet__shuffle_users": True}, "shows another"),
    ],
)
def test_settings_that_it_needs_are_named(small_model, changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(small_model, **changes)
