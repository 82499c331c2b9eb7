"""The language model's weight beside the prior: of valid rows, kept with the run, used by all."""

import json
import shutil

import numpy as np
import pytest

import ckf
from ckf.evaluate import Evaluator
from ckf.report import write_report
from ckf.run import load_run, train_run
from ckf.run_checks import check_rows
from ckf.run_folder import ABOUT
from ckf.scoring import Scorer
from ckf.weighing import LARGEST, fit_weights, likeliest_weight, weigh
from tests.ckf_fixtures import quiet, small_config

CF = {"kind": "mf", "dim": 4, "epochs": 20, "batch_size": 64, "blend": 3}


def made_up(weight: float, rows: int = 20_000):
    """Logits, prior and answers of a language model whose own logits are right by ``weight``."""
    rng = np.random.default_rng(0)
    prior, said = rng.normal(size=(rows, 6)), rng.normal(size=(rows, 6))
    prior[: rows // 2, 4:] = np.nan  # shorter lists
    odds = np.where(np.isnan(prior), -np.inf, prior + weight * said)
    answers = (odds + rng.gumbel(size=odds.shape)).argmax(1)
    return np.where(np.isnan(prior), said, prior + said), prior, answers


@pytest.mark.parametrize("weight", [0.0, 0.35, 1.0, 2.5])
def test_the_weight_that_made_the_answers_is_found(weight):
    logits, prior, answers = made_up(weight)
    assert likeliest_weight(logits, prior, answers) == pytest.approx(weight, abs=0.05)


def test_a_model_that_says_the_opposite_does_not_count():
    assert likeliest_weight(*made_up(-1.0)) == 0.0


@pytest.mark.parametrize("scale", [0.01, 30.0, 1e5])
def test_however_large_its_logits_are(scale):
    """Where a step by the slope would leap or creep, the weight is found all the same."""
    logits, prior, answers = made_up(0.5)
    said = (logits - np.nan_to_num(prior)) * scale
    found = likeliest_weight(np.nan_to_num(prior) + said, prior, answers)
    assert found == pytest.approx(min(0.5 / scale, LARGEST), rel=0.1, abs=1e-9)


def test_heavy_tails_do_not_make_it_swing():
    rng = np.random.default_rng(0)
    prior, said = np.zeros((200, 2)), rng.standard_cauchy((200, 2))
    answers = (said + rng.gumbel(size=said.shape)).argmax(1)

    def loss(weight):
        odds = prior + weight * said
        own = np.take_along_axis(odds, answers[:, None], 1)[:, 0]
        return (np.logaddexp.reduce(odds, 1) - own).sum()

    found = likeliest_weight(prior + said, prior, answers)
    assert loss(found) <= min(loss(found * 0.9), loss(found * 1.1))


def test_logits_that_are_not_finite_make_no_weight():
    logits, prior, answers = made_up(1.0, rows=40)
    for bad in (np.nan, np.inf):
        logits[7, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            likeliest_weight(logits, prior, answers)
    logits[7, 0] = 0.0
    prior[7] = np.nan  # a row without a prior says nothing
    assert 0.1 < likeliest_weight(logits, prior, answers) < LARGEST


def test_a_model_that_says_nothing_keeps_its_weight():
    _, prior, answers = made_up(0.0)
    assert likeliest_weight(np.nan_to_num(prior) + 3.0, prior, answers) == pytest.approx(1.0)


def test_weighed_words_keep_their_chance_together_and_others_are_left():
    logits, prior, _ = made_up(1.0, rows=40)
    prior[:5] = np.nan  # rows without a prior
    own = ~np.isnan(prior)
    for weight in (0.0, 0.3, 1.0):
        found = weigh(logits, prior, weight)
        np.testing.assert_array_equal(found[~own], logits[~own])
        np.testing.assert_allclose(np.exp(found).sum(1), np.exp(logits).sum(1))
        for row in range(5, 40):
            odds = (found - prior - weight * (logits - prior))[row, own[row]]
            np.testing.assert_allclose(odds, odds[0], atol=1e-12)
    np.testing.assert_allclose(weigh(logits, prior, 1.0), logits)


@pytest.fixture(scope="module")
def run(small_model, small_run, tmp_path_factory):
    config = small_config(
        small_model, metanet__match="prior", train__schedule="joint", cf=CF, train__steps=3
    )
    folder = tmp_path_factory.mktemp("weighed") / "run"
    prepared = str(small_run.folder / "data")
    return train_run(config, folder, prepared=prepared, device="cpu", log=quiet)


ANSWERED = {"ctr", "topk", "rating", "review_rating"}


def test_a_trained_run_keeps_its_weights(run):
    weights = json.loads((run.folder / ABOUT).read_text())["weights"]
    valid = {task for task in ANSWERED if len(run.assembly.data.rows(task, "valid"))}
    assert weights.keys() == valid and "ctr" in valid
    assert run.assembly.weights == weights
    assert all(weight >= 0 for weight in weights.values())
    assert load_run(run.folder, "cpu").assembly.weights == weights
    assert load_run(run.folder, "cpu", overrides=["evaluate.weigh=false"]).assembly.weights == {}


def test_it_is_fitted_on_valid_rows_alone(run, monkeypatch):
    batcher, seen = run.assembly.batcher, []
    encode = batcher.encode
    monkeypatch.setattr(
        batcher, "encode", lambda e, split, *rest: seen.append(split) or encode(e, split, *rest)
    )
    assert fit_weights(run.assembly) == run.assembly.weights  # not of what they have weighed
    assert set(seen) == {"valid"}
    monkeypatch.setattr(run.assembly.data, "rows", lambda task, split: np.array([], np.int64))
    assert fit_weights(run.assembly) == {}


def test_the_weight_makes_valid_answers_likeliest(run, monkeypatch):
    losses = {}
    for shift in (-2.0, 0.0, 2.0):  # the prior is all but certain of these rows: little changes
        weights = {t: max(0.0, w + shift) for t, w in run.assembly.weights.items()}
        monkeypatch.setattr(run.assembly, "weights", weights)
        losses[shift] = Evaluator(run.assembly, "valid").task("ctr").loss
        monkeypatch.undo()
    assert losses[0.0] < min(losses[-2.0], losses[2.0]) - 1e-8


def test_scores_and_predictions_are_weighed_alike(run, monkeypatch):
    data, maker = run.assembly.data, run.assembly.maker
    example = maker.examples("ctr", "test")[0]
    rows = [example.row]
    request = {
        "task": "ctr",
        "user": data.user_ids[data.user[example.row]],
        "item": data.item_ids[data.item[example.row]],
        "history": [data.item_ids[i] for i in data.history[example.row] if i >= 0],
    }
    other = {"task": "rating", "user": request["user"], "item": request["item"]}
    prompts = [run.assembly.batcher.encode(example, "test", True)]
    found = {}
    for weight in (0.0, 0.5, 1.0):
        monkeypatch.setattr(run.assembly, "weights", {"ctr": weight})
        logits = Scorer(run.assembly).answers(prompts, data.user[rows], data.history[rows]).logits
        found[weight] = float(logits[0, 0] - logits[0, 1])
        first, second = run.predict([request, other])
        assert first["score"] == pytest.approx(found[weight], abs=1e-4)
        found.setdefault("rating", second["rating"])
        assert second["rating"] == found["rating"]  # another task has its own weight
    assert found[0.5] == pytest.approx((found[0.0] + found[1.0]) / 2, abs=1e-6)
    assert found[0.0] != pytest.approx(found[1.0], abs=1e-3)


def test_a_broken_model_gets_none_and_a_warning(run, monkeypatch):
    assembly, real = run.assembly, run.assembly.model.answer_logits

    def answer_logits(batch):
        return real(batch) * float("nan")

    monkeypatch.setattr(assembly.model, "answer_logits", answer_logits)
    with pytest.warns(UserWarning, match="no weight for ctr: logits that are not finite"):
        assert fit_weights(assembly) == {}


def test_lists_that_are_missing_are_said_before_training(run, monkeypatch):
    data = run.assembly.data
    held = {k: v for k, v in data._candidates.items() if not k.startswith("valid.")}
    monkeypatch.setattr(data, "_candidates", held)
    monkeypatch.setattr(data, "rows", lambda task, split: np.arange(2))
    with pytest.raises(ValueError, match="for split 'valid'"):
        check_rows(run.config, data)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{"])
def test_what_the_run_says_of_itself_is_checked(run, tmp_path, content):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / ABOUT).write_text(content)
    with pytest.raises(ValueError, match="missing or broken"):
        ckf.load_run(folder, "cpu")


@pytest.mark.parametrize(
    "weights", [{"ctr": -1}, {"ctr": "much"}, [1.0], {"ctr": True}, {"ctr": 10**400}]
)
def test_a_damaged_run_is_named(run, tmp_path, weights):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    about = json.loads((folder / ABOUT).read_text()) | {"weights": weights}
    (folder / ABOUT).write_text(json.dumps(about))
    with pytest.raises(ValueError, match="expected a number from 0 to 10"):
        ckf.load_run(folder, "cpu")


def test_the_report_shows_them(run):
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "Weight of the language model" not in page  # nothing was evaluated yet
    run.evaluate(log=quiet)
    page = write_report(run.folder).read_text(encoding="utf-8")
    assert "Weight of the language model" in page
    assert f"{run.assembly.weights['ctr']:.2f}" in page
    plain = load_run(run.folder, "cpu", overrides=["evaluate.weigh=false"])
    plain.evaluate(log=quiet)  # the page says what was applied
    assert "Weight of the language model" not in write_report(run.folder).read_text("utf-8")
