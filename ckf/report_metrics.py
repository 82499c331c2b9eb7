"""What a metrics.json says: its figures by task and model, their wording, and a verdict.

Nothing here reads a file or draws. The verdict claims a difference only where two 95% intervals
do not touch, which is stricter than a paired test: what it leaves open, a paired test may decide.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

TASKS = {
    "ctr": "CTR",
    "topk": "Top-K",
    "rating": "Rating",
    "explain": "Explanation",
    "review_rating": "Rating from review",
}


class Metric(NamedTuple):
    """Its name in print, 1 where greater is better or -1 (0: not known), and chance's level."""

    label: str
    direction: int = 0
    chance: float | None = None


METRICS = {
    "auc": Metric("AUC", 1, 0.5),
    "uauc": Metric("UAUC", 1, 0.5),
    "hr@1": Metric("HR@1", 1),
    "hr@5": Metric("HR@5", 1),
    "hr@10": Metric("HR@10", 1),
    "ndcg@5": Metric("NDCG@5", 1),
    "ndcg@10": Metric("NDCG@10", 1),
    "mrr": Metric("MRR", 1),
    "rmse": Metric("RMSE", -1),
    "mae": Metric("MAE", -1),
    "greedy_rmse": Metric("RMSE, greedy parse", -1),
    "greedy_mae": Metric("MAE, greedy parse", -1),
    "greedy_hr@1": Metric("HR@1, greedy answer", 1),
    "valid_ratio": Metric("Valid greedy answers", 1),
    "greedy_failures": Metric("Greedy parse failures", -1),
    "bleu4": Metric("BLEU-4", 1),
    "rouge1": Metric("ROUGE-1", 1),
    "rouge2": Metric("ROUGE-2", 1),
    "rougeL": Metric("ROUGE-L", 1),
    "distinct1": Metric("Distinct-1", 1),
    "distinct2": Metric("Distinct-2", 1),
    "loss": Metric("Loss", -1),
}
# The verdict speaks of the first of these that a task has; the first two are drawn.
MAIN = ("auc", "uauc", "hr@1", "ndcg@10", "rmse", "mae", "rougeL", "bleu4")
COUNTS = ("rows", "users")
CKF, UNTRAINED = "CKF", "untrained model"
CF_ALONE, PRIOR_ALONE = "CF model alone", "prior alone"
RELATIONS = {"better": "better", "worse": "worse", "open": "not told apart", "unknown": "no claim"}


