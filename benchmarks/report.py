"""Rewrites the marked blocks of benchmarks/README.md from records: no figure is typed by hand.

``python benchmarks/report.py --results benchmarks/results/cpu [--readme FILE]`` draws the plots,
then fills the block between ``<!-- begin cpu -->`` and ``<!-- end cpu -->`` (the folder's name); a
folder without a block gets one at the end.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import COMPETITORS_EXCLUDED  # noqa: E402
from benchmarks.plots import draw_all  # noqa: E402
from benchmarks.records import load_record, rows_of  # noqa: E402

CAPTIONS = {
    "linear_peers": "Every provider on four cases; lines on the bars are quartiles.",
    "linear_rows": "Ratio to the frozen linear over the number of rows.",
    "scaling": "One axis at a time; where lines cross, another choice is best.",
    "roofline": "Share of the analytic floor that is reached.",
    "decode_model": "A whole decoder, one token a row.",
    "step": "A training step, by layout of the rows.",
}
SOURCES = ("bench_linear", "bench_scaling", "bench_decode", "bench_decode_model", "bench_step")


def block(results: Path, readme: Path) -> str:
    """The text between the marks of a results folder."""
    records = {}
    for name in SOURCES:
        path = results / f"{name}.json"
        if path.exists():
            records[name] = load_record(path)
    if not records:
        raise ValueError(f"no records in {results}; run the benchmarks with --out {results}")
    pictures = draw_all(results)
    about = next(iter(records.values()))["environment"]
    commits = sorted({str(r["environment"]["commit"])[:9] for r in records.values()})
    lines = [
        f"### {about['device']}",
        "",
        f"torch {about['torch']}, transformers {about['transformers']}, peft {about['peft']}, "
        f"{about['threads']} threads; commit {', '.join(commits)}; {about['time'][:10]}.",
        "",
    ]
    if "bench_linear" in records:
        lines += ["**Linears**, " + _LINEAR_NOTE, "", *linear_table(records["bench_linear"]), ""]
    if "bench_scaling" in records:
        lines += ["**Where it loses**, " + _LOSES_NOTE, "", *losses(records["bench_scaling"]), ""]
    if "bench_decode" in records:
        lines += ["**Decoding, linears**, forward:", ""]
        lines += [*linear_table(records["bench_decode"]), ""]
    if "bench_decode_model" in records:
        lines += ["**Decoding, whole model**, one token a row:", ""]
        lines += [*decode_table(records["bench_decode_model"]), ""]
    if "bench_step" in records:
        lines += ["**Training step**, " + _STEP_NOTE, "", *step_table(records["bench_step"]), ""]
    for picture in pictures:
        link = os.path.relpath(picture, readme.parent)
        lines += [f"![{CAPTIONS[picture.stem]}]({link})", f"*{CAPTIONS[picture.stem]}*", ""]
    lines += skipped(records)
    return "\n".join(lines).rstrip()


_LINEAR_NOTE = (
    "time over the frozen linear's, median [quartiles]. Floor: the least work by arithmetic. "
    "Saved: what ckf keeps for backward, beside what the best peer keeps."
)
_LOSES_NOTE = "every case of the scaling record in which a peer is at least as fast as ckf."
_STEP_NOTE = (
    "loss and backward; tokens are real ones, padding does not count. Ratio: to the frozen model "
    "in the same layout. AdamW: milliseconds with the optimizer."
)


def linear_table(record: dict) -> list[str]:
    sizes = ("case", "m", "T", "r", "rows", "adapters")
    lines = _header((*sizes, "floor", "ckf", "best peer", "one LoRA", "saved"))
    for case in record["cases"]:
        rows = rows_of({"cases": [case]})
        ours, rival = best_of(rows)
        if ours is None:
            continue
        what = case["case"]
        single = next((r for r in rows if r["provider"] == "single"), None)
        shape = what["shape"] + (f", dropout {what['dropout']}" if what["dropout"] else "")
        lines.append(
            _line(
                shape,
                what["m"],
                what["tasks"],
                what["rank"],
                what["mix"],
                what["adapters"],
                f"{ours['floor_ratio']:.2f}",
                _ratio(ours),
                "" if rival is None else _ratio(rival),
                "" if single is None else f"{single['ratio']:.2f}",
                _saved(ours, rival),
            )
        )
    return lines


def best_of(rows: list[dict]) -> tuple[dict | None, dict | None]:
    """ckf as a user gets it ("auto", else the fastest backend), and the fastest peer."""
    ours = [r for r in rows if r["provider"].startswith("ckf")]
    own = next((r for r in ours if r["provider"] == "ckf"), None)
    rivals = [r for r in rows if r["peer"] and r["provider"] not in COMPETITORS_EXCLUDED]
    return (
        own or min(ours, key=lambda r: r["ms"], default=None),
        min(rivals, key=lambda r: r["ms"], default=None),
    )


def losses(record: dict) -> list[str]:
    lines = _header(("case", "m", "T", "r", "rows", "ckf", "peers as fast or faster"))
    for case in record["cases"]:
        rows = rows_of({"cases": [case]})
        ours, _ = best_of(rows)
        if ours is None:
            continue
        faster = [
            f"{r['provider']} {r['ratio']:.2f}"
            for r in sorted(rows, key=lambda r: r["ms"])
            if r["peer"] and r["provider"] not in COMPETITORS_EXCLUDED and r["ms"] <= ours["ms"]
        ]
        if faster:
            what = case["case"]
            sizes = (what["m"], what["tasks"], what["rank"], what["mix"])
            lines.append(_line(what["shape"], *sizes, _ratio(ours), ", ".join(faster)))
    return lines if len(lines) > 2 else [f"None of {len(record['cases'])} cases."]


def decode_table(record: dict) -> list[str]:
    names = list(dict.fromkeys(r["provider"] for r in rows_of(record)))
    lines = _header(("model", "m", "frozen, ms", *(n for n in names if n != "frozen")))
    for case in record["cases"]:
        found = {r["provider"]: r for r in case["rows"]}
        cells = [_cell(found.get(n)) for n in names if n != "frozen"]
        frozen = f"{found['frozen']['ms']:.2f}"
        lines.append(_line(case["case"]["model"], case["case"]["m"], frozen, *cells))
    return lines


def _cell(row: dict | None) -> str:
    if row is None:
        return "not run"
    return f"{row['ratio']:.2f}" + ("" if row["timed_by"] != "events" else " (no graph)")


def step_table(record: dict) -> list[str]:
    figures = ("tokens/s", "ratio", "with AdamW, ms", "peak, GiB")
    lines = _header(("model", "adapters", "layout", "provider", *figures))
    for case in record["cases"]:
        what = case["case"]
        for r in sorted(case["rows"], key=lambda r: (r["layout"], r["ms"])):
            peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.2f}"
            name = f"**{r['provider']}**" if r["provider"].startswith("ckf") else r["provider"]
            ratio = _ratio(r, named=False) if "ratio" in r else ""
            speed, whole = f"{r['tokens_per_s']:.0f}", f"{r['ms_with_adamw']:.0f}"
            layout = r["layout"] + (", equal lengths" if what.get("sigma") == 0 else "")
            head = (what["model"], what["adapters"], layout)
            lines.append(_line(*head, name, speed, ratio, whole, peak))
    return lines


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


def _ratio(row: dict, named: bool = True) -> str:
    figure = f"{row['ratio']:.2f} [{row['ratio_q1']:.2f}, {row['ratio_q3']:.2f}]"
    return f"{row['provider']} {figure}" if named else figure


def _saved(ours: dict, rival: dict | None) -> str:
    if "saved_bytes" not in ours:
        return ""
    own = f"{ours['saved_bytes'] / 2**20:.1f} MiB"
    return own if rival is None else f"{own} / {rival['saved_bytes'] / 2**20:.1f} MiB"


def _header(names) -> list[str]:
    return [_line(*names), "| " + " | ".join("---" for _ in names) + " |"]


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def rewrite(readme: Path, name: str, text: str) -> None:
    """Put the text between the marks of ``name``; new marks go to the end of the file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = readme.read_text(encoding="utf-8")
    if begin not in page:
        page = page.rstrip() + f"\n\n{begin}\n{end}\n"
    head, rest = page.split(begin, 1)
    if end not in rest:
        raise ValueError(f"{readme} has {begin} but no {end} after it; put it back")
    _, tail = rest.split(end, 1)
    readme.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    parser.add_argument("--readme", type=Path, default=ROOT / "benchmarks" / "README.md")
    options = parser.parse_args(argv)
    results, readme = options.results.resolve(), options.readme.resolve()
    try:
        rewrite(readme, results.name, block(results, readme))
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print(f"{readme}: block {results.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
