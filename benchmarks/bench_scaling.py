"""How does the cost grow with tasks, rank, rows and the mix of tasks, and where do peers cross?

``python benchmarks/bench_scaling.py [--device cpu|cuda] [--out FOLDER] [--quick] [--goals]
[--fresh] [--peers NAME ...]``

Forward + backward of one linear (4096 x 4096 on a GPU, 576 x 1536 on a CPU), one axis at a time
from T 4, r 16, balanced sequences. Same clock and same checks as ``bench_linear.py``.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import arguments  # noqa: E402
from benchmarks.measure import run_cases  # noqa: E402
from benchmarks.problems import MIXES, Case  # noqa: E402

PROVIDERS = ["single", "dense", "grouped", "bmm", "peft-big", "peft-loop-by-hand", "ckf*"]
QUICK = ["dense", "grouped", "ckf*"]  # on a GPU, of the two cases whose ratio is a goal
AXES = {
    "cpu": {
        "tasks": (1, 2, 4, 8, 16, 32, 64, 128, 256),
        "rank": (8, 32, 64),
        "m": (64, 256, 1024),
        "mix": ("sorted", "skewed", "token"),
    },
    "cuda": {  # the most telling first
        "tasks": (2, 64, 16, 256, 8, 32, 1, 128, 4),
        "rank": (64, 8, 32, 128),
        "m": (256, 1024, 2048, 32768),
        "mix": ("sorted", "skewed", "token"),
    },
}


def start(device: str) -> Case:
    """Where all axes meet."""
    if device == "cuda":
        return Case("train", 8192, ((4096, (4096,)),), dtype="bfloat16")
    return Case("train", 2048, ((576, (1536,)),))


def cases(device: str, quick: bool) -> list[tuple[Case, list[str]]]:
    if quick and device == "cuda":
        return [(replace(start(device), tasks=t), QUICK) for t in (2, 64)]
    if quick:
        small = Case("train", 128, ((32, (48,)),), rank=8)
        ends = [replace(small, tasks=t) for t in (2, 8)] + [replace(small, mix="token")]
        return [(case, PROVIDERS) for case in ends]
    base = start(device)
    found = [base]
    for axis, values in AXES[device].items():
        found += [replace(base, **{axis: value}) for value in values]
    return [(case, PROVIDERS) for case in dict.fromkeys(found)]


def axis_rows(rows: list[dict], axis: str) -> list[dict]:
    """The rows of a record that vary in one axis alone, sorted along it."""
    base = start("cuda" if any(r["dtype"] == "bfloat16" for r in rows) else "cpu").columns()
    others = [a for a in ("tasks", "rank", "m", "mix") if a != axis]
    own = [r for r in rows if all(r[a] == base[a] for a in others)]
    return sorted(own, key=lambda r: MIXES.index(r[axis]) if axis == "mix" else r[axis])


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "three small cases; on a GPU T 2 and T 64", "T 2 and T 64")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these; NAME* for all such")
    options = parser.parse_args(argv)
    few = options.quick or options.goals
    return run_cases("bench_scaling", cases(options.device, few), options)


if __name__ == "__main__":
    sys.exit(main())
