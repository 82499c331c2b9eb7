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


def best_of(rows: list[dict], by: str = "ratio") -> tuple[dict | None, dict | None]:
    """ckf as a user gets it ("auto", else the fastest backend), and the fastest peer.

    by: what is compared, the less the better: the ratio to the frozen base in the same rounds, as
    pages show it, or "ms".
    """
    ours = [r for r in rows if r["provider"].startswith("ckf")]
    own = next((r for r in ours if r["provider"] == "ckf"), None)
    return (
        own or min(ours, key=lambda r: r[by], default=None),
        min(peers_of(rows), key=lambda r: r[by], default=None),
    )


def peers_of(rows: list[dict]) -> list[dict]:
    """The rows of peers that route tasks as ckf does."""
    rivals = [r for r in rows if r["provider"] not in COMPETITORS_EXCLUDED]
    # records of whole decoders do not say which are
    return [r for r in rivals if r.get("peer", not r["provider"].startswith("ckf"))]


def growth(record: dict) -> list[str]:
    """Bullets: T 64 against T 2, each over its own frozen base, and where dense-gated products are
    passed."""
    from benchmarks.bench_scaling import axis_rows

    rows = with_best(record)
    tasks = axis_rows(rows, "tasks")
    lines = []
    for name in ("ckf", "ckf triton", "dense", "peft-big"):
        found = {r["tasks"]: r for r in tasks if r["provider"] == name}
        if set(GOAL_TASKS) <= found.keys():
            few, many = (found[t] for t in GOAL_TASKS)
            floor = many["flops"] / few["flops"]
            if many["floor_ms"]:
                floor = many["floor_ms"] / few["floor_ms"]
            lines.append(
                f"- {name}: T 64 takes {many['ratio'] / few['ratio']:.2f} times as long as T 2 "
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
    ours, rival = best_of(list(own.values()), by="ms")
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
    table, won, total, peers = _training_cases(records.get("bench_linear", {"cases": []}))
    lines += table
    lines += [
        "",
        f"ckf is faster than {_named(peers)} in {won} of {total} such cases.",
    ]
    if "bench_linear" in records:
        picture = f"benchmarks/results/{folder}/plots/linear_peers.png"
        title = "Four cases, every provider: time over the frozen linears'"
        lines += ["", f'<img src="{picture}" width="720" alt="{title}">']
    if "bench_scaling" in records:
        lines += ["", *growth(records["bench_scaling"])[:1]]
    lines += decoded(records.get("bench_decode_model", {"cases": []}))
    told_apart = shares(records["bench_step"]) if "bench_step" in records else []
    if told_apart:
        lines += ["", "A training step of a whole model (" + SHARES_NOTE + "):", "", *told_apart]
    return "\n".join(lines)


SHARES_NOTE = (
    "over PEFT's loop on padded rows: what the layout of the rows gains it, batching, times what "
    "ckf gains over it in that layout, kernels; peak memory beside the best peer's"
)


def _training_cases(record: dict) -> tuple[list[str], int, int, set[str]]:
    """A table of the first cases that train, in how many ckf is ahead of how many, and of whom."""
    found, shown, won, total, peers = [], set(), 0, 0, set()
    for case in record["cases"]:
        rows = [r for r in rows_of({"cases": [case]}) if r["pass"] == "train"]
        ours, rival = best_of(rows)
        if ours is None or rival is None:
            continue
        won, total = won + (ours["ratio"] < rival["ratio"]), total + 1
        peers |= {r["provider"] for r in peers_of(rows)}
        what = case["case"]
        title = f"{what['shape']}, {what['m']} rows, {what['tasks']} tasks, {what['mix']}"
        title += f", dropout {what['dropout']}" if what["dropout"] else ""
        if title not in shown and (len(shown) < 4 or what["shape"].startswith("layer")):
            shown.add(title)
            single = next((f"{r['ratio']:.2f}" for r in rows if r["provider"] == "single"), "")
            floor = f"{ours['floor_ratio']:.2f}"
            own = ratio_of(ours, named=ours["provider"] != "ckf")  # a backend chosen afterwards
            found.append((title, floor, own, ratio_of(rival), single))
    head = ["forward + backward", "floor", "ckf", "best peer", "one unrouted LoRA"]
    if not any(cells[-1] for cells in found):
        head, found = head[:-1], [cells[:-1] for cells in found]
    return header(head) + [line(*cells) for cells in found], won, total, peers


def decoded(record: dict) -> list[str]:
    """Bullets: a token a row through a whole decoder, beside the best peer."""
    said: dict[str, list[str]] = {}
    for case in record["cases"]:
        ours, rival = best_of(case["rows"])
        if ours is not None and rival is not None:
            count = f"{case['case']['m']} row{'s' * (case['case']['m'] > 1)}"
            own = f"{ours['ratio']:.2f} in {count} ({rival['provider']} {rival['ratio']:.2f})"
            said.setdefault(case["case"]["model"], []).append(own)
    return [
        f"- a token a row through a whole decoder ({model}): {', '.join(figures)}"
        for model, figures in said.items()
    ]


def _named(peers: set[str]) -> str:
    """The peers that were run: by name where they are few."""
    if len(peers) < 4:
        return f"every peer that was run ({', '.join(sorted(peers))})"
    return f"every one of the {len(peers)} peers"
