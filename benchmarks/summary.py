"""What the records say in a few words: who wins, how cost grows, kernels and batching apart."""

from benchmarks.peers import COMPETITORS_EXCLUDED
from benchmarks.plots import crossings, with_best
from benchmarks.records import rows_of

GOAL_TASKS = (2, 64)  # the second may cost 1.2 times the first


def header(names) -> list[str]:
    return [line(*names), "| " + " | ".join("---" for _ in names) + " |"]


def line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def ratio_of(row: dict, named: bool = True) -> str:
    figure = f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
    return f"{row['provider']} {figure}" if named else figure


def best_of(rows: list[dict]) -> tuple[dict | None, dict | None]:
    """ckf as a user gets it ("auto", else the fastest backend), and the fastest peer."""
    ours = [r for r in rows if r["provider"].startswith("ckf")]
    own = next((r for r in ours if r["provider"] == "ckf"), None)
    rivals = [r for r in rows if r["peer"] and r["provider"] not in COMPETITORS_EXCLUDED]
    return (
        own or min(ours, key=lambda r: r["ms"], default=None),
        min(rivals, key=lambda r: r["ms"], default=None),
    )


def growth(record: dict) -> list[str]:
    """Bullets: T 64 against T 2, and where dense-gated products are passed."""
    from benchmarks.bench_scaling import axis_rows

    rows = with_best(record)
    tasks = axis_rows(rows, "tasks")
    lines = []
    for name in ("ckf", "ckf triton", "dense", "peft-big"):
        ms = {r["tasks"]: r for r in tasks if r["provider"] == name}
        if set(GOAL_TASKS) <= ms.keys():
            few, many = (ms[t] for t in GOAL_TASKS)
            floor = many["flops"] / few["flops"]
            if many["floor_ms"]:
                floor = many["floor_ms"] / few["floor_ms"]
            lines.append(
                f"- {name}: T 64 takes {many['ms'] / few['ms']:.2f} times as long as T 2 "
                f"(floor {floor:.2f})"
            )
    for axis in ("tasks", "rank", "m"):
        words = [f"{n} at {place:.0f}" for n, place, _ in crossings(axis_rows(rows, axis), axis)]
        if words:
            lines.append(f"- Dense-gated products are crossed along {axis}: {', '.join(words)}")
    return lines or ["- Not enough cases."]


def shares(record: dict) -> list[str]:
    """A line a model: ckf at its best against PEFT as a user runs it, and against its equals; empty
    where no layout has ckf and a peer."""
    groups: dict[tuple, dict[tuple[str, str], dict]] = {}
    for row in rows_of(record):
        if row.get("contenders") or row.get("sigma") == 0:
            continue
        key = (row["model"], row["adapters"], row["row_count"])
        groups.setdefault(key, {})[row["layout"], row["provider"]] = row
    lines = header(
        ("model", "adapters", "layout", "ckf, tokens/s", "over peft-loop padded", "of it batching")
        + ("of it kernels", "over the best peer", "of the frozen rate", "peak, of the best peer's")
    )
    for (model, adapters, _), found in groups.items():
        for layout in dict.fromkeys(layout for layout, _ in found):
            own = {p: row for (la, p), row in found.items() if la == layout}
            cells = _shares(own, found.get(("padded", "peft-loop")))
            if cells is not None:
                lines.append(line(model, adapters, layout, *cells))
    return lines if len(lines) > 2 else []


def _shares(own: dict[str, dict], as_run: dict | None) -> list[str] | None:
    ours, rival = best_of(list(own.values()))
    if ours is None or rival is None:
        return None
    rate, loop = ours["tokens_per_s"], own.get("peft-loop")
    cells = [f"{ours['provider']} {rate:.0f}"]
    if as_run is None or loop is None:
        cells += ["", "", ""]
    else:
        before, same = as_run["tokens_per_s"], loop["tokens_per_s"]
        cells += [f"{rate / before:.2f}", f"{same / before:.2f}", f"{rate / same:.2f}"]
    cells.append(f"{rate / rival['tokens_per_s']:.2f} ({rival['provider']})")
    frozen = own.get("frozen")
    cells.append("" if frozen is None else f"{rate / frozen['tokens_per_s']:.2f}")
    peaks = (ours["peak_bytes"], rival["peak_bytes"])
    cells.append(f"{peaks[0] / peaks[1]:.2f}" if all(peaks) else "")
    return cells


def speed(records: dict[str, dict], folder: str) -> str:
    """A paragraph for the front page."""
    about = next(iter(records.values()))["environment"]
    lines = [
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}; records in "
        f"[`benchmarks/results/{folder}`](benchmarks/results/{folder}). Time over the frozen "
        "base's, median [quartiles]; the floor is the least by arithmetic.",
        "",
    ]
    lines += header(("forward + backward", "floor", "ckf", "best peer", "one unrouted LoRA"))
    won = total = 0
    shown = set()
    for case in records.get("bench_linear", {"cases": []})["cases"]:
        rows = [r for r in rows_of({"cases": [case]}) if r["pass"] == "train"]
        ours, rival = best_of(rows)
        if ours is None or rival is None:
            continue
        won, total = won + (ours["ms"] < rival["ms"]), total + 1
        what = case["case"]
        title = f"{what['shape']}, {what['m']} rows, {what['tasks']} tasks, {what['mix']}"
        title += f", dropout {what['dropout']}" if what["dropout"] else ""
        if title not in shown and (len(shown) < 4 or what["shape"].startswith("layer")):
            shown.add(title)
            single = next((f"{r['ratio']:.2f}" for r in rows if r["provider"] == "single"), "")
            floor = f"{ours['floor_ratio']:.2f}"
            own = ratio_of(ours, named=ours["provider"] != "ckf")  # a backend chosen afterwards
            lines.append(line(title, floor, own, ratio_of(rival), single))
    lines += ["", f"ckf is faster than every peer in {won} of {total} such cases."]
    told_apart = shares(records["bench_step"]) if "bench_step" in records else []
    if told_apart:
        lines += ["", "A training step of a whole model:", "", *told_apart]
    return "\n".join(lines)
