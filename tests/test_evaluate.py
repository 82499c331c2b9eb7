"""Evaluation: the shape of metrics.json, figures that can be computed again, other settings."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ckf.evaluate import Evaluator
from ckf.run import load_run, train_run
from ckf.scoring import Scorer
from ckf.train import TrainStream
from tests.ckf_fixtures import TASKS, quiet, small_config

INTERVAL = {"value", "low", "high"}
LIST_METRICS = {"hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr"}


def run_with(model, prepared, folder, **changes):
    config = small_config(model, **changes)
    return train_run(config, folder, prepared=str(prepared), device="cpu", log=quiet)


def predictions(run, task):
    return pl.read_parquet(run.folder / "predictions" / f"{task}.parquet")


# ---- metrics.json


def test_progress_ends_at_its_total(small_run):
    totals, seen = {}, dict.fromkeys(TASKS, 0)
    for task in TASKS:
        evaluator = Evaluator(small_run.assembly, "test")
        evaluator.samples, totals[task] = 0, evaluator.rows(task)

        def advance(rows, task=task):
            seen[task] += rows

        evaluator.scorer.progress = advance
        evaluator.task(task)
    assert seen == totals


@pytest.mark.parametrize("system", ["test", "untrained"])
def test_metrics_have_their_shape(small_metrics, system):
    found = small_metrics[system]
    assert list(found) == list(TASKS)
    ctr = found["ctr"]
    assert set(ctr) == {"auc", "uauc", "loss", "slices"}
    assert set(ctr["auc"]) == INTERVAL and set(ctr["uauc"]) == INTERVAL | {"users"}
    assert set(ctr["slices"]) == {"warm", "cold"}
    assert ctr["slices"]["warm"]["rows"] + ctr["slices"]["cold"]["rows"] == 40
    topk = found["topk"]
    assert LIST_METRICS | {"loss", "lists", "valid_ratio", "greedy_hr@1"} == set(topk)
    assert set(topk["lists"]) == {"uniform9"} and set(topk["hr@1"]) == INTERVAL
    assert topk["lists"]["uniform9"]["mrr"] == topk["mrr"]
    for task in ("rating", "review_rating"):
        assert {"rmse", "mae", "greedy_rmse", "greedy_mae", "greedy_failures", "loss"} == set(
            found[task]
        )
    texts = {"bleu4", "rouge1", "rouge2", "rougeL", "distinct1", "distinct2", "loss"}
    assert set(found["explain"]) == texts


def test_metrics_tell_of_the_run_and_the_trivial_rows(small_metrics, small_run):
    assert set(small_metrics) == {"run", "test", "untrained", "baselines", "held_out_loss"}
    about = small_metrics["run"]
    assert (about["name"], about["seed"], about["device"]) == ("small", 0, "cpu")
    assert set(about["seconds"]) == {"cf", "train", "evaluate"}
    assert about["rows"]["train"]["ctr"] == 80 and about["rows"]["test"]["explain"] == 8
    count = sum(p.numel() for p in small_run.assembly.model.parameters() if p.requires_grad)
    assert about["trainable_parameters"] == count > 1000
    baselines = small_metrics["baselines"]
    assert {"item_mean", "item_user_mean", "popularity", "cf"} <= set(baselines["ctr"])
    assert {"popularity", "cf"} <= set(baselines["topk"])
    assert {"global_mean", "item_mean"} <= set(baselines["rating"])
    for when in ("before", "after"):
        assert set(small_metrics["held_out_loss"][when]) == set(TASKS)


def test_held_out_losses_are_the_losses_of_the_tables(small_metrics):
    for when, system in (("before", "untrained"), ("after", "test")):
        for task in TASKS:
            mean = small_metrics["held_out_loss"][when][task]
            assert small_metrics[system][task]["loss"]["value"] == pytest.approx(mean)


def test_untrained_is_the_bare_model_that_sees_no_vectors(small_run, small_metrics, tmp_path):
    """The same figures from a fresh model without adapters and from text prompts."""
    from transformers import AutoModelForCausalLM

    parts = small_run.assembly
    bare = AutoModelForCausalLM.from_pretrained(parts.config.model.name)
    words = parts.batcher.encoder.answer_tokens("ctr")[1]
    scores, labels = [], []
    for example in parts.maker.examples("ctr", "test"):
        tokens = parts.batcher.encode(example, "test", vectors=False).tokens
        with torch.no_grad():
            logits = bare(torch.tensor([tokens])).logits[0, -1]
        scores.append(float(logits[words["Yes"]] - logits[words["No"]]))
        labels.append(int(parts.data.label[example.row]))
    assert small_metrics["untrained"]["ctr"]["auc"]["value"] == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-6
    )


def test_an_evaluation_from_the_folder_alone_gives_the_same_figures(small_metrics, run_copy):
    before = {p.name: p.read_bytes() for p in (run_copy / "predictions").iterdir()}
    (run_copy / "metrics.json").unlink()
    shutil.rmtree(run_copy / "predictions")
    shutil.rmtree(run_copy / "checkpoints")
    again = load_run(run_copy).evaluate(quiet)
    assert json.loads((run_copy / "metrics.json").read_text()) == again
    for part in ("test", "untrained", "baselines", "held_out_loss"):
        assert again[part] == small_metrics[part]
    assert {p.name for p in (run_copy / "predictions").iterdir()} == set(before)
    for task in TASKS:
        frame = pl.read_parquet(run_copy / "predictions" / f"{task}.parquet")
        (run_copy / "old.parquet").write_bytes(before[f"{task}.parquet"])
        assert frame.equals(pl.read_parquet(run_copy / "old.parquet"))


# ---- predictions/


def test_ctr_predictions_give_the_auc(small_run, small_metrics):
    frame, data = predictions(small_run, "ctr"), small_run.assembly.data
    auc = roc_auc_score(frame["label"].to_numpy(), frame["score"].to_numpy())
    assert auc == pytest.approx(small_metrics["test"]["ctr"]["auc"]["value"], abs=1e-9)
    assert frame["row"].to_list() == data.rows("ctr", "test").tolist()
    first = int(frame["row"][0])
    assert frame["user"][0] == data.user_ids[data.user[first]]
    assert frame["item"][0] == data.item_ids[data.item[first]]
    assert frame["label"][0] == (1 if data.rating[first] >= 4 else 0)


def test_topk_predictions_give_the_hit_rate(small_run, small_metrics):
    frame = predictions(small_run, "topk")
    scores, positive = np.array(frame["scores"].to_list()), frame["positive"].to_numpy()
    assert scores.shape == (12, 10)
    hits = scores.argmax(1) == positive
    assert hits.mean() == pytest.approx(small_metrics["test"]["topk"]["hr@1"]["value"])
    for row in frame.iter_rows(named=True):
        assert row["candidates"][row["positive"]] == row["item"]


@pytest.mark.parametrize("task", ["rating", "review_rating"])
def test_rating_predictions_give_the_rmse(small_run, small_metrics, task):
    frame, found = predictions(small_run, task), small_metrics["test"][task]
    error = (frame["prediction"] - frame["rating"]).to_numpy()
    assert np.sqrt((error**2).mean()) == pytest.approx(found["rmse"]["value"])
    assert np.abs(error).mean() == pytest.approx(found["mae"]["value"])
    assert frame["prediction"].is_between(1, 5).all()
    assert (frame["greedy"] == 0).mean() == pytest.approx(found["greedy_failures"]["value"])


def test_explanations_stand_beside_what_the_user_wrote(small_run):
    frame, data = predictions(small_run, "explain"), small_run.assembly.data
    for row in frame.iter_rows(named=True):
        assert row["reference"] and row["reference"] in data.text(row["row"])
        assert "\n" not in row["prediction"] and "<eos>" not in row["prediction"]


# ---- other settings through the whole pipeline


@pytest.mark.parametrize("per_layer", [False, True])
def test_learned_gates_train_and_are_reported(small_model, prepared, tmp_path, per_layer):
    run = run_with(
        small_model, prepared, tmp_path / "run", lora__gate="learned",
        lora__gate_per_layer=per_layer, train__steps=4, evaluate__untrained=False,
    )  # fmt: skip
    found = run.evaluate(quiet)["gate"]
    assert found["tasks"] == list(TASKS) and found["experts"] == ["shared", *TASKS]
    values = np.array(found["values"])
    start = np.concatenate([np.ones((5, 1)), np.eye(5)], axis=1)
    assert values.shape == (5, 6)
    assert (np.abs(values - start).max(1) > 1e-3).all()  # every task's row has moved
    assert np.abs(values - start).max() < 0.5
    again = load_run(run.folder).evaluate(quiet)
    assert again["gate"] == found and "untrained" not in again


def test_ranking_by_title_trains_and_evaluates(small_model, prepared, tmp_path):
    run = run_with(
        small_model, prepared, tmp_path / "run", prompt__rank_by="title", train__steps=3,
        tasks={"topk": {"train": 40, "valid": 10, "test": 12}},
    )  # fmt: skip
    found = run.evaluate(quiet)["test"]["topk"]
    assert LIST_METRICS | {"loss", "lists"} == set(found)
    assert 0 <= found["hr@1"]["value"] <= 1 and found["hr@10"]["value"] == 1
    frame = predictions(run, "topk")
    parts = run.assembly
    example = parts.maker.examples("topk", "test", "uniform9")[2]
    question = parts.maker.question(example, "test", "uniform9")
    batcher, losses = parts.batcher, []
    for item in question.candidates:  # every title by itself
        question.answer = parts.data.title(item)
        prompt = batcher.encoder.encode(question, vectors=True)
        with torch.no_grad():
            losses.append(float(run.assembly.model(**batcher.batch([example], [prompt]))["loss"]))
    np.testing.assert_allclose(frame["scores"][2].to_list(), [-v for v in losses], rtol=1e-4)
    with pytest.raises(ValueError, match="request 0.*|by title.*rank_by: letters"):
        run.predict([{"task": "topk", "user": "u1", "candidates": ["i1", "i2"]}])


def test_the_first_of_several_lists_stands_at_the_top(small_model, raw_data, tmp_path):
    config = small_config(
        small_model, data__test_lists=["uniform19", "uniform9"], train__steps=1,
        data__train_list="uniform19",
        tasks={"topk": {"train": 20, "valid": 5, "test": 12}}, prompt__max_tokens=256,
    )  # fmt: skip
    run = train_run(config, tmp_path / "run", str(raw_data), device="cpu", log=quiet)
    metrics = run.evaluate(quiet)
    for found in (metrics["test"]["topk"], metrics["baselines"]["topk"]["cf"]):
        assert set(found["lists"]) == {"uniform19", "uniform9"}
        assert found["hr@10"] == found["lists"]["uniform19"]["hr@10"]
        assert found["lists"]["uniform9"]["hr@10"]["value"] == 1
    assert len(predictions(run, "topk")["scores"][0]) == 20
    with pytest.raises(ValueError, match="no candidate list 'popular99' for split 'test'"):
        run_with(
            small_model, run.folder / "data", tmp_path / "other", prompt__rank_by="title",
            tasks={"topk": None}, data__test_lists=["uniform9", "popular99"],
            data__train_list="uniform19",
        )  # fmt: skip
    assert not (tmp_path / "other").exists()


def test_labels_alone_are_enough_for_two_tasks(small_model, tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        f"{user},{item},{int((user + item) % 2 == 0)},{time}"
        for user in range(12)
        for time, item in enumerate(rng.permutation(30)[:12])
    ]
    file = tmp_path / "clicks.csv"
    file.write_text("user,item,click,time\n" + "\n".join(lines))
    config = small_config(
        small_model, train__steps=2, tasks={"topk": None, "ctr": None},
        data__columns={"user": "user", "item": "item", "label": "click", "time": "time"},
    )  # fmt: skip
    run = train_run(config, tmp_path / "run", str(file), device="cpu", log=quiet)
    assert list(run.evaluate(quiet)["test"]) == ["topk", "ctr"]
    tokens = run.assembly.batcher.encode(
        run.assembly.maker.examples("ctr", "test")[0], "test", vectors=True
    ).tokens
    assert '"item ' in run.assembly.tokenizer.decode(tokens)  # no titles: raw ids


def test_without_vectors_nothing_but_text_is_trained(small_model, prepared, tmp_path):
    run = run_with(
        small_model, prepared, tmp_path / "run", metanet__kind="none", train__steps=2,
        evaluate__untrained=False,
    )  # fmt: skip
    stream = TrainStream(run.assembly)
    assert not any(stream[p][1] for p in range(len(stream)))
    assert set(run.evaluate(quiet)["test"]) == set(TASKS)
    assert run.predict([{"task": "ctr", "user": "u1", "item": "i1"}])[0]["score"]


def test_batches_hold_no_more_logits_than_fit(small_run, monkeypatch):
    """A sentence of 65 positions over 262,144 words is 68 MB, whatever its prompt's tokens."""
    parts, sizes = small_run.assembly, []
    examples = parts.maker.examples("explain", "train")
    rows = [e.row for e in examples]
    prompts = [parts.batcher.encode(e, "train", vectors=True) for e in examples]
    words = parts.model.backbone.config.vocab_size
    columns = 1 + max(len(p.answer) for p in prompts)

    def losses():
        sizes.clear()
        scorer = Scorer(parts, progress=sizes.append)
        return scorer.losses(prompts, parts.data.user[rows], parts.data.history[rows])

    free = losses()
    assert max(sizes) > 2
    monkeypatch.setattr("ckf.scoring.LOGITS_AT_ONCE", 2 * words * columns)
    bounded = losses()
    assert max(sizes) == 2 and sum(sizes) == len(rows)
    np.testing.assert_allclose(bounded, free, rtol=1e-4, atol=1e-5)
