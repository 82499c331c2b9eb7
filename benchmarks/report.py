"""Rewrites the marked blocks of two pages from records: no figure is typed by hand.

``python benchmarks/report.py --results benchmarks/results/cpu [--readme FILE] [--front FILE]``
draws the plots, then fills the block between ``<!-- begin cpu -->`` and ``<!-- end cpu -->`` (the
folder's name) of benchmarks/README.md; a folder without a block gets one at the end. The block
``speed-cpu`` of README.md gets the summary, if the page has one.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.plots import PICTURES, draw_all  # noqa: E402
from benchmarks.records import load_record, rows_of  # noqa: E402
from benchmarks.summary import (  # noqa: E402
    SHARES_NOTE,
    best_of,
    growth,
    header,
    line,
    peers_of,
    ratio_of,
    shares,
    speed,
)

CAPTIONS = {
    "linear_peers": "Every provider on four cases; lines on the bars are quartiles.",
    "linear_rows": "Ratio to the frozen linear over the number of rows.",
    "scaling": "One axis at a time; rings: where another way passes the dense-gated products.",
    "roofline": "Share of the analytic floor that is reached.",
    "decode_model": "A whole decoder, one token a row.",
    "step": "A training step, by layout of the rows.",
    "training": "A training step of a small model: the wall, and what the GPU works of it.",
}
LINEARS = ("bench_linear", "bench_scaling", "bench_decode")
SOURCES = (*LINEARS, "bench_decode_model", "bench_step", "bench_training")


def load_records(results: Path) -> dict[str, dict]:
    """Those of a folder by name; ValueError where there is none, or one of another format."""
    paths = {name: results / f"{name}.json" for name in SOURCES}
    records = {name: load_record(path) for name, path in paths.items() if path.exists()}
    if not records:
        raise ValueError(f"no records in {results}; run the benchmarks with --out {results}")
    return records


def block(records: dict[str, dict], results: Path, readme: Path) -> str:
    """The text between the marks of a results folder whose pictures are drawn."""
    about = next(iter(records.values()))["environment"]
    commits = sorted({_commit(r["environment"]) for r in records.values()})
    lines = [
        f"### {about['device']}",
        "",
        f"torch {about['torch']}, transformers {about['transformers']}, peft {about['peft']}, "
        f"{about['threads']} threads; commit {', '.join(commits)}; {about['time'][:10]}.",
        "",
    ]
    if "bench_linear" in records:
        lines += ["**Linears**, " + _LINEAR_NOTE, "", *linear_table(records["bench_linear"]), ""]
    linears = [records[name] for name in LINEARS if name in records]
    if linears:
        lines += ["**Where it loses**, " + _LOSES_NOTE, "", *losses(linears), ""]
    if "bench_scaling" in records:
        lines += ["**Growth** in the scaling record:", "", *growth(records["bench_scaling"]), ""]
    if "bench_decode" in records:
        lines += ["**Decoding, linears**, forward:", ""]
        lines += [*linear_table(records["bench_decode"]), ""]
    if "bench_decode_model" in records:
        lines += ["**Decoding, whole model**, one token a row:", ""]
        lines += [*decode_table(records["bench_decode_model"]), ""]
    if "bench_step" in records:
        lines += ["**Training step**, " + _STEP_NOTE, "", *step_table(records["bench_step"]), ""]
        told_apart = shares(records["bench_step"])
        if told_apart:
            lines += ["**Kernels and batching told apart**, without AdamW (" + SHARES_NOTE + "):"]
            lines += ["", *told_apart, ""]
    if "bench_training" in records:
        lines += ["**What a small model's training step waits for**, " + _TRAINING_NOTE, ""]
        lines += [*training_table(records["bench_training"]), ""]
    for picture in (results / "plots" / f"{name}.png" for name in PICTURES):
        if not picture.exists():
            continue
        link = os.path.relpath(picture, readme.parent)
        lines += [f"![{CAPTIONS[picture.stem]}]({link})", f"*{CAPTIONS[picture.stem]}*", ""]
    lines += skipped(records)
    return "\n".join(lines).rstrip()


def _commit(about: dict) -> str:
    name = str(about["commit"])[:9]
    return f"{name} with uncommitted changes" if about.get("uncommitted") else name


_LINEAR_NOTE = (
    "time over the frozen linear's, median [quartiles]. Floor: the least work by arithmetic. "
    "Saved: what ckf keeps for backward, beside what the best peer keeps."
)
_LOSES_NOTE = (
    "every case of a linear, a group or a layer, of the records of this block, in which a peer is "
    "at least as fast as ckf."
)
_STEP_NOTE = (
    "loss and backward; tokens are real ones, padding does not count. Ratio: to the frozen model "
    "in the same layout. AdamW: milliseconds with the optimizer. Peak: above weights, adapters "
    "and moments."
)


_TRAINING_NOTE = (
    "loss at the labels, backward and AdamW. Host: until Python has launched it; GPU: its kernels "
    "alone; off by: gradients beside those of plain ckf, over their norm."
)


def linear_table(record: dict) -> list[str]:
    sizes = ("case", "rows", "T", "r", "mix", "adapters")
    lines = header((*sizes, "floor", "ckf", "best peer", "one LoRA", "saved"))
    for case in record["cases"]:
        rows = rows_of({"cases": [case]})
        ours, rival = best_of(rows)
        if ours is None:
            continue
        what = case["case"]
        single = next((r for r in rows if r["provider"] == "single"), None)
        shape = what["shape"] + (f", dropout {what['dropout']}" if what["dropout"] else "")
        lines.append(
            line(
                shape,
                what["m"],
                what["tasks"],
                what["rank"],
                what["mix"],
                what["adapters"],
                f"{ours['floor_ratio']:.2f}",
                ratio_of(ours),
                "" if rival is None else ratio_of(rival),
                "" if single is None else f"{single['ratio']:.2f}",
                _saved(ours, rival),
            )
        )
    return lines


def losses(records: Sequence[dict]) -> list[str]:
    head = ("case", "pass", "rows", "T", "r", "mix", "floor", "ckf", "peers as fast or faster")
    lines, count = [], 0
    for case in (case for record in records for case in record["cases"]):
        rows = rows_of({"cases": [case]})
        ours, _ = best_of(rows)
        if ours is None:
            continue
        count += 1
        faster = [
            f"{r['provider']} {r['ratio']:.2f}"
            for r in sorted(peers_of(rows), key=lambda r: r["ratio"])
            if r["ratio"] <= ours["ratio"]
        ]
        if faster:
            what = case["case"]
            sizes = (what["pass"], what["m"], what["tasks"], what["rank"], what["mix"])
            figures = (f"{ours['floor_ratio']:.2f}", ratio_of(ours), ", ".join(faster))
            found = line(what["shape"], *sizes, *figures)
            if found not in lines:  # a case of two records
                lines.append(found)
    return [*header(head), *lines] if lines else [f"None of {count} cases."]


def decode_table(record: dict) -> list[str]:
    names = list(dict.fromkeys(r["provider"] for r in rows_of(record)))
    lines = header(("model", "rows", "frozen, ms", "floor", *(n for n in names if n != "frozen")))
    for case in record["cases"]:
        found = {r["provider"]: r for r in case["rows"]}
        if "frozen" not in found:
            continue
        cells = [_cell(found.get(n)) for n in names if n != "frozen"]
        frozen = f"{found['frozen']['ms']:.2f}"
        floor = f"{found['frozen']['floor_ratio']:.2f}"
        lines.append(line(case["case"]["model"], case["case"]["m"], frozen, floor, *cells))
    return lines


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    return f"{row['ratio']:.2f}" + ("" if row["timed_by"] != "events" else " (no graph)")


def step_table(record: dict) -> list[str]:
    figures = ("tokens/s", "floor", "ratio", "with AdamW, ms", "peak, GiB")
    lines = header(("model", "adapters", "layout", "provider", *figures))
    for case in record["cases"]:
        what = case["case"]
        for r in sorted(case["rows"], key=lambda r: (r["layout"], r["ms"])):
            peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
            name = f"**{r['provider']}**" if r["provider"].startswith("ckf") else r["provider"]
            ratio = ratio_of(r, named=False) if "ratio" in r else ""
            tokens, whole = f"{r['tokens_per_s']:.0f}", f"{r['ms_with_adamw']:.0f}"
            layout = r["layout"] + (", equal lengths" if what.get("sigma") == 0 else "")
            head = (what["model"], what["adapters"], layout)
            floor = "1.00" if r["provider"] == "frozen" else f"{r['floor_ratio']:.2f}"
            lines.append(line(*head, name, tokens, floor, ratio, whole, peak))
    return lines


def training_table(record: dict) -> list[str]:
    figures = ("wall, ms", "host, ms", "GPU, ms", "tokens/s", "off by", "memory, GiB")
    lines = header(("model", "rows", "variant", *figures))
    for case in record["cases"]:
        what = case["case"]
        for r in case["rows"]:
            name = f"**{r['provider']}**" if r["provider"].startswith("ckf") else r["provider"]
            times = (f"{r['ms']:.1f}", f"{r['host_ms']:.1f}", _known(r["gpu_ms"], ".1f"))
            off = "" if r["provider"] == "ckf" else _known(r.get("difference"), ".1e")
            memory = "" if r["reserved_bytes"] is None else f"{r['reserved_bytes'] / 2**30:.1f}"
            figures = (*times, f"{r['tokens_per_second']:,}", off, memory)
            lines.append(line(what["model"], what["row_count"], name, *figures))
    return lines


def _known(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)


def skipped(records: dict[str, dict]) -> list[str]:
    """Who was not run, with the first reason given."""
    reasons: dict[str, str] = {}
    for record in records.values():
        for case in record["cases"]:
            for name, why in case["skipped"].items():
                if why != "forward only":
                    reasons.setdefault(name, why)
    if not reasons:
        return []
    lines = ["<details><summary>Not run, or not in every case</summary>", ""]
    lines += [f"- {name}: {' '.join(why.split())}" for name, why in sorted(reasons.items())]
    return [*lines, "", "</details>"]


def _saved(ours: dict, rival: dict | None) -> str:
    if "saved_bytes" not in ours:
        return ""
    own = f"{ours['saved_bytes'] / 2**20:.1f} MiB"
    return own if rival is None else f"{own} / {rival['saved_bytes'] / 2**20:.1f} MiB"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def rewrite(readme: Path, name: str, text: str, append: bool = True) -> bool:
    """Put the text between the marks of ``name``; new marks go to the end of the file, if at all.

    False where there is no place for it.
    """
    begin, end = marks(name)
    page = readme.read_text(encoding="utf-8")
    if begin not in page:
        if not append:
            return False
        page = page.rstrip() + f"\n\n{begin}\n{end}\n"
    head, rest = page.split(begin, 1)
    if end not in rest:
        raise ValueError(f"{readme} has {begin} but no {end} after it; put it back")
    _, tail = rest.split(end, 1)
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    parser.add_argument("--front", type=Path, help="page for the summary; default: README.md")
    options = parser.parse_args(argv)
    results, readme = options.results.resolve(), options.readme.resolve()
    front = options.front or readme.parents[1] / "README.md"
    name = f"speed-{results.name}"
    try:
        records = load_records(results)
        draw_all(results)
        rewrite(readme, results.name, block(records, results, readme))
        print(f"{readme}: block {results.name}")
        if front.exists() and rewrite(front, name, speed(records, results.name), append=False):
            print(f"{front}: block {name}")
        else:
            print(f"{front} has no {' '.join(marks(name))}: put both where the summary belongs")
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
