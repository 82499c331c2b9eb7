import sys
from collections import Counter

import numpy as np
import pytest
import torch

from ckf.baselines import (
    TrainMeans,
    ctr_scores,
    evaluate_baselines,
    explanations,
    rating_predictions,
    slice_masks,
    topk_scores,
)
from ckf.cf import CFConfig, CFVectors, fit_mf
from ckf.data.prepared import Candidates
from ckf.metrics import auc
from tests.prepared_data import prepared


@pytest.fixture
def toy():
    """Train: item 0 liked 2 of 2, item 1 liked 0 of 1, item 2 unseen; users 0 and 1; mean 2/3."""
    return prepared(
        user=[0, 0, 0, 1, 1, 2],
        item=[0, 1, 2, 0, 1, 0],
        label=[1, 0, 1, 1, 1, 0],
        split=[0, 0, 2, 0, 2, 2],
        rating=[5, 1, 4, 4, 4, 2],
        titles=["A (1999)", "B", "C (Part 2) (2001)"],
    )


def planted(seed=0, n_users=60, n_items=40, per_user=20):
    """Labels from a bias per item and per user, and splits by position in the user's stream."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(n_users), per_user)
    item = np.concatenate([rng.permutation(n_items)[:per_user] for _ in range(n_users)])
    logit = rng.normal(size=n_users)[user] + rng.normal(size=n_items)[item]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-2 * logit))).astype(int)
    split = np.tile(np.repeat([0, 1, 2], [per_user - 6, 3, 3]), n_users)
    return prepared(user, item, label, split, rating=3 + 2 * label - (item % 2))


def test_means_by_hand(toy):
    scores = ctr_scores(toy, toy.rows("ctr", "test"))
    mean = 2 / 3
    first, second, unseen = (2 + 2 * mean) / 4, (0 + 2 * mean) / 3, mean
    np.testing.assert_allclose(scores["item_mean"], [unseen, second, first])
    first, second = (2 + 10 * mean) / 12, (0 + 10 * mean) / 11
    users = [(1 + 20 * mean) / 22, (1 + 20 * mean) / 21, mean]
    np.testing.assert_allclose(
        scores["item_user_mean"], [mean + users[0], second + users[1], first + users[2]]
    )
    np.testing.assert_allclose(scores["popularity"], [0, 1, 2])


def test_ratings_by_hand(toy):
    predictions = rating_predictions(toy, toy.rows("rating", "test"))
    mean = 10 / 3
    np.testing.assert_allclose(predictions["global_mean"], [mean] * 3)
    np.testing.assert_allclose(
        predictions["item_mean"], [mean, (1 + 2 * mean) / 3, (9 + 2 * mean) / 4]
    )
    items = np.array([(9 + 10 * mean) / 12, (1 + 10 * mean) / 11, mean])
    users = [(5 - items[0] + 1 - items[1]) / 22, (4 - items[0]) / 21, 0.0]
    np.testing.assert_allclose(
        predictions["item_user_mean"], [items[2] + users[0], items[1] + users[1], items[0]]
    )


def test_baselines_read_train_rows_only():
    data = planted()
    rows = data.rows("ctr", "test")
    before, ratings = ctr_scores(data, rows), rating_predictions(data, rows)
    held_out = data.split > 0
    data.label[held_out] = 1 - data.label[held_out]
    data.rating[held_out] = 6 - data.rating[held_out]
    after, ratings_after = ctr_scores(data, rows), rating_predictions(data, rows)
    assert set(before) == {"item_mean", "item_user_mean", "popularity", "logistic_regression"}
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    for name in ratings:
        np.testing.assert_array_equal(ratings[name], ratings_after[name])


def test_regression_sees_no_own_label():
    """Labels are noise: with a row's own label in its means the regression would trust them."""
    rng = np.random.default_rng(0)
    n = 3000
    user, item = np.sort(rng.integers(1000, size=n)), rng.integers(1000, size=n)
    data = prepared(user, item, rng.integers(2, size=n), np.repeat([0, 2], [2000, 1000]))
    train = data.rows("ctr", "train")
    leak = auc(ctr_scores(data, train)["item_mean"], data.label[train])
    assert leak > 0.7
    assert ctr_scores(data, data.rows("ctr", "test"))["logistic_regression"].std() < 0.25


def test_regression_uses_all_its_features():
    data = planted()
    rows = data.rows("ctr", "test")
    scores = ctr_scores(data, rows)
    found = auc(scores["logistic_regression"], data.label[rows])
    assert found > auc(scores["item_mean"], data.label[rows]) + 0.03
    # the release year decides alone
    year = 1950 + np.arange(data.n_items)
    data.titles = [f"Film ({y})" for y in year]
    data.label[:] = year[data.item] > 1970
    rng = np.random.default_rng(0)
    data.item[rows] = rng.permutation(data.item[rows])
    data.label[rows] = year[data.item[rows]] > 1970
    assert auc(ctr_scores(data, rows)["logistic_regression"], data.label[rows]) > 0.95


