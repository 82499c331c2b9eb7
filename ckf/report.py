"""A run as one self-contained HTML page, and its metrics as a table for the terminal.

Everything shown comes from the run folder (config.yaml, metrics.json, train_log.jsonl and
data/manifest.json). The page loads nothing, and the same folder gives the same bytes.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ckf import report_metrics as rm
from ckf.plots import Figure, Mark, change_plot, curve_plot, interval_plot, smoothed, uses_log_scale
from ckf.report_metrics import CKF, UNTRAINED, Value, is_finite, mapping, number, with_interval

if TYPE_CHECKING:
    from rich.table import Table


def write_report(run: Path) -> Path:
    """Write `run`/report.html from what the run folder holds and return its path.

    Parts that are missing are named on the page. Raises ValueError when there is neither a
    readable metrics.json nor a readable train_log.jsonl. The file appears whole or not at all.
    """
    run = Path(run)
    page = _render(_collect(run))
    path = run / "report.html"
    temporary = run / f".report.html.{os.getpid()}"
    try:
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def metrics_table(metrics: dict) -> Table:
    """The test metrics of a metrics.json beside the untrained model and the simplest baselines.

    Raises ValueError when `metrics` is not a dict.
    """
    from rich.table import Table
    from rich.text import Text

    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"metrics is a {type(metrics).__name__}, expected the dict in metrics.json: "
            "pass json.loads(path.read_text())"
        )
    name = mapping(metrics.get("run")).get("name")
    caption = "[low, high]: 95% interval; CF, prior: without the language model"
    table = Table(title=Text(str(name)) if name else None, caption=Text(caption))
    table.add_column("task")
    table.add_column("metric")
    measured = {task: rm.models(metrics, task) for task in rm.tasks(metrics)}
    who = [CKF, UNTRAINED, "item mean", "popularity"]
    who += [w for w in (rm.CF_ALONE, rm.PRIOR_ALONE) if any(w in m for m in measured.values())]
    short = {UNTRAINED: "untrained", rm.CF_ALONE: "CF", rm.PRIOR_ALONE: "prior"}
    for column in who:
        table.add_column(short.get(column, column), justify="right", no_wrap=True)
    for task, found in measured.items():
        names = rm.metric_names(found.values())
        for i, name in enumerate(names):
            ours, *others = (rm.read_value(found.get(w, {}).get(name)) for w in who)
            cells = [with_interval(ours), *(number(v and v.value) for v in others)]
            row = [rm.task_label(task) if i == 0 else "", rm.metric(name).label, *cells]
            table.add_row(*map(Text, row), end_section=i == len(names) - 1)
    return table


def _render(parts: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,  # names and titles come from users
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.j2").render(parts)


def _collect(run: Path) -> dict[str, Any]:
    """Everything the template shows."""
    if not run.is_dir():
        raise ValueError(f"{run} is not a run folder: pass the folder that `ckf train` wrote")
    metrics, metrics_problem = _read_json(run / "metrics.json")
    log, log_problem = _read_log(run / "train_log.jsonl")
    if metrics is None and not log:
        raise ValueError(
            f"nothing to report in {run}: metrics.json {metrics_problem}; train_log.jsonl "
            f"{log_problem}. Train with `ckf train CONFIG.yaml`, then `ckf evaluate {run}`"
        )
    name = run.resolve().name
    problems = []
    if metrics is None:
        problems.append(
            f"No test results: metrics.json {metrics_problem}. Run `ckf evaluate "
            f"{shlex.quote(name)}`, then `ckf report {shlex.quote(name)}`."
        )
    if log_problem:
        problems.append(f"Training log: train_log.jsonl {log_problem}.")
    metrics = metrics or {}
    gate, gate_problem = _gate(metrics.get("gate"))
    problems += _not_finite(metrics, log) + gate_problem
    config_text, config = _read_config(run / "config.yaml")
    manifest = _read_json(run / "data" / "manifest.json")[0] or {}
    about = mapping(metrics.get("run"))
    tasks = [_task(metrics, task) for task in rm.tasks(metrics)]
    return {
        "name": str(about.get("name") or config.get("name") or name),
        "folder": shlex.quote(name),
        "created": about.get("created"),
        "facts": _facts(about, config, manifest, log),
        "verdict": rm.verdict(metrics),
        "last_step": log[-1]["step"] if log else None,
        "problems": problems,
        "absent": _absent(metrics, tasks, log, config_text),
        "seed": about.get("seed"),
        "tasks": tasks,
        "curves": _curves(log),
        "held_out": _held_out(mapping(metrics.get("held_out_loss"))),
        "gate": gate,
        "config": config_text,
        "manifest": json.dumps(manifest, indent=2, ensure_ascii=False) if manifest else "",
    }


# ---- reading


def _read_json(path: Path) -> tuple[dict | None, str]:
    """The object in the file, or None and what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, ValueError, RecursionError) as error:
        return None, f"cannot be read ({error})"
    if not isinstance(found, dict) or not found:
        return None, f"holds {str(found)[:40]!r}, expected an object with the figures"
    return found, ""


