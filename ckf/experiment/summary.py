"""What a record of an experiment says, as the paragraph and table that a README shows.

    python -m ckf.experiment.summary benchmarks/results/ml-1m-collm.json

Every figure and every claim comes from the record, so the text can be made again and tested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from ckf.experiment.report import as_table, shown, verdict
from ckf.report_metrics import metric, number

_COLUMNS = (("ctr", "auc"), ("ctr", "uauc"), ("topk", "mrr"), ("rating", "rmse"))


def summary(record: Mapping, path: str) -> str:
    """Markdown: what was run, the table of cells and baselines, what is better and what is open.

    record: as ``ckf report --record`` writes it; path: where it lies, for the link.
    """
    return "\n\n".join([_what(record, path), _figures(record), _claims(record)])


def _what(record: Mapping, path: str) -> str:
    counts = {len(f["seeds"]) for cell in record["cells"].values() for f in _entries(cell)}
    seeds = " or ".join(map(str, sorted(counts)))
    rows = ", ".join(f"{count:,} {task} rows" for task, count in record["rows"].items())
    said = (
        f"{record['model']['name']} on {', '.join(record['environment']['devices'])}, "
        f"{seeds} seed(s) a cell, {record['split']} split ({rows}); "
        f"record [`{path}`]({path}). 95% intervals by bootstrap over users."
    )
    if record["reduced"]:
        cut = "; ".join(record["reduced"])
        said = (
            f"**Reduced run** ({cut}): it shows that the parts work and large effects, not how "
            f"good the full system is. {said}"
        )
    if record["runs_done"] < record["runs"]:
        said += f" **Not complete: {record['runs_done']} of {record['runs']} runs.**"
    return said


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


def _claims(record: Mapping) -> str:
    """CTR comparisons that are decided, and one line with the differences that are open."""
    lines, undecided = [], []
    for entry in record["comparisons"]:
        if entry["task"] != "ctr" or entry["value"] is None:
            continue
        found = verdict(entry)
        result = {"A better": "holds", "B better": "the opposite holds"}.get(found)
        pair, name = f"{entry['a']} - {entry['b']}", metric(entry["metric"]).label
        value = f"{number(entry['value'])} [{number(entry['low'])}, {number(entry['high'])}]"
        if result is None:
            undecided.append(f"{pair} {name} {value}")
            continue
        lines.append(
            f"* {entry['claim']} ({pair}, {name}): "
            f"**{result}**, {value}, p {number(entry['p_holm'])} (Holm)"
        )
    if undecided:
        why = "not decided once corrected for the number of tests"
        lines.append(f"* **open**, {why}: {'; '.join(undecided)}.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the summary of a record."""
    (path,) = arguments if arguments is not None else sys.argv[1:]
    print(summary(json.loads(Path(path).read_text(encoding="utf-8")), path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