def test_regression_is_left_out_with_a_warning_without_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.warns(UserWarning, match="scikit-learn is not installed"):
        scores = ctr_scores(planted(), np.arange(5))
    assert "logistic_regression" not in scores


def test_evaluate_has_the_shape_of_the_metrics_file():
    data = planted()
    vectors = fit_mf(CFConfig(dim=4, epochs=5), data, log=lambda text: None)
    rows = data.rows("topk", "test")
    rng = np.random.default_rng(0)
    for name, width in (("uniform9", 10), ("uniform19", 20)):
        items = rng.integers(data.n_items, size=(len(rows), width)).astype(np.int32)
        items[:, 3] = data.item[rows]
        data._candidates[f"test.{name}.rows"] = rows
        data._candidates[f"test.{name}.items"] = items
        data._candidates[f"test.{name}.positive"] = np.full(len(rows), 3)
    tasks = ["ctr", "topk", "rating"]
    found = evaluate_baselines(data, "test", tasks, vectors, ["uniform9", "uniform19"], n=20)
    assert list(found) == tasks
    assert set(found["ctr"]) == {
        "item_mean",
        "item_user_mean",
        "popularity",
        "logistic_regression",
        "cf",
    }
    assert set(found["ctr"]["cf"]) == {"auc", "uauc"}
    assert found["ctr"]["cf"]["uauc"]["users"] > 0
    assert set(found["topk"]) == {"popularity", "item_mean", "cf"}
    one = found["topk"]["item_mean"]
    assert one["hr@1"] == one["lists"]["uniform9"]["hr@1"] != one["lists"]["uniform19"]["hr@1"]
    assert set(found["rating"]) == {"global_mean", "item_mean", "item_user_mean"}
    rmse = {name: part["rmse"]["value"] for name, part in found["rating"].items()}
    assert rmse["item_user_mean"] < rmse["item_mean"] < rmse["global_mean"]
    assert "lists" in evaluate_baselines(data, "test", ["topk"], n=5)["topk"]["popularity"]


def test_cf_row_folds_in_users_without_train_rows(toy):
    toy.history[:] = [[-1, -1, 0]] * 6
    vectors = CFVectors(
        users=torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        items=torch.tensor([[1.0, 0.5], [1.0, -0.5], [0.0, 0.0]]),
        user_known=torch.tensor([True, True, False]),
        item_known=torch.tensor([True, True, False]),
        kind="mf",
        fold_in=torch.tensor([[2.0, 0.25], [0.0, 0.0], [0.0, 0.0]]),
        fold_in_offset=torch.zeros(2),
    )
    scores = ctr_scores(toy, np.array([4, 5]), vectors)["cf"]  # users 1 and 2, items 1 and 0
    np.testing.assert_allclose(scores, [-0.5, 2.0 + 0.25 + 0.5])
    candidates = Candidates(np.array([4, 5]), np.array([[0, 1], [0, 1]]), np.array([1, 0]))
    scores = topk_scores(toy, candidates, vectors)["cf"]
    np.testing.assert_allclose(scores, [[0.5, -0.5], [2.75, 1.75]])


def test_slices(toy):
    masks = slice_masks(toy, np.arange(6), least=1)
    np.testing.assert_array_equal(masks["warm"], [True, True, False, True, True, False])
    np.testing.assert_array_equal(masks["cold"], ~masks["warm"])
    assert "not_cold" not in masks
    toy.not_cold[:] = [1, 0, 1, 0, 1, 0]
    np.testing.assert_array_equal(slice_masks(toy, np.array([0, 1]))["not_cold"], [True, False])


def test_no_train_values_is_an_error(toy):
    toy.rating[:] = np.nan
    with pytest.raises(ValueError, match="no train row has a rating"):
        TrainMeans.of(toy, "rating")


def test_one_class_in_train_has_no_regression(toy):
    toy.label[:] = 1
    assert "logistic_regression" not in ctr_scores(toy, np.arange(3))


def test_explanations_are_others_train_sentences(small_run, small_metrics):
    data = small_run.assembly.data
    rows, train = data.rows("explain", "test"), data.rows("explain", "train")
    texts = explanations(data, rows)
    said = Counter(data.explanation(int(row)) for row in train)
    assert set(texts["common_sentence"]) == {said.most_common(1)[0][0]}
    for row, text in zip(rows, texts["item_sentence"], strict=True):
        about = train[data.item[train] == data.item[row]]
        newest = about[data.time[about] == data.time[about].max()] if len(about) else about
        allowed = {data.explanation(int(r)) for r in newest} or set(texts["common_sentence"])
        assert text in allowed
    found = small_metrics["baselines"]["explain"]
    assert set(found) == set(texts)
    assert set(found["item_sentence"]) == set(small_metrics["test"]["explain"]) - {"loss"}