def _read_log(path: Path) -> tuple[list[dict], str]:
    """Entries in step order, and what is wrong: a killed run leaves half a line at the end.

    The entries of a resumed run replace those of the steps it trained again.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], "is missing"
    except OSError as error:
        return [], f"cannot be read ({error})"
    entries: list[dict] = []
    bad = 0
    for line in filter(str.strip, lines):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not is_finite(entry.get("step")):
            bad += 1
            continue
        while entries and entries[-1]["step"] >= entry["step"]:
            entries.pop()
        entries.append(entry)
    if not entries:
        return [], f"has no readable line ({bad} unreadable)" if bad else "is empty"
    return entries, f"has {bad} unreadable line(s), left out" if bad else ""


def _read_config(path: Path) -> tuple[str, dict]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text, mapping(yaml.safe_load(text))
    except OSError:
        return "", {}
    except (yaml.YAMLError, ValueError):
        return text, {}


def _not_finite(metrics: dict, log: list[dict]) -> list[str]:
    problems = []
    bad = sum(isinstance(x, float) and not is_finite(x) for x in rm.leaves(metrics))
    if bad:
        problems.append(f"{bad} value(s) in metrics.json are not finite and shown as a dash.")
    losses = [x for e in log for k, x in e.items() if k == "loss" or k.startswith("loss/")]
    bad = sum(not is_finite(x) for x in losses)
    if bad:
        problems.append(f"{bad} logged loss(es) are not finite; the curves leave them out.")
    return problems


def _absent(metrics: dict, tasks: list[dict], log: list[dict], config: str) -> list[str]:
    """What a full report would show and this run does not hold."""
    checks = {
        "test metrics": metrics.get("test"),
        "the untrained model": metrics.get("untrained"),
        "baselines": metrics.get("baselines"),
        "slices": any(t["slices"] for t in tasks),
        "training log": log,
        "held-out loss": metrics.get("held_out_loss"),
        "gate": metrics.get("gate"),
        "config.yaml": config,
    }
    return [name for name, part in checks.items() if not part]


# ---- parts of the page


def _facts(about: dict, config: dict, manifest: dict, log: list[dict]) -> list[dict]:
    """The headline: label, value, detail."""
    data, model = mapping(config.get("data")), config.get("model")
    model = about.get("model") or (mapping(model).get("name") or mapping(model).get("base")
                                   if isinstance(model, dict) else model)  # fmt: skip
    seconds = {k: s for k, s in mapping(about.get("seconds")).items() if is_finite(s)}
    took = sum(seconds.values()) if seconds else None
    detail = ", ".join(f"{part.replace('cf', 'CF')} {_duration(s)}" for part, s in seconds.items())
    if took is None and log and is_finite(log[-1].get("seconds")):
        took, detail = log[-1]["seconds"], "training, as logged so far"
    facts = [("Model", model, ""), ("Data set", manifest.get("name") or data.get("name"), "")]
    for split, rows in mapping(about.get("rows")).items():
        counts = {task: n for task, n in mapping(rows).items() if is_finite(n)}
        listed = ", ".join(f"{rm.task_label(task)} {n:,}" for task, n in counts.items())
        label = {"train": "Training", "valid": "Validation"}.get(split, split.capitalize())
        facts.append((f"{label} rows", f"{sum(counts.values()):,}" if counts else None, listed))
    trainable = about.get("trainable_parameters")
    facts += [
        ("Trainable parameters", f"{trainable:,}" if is_finite(trainable) else None, ""),
        ("Wall time", _duration(took) if took is not None else None, detail),
        ("Device", about.get("device"), ""),
        ("Seed", about.get("seed"), ""),
    ]
    weights = {t: w for t, w in mapping(about.get("weights")).items() if is_finite(w)}
    if weights:
        listed = ", ".join(
            f"{rm.task_label(task)} {weight:.2f}" for task, weight in weights.items()
        )
        facts.append(("Weight of the language model", listed, "beside the prior; from valid rows"))
    missing = "not recorded"
    return [
        {"label": label, "value": missing if value is None else str(value), "detail": detail}
        for label, value, detail in facts
    ]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _task(metrics: Mapping, task: str) -> dict[str, Any]:
    """One task's tables and figures."""
    found = rm.models(metrics, task)
    rows = []
    for name in rm.metric_names(found.values()):
        raw = mapping(found[CKF].get(name))
        counts = [f"{raw[c]:,} {c}" for c in rm.COUNTS if is_finite(raw.get(c))]
        cells = [rm.read_value(part.get(name)) for part in found.values()]
        label, direction, _ = rm.metric(name)
        rows.append({"label": label, "direction": direction, "cells": cells,
                     "note": ", ".join(counts)})  # fmt: skip
    title = rm.task_label(task)
    drawn = [name for name in rm.MAIN if rm.read_value(found[CKF].get(name))][:2]
    figures, by_slice = [], []
    for name in drawn:
        label = rm.metric(name).label
        values = {who: rm.read_value(part.get(name)) for who, part in found.items()}
        figures.append(_intervals(f"{task}-{name}", f"{title}: {label}", name, values))
        groups = {"all": found[CKF], **mapping(found[CKF].get("slices"))}
        values = {rm.group_label(g): rm.read_value(mapping(part).get(name))
                  for g, part in groups.items()}  # fmt: skip
        if sum(v is not None for v in values.values()) > 1:
            heading = f"{title}: {label} of CKF by slice"
            by_slice.append(_intervals(f"{task}-{name}-slices", heading, name, values, True))
    return {
        "title": title,
        "columns": list(found),
        "rows": rows,
        "figures": figures,
        "slices": _labelled(rm.breakdown(found, "slices")),
        "slice_figures": by_slice,
        "lists": _labelled(rm.breakdown(found, "lists")),
    }


