"""Figures of the run report as inline SVG: intervals, training curves, before and after.

Matplotlib draws in placeholder colours that are then renamed to CSS variables (`--ink`, `--accent`,
...), so the page that holds a figure decides how it looks in light, in dark and on paper. Text
stays text. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from ckf.report_metrics import Value

WIDTH = 4.4  # inches; 317 units of the view box, so that 9 point text stays readable on a phone
MAX_POINTS = 240  # of a drawn curve; a longer one is drawn by the extremes of its bins

# Placeholder colours, renamed in `_svg`; matplotlib itself knows no CSS variables.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
ACCENT, OTHER, PAPER = "#040404", "#050505", "#060606"
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", OTHER: "other"}
_VARIABLES[PAPER] = "card"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ckf",
    "text.parse_math": False,  # a name with two dollar signs is a name
    "axes.unicode_minus": False,
    "font.size": 9.2,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.left": False,
    "xtick.bottom": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


class Mark(NamedTuple):
    """One row of an interval plot; `ours` marks the rows drawn in the accent colour."""

    label: str
    value: Value
    text: str
    ours: bool = False


class Figure(NamedTuple):
    """An inline SVG with its text alternative and its caption (both plain text)."""

    svg: Markup
    alt: str
    caption: str


def interval_plot(
    name: str, title: str, note: str, marks: Sequence[Mark], chance: float | None
) -> Markup:
    """Dots with whiskers, one row a mark from the top; the first mark's interval is a faint band.

    name: prefix of the ids in the SVG, unique in its page. note: faint, after the title.
    chance: where to draw a dashed line.
    """

    def draw(figure, axes):
        ends = [x for m in marks for x in m.value if x is not None]
        ends += [] if chance is None else [chance]
        margin = 0.06 * ((max(ends) - min(ends)) or 0.1 * abs(ends[0]) or 1.0)
        axes.set_xlim(min(ends) - margin, max(ends) + margin)
        axes.set_ylim(len(marks) - 0.4, -0.6)
        first = marks[0]
        if first.ours and first.value.has_interval:
            axes.axvspan(first.value.low, first.value.high, color=ACCENT, alpha=0.1, lw=0)
        if chance is not None:
            axes.axvline(chance, color=MUTED, lw=0.9, dashes=(3, 2))
            axes.annotate("chance", (chance, 1), xycoords=("data", "axes fraction"), xytext=(3, 2),
                          textcoords="offset points", color=MUTED, fontsize=7.5)  # fmt: skip
        for y, mark in enumerate(marks):
            colour = ACCENT if mark.ours else OTHER
            if mark.value.has_interval:
                axes.hlines(y, mark.value.low, mark.value.high, color=colour, lw=1.6)
            axes.plot(mark.value.value, y, "o", color=colour, ms=5.5, mec=PAPER, mew=0.8)
            axes.annotate(mark.text, (1, y), xycoords=("axes fraction", "data"), xytext=(8, 0),
                          textcoords="offset points", va="center_baseline", color=INK)  # fmt: skip
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(range(len(marks)), [_short(m.label) for m in marks])
        for label, mark in zip(axes.get_yticklabels(), marks, strict=True):
            label.set_color(INK if mark.ours else MUTED)
        axes.grid(axis="y", visible=False)

    height = 0.63 + 0.26 * len(marks)
    return _svg(name, draw, title, height, left=1.3, right=0.58, bottom=0.25, note=note)


def curve_plot(
    name: str,
    title: str,
    steps: np.ndarray,
    values: np.ndarray,
    smooth: np.ndarray | None = None,
    bottom: float | None = None,
    top: float | None = None,
    allow_log: bool = False,
) -> Markup:
    """A quantity over training steps; with `smooth` the values are faint and it is drawn on top.

    bottom, top: ends of the value axis if fixed. allow_log: a log axis where `uses_log_scale`.
    """

    def draw(figure, axes):
        x, y = thin(steps, values)
        raw = {"lw": 0.9, "alpha": 0.35} if smooth is not None else {"lw": 1.7}
        axes.plot(x, y, color=ACCENT, marker="o" if len(x) == 1 else None, ms=4, **raw)
        if smooth is not None:
            keep = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
            axes.plot(steps[keep], smooth[keep], color=ACCENT, lw=1.7)
        if allow_log and uses_log_scale(values):
            from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=bottom, top=top)
            axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.set_xlabel("step")
        axes.grid(axis="x", visible=False)

    return _svg(name, draw, title, height=1.95, left=0.62, right=0.12, bottom=0.42)


def change_plot(
    name: str, title: str, rows: Sequence[tuple[str, float | None, float | None]]
) -> Markup:
    """Before (hollow) and after (full) per row, joined by a line; a missing end is left out."""

    def draw(figure, axes):
        for y, (_, before, after) in enumerate(rows):
            if before is not None and after is not None:
                axes.hlines(y, before, after, color=ACCENT, lw=1.6, alpha=0.5)
            if before is not None:
                axes.plot(before, y, "o", mfc=PAPER, mec=OTHER, ms=6, mew=1.5)
            if after is not None:
                axes.plot(after, y, "o", color=ACCENT, ms=6)
        axes.set_yticks(range(len(rows)), [_short(label) for label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", visible=False)

    return _svg(name, draw, title, height=0.63 + 0.28 * len(rows), left=1.3, right=0.2, bottom=0.25)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the curve, cut off at its ends."""
    half = len(values) // 40
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long curve as the least and the greatest value of each of its bins, no peak lost."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    bins = np.array_split(np.arange(len(steps)), MAX_POINTS // 2)
    ends = [sorted({b[values[b].argmin()], b[values[b].argmax()]}) for b in bins]
    keep = np.array([i for pair in ends for i in pair])
    return steps[keep], values[keep]


def uses_log_scale(values: np.ndarray) -> bool:
    """True for a positive curve whose start dwarfs the rest: a straight axis would flatten it."""
    return len(values) > 1 and values.min() > 0 and values.max() > 5 * np.median(values)


def _short(label: str) -> str:
    return label if len(label) <= 20 else label[:19] + "…"


def _svg(
    name: str,
    draw: Callable[[Any, Any], None],
    title: str,
    height: float,
    left: float,
    right: float,
    bottom: float,
    note: str = "",
) -> Markup:
    """Draw on a figure `height` inches high with fixed margins (inches), return it as SVG."""
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's browser has the font
        canvas = Canvas(figsize=(WIDTH, height))
        top = 0.36
        axes = canvas.add_axes(
            (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
        )
        line = {"y": 1 - 0.14 / height, "va": "center_baseline"}
        canvas.text(0.0, s=title, weight="bold", **line)
        canvas.text(1.0, s=note, color=MUTED, fontsize=7.5, ha="right", **line)
        draw(canvas, axes)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        canvas.savefig(out, format="svg", metadata=nothing)
    return Markup(_inline(out.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Matplotlib's document as an element of a page: no prolog, own ids, CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<(?:path|clipPath) id=")', rf"\1{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"; font-family: [^;\"]*", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{variable})", svg)
    return svg
