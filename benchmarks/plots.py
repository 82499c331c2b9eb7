"""Pictures of the records: ``python benchmarks/plots.py --results FOLDER`` writes FOLDER/plots/.

One picture a question; what has no record has no picture. Colours are Okabe and Ito's, which stay
apart for colour-blind readers; lines are labelled where they end. Bars and bands: quartiles; dots:
the analytic floor.
"""

import argparse
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.bench_scaling import axis_rows  # noqa: E402
from benchmarks.floors import peaks_of  # noqa: E402
from benchmarks.records import load_record, rows_of  # noqa: E402

DERIVED = ("ckf best", "ckf triton")
OURS, RIVAL, NEUTRAL, INK = "#D55E00", "#0072B2", "#999999", "#222222"
LINES = {
    "frozen": NEUTRAL,
    "single": "#000000",
    "dense": "#0072B2",
    "grouped": "#009E73",
    "bmm": "#56B4E9",
    "peft-big": "#CC79A7",
    "peft-masks": "#E69F00",
    "peft-loop-by-hand": "#8C6D31",
    "peft-mixed": "#6A3D9A",
    "vllm": "#009E73",
    "sglang": "#56B4E9",
    "ckf best": "#8B2500",
    "ckf triton": "#F0914D",
    "ckf": OURS,
}
WIDTH = 4.3  # inches of a panel: two side by side stay readable at 800 pixels
CROSSED = ("grouped", "ckf triton", "ckf")  # what may pass dense-gated products as work grows
AXES = {"tasks": "tasks", "rank": "rank of each LoRA", "m": "rows", "mix": "mix of tasks"}


def bars(rows: list[dict], path: Path) -> bool:
    """Every provider of each case that has the most of them: ratio to the frozen linear."""
    cases = _cases([r for r in rows if r["pass"] == "train"])
    most = sorted(cases.items(), key=lambda item: -len(item[1]))[:4]
    if not most:
        return False
    figure, axes = _figure(len(most), WIDTH, max(len(r) for _, r in most) * 0.26 + 1.0)
    for ax, (title, found) in zip(axes, most, strict=True):
        found = [r for r in found if r["provider"] not in ("frozen", *DERIVED)]
        found.sort(key=lambda r: -r["ratio"])
        for y, row in enumerate(found):
            name = row["provider"]
            colour = OURS if name.startswith("ckf") else NEUTRAL if name == "single" else RIVAL
            ax.barh(y, row["ratio"], color=colour, height=0.7)
            ax.hlines(y, row["ratio_q1"], row["ratio_q3"], color=INK, lw=1.2)
            ax.text(max(row["ratio"], row["ratio_q3"]), y, f" {row['ratio']:.2f}", va="center")
        ax.axvline(found[0]["floor_ratio"], color=INK, ls=":", lw=1)
        ax.text(found[0]["floor_ratio"], -0.85, "floor ", ha="right", va="center", fontsize=8)
        ax.set_ylim(-1.2, len(found) - 0.4)
        ax.set_yticks(range(len(found)), [r["provider"] for r in found])
        ax.set_title(title, loc="left")
        ax.set_xlim(0, max(r["ratio_q3"] for r in found) * 1.15)
        ax.set_xlabel("time over the frozen linears'")
    return _save(figure, path)


def over_rows(rows: list[dict], path: Path) -> bool:
    """Ratio to the frozen linear over m, one panel a pass."""
    from_records = [r for r in rows if r["k"] is not None and r["dropout"] == 0]
    panels = []
    for kind in ("forward", "train"):
        own = [r for r in from_records if r["pass"] == kind]
        own = [r for r in own if (r["tasks"], r["rank"]) == (4, 16)]
        sets: dict[tuple, list[dict]] = {}
        for r in own:
            sets.setdefault((r["shape"], r["mix"], r["adapters"]), []).append(r)
        widest = max(sets, key=lambda key: len({r["m"] for r in sets[key]}), default=None)
        if widest is not None and len({r["m"] for r in sets[widest]}) > 1:
            panels.append((f"{kind}, {widest[0]}, T 4, r 16, {widest[1]}", sets[widest]))
    return _curves(panels, "m", path, "rows", bands=True)


