"""Evaluation of a run on its test rows: metrics with intervals, predictions, trivial rows beside.

Deterministic: no sampling anywhere, candidate lists and rows from the run's folder.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ckf.assembly import Assembly
from ckf.baselines import evaluate_baselines, slice_masks
from ckf.batches import Example, expected_stars, stars
from ckf.metrics import (
    bootstrap_over_users,
    ctr_metrics,
    ctr_slices,
    mean_statistic,
    rating_metrics,
    topk_metrics,
)
from ckf.prompts import Encoded, Question
from ckf.scoring import Answers, PriorScorer, Scorer
from ckf.tables import write_parquet

Log = Callable[[str], None]


@dataclass
class TaskResult:
    """Metrics of one task, its per-row predictions, and its mean held-out loss."""

    metrics: dict
    predictions: dict[str, list | np.ndarray] = field(default_factory=dict)
    loss: float | None = None


class Evaluator:
    """Evaluates all tasks of a run on one split.

    Args:
        base_only: the bare language model instead of the trained system.
    """

    def __init__(
        self, assembly: Assembly, split: str = "test", base_only: bool = False, progress=None
    ):
        self.assembly, self.data, self.split = assembly, assembly.data, split
        self.scorer = Scorer(assembly, base_only, progress)
        self.samples, self.seed = assembly.config.evaluate.bootstrap, assembly.config.seed
        self.lists = list(assembly.config.data.test_lists)

    def rows(self, task: str) -> int:
        """Prompts that evaluating a task takes, for progress bars."""
        count = len(self.data.rows(task, self.split))
        if task == "explain":  # once for the loss, once to write
            return 2 * count
        if task != "topk":
            return count
        if not self.assembly.maker.ranks_by_title:
            return count * len(self.lists)
        sizes = [self.assembly.maker.candidates(self.split, n).items.shape[1] for n in self.lists]
        return count * sum(sizes)

    def task(self, task: str) -> TaskResult:
        """Evaluate one task."""
        return getattr(self, f"_{task}")()

    def _encode(self, examples: list[Example], list_name: str | None = None) -> list[Encoded]:
        batcher = self.assembly.batcher
        return [
            batcher.encode(e, self.split, self.scorer.vectors, list_name=list_name)
            for e in examples
        ]

    def _answers(self, examples: list[Example], list_name: str | None = None) -> Answers:
        rows = [e.row for e in examples]
        prompts = self._encode(examples, list_name)
        return self.scorer.answers(prompts, self.data.user[rows], self.data.history[rows])

    def _frame(self, rows: np.ndarray) -> dict:
        data = self.data
        return {
            "row": rows,
            "user": [data.user_ids[u] for u in data.user[rows]],
            "item": [data.item_ids[i] for i in data.item[rows]],
        }

    def _loss(self, losses: np.ndarray, rows: np.ndarray) -> tuple[dict, float]:
        users = self.data.user[rows]
        interval = bootstrap_over_users(mean_statistic(losses), users, self.samples, self.seed)
        return {"loss": interval}, float(losses.mean())

    def _ctr(self) -> TaskResult:
        examples = self.assembly.maker.examples("ctr", self.split)
        rows = np.array([e.row for e in examples], np.int64)
        answers = self._answers(examples)
        labels, users = self.data.label[rows], self.data.user[rows]
        scores = answers.logits[:, 0] - answers.logits[:, 1]  # Yes - No
        loss, mean = self._loss(answers.losses(np.where(labels == 1, 0, 1)), rows)
        metrics = ctr_metrics(scores, labels, users, self.samples, self.seed) | loss
        masks = slice_masks(self.data, rows)
        metrics["slices"] = ctr_slices(scores, labels, users, masks, self.samples, self.seed)
        frame = self._frame(rows) | {"label": labels, "score": scores}
        return TaskResult(metrics, frame, mean)

    def _rating(self, task: str = "rating") -> TaskResult:
        examples = self.assembly.maker.examples(task, self.split)
        rows = np.array([e.row for e in examples], np.int64)
        answers = self._answers(examples)
        users, ratings = self.data.user[rows], self.data.rating[rows].astype(np.float64)
        expected = expected_stars(answers.logits)
        loss, mean = self._loss(answers.losses(stars(ratings, rows) - 1), rows)
        metrics = rating_metrics(expected, ratings, users, self.samples, self.seed) | loss
        metrics |= self._greedy_rating(answers.greedy, ratings, users)
        frame = self._frame(rows) | {
            "rating": ratings,
            "prediction": expected,
            "greedy": answers.greedy + 1,  # 0: not a number
        }
        return TaskResult(metrics, frame, mean)

    def _review_rating(self) -> TaskResult:
        return self._rating("review_rating")

    def _greedy_rating(self, greedy, ratings, users) -> dict:
        """What plain decoding says; a failure to name a number counts as the global mean."""
        train = self.data.rating[self.data.split == 0]
        said = np.where(greedy >= 0, greedy + 1.0, np.nanmean(train))
        measured = rating_metrics(said, ratings, users, self.samples, self.seed)
        return {
            "greedy_rmse": measured["rmse"],
            "greedy_mae": measured["mae"],
            "greedy_failures": {"value": float((greedy < 0).mean())},
        }

    def _topk(self) -> TaskResult:
        results = {name: self._topk_list(name) for name in self.lists}
        main = results[self.lists[0]]
        metrics = dict(main.metrics)
        metrics["lists"] = {name: r.metrics for name, r in results.items()}
        return TaskResult(metrics, main.predictions, main.loss)

    def _topk_list(self, name: str) -> TaskResult:
        examples = self.assembly.maker.examples("topk", self.split, name)
        rows = np.array([e.row for e in examples], np.int64)
        lists = self.assembly.maker.candidates(self.split, name)
        places = [e.place for e in examples]
        items, positive = lists.items[places], lists.positive[places]
        users = self.data.user[rows]
        greedy = {}
        if self.assembly.maker.ranks_by_title:
            losses = self._title_losses(examples, name, items)
            scores, own = -losses, np.take_along_axis(losses, positive[:, None], 1)[:, 0]
        else:
            answers = self._answers(examples, name)
            scores, own = answers.logits[:, : items.shape[1]], answers.losses(positive)
            valid = (answers.greedy >= 0) & (answers.greedy < items.shape[1])
            hits = (valid & (answers.greedy == positive)).astype(float)
            greedy["valid_ratio"] = {"value": float(valid.mean()) if len(valid) else None}
            hit_statistic = mean_statistic(hits)
            greedy["greedy_hr@1"] = bootstrap_over_users(
                hit_statistic, users, self.samples, self.seed
            )
        loss, mean = self._loss(own, rows)
        metrics = topk_metrics(scores, positive, users, self.samples, self.seed) | loss | greedy
        frame = self._frame(rows) | {
            "candidates": [[self.data.item_ids[i] for i in row] for row in items],
            "scores": [row.tolist() for row in scores],
            "positive": positive,
        }
        return TaskResult(metrics, frame, mean)

    def _title_losses(self, examples: list[Example], name: str, items: np.ndarray) -> np.ndarray:
        """Length-normalised negative log-likelihood of every candidate's title, (P, C)."""
        batcher, maker = self.assembly.batcher, self.assembly.maker
        prompts = []
        for example, candidates in zip(examples, items, strict=True):
            question = maker.question(example, self.split, name)
            for item in candidates:
                question.answer = self.data.title(int(item))
                prompts.append(batcher.encoder.encode(question, self.scorer.vectors))
        rows = np.repeat([e.row for e in examples], items.shape[1])
        losses = self.scorer.losses(prompts, self.data.user[rows], self.data.history[rows])
        return losses.reshape(items.shape)

    def _explain(self) -> TaskResult:
        from ckf.text_metrics import text_metrics

        maker, config = self.assembly.maker, self.assembly.config
        examples = maker.examples("explain", self.split)
        rows = np.array([e.row for e in examples], np.int64)
        users, histories = self.data.user[rows], self.data.history[rows]
        losses = self.scorer.losses(self._encode(examples), users, histories)
        questions: list[Question] = [
            maker.question(e, self.split, answered=False) for e in examples
        ]
        written = self.scorer.texts(questions, users, histories, config.prompt.max_answer_tokens)
        own = [self.data.explanation(int(row)) for row in rows]
        loss, mean = self._loss(losses, rows)
        metrics = text_metrics(written, own, users, self.samples, self.seed) | loss
        frame = self._frame(rows) | {"prediction": written, "reference": own, "loss": losses}
        return TaskResult(metrics, frame, mean)


