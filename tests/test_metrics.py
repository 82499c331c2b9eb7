import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from ckf import metrics
from ckf.metrics import (
    auc,
    auc_statistic,
    bootstrap_over_users,
    ctr_metrics,
    ctr_slices,
    mae,
    mean_statistic,
    paired_bootstrap,
    ranking_metrics,
    rating_metrics,
    rmse,
    rmse_statistic,
    topk_metrics,
    uauc,
    uauc_statistic,
)


def clicks(n_rows, n_users, seed=0, levels=20):
    rng = np.random.default_rng(seed)
    users = rng.integers(n_users, size=n_rows) * 7 + 3  # any ids, not 0..U-1
    labels = rng.integers(2, size=n_rows)
    scores = np.round(rng.normal(size=n_rows) + labels * 0.5, 1) * levels
    return scores, labels, users


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_equals_sklearn_with_ties(pairs):
    scores, labels = np.array(pairs, dtype=float).T
    if labels.min() == labels.max():
        assert np.isnan(auc(scores, labels))
    else:
        assert auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_of_infinite_scores_counts_ties():
    scores, labels = [np.inf, np.inf, -np.inf, 0.0], [1, 0, 0, 1]
    assert auc(scores, labels) == pytest.approx(2.5 / 4)


def test_weighted_auc_is_the_auc_of_repeated_rows():
    scores, labels, _ = clicks(60, 5)
    weights = np.random.default_rng(1).integers(0, 4, size=(8, 60))
    repeated = [roc_auc_score(np.repeat(labels, w), np.repeat(scores, w)) for w in weights]
    found = auc_statistic(scores, labels)(weights.astype(float))
    np.testing.assert_allclose(found, repeated, atol=1e-12)


def test_uauc_by_hand():
    users = [1, 1, 1, 2, 2, 3, 3, 4]
    labels = [1, 0, 0, 1, 0, 1, 1, 0]
    scores = [2.0, 1.0, 3.0, 5.0, 5.0, 1.0, 0.0, 9.0]
    # user 1: beats one of two; user 2: a tie; users 3 and 4 have one label
    assert uauc(scores, labels, users) == (pytest.approx(0.5), 2)


def test_uauc_equals_sklearn_per_user():
    scores, labels, users = clicks(400, 30)
    each = [
        roc_auc_score(labels[users == u], scores[users == u])
        for u in np.unique(users)
        if len(np.unique(labels[users == u])) == 2
    ]
    assert uauc(scores, labels, users) == (pytest.approx(np.mean(each), abs=1e-12), len(each))


def test_uauc_without_mixed_users_is_nan():
    value, count = uauc([1.0, 2.0], [0, 1], [1, 2])
    assert np.isnan(value) and count == 0


