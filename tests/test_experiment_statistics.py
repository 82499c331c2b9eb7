"""Statistics of an experiment against scipy and against computing by hand."""

import numpy as np
import pytest

from ckf.experiment import statistics
from ckf.experiment.cells import BY_USER, CELLS, COMPARISONS
from ckf.experiment.figures import _Measure
from ckf.experiment.scores import TaskScores
from ckf.experiment.slices import slices
from ckf.experiment.statistics import (
    figure,
    holm,
    mean_over_seeds,
    paired_samples,
    sampled,
    spread,
)
from ckf.metrics import auc_statistic, mean_statistic, paired_bootstrap
from tests.prepared_data import prepared

stats = pytest.importorskip("scipy.stats")  # comes with scikit-learn
USERS = np.arange(400)  # one row each, so that users are independent draws


def values(shift=0.0, seed=0):
    return np.random.default_rng(seed).normal(shift, 1.0, len(USERS))


def difference(a, b, users, samples):
    """a - b of one metric, given as one statistic per seed."""
    sides = [sampled({"m": side}, users, samples)["m"] for side in (a, b)]
    return statistics.difference(*sides)


def test_a_mean_over_seeds_is_the_mean_of_the_statistics():
    runs = [mean_statistic(values(seed=k)) for k in range(3)]
    weights = np.random.default_rng(9).integers(0, 3, (5, len(USERS))).astype(float)
    by_hand = np.mean([run(weights) for run in runs], axis=0)
    np.testing.assert_allclose(mean_over_seeds(runs)(weights), by_hand)


def test_the_interval_of_a_figure_is_that_of_normal_theory():
    runs = [values(seed=k) for k in range(3)]
    found = figure([mean_statistic(r) for r in runs], USERS, samples=4000)
    pooled = np.mean(runs, axis=0)  # users are resampled, seeds are not
    half = stats.norm.ppf(0.975) * pooled.std(ddof=1) / len(USERS) ** 0.5
    assert found["value"] == pytest.approx(pooled.mean())
    # a 2.5% quantile of 4000 draws is known to about 5% of the half width
    assert found["low"] == pytest.approx(pooled.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(pooled.mean() + half, abs=0.1 * half)
    assert found["seeds"] == pytest.approx([r.mean() for r in runs])
    assert found["std"] == pytest.approx(np.std([r.mean() for r in runs], ddof=1))


@pytest.mark.parametrize("shift", [0.0, 0.05, 0.1, 0.15])
def test_a_paired_p_is_that_of_the_paired_t_test(shift):
    noise = values(seed=1)
    a, b = noise + shift + 0.5 * values(seed=2), noise
    found = difference([mean_statistic(a)], [mean_statistic(b)], USERS, samples=8000)
    expected = stats.ttest_rel(a, b).pvalue
    # p of 8000 resamples has a standard error of 2 sqrt(p / 2 / 8000) at most
    error = 2 * np.sqrt(expected / 2 / 8000) + 2 / 8000
    assert found["p"] == pytest.approx(expected, abs=4 * error + 0.05 * expected)
    assert found["value"] == pytest.approx((a - b).mean())


def test_pairing_is_what_makes_a_small_difference_seen():
    noise = 5 * values(seed=1)
    a, b = noise + 0.1 + 0.1 * values(seed=2), noise
    found = difference([mean_statistic(a)], [mean_statistic(b)], USERS, samples=2000)
    assert found["p"] < 0.001 < stats.ttest_ind(a, b).pvalue
    assert 0 < found["low"] < found["value"] < found["high"]


def test_the_sign_is_a_minus_b_and_sides_swap():
    a, b = values(0.3), values(seed=1)
    one = difference([mean_statistic(a)], [mean_statistic(b)], USERS, samples=500)
    other = difference([mean_statistic(b)], [mean_statistic(a)], USERS, samples=500)
    assert one["value"] > 0 and other["value"] == pytest.approx(-one["value"])
    assert (one["low"], one["high"]) == pytest.approx((-other["high"], -other["low"]))
    assert one["p"] == other["p"]


def test_seeds_are_paired_and_a_baseline_stands_beside_each():
    a, b = [values(0.1 * k, seed=k) for k in range(3)], [values(seed=7 + k) for k in range(3)]
    ours, theirs = [mean_statistic(x) for x in a], [mean_statistic(x) for x in b]
    pairs = [x.mean() - y.mean() for x, y in zip(a, b, strict=True)]
    assert difference(ours, theirs, USERS, 100)["seeds"] == pytest.approx(pairs)
    against_one = [x.mean() - b[0].mean() for x in a]
    assert difference(ours, theirs[:1], USERS, 100)["seeds"] == pytest.approx(against_one)
    turned = [b[0].mean() - x.mean() for x in a]
    assert difference(theirs[:1], ours, USERS, 100)["seeds"] == pytest.approx(turned)


def test_one_seed_has_no_spread():
    assert spread([0.5]) == {"seeds": [0.5], "std": None}
    assert spread([0.5, float("nan")]) == {"seeds": [0.5, None], "std": None}
    assert spread([1.0, 3.0])["std"] == pytest.approx(2**0.5)


def test_a_user_with_many_rows_is_one_draw():
    """Ten copies of every row must not make an interval narrower."""
    own, users = values(), USERS
    many, owners = np.repeat(own, 10), np.repeat(users, 10)
    one = figure([mean_statistic(own)], users, 1000)
    ten = figure([mean_statistic(many)], owners, 1000)
    assert (ten["low"], ten["high"]) == pytest.approx((one["low"], one["high"]))


def test_what_is_undefined_stays_undefined():
    labels = np.ones(len(USERS), int)
    found = figure([auc_statistic(values(), labels)], USERS, 20)
    assert found["value"] is None and found["seeds"] == [None]


def test_holm_by_hand():
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 and 0.5 x 1, never falling
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None, 0.02, None]) == [None, 0.02, None]
    assert holm([]) == []


