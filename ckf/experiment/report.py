"""experiment.json as Markdown and as one self-contained HTML page, and its compact record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ckf.data.prepared import PreparedData
from ckf.evaluate import write_json
from ckf.report_metrics import Value, metric, number, task_label, with_interval

Log = Callable[[str], None]
JSON, MARKDOWN, HTML = "experiment.json", "experiment.md", "experiment.html"
_ALPHA = 0.05
_RECORDED = (
    ("ctr", "auc"),
    ("ctr", "uauc"),
    ("topk", "hr@1"),
    ("topk", "mrr"),
    ("rating", "rmse"),
    ("rating", "mae"),
    ("review_rating", "rmse"),
    ("review_rating", "mae"),
    ("explain", "loss"),
)
_OF_CELLS = (
    *("title", "trainable_parameters", "seconds", "tokens_per_second", "data_wait", "checks"),
    "weights",
)


def write_figures(experiment, data: PreparedData, vector_files: Mapping[str, Path], log: Log):
    """Write experiment.json, .md and .html from the finished runs; the path of the first.

    Without matplotlib or jinja2, as a GPU machine may be, the page is left out with one line.
    """
    from ckf.experiment.figures import collect

    write_json(collect(experiment, data, vector_files), experiment.out / JSON)
    try:
        log(f"report: {write_pages(experiment.out)}")
    except ModuleNotFoundError as error:
        log(f"no {HTML} ({error}); write it on another machine with: ckf report {experiment.out}")
    return experiment.out / JSON


def write_pages(out: Path) -> Path:
    """experiment.md and experiment.html from experiment.json alone; the path of the page."""
    found = read_experiment(out)
    _write(markdown(found), out / MARKDOWN)
    from ckf.experiment.page import page  # matplotlib and jinja2

    _write(page(found), out / HTML)
    return out / HTML


def write_record(out: Path, folder: Path) -> Path:
    """Copy what a reader of the repository needs from ``out`` to ``folder``/<name>.json.

    <name>.svg beside it shows it, where matplotlib is.
    """
    found = read_experiment(out)
    kept = ("name", "split", "reduced", "runs", "runs_done", "environment", "rows", "comparisons")
    record: dict[str, Any] = {key: found[key] for key in kept}
    record["by_user_rows"] = found.get("by_user_rows", [])  # none before there were any
    for part in ("cells", "baselines"):
        record[part] = {}
        for name, cell in found[part].items():
            short = {k: cell[k] for k in (*_OF_CELLS, "slices") if k in cell}
            for task, name_of in _RECORDED:
                figure = cell["figures"].get(task, {}).get(name_of)
                if figure is not None:
                    short[f"{found['split']}_{task}_{name_of}"] = figure
            record[part][name] = short
    settings = found["config"]
    record["model"] = settings["model"] | {"name": Path(settings["model"]["name"]).name}
    record |= {key: settings[key] for key in ("train", "lora", "metanet", "prompt", "cf")}
    record["cf_fits"] = {name: fit["log"] for name, fit in found["cf"].items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{found['name']}.json"
    write_json(record, file)
    with suppress(ModuleNotFoundError):  # of matplotlib, as on a GPU machine
        from ckf.experiment.picture import write_picture

        write_picture(file)
    return file


def read_experiment(out: Path) -> dict:
    """experiment.json of a folder; ValueError where there is none."""
    try:
        return json.loads((out / JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{out} has no readable {JSON} ({error}); make it with: ckf experiment CONFIG "
            f"--out {out}"
        ) from error


def markdown(found: Mapping) -> str:
    """The tables as Markdown."""
    lines = [f"# Experiment {found['name']}", ""]
    for note in notes(found):
        lines += [note, ""]
    for task in found["rows"]:
        head, rows = task_table(found, task)
        lines += [f"## {task_label(task)}, {found['rows'][task]:,} {found['split']} rows", ""]
        lines += as_table(head, rows) + [""]
    head, rows = comparison_table(found)
    lines += ["## Paired differences", "", _PAIRED, "", *as_table(head, rows), ""]
    head, rows = by_user_table(found)
    if rows:
        lines += [f"{BY_USER}:", "", *as_table(head, rows), ""]
    head, rows = runs_table(found)
    lines += ["## Runs", "", *as_table(head, rows), ""]
    for group, (head, rows) in slice_tables(found).items():
        lines += [f"## {label(found, f'CTR AUC by {group}')}", "", *as_table(head, rows), ""]
    return "\n".join(lines)


BY_USER = (
    "A minus B in AUC by the user's train rows (0: cold; rows in brackets), named better where p, "
    "adjusted by Holm over this table, is below .05"
)
_PAIRED = (
    "A minus B on the same rows, means over seeds; 95% interval and two-sided p by paired "
    "bootstrap over users, p adjusted by Holm over the comparisons of a metric. Seeds: how many "
    "differences of single seeds have the sign of the mean; where not all have it, nothing is "
    "called better."
)


def notes(found: Mapping) -> list[str]:
    """What a reader must know before the figures."""
    said = []
    if found["reduced"]:
        cut = "; ".join(found["reduced"])
        said.append(
            f"**REDUCED**: {cut}. Figures of this run say whether the parts work and which way "
            "differences point; they are not those of the full experiment."
        )
    if found["runs_done"] < found["runs"]:
        said.append(f"**Not complete**: {found['runs_done']} of {found['runs']} runs are done.")
    for name, why in found["failed"].items():
        said.append(f"**Failed**: {name}: {why}")
    if found["split"] != "test":
        said.append("On valid rows: for choosing settings. The test rows were not looked at.")
    said.append(
        "CKF-style, re-evaluated. All cells share data, CF vectors, rows and steps, and train "
        "about as many LoRA parameters. Intervals: 95%, bootstrap over users of the mean over "
        "seeds; ±: sample deviation over seeds."
    )
    return said


def label(found: Mapping, text: str) -> str:
    """A column or caption, marked where figures are reduced."""
    return f"{text} (reduced)" if found["reduced"] else text


def task_table(found: Mapping, task: str) -> tuple[list[str], list[list[str]]]:
    """Cells and baselines by metric of a task."""
    entries = [
        (name, part.get("title", "baseline"), part["figures"][task])
        for group in ("cells", "baselines")
        for name, part in found[group].items()
        if task in part["figures"]
    ]
    names = list(dict.fromkeys(m for _, _, figures in entries for m in figures))
    head = ["cell", "what it is", *(label(found, metric(m).label) for m in names)]
    return head, [
        [name, title, *(shown(figures.get(m)) for m in names)] for name, title, figures in entries
    ]


def comparison_table(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """Every paired difference with its verdict."""
    head = ["A", "B", "A > B would show that", "metric", label(found, "A - B"), "p", "p (Holm)",
            "seeds", "verdict"]  # fmt: skip
    rows = []
    for entry in found["comparisons"]:
        seeds = [s for s in entry["seeds"] if s is not None]
        agree = sum(1 for s in seeds if s * (entry["value"] or 0) > 0)
        rows.append(
            [
                entry["a"],
                entry["b"],
                entry["claim"],
                f"{task_label(entry['task'])} {metric(entry['metric']).label}",
                with_interval(_value(entry)),
                _p(entry["p"]),
                _p(entry["p_holm"]),
                f"{agree} of {len(seeds)}",
                verdict(entry),
            ]
        )
    return head, rows


def by_user_table(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """The paired differences by the user's train rows: a row a pair, a column a slice."""
    entries = found.get("by_user_rows", [])
    slices = {entry["slice"]: entry["rows"] for entry in entries}
    head = ["A", "B", *(f"{name} ({rows:,})" for name, rows in slices.items())]
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for entry in entries:
        said, better = with_interval(_value(entry)), verdict(entry)
        if better != "open":
            said += f", {better}"
        pairs.setdefault((entry["a"], entry["b"]), {})[entry["slice"]] = said
    return head, [[*pair, *(own.get(name, "–") for name in slices)] for pair, own in pairs.items()]