def brute_force_ranking(scores, positive):
    """Mean over every order of the columns that sorts the scores downwards."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)):
            continue
        rank = order.index(positive) + 1
        row = {f"hr@{k}": float(rank <= k) for k in (1, 5, 10)}
        row |= {f"ndcg@{k}": (rank <= k) / np.log2(rank + 1) for k in (5, 10)}
        found.append(row | {"mrr": 1 / rank})
    return {name: np.mean([row[name] for row in found]) for name in found[0]}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=7), st.data())
def test_ranking_metrics_average_over_ties(scores, data):
    positive = data.draw(st.integers(0, len(scores) - 1))
    found = ranking_metrics(np.array([scores], float), np.array([positive]))
    for name, value in brute_force_ranking(scores, positive).items():
        assert found[name][0] == pytest.approx(value, abs=1e-12), name


def test_ndcg_equals_sklearn():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, size=(20, 15)).astype(float), rng.integers(15, size=20)
    relevance = np.eye(15)[positive]
    found = ranking_metrics(scores, positive)
    for k in (5, 10):
        expected = ndcg_score(relevance, scores, k=k)  # averages over ties as well
        assert found[f"ndcg@{k}"].mean() == pytest.approx(expected)


def test_constant_scores_rank_as_chance_does():
    found = ranking_metrics(np.zeros((3, 20)), np.array([0, 7, 19]))
    assert found["hr@1"] == pytest.approx(1 / 20)
    assert found["hr@5"] == pytest.approx(5 / 20)
    assert found["hr@10"] == pytest.approx(10 / 20)


def test_rating_errors():
    assert rmse([1.0, 2.0], [1.0, 4.0]) == pytest.approx(np.sqrt(2))
    assert mae([1.0, 2.0], [1.0, 4.0]) == pytest.approx(1.0)
    found = rating_metrics([1.0, 2.0], [1.0, 4.0], [0, 1])
    assert found["rmse"]["value"] == pytest.approx(np.sqrt(2))
    assert found["mae"]["value"] == pytest.approx(1.0)
    weights = np.array([[1.0, 3.0]])
    assert rmse_statistic([1.0, 2.0], [1.0, 4.0])(weights) == pytest.approx([np.sqrt(3)])


@pytest.mark.parametrize(
    "call",
    [
        lambda: auc([np.nan, 1.0], [0, 1]),
        lambda: uauc([np.nan, 1.0], [0, 1], [0, 0]),
        lambda: ranking_metrics(np.array([[np.nan, 1.0]]), np.array([0])),
        lambda: rmse([np.nan], [1.0]),
        lambda: mean_statistic([np.nan]),
        lambda: ctr_metrics([np.nan, 1.0], [0, 1], [0, 0]),
    ],
)
def test_nan_raises(call):
    with pytest.raises(ValueError, match=r"1 of \d .* NaN"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([1.0, 2.0], [0, -1]), r"labels hold \[-1\]"),
        (lambda: auc([1.0, 2.0], [0]), "one per row"),
        (lambda: auc(np.zeros((2, 2)), [0, 1]), "one score per row"),
        (lambda: ranking_metrics(np.zeros((2, 3)), np.array([0, 3])), "expected 0..2"),
        (lambda: ranking_metrics(np.zeros((2, 3)), np.array([0, -1])), "expected 0..2"),
        (lambda: ranking_metrics(np.zeros((2, 3)), np.array([0])), r"\(P,\)"),
    ],
)
def test_wrong_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bootstrap_draws_whole_users():
    """Rows of one user are copies: the interval is that of the users, not of the rows."""
    values = np.random.default_rng(0).normal(size=50)
    alone = bootstrap_over_users(mean_statistic(values), np.arange(50), seed=3)
    copied = bootstrap_over_users(
        mean_statistic(np.repeat(values, 20)), np.repeat(np.arange(50), 20), seed=3
    )
    for name in ("value", "low", "high"):
        assert copied[name] == pytest.approx(alone[name])


def test_bootstrap_does_not_depend_on_the_chunk(monkeypatch):
    scores, labels, users = clicks(200, 20)
    whole = bootstrap_over_users(auc_statistic(scores, labels), users, n=50)
    monkeypatch.setattr(metrics, "_WEIGHTS_AT_ONCE", 7 * 200)
    assert bootstrap_over_users(auc_statistic(scores, labels), users, n=50) == whole


def test_bootstrap_covers_the_truth():
    """Means of correlated rows: about 95 of 100 intervals hold the true mean 0."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(60), 5)
    covered = 0
    for _ in range(200):
        values = np.repeat(rng.normal(size=60), 5) + rng.normal(size=300)
        found = bootstrap_over_users(mean_statistic(values), users, n=200)
        covered += found["low"] <= 0.0 <= found["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_uauc_statistic_resamples_users():
    scores, labels, users = clicks(300, 25)
    values = [
        roc_auc_score(labels[users == u], scores[users == u])
        for u in np.unique(users)
        if len(np.unique(labels[users == u])) == 2
    ]
    found = bootstrap_over_users(uauc_statistic(scores, labels, users), users)
    error = np.std(values) / np.sqrt(len(values))
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_undefined_values_are_none():
    assert ctr_metrics([1.0, 2.0], [1, 1], [0, 1]) == {
        "auc": {"value": None, "low": None, "high": None},
        "uauc": {"value": None, "low": None, "high": None, "users": 0},
    }
    empty = topk_metrics(np.zeros((0, 5)), np.zeros(0, int), np.zeros(0, int))
    assert empty["hr@1"] == {"value": None, "low": None, "high": None}


def test_slices_count_their_rows():
    scores, labels, users = clicks(100, 10)
    mask = np.arange(100) < 40
    found = ctr_slices(scores, labels, users, {"first": mask}, n=20)["first"]
    assert found["rows"] == 40
    assert found["auc"]["value"] == pytest.approx(auc(scores[:40], labels[:40]))


def test_paired_bootstrap_is_narrower_than_two_intervals():
    scores, labels, users = clicks(2000, 100)
    other = scores + np.random.default_rng(5).normal(size=2000)
    a, b = auc_statistic(scores, labels), auc_statistic(other, labels)
    same = paired_bootstrap(a, a, users, n=200)
    assert (same["value"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)
    found = paired_bootstrap(a, b, users, n=200)
    single = bootstrap_over_users(a, users, n=200)
    assert found["value"] == pytest.approx(auc(scores, labels) - auc(other, labels))
    assert found["high"] - found["low"] < 0.5 * (single["high"] - single["low"])
    better = auc_statistic(scores + 20 * labels, labels)
    assert paired_bootstrap(better, a, users, n=200)["p"] < 0.02


def test_bootstrap_is_fast():
    scores, labels, users = clicks(7331, 320)
    start = time.perf_counter()
    ctr_metrics(scores + np.random.default_rng(0).normal(size=7331), labels, users, n=1000)
    assert time.perf_counter() - start < 10


def test_text_metrics():
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from ckf.text_metrics import distinct, text_metrics

    texts = ["the sound of this album is great", "a dull and long record", "great great songs here"]
    found = text_metrics(texts, texts, [0, 1, 2], n=20)
    for name in ("bleu4", "rouge1", "rouge2", "rougeL"):
        assert found[name]["value"] == pytest.approx(100.0), name
    assert found["distinct1"]["value"] == pytest.approx(100 * 14 / 16)
    assert found["distinct1"]["low"] <= found["distinct1"]["value"] <= found["distinct1"]["high"]
    assert found["distinct2"]["value"] == pytest.approx(100.0)
    assert distinct(["", ""], [0, 1], 1)["value"] is None
    empty = text_metrics(["", "", ""], texts, [0, 1, 2], n=5)
    assert empty["bleu4"]["value"] == 0.0 and empty["rougeL"]["value"] == 0.0
    with pytest.raises(ValueError, match="2 predictions, 3 references"):
        text_metrics(texts[:2], texts, [0, 1, 2])


def test_bleu_is_sacrebleus_corpus_score():
    sacrebleu = pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    from ckf.text_metrics import text_metrics

    predictions = ["the sound of this album is good, really", "a dull record it is", "buy it now"]
    references = ["the sound of the album is good, really good", "it is a dull record", "do buy it"]
    found = text_metrics(predictions, references, [0, 1, 1], n=200)["bleu4"]
    expected = sacrebleu.corpus_bleu(predictions, [references]).score
    assert found["value"] == pytest.approx(expected)
    # two users: every resample is user 0 twice, user 1 twice or both once
    once = [sacrebleu.corpus_bleu(predictions[:1] * 2, [references[:1] * 2]).score]
    once += [sacrebleu.corpus_bleu(predictions[1:] * 2, [references[1:] * 2]).score]
    assert found["low"] == pytest.approx(min(once)) and found["high"] == pytest.approx(max(once))
