"""Every figure of an experiment, from the files of its finished runs: experiment.json."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from ckf.config_files import config_to_dict
from ckf.data.prepared import PreparedData
from ckf.experiment.cells import BY_USER, COMPARISONS
from ckf.experiment.parts import read_vectors
from ckf.experiment.runner import Experiment
from ckf.experiment.scores import (
    TaskScores,
    baseline_scores,
    prior_scores,
    read_scores,
    same_rows,
)
from ckf.experiment.slices import BY_USER_ROWS, slices
from ckf.experiment.statistics import (
    Sampled,
    difference,
    figure,
    holm,
    paired_samples,
    sampled,
)

SeedScores = list[dict[str, TaskScores]]  # one per seed


def collect(experiment: Experiment, data: PreparedData, vector_files: Mapping[str, Path]) -> dict:
    """The content of experiment.json. Runs that are not done are left out and counted.

    vector_files: CF vectors by name, the config's own first.
    """
    config, split = experiment.config, experiment.split
    scores: dict[str, SeedScores] = {}
    results: dict[str, list[dict]] = {}
    for cell, seed in experiment.runs():
        result = experiment.result(cell, seed)
        if result is not None:
            file = experiment.folder(cell, seed) / f"scores-{split}.safetensors"
            scores.setdefault(cell.name, []).append(read_scores(file))
            results.setdefault(cell.name, []).append(result)
    vectors = {name: read_vectors(file) for name, file in vector_files.items()}
    baselines = baseline_scores(config, data, split, vectors)
    if any(cell.name == "ckf-prior" for cell in experiment.cells):
        own = next(iter(vectors.values()))  # the config's
        baselines["prior"] = prior_scores(config, data, split, own)
    measure = _Measure(data, config.evaluate.bootstrap, config.seed)
    done = sum(len(r) for r in results.values())
    return {
        "name": config.name + ("-reduced" if experiment.cut else ""),
        "split": split,
        "reduced": experiment.cut,
        "runs": len(experiment.runs()),
        "runs_done": done,
        "failed": experiment.failed,
        "environment": _environment(results),
        "rows": {task: len(data.rows(task, split)) for task in config.tasks},
        "cells": {
            cell.name: {
                "title": cell.title,
                "seeds": [r["seed"] for r in results[cell.name]],
                "figures": measure.tasks(scores[cell.name]),
                "slices": measure.slices(scores[cell.name]),
                **_of_runs(experiment, cell, results[cell.name]),
            }
            for cell in experiment.cells
            if cell.name in results
        },
        "baselines": {
            name: {"figures": measure.tasks([tasks]), "slices": measure.slices([tasks])}
            for name, tasks in baselines.items()
        },
        "comparisons": measure.comparisons(
            scores | {f"={name}": [tasks] for name, tasks in baselines.items()}
        ),
        "by_user_rows": measure.by_user_rows(scores),
        "cf": {n: json.loads(f.with_suffix(".json").read_text()) for n, f in vector_files.items()},
        "config": config_to_dict(config),
    }


class _Measure:
    """Statistics of scores on the same rows."""

    def __init__(self, data: PreparedData, samples: int, seed: int) -> None:
        self.data, self.samples, self.seed = data, samples, seed

    def tasks(self, seeds: SeedScores) -> dict[str, dict]:
        """{task: {metric: figure}} of one cell."""
        return {task: self._figures([s[task] for s in seeds]) for task in seeds[0]}

    def _figures(self, seeds: list[TaskScores], mask: np.ndarray | None = None) -> dict:
        for other in seeds[1:]:
            same_rows(seeds[0], other)
        users = self.data.user[seeds[0].rows if mask is None else seeds[0].rows[mask]]
        parts = [s.statistics(self.data, mask) for s in seeds]
        found = {}
        for name in parts[0]:
            found[name] = figure([p[name] for p in parts], users, self.samples, self.seed)
            if name == "uauc":
                found[name]["users"] = self._both_labels(seeds[0].rows, users, mask)
        return found

    def _both_labels(self, rows: np.ndarray, users: np.ndarray, mask) -> int:
        labels = self.data.label[rows if mask is None else rows[mask]]
        positive = np.unique(users[labels == 1])
        return len(np.intersect1d(positive, np.unique(users[labels == 0])))

    def slices(self, seeds: SeedScores) -> dict:
        """{group: {slice: {"rows", "auc"}}} of CTR, empty without it."""
        if "ctr" not in seeds[0]:
            return {}
        own = [s["ctr"] for s in seeds]
        return {
            group: {
                name: {"rows": int(mask.sum()), "auc": self._figures(own, mask)["auc"]}
                for name, mask in masks.items()
            }
            for group, masks in slices(self.data, own[0].rows).items()
        }

    def comparisons(self, scores: Mapping[str, SeedScores]) -> list[dict]:
        """Paired differences of `COMPARISONS` where both sides are there, p adjusted by Holm."""
        tests = [
            (a, b, claim, task)
            for a, b, claim in COMPARISONS
            if a in scores and b in scores
            for task in scores[a][0]
            if task in scores[b][0]
        ]
        counts = Counter(task for *_, task in tests)  # the same for every metric of a task
        found, drawn = [], {}
        for a, b, claim, task in tests:
            left, right = _on_the_same_rows(scores, task, a, b)
            for name, seeds in ((a, left), (b, right)):
                if (name, task) not in drawn:
                    drawn[name, task] = self._sampled(seeds, counts[task])
            names = {"a": a.lstrip("="), "b": b.lstrip("="), "claim": claim, "task": task}
            for metric, ours in drawn[a, task].items():
                pair = difference(ours, drawn[b, task][metric])
                found.append(names | {"metric": metric} | pair)
        families: dict[tuple, list[dict]] = {}
        for entry in found:
            families.setdefault((entry["task"], entry["metric"]), []).append(entry)
        for family in families.values():
            _adjust(family)
        return found

    def by_user_rows(self, scores: Mapping[str, SeedScores]) -> list[dict]:
        """Paired differences in CTR AUC of `BY_USER`, a slice of users each; p adjusted by Holm
        over all of them. Each with "slice" and its "rows"."""
        claims = {(a, b): claim for a, b, claim in COMPARISONS}
        pairs = [pair for pair in BY_USER if all("ctr" in scores.get(n, [{}])[0] for n in pair)]
        found, drawn = [], {}
        for a, b in pairs:
            sides = _on_the_same_rows(scores, "ctr", a, b)
            masks = slices(self.data, sides[0][0].rows)[BY_USER_ROWS]
            for name, mask in masks.items():
                for cell, seeds in zip((a, b), sides, strict=True):
                    if (cell, name) not in drawn:
                        count = len(pairs) * len(masks)
                        drawn[cell, name] = self._sampled(seeds, count, mask, ("auc",))["auc"]
                about = {"a": a, "b": b, "claim": claims[a, b], "task": "ctr", "metric": "auc"}
                about |= {"slice": name, "rows": int(mask.sum())}
                found.append(about | difference(drawn[a, name], drawn[b, name]))
        _adjust(found)
        return found

    def _sampled(
        self,
        seeds: list[TaskScores],
        comparisons: int,
        mask: np.ndarray | None = None,
        names: Sequence[str] | None = None,
    ) -> dict[str, Sampled]:
        """Of the rows of a mask (N,), and of these metrics; None: all."""
        parts = [s.statistics(self.data, mask) for s in seeds]
        metrics = {name: [part[name] for part in parts] for name in names or parts[0]}
        samples = paired_samples(self.samples, comparisons)
        rows = seeds[0].rows if mask is None else seeds[0].rows[mask]
        return sampled(metrics, self.data.user[rows], samples, self.seed)


def _on_the_same_rows(
    scores: Mapping[str, SeedScores], task: str, a: str, b: str
) -> tuple[list[TaskScores], list[TaskScores]]:
    """Both sides of a pair, by seed; ValueError where they answered other rows."""
    left, right = ([s[task] for s in scores[side]] for side in (a, b))
    for other in [*left[1:], *right]:
        same_rows(left[0], other)
    return left, right


def _adjust(family: list[dict]) -> None:
    for entry, p in zip(family, holm([e["p"] for e in family]), strict=True):
        entry["p_holm"] = p


def _of_runs(experiment: Experiment, cell, results: list[dict]) -> dict:
    """What the runs of a cell say of themselves: size, time, speed, checks, learning curves."""
    about = results[0]["about"]
    seeds = [r["seed"] - experiment.config.seed for r in results]
    logs = [_log(experiment.folder(cell, seed)) for seed in seeds]
    speeds = [r["throughput"] for r in results]
    checks = {name: all(r["checks"][name] for r in results) for name in results[0]["checks"]}
    return {
        "trainable_parameters": about["trainable_parameters"],
        "seconds": {
            "train": _mean([r["about"]["seconds"].get("train") for r in results]),
            "evaluate": _mean([r["evaluate_seconds"] for r in results]),
            **_weigh_seconds(results),
        },
        **_weights(results),
        "tokens_per_second": _mean([s["tokens_per_second"] for s in speeds]),
        "data_wait": _mean([s["data_wait"] for s in speeds]),
        "checks": checks,
        "curves": _curves(logs),
    }


def _weights(results: list[dict]) -> dict[str, dict[str, list[float]]]:
    """{"weights": {task: the language model's weight beside the prior, by seed}}, where fitted."""
    found = [r["about"].get("weights") or {} for r in results]
    tasks = [task for task in found[0] if all(task in own for own in found)]
    return {"weights": {task: [own[task] for own in found] for task in tasks}} if tasks else {}


def _weigh_seconds(results: list[dict]) -> dict[str, float]:
    took = [r["about"]["seconds"].get("weigh") for r in results]
    return {} if None in took else {"weigh": _mean(took)}


def _curves(logs: list[list[dict]]) -> dict[str, list[list[float]]]:
    """{loss: [[step, mean over seeds], ..]} where every seed logged the step."""
    curves: dict[str, list[list[float]]] = {}
    for name in dict.fromkeys(key for line in logs[0] for key in line if key.startswith("loss")):
        by_step = [{line["step"]: line[name] for line in log if name in line} for log in logs]
        common = sorted(set.intersection(*(set(values) for values in by_step)))
        curves[name] = [[step, float(np.mean([v[step] for v in by_step]))] for step in common]
    return curves


def _log(folder: Path) -> list[dict]:
    lines = (folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def _environment(results: Mapping[str, list[dict]]) -> dict:
    """Where the runs were trained, with the versions that they name; else those of this machine."""
    abouts = [r["about"] for runs in results.values() for r in runs]
    own = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    versions = [about.get("versions", own) for about in abouts] or [own]
    said = {name: ", ".join(sorted({found[name] for found in versions})) for name in own}
    return {"devices": sorted({about["device"] for about in abouts})} | said