def verdict(entry: Mapping) -> str:
    """ "A better", "B better" or "open", by the adjusted p and only where all seeds agree."""
    seeds = [s for s in entry["seeds"] if s is not None]
    agree = all(s * (entry["value"] or 0) > 0 for s in seeds)
    if entry["p_holm"] is None or entry["p_holm"] >= _ALPHA or not agree:
        return "open"
    direction = metric(entry["metric"]).direction
    return "A better" if entry["value"] * direction > 0 else "B better"


def runs_table(found: Mapping) -> tuple[list[str], list[list[str]]]:
    """Size, time, speed and checks of the cells."""
    head = ["cell", "seeds", "trained parameters", "train, s", "evaluate, s", "tokens/s",
            "waiting for data", "checks"]  # fmt: skip
    rows = []
    for name, cell in found["cells"].items():
        wait = cell["data_wait"]
        failed = [check for check, holds in cell["checks"].items() if not holds]
        rows.append(
            [
                name,
                str(len(cell["seeds"])),
                f"{cell['trainable_parameters']:,}",
                _round(cell["seconds"]["train"]),
                _round(cell["seconds"]["evaluate"]),
                _round(cell["tokens_per_second"]),
                "–" if wait is None else f"{100 * wait:.1f}%",
                f"NOT: {', '.join(failed)}" if failed else "hold",
            ]
        )
    return head, rows


def slice_tables(found: Mapping) -> dict[str, tuple[list[str], list[list[str]]]]:
    """{group: (head, rows)}: AUC of every cell and of the CF model in each slice."""
    parts = {**found["cells"], **{k: v for k, v in found["baselines"].items() if k == "cf"}}
    parts = {name: part["slices"] for name, part in parts.items() if part["slices"]}
    tables = {}
    for group in next(iter(parts.values()), {}):
        first = next(iter(parts.values()))[group]
        head = ["cell", *(f"{name} ({entry['rows']:,})" for name, entry in first.items())]
        rows = [
            [name, *(with_interval(_value(e["auc"])) for e in slices[group].values())]
            for name, slices in parts.items()
        ]
        tables[group] = head, rows
    return tables


def shown(figure: Mapping | None) -> str:
    """A figure with its interval, its deviation over seeds and the users it counts."""
    if figure is None:
        return "–"
    text = with_interval(_value(figure))
    if figure.get("std") is not None:
        text += f" ± {number(figure['std'])}"
    return text + (f", {figure['users']} users" if "users" in figure else "")


def _value(figure: Mapping) -> Value | None:
    if figure["value"] is None:
        return None
    return Value(figure["value"], figure["low"], figure["high"])


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _round(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def as_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


def _write(text: str, path: Path) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
