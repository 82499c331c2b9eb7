"""The HTML page of an experiment: tables, intervals per cell, learning curves, slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckf.experiment import report
from ckf.plots import Figure, Mark, curve_plot, interval_plot
from ckf.report_metrics import METRICS, Value, metric, number, task_label, with_interval

TEMPLATES = Path(__file__).parent.parent / "templates"


def page(found: Mapping) -> str:
    """The page as text; it loads nothing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tasks = [
        {
            "title": f"{task_label(task)}, {rows:,} {found['split']} rows",
            "table": report.task_table(found, task),
            "figures": _intervals(found, task),
        }
        for task, rows in found["rows"].items()
    ]
    return environment.get_template("experiment.html.j2").render(
        name=found["name"],
        reduced=bool(found["reduced"]),
        notes=[note.replace("**", "") for note in report.notes(found)],
        tasks=tasks,
        comparisons=report.comparison_table(found),
        by_user=report.by_user_table(found),
        by_user_caption=report.BY_USER,
        runs=report.runs_table(found),
        slices=[
            {
                "group": report.label(found, group),
                "table": table,
                "figure": _slice_figure(found, group),
            }
            for group, table in report.slice_tables(found).items()
        ],
        curves=_curves(found),
        environment=", ".join(f"{k} {v}" for k, v in found["environment"].items()),
    )


def _intervals(found: Mapping, task: str) -> list[Figure]:
    """The first two metrics of a task, one row a cell or baseline."""
    parts = {**found["cells"], **found["baselines"]}
    entries = {name: p["figures"][task] for name, p in parts.items() if task in p["figures"]}
    names = list(dict.fromkeys(m for figures in entries.values() for m in figures))[:2]
    figures = []
    for name in names:
        title = report.label(found, f"{task_label(task)}: {metric(name).label}")
        marks = [
            mark(who, figures_of[name], who in found["cells"])
            for who, figures_of in entries.items()
            if figures_of.get(name, {}).get("value") is not None
        ]
        if marks:
            figures.append(drawn(f"{task}-{name}", title, name, marks))
    return figures


def _slice_figure(found: Mapping, group: str) -> Figure | None:
    """AUC by slice of the plain cell, or of the first there is."""
    cells = {name: c for name, c in found["cells"].items() if group in c["slices"]}
    if not cells:
        return None
    name = "ckf" if "ckf" in cells else next(iter(cells))
    marks = [
        mark(slice_name, entry["auc"], True)
        for slice_name, entry in cells[name]["slices"][group].items()
        if entry["auc"]["value"] is not None
    ]
    title = report.label(found, f"AUC of {name}")
    return drawn(f"slice-{group}", title, "auc", marks) if marks else None


def mark(who: str, figure: Mapping, ours: bool) -> Mark:
    """A figure with its interval as a row of a plot."""
    value = Value(figure["value"], figure["low"], figure["high"])
    return Mark(who, value, number(value.value), ours)


def drawn(name: str, title: str, metric_name: str, marks: list[Mark]) -> Figure:
    """Rows of one metric as a plot."""
    known = METRICS.get(metric_name) or metric(metric_name)
    better = "greater is better" if known.direction > 0 else "smaller is better"
    svg = interval_plot(_ident(name), title, better, marks, known.chance)
    listed = "; ".join(f"{m.label} {with_interval(m.value)}" for m in marks)
    return Figure(svg, f"{title}, {better}. Dots with 95% intervals: {listed}.", "")


def _curves(found: Mapping) -> list[Figure]:
    """The first task's training loss of every cell."""
    figures = []
    for name, cell in found["cells"].items():
        curve = next((c for key, c in cell["curves"].items() if key != "loss" and c), None)
        if curve is None:
            continue
        steps, values = np.array(curve, dtype=np.float64).T
        title = report.label(found, f"Loss of {name}")
        svg = curve_plot(_ident(f"curve-{name}"), title, steps, values, allow_log=True)
        first, last = (number(float(values[i])) for i in (0, -1))
        figures.append(Figure(svg, f"{title}: {first} to {last}.", f"{first} → {last}"))
    return figures


def _ident(text: str) -> str:
    return "f" + "".join(c if c.isascii() and c.isalnum() else "-" for c in text)