def scaling(rows: list[dict], path: Path) -> bool:
    """Ratio to the frozen linear along each axis: where curves cross, the best choice changes."""
    panels = [(AXES[axis], axis_rows(rows, axis), axis) for axis in AXES]
    panels = [(title, own, axis) for title, own, axis in panels if len({r[axis] for r in own}) > 1]
    if not panels:
        return False
    figure, axes = _figure(len(panels), WIDTH, 3.8)
    for ax, (title, own, axis) in zip(axes, panels, strict=True):
        _draw(ax, own, axis, bands=True)
        ax.set_title(f"cost against {title}", loc="left")
        ax.set_xlabel(title)
        for name, place, ratio in crossings(own, axis):
            ax.plot(place, ratio, "o", ms=9, mfc="none", mec=LINES[name], mew=1.5, zorder=4)
    return _save(figure, path)


def crossings(rows: list[dict], axis: str) -> list[tuple[str, float, float]]:
    """(provider, place on the axis, ratio) where a provider passes the dense-gated products.

    Straight lines between measured points, both axes logarithmic.
    """
    if axis == "mix":
        return []
    found = []
    times = {n: {r[axis]: r["ratio"] for r in rows if r["provider"] == n} for n in LINES}
    for name in CROSSED:
        keys = sorted(times["dense"].keys() & times[name].keys())
        gaps = [math.log(times[name][key] / times["dense"][key]) for key in keys]
        for (low, high), (before, after) in zip(pairwise(keys), pairwise(gaps), strict=True):
            if before > 0 > after or before < 0 < after:
                share = before / (before - after)
                place = low * (high / low) ** share
                ratio = times["dense"][low] * (times["dense"][high] / times["dense"][low]) ** share
                found.append((name, place, ratio))
    return found


def roofline(rows: list[dict], path: Path) -> bool:
    """Achieved time over the analytic floor, one dot a case; only where peaks are known."""
    own = [r for r in rows if r.get("floor_ms") and r["provider"] in LINES]
    if not own:
        return False
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 4.2))
    for name in dict.fromkeys(r["provider"] for r in own):
        found = [r for r in own if r["provider"] == name]
        frozen = name == "frozen"
        x = [(r["frozen_flops"] if frozen else r["flops"])
             / (r["frozen_bytes"] if frozen else r["bytes"]) for r in found]  # fmt: skip
        floors = [r["frozen_floor_ms"] if frozen else r["floor_ms"] for r in found]
        share = [floor / r["ms"] for floor, r in zip(floors, found, strict=True)]
        ax.plot(x, share, "o", color=LINES[name], label=name, ms=5, alpha=0.8)
    flops, traffic = peaks_of(own[0]["device"])
    ax.axvline(flops / traffic, color=INK, ls=":", lw=1)
    ax.text(flops / traffic, 0.02, " compute-bound to the right", fontsize=8)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("FLOPs a byte, at the least traffic")
    ax.set_ylabel("share of the floor reached (1: none faster)")
    ax.legend(frameon=False, fontsize=8, ncols=2)
    return _save(figure, path)