class Value(NamedTuple):
    """A figure with its 95% interval; `low` and `high` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


def read_value(raw: Any) -> Value | None:
    """A metric as written, {"value", "low", "high"} or a bare number; None if not finite."""
    if is_finite(raw):
        return Value(raw)
    raw = mapping(raw)
    if not is_finite(raw.get("value")):
        return None
    low, high = raw.get("low"), raw.get("high")
    known = is_finite(low) and is_finite(high) and low <= high
    return Value(raw["value"], low, high) if known else Value(raw["value"])


def tasks(metrics: Mapping) -> list[str]:
    """The tasks that anything was measured on, in the order of `TASKS`, then as met."""
    parts = [mapping(metrics.get(part)) for part in ("test", "untrained", "baselines")]
    found = {task: None for part in parts for task in part}
    return [t for t in TASKS if t in found] + [t for t in found if t not in TASKS]


def models(metrics: Mapping, task: str) -> dict[str, dict]:
    """Who was measured on the task: CKF (always listed), the untrained model, the baselines."""
    found = {CKF: metrics.get("test"), UNTRAINED: metrics.get("untrained")}
    found = {who: mapping(mapping(part).get(task)) for who, part in found.items()}
    for name, part in mapping(mapping(metrics.get("baselines")).get(task)).items():
        label = {"cf": CF_ALONE, "prior": PRIOR_ALONE}.get(name, name.replace("_", " "))
        found[f"{label} (baseline)" if label in (CKF, UNTRAINED) else label] = mapping(part)
    return {who: part for who, part in found.items() if part or who == CKF}


def metric_names(parts: Iterable[Mapping]) -> list[str]:
    """The metrics that any of the parts has, in the order of `METRICS`, then as met."""
    found = {k: None for part in parts for k in part if k not in COUNTS and read_value(part[k])}
    return [m for m in METRICS if m in found] + [m for m in found if m not in METRICS]


def metric(name: str) -> Metric:
    return METRICS.get(name, Metric(name))


def task_label(task: str) -> str:
    return TASKS.get(task, task)


def number(x: float | None) -> str:
    """Three decimals, two digits below 0.01, counts in full; a dash for None.

    What rounding leaves of zero, as of a difference of equal means, is 0.000.
    """
    if x is None:
        return "–"
    if isinstance(x, int):
        return f"{x:,}"
    if abs(x) < 1e-12:
        x = 0.0
    if 0 < abs(x) < 0.01:
        return f"{x:.2g}"
    return f"{x:.3f}" if abs(x) < 1000 else f"{x:,.0f}"


def with_interval(value: Value | None) -> str:
    """`0.708 [0.660, 0.756]`, or the figure alone, or a dash."""
    if value is None or not value.has_interval:
        return number(value.value if value else None)
    return f"{number(value.value)} [{number(value.low)}, {number(value.high)}]"


def compare(ours: Value, theirs: Value, direction: int) -> str:
    """One of `RELATIONS`: better or worse only if the intervals do not touch."""
    if not (ours.has_interval and theirs.has_interval and direction):
        return "unknown"
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "open"
    return "better" if (ours.value - theirs.value) * direction > 0 else "worse"


def verdict(metrics: Mapping) -> list[str]:
    """Sentences on CKF's main metric per task against the untrained model and the best baseline.

    The first one counts, the others give a task each; no sentences if CKF has no test metrics.
    """
    sentences: list[str] = []
    seen: dict[str, list[str]] = {f"the {UNTRAINED}": [], "the best baseline": []}
    for task in tasks(metrics):
        found = models(metrics, task)
        name = next((m for m in MAIN if read_value(found[CKF].get(m))), None)
        if name is None:
            continue
        label, direction, chance = metric(name)
        ours = read_value(found.pop(CKF)[name])
        sentence = f"{task_label(task)} {label} is {with_interval(ours)}"
        clauses = []
        theirs = {who: v for who, p in found.items() if (v := read_value(p.get(name)))}
        if UNTRAINED in theirs:
            relation, clause = _clause(f"the {UNTRAINED}", ours, theirs.pop(UNTRAINED), direction)
            seen[f"the {UNTRAINED}"].append(relation)
            clauses.append(clause)
        if theirs:
            best = max(theirs, key=lambda who: direction * theirs[who].value)
            who = f"the best of {len(theirs)} baselines, {best}" if len(theirs) > 1 else best
            relation, clause = _clause(who, ours, theirs[best], direction)
            seen["the best baseline"].append(relation)
            clauses.append(clause)
        sentence += f": {', '.join(clauses)}." if clauses else "."
        if chance is not None and ours.has_interval and ours.low <= chance:
            place = "lies below" if ours.high < chance else "includes"
            sentence += f" Its interval {place} {chance:g}, which is chance."
        sentences.append(sentence)
    return [_count(seen), *sentences] if sentences else []


def _clause(who: str, ours: Value, theirs: Value, direction: int) -> tuple[str, str]:
    relation = compare(ours, theirs, direction)
    figure = with_interval(theirs)
    return relation, {
        "better": f"better than {who} ({figure})",
        "worse": f"worse than {who} ({figure})",
        "open": f"not told apart from {who} ({figure}; the intervals overlap)",
        "unknown": f"beside {who} ({figure}; an interval is missing, so no claim)",
    }[relation]


def _count(seen: Mapping[str, list[str]]) -> str:
    """`Against the untrained model: better on 3 of 4 tasks, not told apart on 1.`"""
    parts = []
    for who, relations in seen.items():
        counts = [(RELATIONS[r], relations.count(r)) for r in RELATIONS if r in relations]
        if counts:
            first, *rest = [f"{word} on {n}" for word, n in counts]
            total = f" of {len(relations)} task{'s' if len(relations) > 1 else ''}"
            parts.append(f"gainst {who}: {', '.join([first + total, *rest])}.")
    alone = "CKF's figures stand alone: there is nothing measured beside them on the same metric."
    return f"CKF a{' A'.join(parts)}" if parts else alone


def breakdown(found: Mapping[str, Mapping], key: str) -> dict[str, Any] | None:
    """A task's figures by slice or by candidate list (`key`: "slices" or "lists"), or None.

    Returns {"metrics": [name], "groups": [{"label", "rows", "lines": [(who, [Value | None])]}]}.
    """
    parts = {who: mapping(part.get(key)) for who, part in found.items()}
    parts = {who: part for who, part in parts.items() if part}
    groups = list(dict.fromkeys(group for part in parts.values() for group in part))
    names = metric_names(mapping(part.get(g)) for part in parts.values() for g in groups)
    if not names:
        return None
    if key == "slices":
        parts = {who: {"all": found[who], **part} for who, part in parts.items()}
        groups = ["all", *(g for g in groups if g != "all")]
    out = []
    for group in groups:
        blocks = {who: mapping(part.get(group)) for who, part in parts.items()}
        rows = next((b["rows"] for b in blocks.values() if is_finite(b.get("rows"))), None)
        lines = [(who, [read_value(b.get(m)) for m in names]) for who, b in blocks.items() if b]
        out.append({"label": group_label(group), "rows": rows, "lines": lines})
    return {"metrics": names, "groups": out}


def group_label(group: str) -> str:
    """`uniform19` is one positive among 19 drawn uniformly; `not_cold` is the data set's flag."""
    if match := re.fullmatch(r"(uniform|popular)(\d+)", group):
        return f"1 + {match[2]} " + ("uniform" if match[1] == "uniform" else "by popularity")
    return {"all": "all rows", "not_cold": "not cold"}.get(group, group.replace("_", " "))


def mapping(x: Any) -> dict:
    return x if isinstance(x, dict) else {}


def is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def leaves(x: Any) -> Iterator[Any]:
    """Every value in nested dicts and lists."""
    if isinstance(x, dict | list):
        for child in x.values() if isinstance(x, dict) else x:
            yield from leaves(child)
    else:
        yield x