def _labelled(table: dict[str, Any] | None) -> dict[str, Any] | None:
    return table and {**table, "metrics": [rm.metric(m).label for m in table["metrics"]]}


def _intervals(
    name: str, title: str, metric: str, values: dict[str, Value | None], all_ours: bool = False
) -> Figure:
    marks = [
        Mark(label, v, number(v.value), all_ours or label == CKF)
        for label, v in values.items()
        if v
    ]
    _, direction, chance = rm.metric(metric)
    better = "greater is better" if direction > 0 else "smaller is better"
    listed = "; ".join(f"{m.label} {with_interval(m.value)}" for m in marks)
    svg = interval_plot(_ident(name), title, better, marks, chance)
    return Figure(svg, f"{title}, {better}. Dots with 95% intervals: {listed}.", "")


def _curves(log: list[dict]) -> dict[str, list[Figure]]:
    """Losses (all tasks, then each), text share, throughput; a key without values is left out."""
    keys = list(dict.fromkeys(k for entry in log for k in entry if k.startswith("loss/")))
    losses = [_curve(log, key, f"{rm.task_label(key[5:])} loss") for key in keys]
    losses = [_curve(log, "loss", "Loss, all tasks"), *losses] if len(keys) != 1 else losses
    share = _curve(log, "text_share", "Text share of the curriculum", smooth=False, top=1.02)
    speed = _curve(log, "tokens_per_second", "Tokens per second")
    wait = _curve(log, "data_wait", "Share of the time spent waiting for data", smooth=False)
    return {
        "losses": [f for f in losses if f],
        "share": [f for f in (share,) if f],
        "speed": [f for f in (speed, wait) if f],
    }