def decode_model(rows: list[dict], path: Path) -> bool:
    """A decoder step of a whole model over the batch."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    panels = [(f"one token a row, {name}", [r for r in rows if r["model"] == name])
              for name in models]  # fmt: skip
    return _curves([p for p in panels if len({r["m"] for r in p[1]}) > 1], "m", path, "rows")


def step(rows: list[dict], path: Path) -> bool:
    """Tokens a second of a training step, one panel a model, one bar a provider and layout."""
    cases: dict[str, list[dict]] = {}
    for r in rows:
        title = f"{r['model']}, {r['adapters']} adapters"
        title += ", rows of equal length" if r.get("sigma") == 0 else ""
        title += ", compiled too" if r.get("contenders") and r["compiled"] else ""
        cases.setdefault(title, []).append(r)
    if not cases:
        return False
    figure, axes = _figure(len(cases), WIDTH, max(map(len, cases.values())) * 0.22 + 1.0)
    for ax, (title, own) in zip(axes, cases.items(), strict=True):
        own.sort(key=lambda r: r["tokens_per_s"])
        for y, row in enumerate(own):
            name = row["provider"]
            colour = OURS if name.startswith("ckf") else RIVAL if name[:4] == "peft" else NEUTRAL
            ax.barh(y, row["tokens_per_s"], color=colour, height=0.7)
            ends = [row["tokens"] / row[q] * 1e3 for q in ("ms_q3", "ms_q1")]
            ax.hlines(y, *ends, color=INK, lw=1.2)
            frozen = [r for r in own if (r["provider"], r["layout"]) == ("frozen", row["layout"])]
            if frozen and name != "frozen":  # at the floor's share of the frozen model's rate
                most = frozen[0]["tokens_per_s"] / row["floor_ratio"]
                ax.vlines(most, y - 0.4, y + 0.4, color=INK, ls=":", lw=1.4)
        ax.set_yticks(range(len(own)), [f"{r['provider']}, {r['layout']}" for r in own], fontsize=8)
        ax.set_xlabel("tokens a second, without AdamW (dotted: floor)")
        ax.set_title(title, loc="left")
    return _save(figure, path)


def training(rows: list[dict], path: Path) -> bool:
    """A small model's training step: the wall's time, and in it that of the GPU's kernels."""
    rows = [r for r in rows if r["provider"] != "ckf best"]  # a variant is no backend
    models = list(dict.fromkeys(r["model"] for r in rows))
    most = max(sum(r["model"] == model for r in rows) for model in models)
    figure, axes = _figure(len(models), WIDTH, most * 0.3 + 1.0)
    for ax, model in zip(axes, models, strict=True):
        own = sorted((r for r in rows if r["model"] == model), key=lambda r: -r["ms"])
        for y, row in enumerate(own):
            ours = row["provider"].startswith("ckf")
            ax.barh(y, row["ms"], color=OURS if ours else NEUTRAL, height=0.7)
            if row["gpu_ms"] is not None:
                ax.barh(y, row["gpu_ms"], color=INK, height=0.22)
            ax.text(
                row["ms"], y, f" {row['tokens_per_second']:,} tokens/s", va="center", fontsize=8
            )
        ax.set_yticks(range(len(own)), [r["provider"] for r in own], fontsize=8)
        ax.set_xlim(0, 1.35 * max(r["ms"] for r in own))
        ax.set_xlabel("ms a step, AdamW included (dark: the GPU's kernels alone)")
        ax.set_title(f"{model}, {own[0]['row_count']} packed rows of two tasks", loc="left")
    return _save(figure, path)


PICTURES: dict[str, tuple[tuple[str, ...], Callable[[list[dict], Path], bool]]] = {
    "linear_peers": (("bench_linear",), bars),
    "linear_rows": (("bench_decode", "bench_linear", "bench_scaling"), over_rows),
    "scaling": (("bench_scaling",), scaling),
    "roofline": (("bench_linear", "bench_decode"), roofline),
    "decode_model": (("bench_decode_model",), decode_model),
    "step": (("bench_step",), step),
    "training": (("bench_training",), training),
}


def draw_all(results: Path) -> list[Path]:
    """The pictures that the records in a folder allow."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"{error}; pip install matplotlib") from error
    matplotlib.use("Agg")
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    style |= {"axes.grid": True, "grid.color": "#e6e6e6", "axes.titlesize": 10, "font.size": 9}
    made = []
    with matplotlib.rc_context(style):
        for name, (sources, draw) in PICTURES.items():
            paths = [results / f"{source}.json" for source in sources]
            found = [load_record(path) for path in paths if path.exists()]
            rows = [
                row | {"device": record["environment"]["device"]}
                for record in found
                for row in with_best(record)
            ]
            path = results / "plots" / f"{name}.png"
            if rows and draw(rows, path):
                made.append(path)
    return made


def with_best(record: dict) -> list[dict]:
    """The rows, and in each case "ckf triton", the fastest plan of those kernels, and "ckf best"
    where some backend beats the default by over 2%."""
    rows = []
    for case in record["cases"]:
        own = rows_of({"cases": [case]})
        ours = [r for r in own if r["provider"].startswith("ckf")]
        auto = next((r for r in ours if r["provider"] == "ckf"), None)
        best = min(ours, key=lambda r: r["ms"], default=None)
        rows += own
        plans = [r for r in ours if r["provider"].startswith("ckf-triton:")]
        if plans:
            rows.append(min(plans, key=lambda r: r["ms"]) | {"provider": "ckf triton"})
        if (
            auto is not None
            and "layout" not in auto
            and best["ms"] < 0.98 * auto["ms"]
            and best not in plans
        ):
            rows.append(best | {"provider": "ckf best"})
    return rows


def _cases(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by case, under a title."""
    cases: dict[str, list[dict]] = {}
    for r in rows:
        title = f"{r['shape']}, m {r['m']}, T {r['tasks']}, r {r['rank']}\n{r['mix']}"
        title += f", dropout {r['dropout']}" if r["dropout"] else ""
        title += "" if r["adapters"] == r["dtype"] else f", {r['adapters']} adapters"
        own = cases.setdefault(title, [])
        if r["provider"] not in [known["provider"] for known in own]:
            own.append(r)
    return cases