def everything(seeds=2, users=60):
    """CTR scores of every cell and baseline; all but "text" order each user's two rows."""
    user, label = np.repeat(np.arange(users), 2), np.tile([0, 1], users)
    data = prepared(user, np.zeros(2 * users), label, np.full(2 * users, 2))
    names = {name for a, b, _ in COMPARISONS for name in (a, b)}
    assert {name for name in names if name[0] != "="} <= set(CELLS)
    rng = np.random.default_rng(0)
    rows = np.arange(len(user))

    def runs(name):
        told = 0.1 if name == "text" else 2.0
        noise = rng.normal(size=(1 if name[0] == "=" else seeds, len(user)))
        return [{"ctr": TaskScores("ctr", rows, {"score": told * label + x})} for x in noise]

    return data, {name: runs(name) for name in sorted(names)}


def test_a_clear_difference_is_decided_among_all_comparisons():
    """p has a floor; times the number of comparisons it must still be below 0.05."""
    data, scores = everything()
    found = _Measure(data, samples=1000, seed=0).comparisons(scores)
    family = [e for e in found if e["metric"] == "auc"]
    assert len(family) == len(COMPARISONS) and 2 * len(family) / 1001 > 0.05
    clear = next(e for e in family if (e["a"], e["b"]) == ("linear", "text"))
    assert clear["low"] > 0 and clear["p_holm"] < 0.011
    assert min(e["p"] for e in family) == 2 / (200 * len(family) + 1)


def test_few_comparisons_or_none_keep_the_samples_of_the_config():
    assert statistics.paired_samples(1000, 5) == 1000
    assert statistics.paired_samples(0, 28) == 0  # evaluate.bootstrap: 0


def test_the_draws_of_a_cell_are_made_once_and_give_the_paired_bootstrap(monkeypatch):
    data, scores = everything()
    calls = []

    def counted(*args):
        calls.append(1)
        return sampled(*args)

    monkeypatch.setattr("ckf.experiment.figures.sampled", counted)
    samples = 200 * len(COMPARISONS)
    found = _Measure(data, samples, seed=3).comparisons(scores)
    assert len(calls) == len(scores)
    for entry in (e for e in found if (e["a"], e["b"]) == ("ckf", "cf")):
        sides = [[s["ctr"].statistics(data) for s in scores[name]] for name in ("ckf", "=cf")]
        means = [mean_over_seeds([s[entry["metric"]] for s in side]) for side in sides]
        alone = paired_bootstrap(*means, data.user, samples, 3)
        assert {k: entry[k] for k in alone} == alone


def test_differences_by_the_users_train_rows_are_of_those_rows_alone():
    data, scores = everything()
    data.split[: len(data.split) // 2] = 0  # two train rows each for the first half of the users
    found = _Measure(data, 400, seed=3).by_user_rows(scores)
    masks = slices(data, scores["ckf"][0]["ctr"].rows)["user's train rows"]
    assert set(masks) == {"0", "1 to 9"}
    assert [(e["a"], e["b"]) for e in found] == [pair for pair in BY_USER for _ in masks]
    for entry in found:
        mask = masks[entry["slice"]]
        assert entry["rows"] == mask.sum()
        sides = [
            [s["ctr"].statistics(data, mask)["auc"] for s in scores[entry[name]]] for name in "ab"
        ]
        means = [mean_over_seeds(side) for side in sides]
        users = data.user[scores["ckf"][0]["ctr"].rows][mask]
        alone = paired_bootstrap(*means, users, paired_samples(400, len(found)), 3)
        assert {k: entry[k] for k in alone} == alone
        assert entry["p_holm"] is None or entry["p_holm"] >= entry["p"]
    assert _Measure(data, 400, seed=3).by_user_rows({"ckf": scores["ckf"]}) == []


def test_slices_by_hand():
    user = [0] * 12 + [1, 2, 0]
    item = list(range(10)) + [0, 0, 0, 1, 5]
    split = [0] * 12 + [2, 2, 2]
    label = [1] * 15
    history = np.full((15, 3), -1)
    history[12, -1:] = 1
    history[14, -3:] = 1
    data = prepared(user, item, label, split, history=history)
    rows = np.array([12, 13, 14])  # users 1 and 2 have no train rows; item 0 has three, 1 and 5 one
    found = slices(data, rows)
    groups = {g: {k: m.tolist() for k, m in masks.items()} for g, masks in found.items()}
    first, last = [True, True, False], [False, False, True]
    assert groups["user's train rows"] == {"0": first, "10 to 49": last}
    assert groups["liked before"] == {"0 to 2": first, "3 to 9": last}
    deciles = groups["popularity decile"]
    assert [d for d, m in deciles.items() if m[0]] == ["7"]  # the most popular of three
    assert sum(sum(m) for m in deciles.values()) == 3
