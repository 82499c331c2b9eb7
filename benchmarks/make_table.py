"""From measured linears to the table by which ``backend="auto"`` chooses on a GPU.

``python benchmarks/make_table.py --results FOLDER [--out FILE] [--table FILE] [--decode FILE ...]``

Reads bench_linear.json, and bench_scaling.json and bench_decode.json where they are of the same
sources; writes
ckf/kernels/tables/<gpu>.json. Only single linears count, rows of one task next to each other where
it matters. Of several measurements of one shape the first is taken: linear, scaling, decode.
--decode: CSVs (decode_variants.csv, decode_plans.csv) of csrc's decode kernels measured apart
since, the latest last; ms in rows of the "token" mix stand for the records' figures of what they
are "taken" as: "cuda" ("yes" says the same) or "cuda:linear". --table: rows of a table instead of
the records'.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.records import load_record, rows_of  # noqa: E402
from ckf.kernels.dispatch import ROW_KEY, device_slug, table_row  # noqa: E402

SOURCES = ("bench_linear", "bench_scaling", "bench_decode")


def table_rows(records: list[dict]) -> list[dict]:
    """One row a shape: milliseconds of each backend, the best Triton plan and its name.

    Float32 adapters, the default, go before bfloat16 ones; the balanced mix before others.
    """
    found: dict[tuple, dict] = {}
    for record in records:
        cases: dict[str, list[dict]] = {}
        for row in rows_of(record):
            if row["k"] is not None and row["dtype"] == "bfloat16":
                case = json.dumps([row[c] for c in (*ROW_KEY, "mix", "adapters", "providers")])
                cases.setdefault(case, []).append(row)
        order = sorted(
            cases.values(),
            key=lambda rows: (rows[0]["adapters"] != "float32", rows[0]["mix"] != "balanced"),
        )
        for rows in order:
            made = _table_row(rows)
            if made is not None:
                found.setdefault(tuple(made[name] for name in ROW_KEY), made)
    return sorted(found.values(), key=lambda row: tuple(row[name] for name in ROW_KEY))


def _table_row(rows: list[dict]) -> dict | None:
    """None where ckf's backends were not measured."""
    ms = {row["provider"]: row["ms"] for row in rows}
    times = {name.removeprefix("ckf-"): t for name, t in ms.items() if name.startswith("ckf-")}
    case = rows[0]
    return table_row(case | {"rank": case["R"], "dropout": case["dropout"] > 0}, times)


def make_table(records: list[dict]) -> dict:
    """The table of the GPU that the first record names."""
    about = records[0]["environment"]
    devices = {record["environment"]["device"] for record in records}
    if len(devices) > 1:
        raise ValueError(f"records of {', '.join(sorted(devices))}; expected one GPU")
    rows = table_rows(records)
    if not rows:
        raise ValueError(
            f"no bfloat16 linear of ckf in the records of {about['device']}; run "
            "python benchmarks/bench_linear.py --device cuda --out FOLDER"
        )
    source = {name: about[name] for name in ("commit", "time", "torch", "triton")}
    return {"gpu": about["device"], "record": source, "rows": rows}


def of_one_code(records: list[dict]) -> list[dict]:
    """The first and those of its sources: what other code took must not decide."""
    first, kept = records[0]["environment"], []
    for record in records:
        about = record["environment"]
        if about["sources"] == first["sources"]:
            kept.append(record)
        else:
            print(f"left out: a record of {about['time']}, commit {about['commit']}, other sources")
    return kept


def with_decode(rows: list[dict], file: Path) -> list[dict]:
    """The forward rows with other milliseconds of the decode kernels."""
    with open(file, newline="", encoding="utf-8") as opened:
        taken = [r for r in csv.DictReader(opened) if r["taken"] and r["mix"] == "token"]
    sizes, found = ("m", "k", "n", "rank"), {}
    for r in taken:
        name = "cuda" if r["taken"] == "yes" else r["taken"]
        found.setdefault(tuple(int(r[s]) for s in sizes), {})[name] = float(r["ms"])
    return [
        row | found.get(tuple(row[s] for s in sizes), {}) if row["pass"] == "forward" else row
        for row in rows
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the records")
    parser.add_argument("--out", type=Path, help="default: ckf/kernels/tables/<gpu>.json")
    what = "CSVs of the decode kernels, measured apart"
    parser.add_argument("--decode", type=Path, nargs="+", default=[], help=what)
    parser.add_argument("--table", type=Path, help="begin with its rows instead of the records'")
    options = parser.parse_args(argv)
    paths = [options.results / f"{name}.json" for name in SOURCES]
    try:
        if options.table is not None:
            table = json.loads(options.table.read_text(encoding="utf-8"))
        else:
            records = [load_record(p) for p in paths if p.exists() or p is paths[0]]
            table = make_table(of_one_code(records))
        for file in options.decode:
            table["rows"] = with_decode(table["rows"], file)
    except (OSError, ValueError, KeyError) as error:
        print(f"no table: {error}", file=sys.stderr)
        return 1
    out = options.out or ROOT / "ckf" / "kernels" / "tables" / f"{device_slug(table['gpu'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    head = json.dumps({"gpu": table["gpu"], "record": table["record"]}, indent=1)[:-2]
    out.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    print(f"{len(table['rows'])} shapes in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