def evaluate_run(
    assembly: Assembly, folder: Path, about: dict, log: Log = print, progress=None
) -> dict:
    """Evaluate all tasks on test, write metrics.json and predictions/, return the metrics.

    Args:
        folder: the run's folder.
        about: what metrics.json says of the run itself (its "run" part).
        progress: makes a progress callback from a title and a total, or None.
    """
    config, start = assembly.config, time.perf_counter()
    metrics: dict = {"run": about, "test": {}}
    about["weights"] = assembly.weights  # those that are applied
    held_out: dict[str, dict] = {"after": {}}
    systems = [("test", False)] + [("untrained", True)] * config.evaluate.untrained
    predictions = folder / "predictions"
    predictions.mkdir(exist_ok=True)
    for name, base_only in systems:
        metrics[name], losses = {}, {}
        for task in assembly.tasks:
            evaluator = Evaluator(assembly, "test", base_only)
            title = f"{'untrained ' if base_only else ''}{task}"
            if progress is not None:
                evaluator.scorer.progress = progress(title, evaluator.rows(task))
            result = evaluator.task(task)
            metrics[name][task], losses[task] = result.metrics, result.loss
            if not base_only:
                write_parquet(result.predictions, predictions / f"{task}.parquet")
        held_out["before" if base_only else "after"] = losses
    metrics["held_out_loss"] = held_out
    metrics["baselines"] = evaluate_baselines(
        assembly.data,
        "test",
        assembly.tasks,
        assembly.vectors,
        config.data.test_lists,
        config.evaluate.bootstrap,
        config.seed,
    )
    prior = assembly.batcher.collator.prior
    for task in prior.tokens if prior is not None else ():
        evaluator = Evaluator(assembly, "test")
        evaluator.scorer = PriorScorer(assembly)
        metrics["baselines"][task]["prior"] = evaluator.task(task).metrics
    gate = gate_matrix(assembly)
    if gate:
        metrics["gate"] = gate
    seconds = about.setdefault("seconds", {})
    seconds["evaluate"] = round(time.perf_counter() - start, 1)
    write_json(metrics, folder / "metrics.json")
    return metrics


def gate_matrix(assembly: Assembly) -> dict | None:
    """Learned gates as tasks x experts, the mean over layers where each has its own."""
    from ckf.layers import TaskGate

    gates = [m for m in assembly.model.backbone.modules() if isinstance(m, TaskGate)]
    gates = [g for g in gates if g.experts == gates[0].experts]
    if not gates:
        return None
    values = sum(g.gate.detach().float() for g in gates) / len(gates)
    return {
        "tasks": assembly.tasks,
        "experts": list(gates[0].experts),
        "values": values.tolist(),
    }


def write_json(values: dict, path: Path) -> None:
    """JSON by way of a temporary file, so that a reader never meets half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
