"""What a run answered on a split, kept as arrays, and the statistics that can be made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ckf.baselines import ctr_scores, rating_predictions, topk_scores
from ckf.batches import QuestionMaker, expected_stars
from ckf.cf import CFVectors
from ckf.config import RunConfig
from ckf.data.prepared import Candidates, PreparedData
from ckf.match import MatchScores
from ckf.metrics import (
    auc_statistic,
    mean_statistic,
    ranking_metrics,
    rmse_statistic,
    uauc_statistic,
)
from ckf.prior import AnswerPrior
from ckf.prompts import ANSWERS

KEPT = ("row", "score", "loss", "prediction", "scores", "positive")
TOPK_METRICS = ("hr@1", "ndcg@10", "mrr")


@dataclass(frozen=True)
class TaskScores:
    """Answers of one task. rows (N,) of the data; arrays by name, first axis N.

    ctr has "score"; topk "scores" (N, C) and "positive" (N,); rating and review_rating
    "prediction"; explain "loss".
    """

    task: str
    rows: np.ndarray
    arrays: Mapping[str, np.ndarray]

    def statistics(self, data: PreparedData, mask: np.ndarray | None = None) -> dict:
        """{metric: Statistic} over these rows, or over those of a mask (N,)."""
        chosen = slice(None) if mask is None else mask
        rows = self.rows[chosen]
        part = {name: values[chosen] for name, values in self.arrays.items()}
        if self.task == "ctr":
            labels, users = data.label[rows], data.user[rows]
            return {
                "auc": auc_statistic(part["score"], labels),
                "uauc": uauc_statistic(part["score"], labels, users),
            }
        if self.task == "topk":
            ranked = ranking_metrics(part["scores"], part["positive"])
            return {name: mean_statistic(ranked[name]) for name in TOPK_METRICS}
        if self.task in ("rating", "review_rating"):
            wanted = data.rating[rows].astype(np.float64)
            return {
                "rmse": rmse_statistic(part["prediction"], wanted),
                "mae": mean_statistic(np.abs(part["prediction"] - wanted)),
            }
        return {"loss": mean_statistic(part["loss"])}


def read_scores(file: Path) -> dict[str, TaskScores]:
    """What ``write_scores`` wrote; ValueError for a missing or damaged file."""
    try:
        arrays = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or damaged ({error}); remove its folder") from error
    tasks: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        task, name = key.split(".", 1)
        tasks.setdefault(task, {})[name] = values
    return {task: TaskScores(task, part.pop("row"), part) for task, part in tasks.items()}


def write_scores(predictions: Mapping[str, Mapping], file: Path) -> None:
    """The numbers among the predictions of each task, as ``Evaluator`` gives them."""
    arrays = {
        f"{task}.{name}": np.ascontiguousarray(values)
        for task, frame in predictions.items()
        for name, values in frame.items()
        if name in KEPT and not (name == "prediction" and task == "explain")
    }
    temporary = file.with_name(file.name + ".part")
    save_file(arrays, temporary)
    temporary.replace(file)


def baseline_scores(
    config: RunConfig, data: PreparedData, split: str, vectors: Mapping[str, CFVectors]
) -> dict[str, dict[str, TaskScores]]:
    """{baseline: {task: scores}} on the rows that cells are evaluated on.

    vectors: CF models by name; the first is the row "cf", another one "cf-<name>".
    """
    found: dict[str, dict[str, TaskScores]] = {}
    names = {name: "cf" if place == 0 else f"cf-{name}" for place, name in enumerate(vectors)}
    for task in config.tasks:
        rows = data.rows(task, split)
        for name, model in vectors.items():
            for baseline, scores in _of_task(config, data, split, task, rows, model).items():
                renamed = names[name] if baseline == "cf" else baseline
                found.setdefault(renamed, {})[task] = scores
    return found


def prior_scores(
    config: RunConfig, data: PreparedData, split: str, vectors: CFVectors
) -> dict[str, TaskScores]:
    """{task: scores} of ``ckf.prior`` by itself; the arguments as in ``baseline_scores``."""
    tasks = [task for task in config.tasks if task in ANSWERS]
    words = {task: range(len(ANSWERS[task])) for task in tasks}
    prior = AnswerPrior(MatchScores(vectors, data), QuestionMaker(data, config), words)
    found = {}
    for task in tasks:
        rows = data.rows(task, split)
        if task == "topk":
            lists = _lists(config, data, split)
            every, items = np.repeat(lists.rows, lists.items.shape[1]), lists.items.flatten()
        else:
            every, items = rows, data.item[rows]
        x = prior.features(data.user[every], data.history[every], items)
        logits = x @ prior.weights[task].T
        if task == "topk":
            scores = {"scores": logits.reshape(lists.items.shape), "positive": lists.positive}
            found[task] = TaskScores(task, lists.rows, scores)
        elif task == "ctr":
            found[task] = TaskScores(task, rows, {"score": logits[:, 0] - logits[:, 1]})
        else:
            found[task] = TaskScores(task, rows, {"prediction": expected_stars(logits)})
    return found


def _lists(config, data, split) -> Candidates:
    name = config.data.test_lists[0]
    lists = data.candidates(split, name)
    _, places = QuestionMaker(data, config).rows_and_places("topk", split, name)
    return Candidates(lists.rows[places], lists.items[places], lists.positive[places])


def _of_task(config, data, split, task, rows, model) -> dict[str, TaskScores]:
    if task == "ctr":
        scores = ctr_scores(data, rows, model)
        return {k: TaskScores(task, rows, {"score": np.asarray(v)}) for k, v in scores.items()}
    if task in ("rating", "review_rating"):
        scores = rating_predictions(data, rows)
        return {k: TaskScores(task, rows, {"prediction": v}) for k, v in scores.items()}
    if task == "topk":
        own = _lists(config, data, split)
        scores = topk_scores(data, own, model)
        return {
            k: TaskScores(task, own.rows, {"scores": np.asarray(v), "positive": own.positive})
            for k, v in scores.items()
        }
    return {}


def same_rows(a: TaskScores, b: TaskScores) -> None:
    """ValueError where two runs did not answer the same rows, so that nothing can be paired."""
    if not np.array_equal(a.rows, b.rows):
        raise ValueError(
            f"two cells answered different {a.task} rows ({len(a.rows)} and {len(b.rows)}), so "
            "they cannot be compared; give another --out, and run all cells on the same data"
        )
