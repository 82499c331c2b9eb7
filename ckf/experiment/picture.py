"""A record of an experiment as a picture for a page: intervals of every cell and baseline.

    python -m ckf.experiment.picture benchmarks/results/ml-1m-collm.json

writes ml-1m-collm.svg beside it; ``ckf report --record`` does so too where matplotlib is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from ckf.experiment.page import drawn, mark
from ckf.experiment.report import label
from ckf.plots import WIDTH
from ckf.report_metrics import metric, task_label

SHOWN = (("ctr", "auc"), ("ctr", "uauc"), ("topk", "mrr"))
_UNITS = 72 * WIDTH  # of a plot's view box
_GAP = 28
# The variables of a plot, in light and in dark: an image sees no style of the page around it.
_STYLE = (
    "svg{--ink:#1a2029;--muted:#586273;--line:#dfe3ea;--accent:#0b6e99;--other:#7b8494;"
    "--card:#ffffff;font-family:system-ui,'Segoe UI',Roboto,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{--ink:#e7eaf0;--muted:#a2abba;--line:#323945;"
    "--accent:#52b6e2;--other:#8d97a8;--card:#1b2027}}"
)


def picture(record: Mapping) -> str:
    """An SVG of its own, one plot a metric side by side; cells in the accent colour.

    record: as ``ckf report --record`` writes it.

    Raises:
        ValueError: a record without a figure to draw.
    """
    plots = [plot for task, name in SHOWN if (plot := _plot(record, task, name)) is not None]
    if not plots:
        raise ValueError("the record has no AUC, UAUC or MRR to draw")
    heights = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', plot).group(1)) for plot in plots]
    width = len(plots) * (_UNITS + _GAP) + _GAP
    height = max(heights) + _GAP
    placed = "".join(
        plot.replace(
            "<svg ",
            f'<svg x="{_GAP + i * (_UNITS + _GAP):g}" y="{_GAP / 2:g}" width="{_UNITS:g}" '
            f'height="{own:g}" overflow="visible" ',
            1,
        )
        for i, (plot, own) in enumerate(zip(plots, heights, strict=True))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="var(--card)"/>{placed}</svg>\n'
    )


def write_picture(file: Path) -> Path:
    """The picture of a record, beside it."""
    target = file.with_suffix(".svg")
    target.write_text(picture(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    return target


def _plot(record: Mapping, task: str, name: str) -> str | None:
    key = f"{record['split']}_{task}_{name}"
    parts = {**record["cells"], **record["baselines"]}
    if "ckf" in parts:  # first: its interval is the band that others are held against
        parts = {"ckf": parts["ckf"], **parts}
    marks = []
    for who, part in parts.items():
        figure = part.get(key)
        if figure is not None and figure["value"] is not None:
            marks.append(mark(who, figure, who in record["cells"]))
    if not marks:
        return None
    title = label(record, f"{task_label(task)} {metric(name).label}")
    return str(drawn(f"{task}-{name}", title, name, marks).svg)


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures of records."""
    for path in arguments if arguments is not None else sys.argv[1:]:
        print(write_picture(Path(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