def _curves(panels: list, axis: str, path: Path, label: str, bands: bool = False) -> bool:
    if not panels:
        return False
    figure, axes = _figure(len(panels), WIDTH, 3.8)
    for ax, (title, own) in zip(axes, panels, strict=True):
        _draw(ax, own, axis, bands)
        ax.set_title(title, loc="left")
        ax.set_xlabel(label)
    return _save(figure, path)


def _draw(ax, rows: list[dict], axis: str, bands: bool) -> None:
    """One line a provider, its name at its end; names that would touch are moved apart."""
    names = [n for n in LINES if n != "frozen" and any(r["provider"] == n for r in rows)]
    ends = []
    for name in names:
        own = {r[axis]: r for r in rows if r["provider"] == name}
        words = axis == "mix"
        keys = list(own) if words else sorted(own)
        x = list(range(len(keys))) if words else keys
        y = [own[key]["ratio"] for key in keys]
        wide = 2.4 if name == "ckf" else 1.3
        kind = "o--" if name in DERIVED else "o-"
        ax.plot(x, y, kind, color=LINES[name], lw=wide, ms=3.5, zorder=3 if name == "ckf" else 2)
        if bands:
            low, high = ([own[key][q] for key in keys] for q in ("ratio_q1", "ratio_q3"))
            ax.fill_between(x, low, high, color=LINES[name], alpha=0.12, lw=0)
        ends.append((y[-1], x[-1], name))
        if words:
            ax.set_xticks(x, keys)
    floors = {r[axis]: r["floor_ratio"] for r in rows}
    if floors:
        x, y = list(range(len(floors))) if axis == "mix" else list(floors), list(floors.values())
        x, y = zip(*sorted(zip(x, y, strict=True)), strict=True)
        ax.plot(x, y, ":", color=INK, lw=1.4)
        ends.append((y[-1], x[-1], "floor"))
    ax.axhline(1, color=NEUTRAL, lw=1)
    ax.set_yscale("log")
    if axis != "mix":
        ax.set_xscale("log", base=2)
        ticks = sorted({r[axis] for r in rows})
        ax.set_xticks(ticks, [str(t) for t in ticks], rotation=45 if len(ticks) > 6 else 0)
        ax.minorticks_off()
    top = max((y for y, _, _ in ends), default=1)
    near = (1, 1.1, 1.2, 1.5, 2, 3, 5) if top < 6 else (1, 2, 5, 10, 20, 50, 100, 200, 500)
    marks = [t for t in near if t <= top * 1.3]
    ax.set_yticks(marks, [f"{t:g}" for t in marks])
    ax.set_ylabel("time over the frozen base's")
    _label_ends(ax, ends)


def _label_ends(ax, ends: list[tuple[float, float, str]]) -> None:
    height = 11.0  # points between two names
    last = -1e9
    scale = 72 / ax.figure.dpi
    for y, x, name in sorted(ends):
        at = ax.transData.transform((x, y))[1] * scale
        place = max(at, last + height)
        last = place
        ax.annotate(
            name, (x, y), xytext=(7, place - at), textcoords="offset points", va="center",
            color=LINES.get(name, INK), fontsize=8, weight="bold" if name == "ckf" else "normal",
            annotation_clip=False,
        )  # fmt: skip


def _figure(panels: int, width: float, height: float):
    import matplotlib.pyplot as plt

    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    flat = list(axes.flat)
    for ax in flat[panels:]:
        ax.set_visible(False)
    return figure, flat[:panels]


def _save(figure, path: Path) -> bool:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    options = parser.parse_args(argv)
    try:
        made = draw_all(options.results)
    except ValueError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return 1
    for path in made:
        print(path)
    if not made:
        print(f"no records of benchmarks in {options.results}", file=sys.stderr)
    return 0 if made else 1


if __name__ == "__main__":
    sys.exit(main())
