"""What a record of an experiment says, as the paragraph and table that a page shows.

    python -m ckf.experiment.summary benchmarks/results/ml-1m-collm.json [PAGE]

PAGE: the page it will stand on, for its link to the record; docs/experiments.md unless told.
Every figure and every claim comes from the record, so the text can be made again and tested.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ckf.experiment.report import BY_USER, as_table, by_user_table, shown, verdict
from ckf.report_metrics import metric, number

_COLUMNS = (("ctr", "auc"), ("ctr", "uauc"), ("topk", "mrr"), ("rating", "rmse"))


def summary(record: Mapping, path: str, page: str = "docs/experiments.md") -> str:
    """Markdown: what was run, the table of cells and baselines, what is better and what is open.

    record: as ``ckf report --record`` writes it; path: where it lies, page: where the text will
    stand (both from the repository's root), for the link.
    """
    link = Path(os.path.relpath(path, Path(page).parent)).as_posix()
    parts = [_what(record, path, link), _figures(record), _picture(record, link)]
    parts += [_weights(record), _claims(record)]
    parts.append(_by_user(record))
    return "\n\n".join(part for part in parts if part)


def _what(record: Mapping, path: str, link: str) -> str:
    counts = {len(f["seeds"]) for cell in record["cells"].values() for f in _entries(cell)}
    seeds = " or ".join(map(str, sorted(counts)))
    rows = ", ".join(f"{count:,} {task} rows" for task, count in record["rows"].items())
    said = (
        f"{record['model']['name']} on {', '.join(record['environment']['devices'])}, "
        f"{seeds} seed(s) a cell, {record['split']} split ({rows}); "
        f"record [`{path}`]({link}). 95% intervals by bootstrap over users."
    )
    if record["runs_done"] < record["runs"]:
        said += f" **Not complete: {record['runs_done']} of {record['runs']} runs.**"
    if record["reduced"]:
        said = (
            "**Reduced run**: it shows that the parts work and large effects, not how good the "
            f"full system is. {said}"
        )
        said += "\n\n" + _folded("What was cut", "\n".join(f"* {cut}" for cut in record["reduced"]))
    return said


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _entries(part: Mapping) -> list[Mapping]:
    """The figures of a cell."""
    return [v for v in part.values() if isinstance(v, Mapping) and "seeds" in v]


def _figures(record: Mapping) -> str:
    parts = [*record["cells"].items(), *record["baselines"].items()]
    names = [(task, name) for task, name in _COLUMNS if task in record["rows"]]
    keys = [f"{record['split']}_{task}_{name}" for task, name in names]
    mark = " (reduced)" if record["reduced"] else ""
    head = ["", *(f"{task} {metric(name).label}{mark}" for task, name in names)]
    rows = [
        [
            f"{name}: {part['title']}" if "title" in part else name,
            *(shown(part.get(k)) for k in keys),
        ]
        for name, part in parts
        if any(key in part for key in keys)
    ]
    return "\n".join(as_table(head, rows))


def _picture(record: Mapping, link: str) -> str:
    """``picture.write_picture`` makes it."""
    title = f"{record['name']}: intervals of every cell (colour) and baseline (grey)"
    return f"![{title}]({Path(link).with_suffix('.svg').as_posix()})"


def _weights(record: Mapping) -> str:
    """What the language model counts beside a prior, in the cells that have one."""
    lines = []
    for name, cell in record["cells"].items():
        said = [
            f"{task} {', '.join(f'{weight:.2f}' for weight in weights)}"
            for task, weights in cell.get("weights", {}).items()
        ]
        if said:
            lines.append(
                f"Weight of the language model beside the prior in {name}, by seed: "
                f"{'; '.join(said)} (0: the prior alone)."
            )
    return "\n".join(lines)


def _claims(record: Mapping) -> str:
    """CTR comparisons that are decided, the claims that are open, and their figures, folded."""
    entries = [e for e in record["comparisons"] if e["task"] == "ctr" and e["value"] is not None]
    lines, undecided = [], []
    for entry in entries:
        result = {"A better": "holds", "B better": "the opposite holds"}.get(verdict(entry))
        if result is None:
            undecided.append(entry)
            continue
        lines.append(
            f"* {entry['claim']} ({_pair(entry)}, {metric(entry['metric']).label}): "
            f"**{result}**, {_difference(entry)}, p {number(entry['p_holm'])} (Holm)"
        )
    half = {e["claim"] for e in entries if e not in undecided}
    claims = [c for c in dict.fromkeys(e["claim"] for e in undecided) if c not in half]
    if not undecided:
        return "\n".join(lines)
    lines.append(
        "* **open**, not decided once corrected for the number of tests: "
        f"{'; '.join(claims) or 'only what stands in the table'}"
    )
    head = ["claim", "", *(metric(name).label for name in ("auc", "uauc"))]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for entry in undecided:
        cells.setdefault((entry["claim"], _pair(entry)), {})[entry["metric"]] = _difference(entry)
    rows = [
        [*key, *(found.get(name, "decided") for name in ("auc", "uauc"))]
        for key, found in cells.items()
    ]
    table = "\n".join(as_table(head, rows))
    return "\n".join(lines) + "\n\n" + _folded("Differences that are open", table)


def _by_user(record: Mapping) -> str:
    head, rows = by_user_table(record)
    if not rows:
        return ""
    return f"{BY_USER}:\n\n" + "\n".join(as_table(head, rows))


def _pair(entry: Mapping) -> str:
    return f"{entry['a']} - {entry['b']}"


def _difference(entry: Mapping) -> str:
    return f"{number(entry['value'])} [{number(entry['low'])}, {number(entry['high'])}]"


def main(arguments: list[str] | None = None) -> int:
    """Print the summary of a record."""
    path, *page = arguments if arguments is not None else sys.argv[1:]
    print(summary(json.loads(Path(path).read_text(encoding="utf-8")), path, *page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