def _curve(
    log: list[dict], key: str, title: str, smooth: bool = True, top: float | None = None
) -> Figure | None:
    pairs = [(e["step"], e[key]) for e in log if is_finite(e.get(key))]
    if not pairs:
        return None
    steps, values = (np.array(x, dtype=np.float64) for x in zip(*pairs, strict=True))
    line = smoothed(values) if smooth else values
    loss = key == "loss" or key.startswith("loss/")
    bottom = None if loss else 0.0
    svg = curve_plot(_ident(key), title, steps, values, line if smooth else None, bottom, top, loss)
    first, last = (number(float(line[i])) for i in (0, -1))
    how = "smoothed " if smooth else ""
    alt = f"{title} over steps {steps[0]:,.0f} to {steps[-1]:,.0f}: {how}{first} to {last}."
    caption = f"{how.capitalize()}{first} → {last}"
    if key == "tokens_per_second":
        caption += f", median {number(float(np.median(values)))}"
    return Figure(svg, alt, caption + (", log scale" if loss and uses_log_scale(values) else ""))


def _held_out(losses: dict) -> dict[str, Any] | None:
    before, after = mapping(losses.get("before")), mapping(losses.get("after"))
    rows = []
    for task in dict.fromkeys((*before, *after)):
        pair = [v and v.value for v in (rm.read_value(x.get(task)) for x in (before, after))]
        if pair != [None, None]:
            change = None if None in pair else float(pair[1] - pair[0])
            rows.append({"task": rm.task_label(task), "pair": pair, "change": change})
    if not rows:
        return None
    title = "Held-out loss before and after"
    svg = change_plot("held-out", title, [(r["task"], *r["pair"]) for r in rows])
    listed = "; ".join(f"{r['task']} {' to '.join(map(number, r['pair']))}" for r in rows)
    caption = "Hollow: before training. Full: after. Smaller is better."
    return {"rows": rows, "figure": Figure(svg, f"{title}: {listed}.", caption)}


def _gate(gate: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """The heat map's rows, each cell with its strength in [0, 1]; or what is wrong with it."""
    if gate is None:
        return None, []
    gate = mapping(gate)
    tasks, experts, values = (gate.get(key) for key in ("tasks", "experts", "values"))
    lists = all(isinstance(x, list) and x for x in (tasks, experts, values))
    if not lists or len(values) != len(tasks) or not all(
        isinstance(row, list) and len(row) == len(experts) for row in values
    ):  # fmt: skip
        return None, ["gate in metrics.json is not a matrix with a row a task, a column an expert."]
    greatest = max((abs(x) for row in values for x in row if is_finite(x)), default=0) or 1
    rows = []
    for task, row in zip(tasks, values, strict=True):
        cells = [float(x) if is_finite(x) else None for x in row]
        strong = [round(abs(x or 0) / greatest, 3) for x in cells]
        cells = [
            {"value": x, "strength": s, "negative": (x or 0) < 0}
            for x, s in zip(cells, strong, strict=True)
        ]
        rows.append({"task": rm.task_label(str(task)), "cells": cells})
    return {"experts": [rm.task_label(str(e)) for e in experts], "rows": rows}, []


def _ident(text: str) -> str:
    """An id for the SVG from any name: letters, digits and dashes."""
    return "f" + "".join(c if c.isascii() and c.isalnum() else f"-{ord(c):x}-" for c in text)
