"""What does Multi-LoRA cost over the frozen linear: by each backend of ckf, and by each peer?

``python benchmarks/bench_linear.py [--device cpu|cuda] [--out FOLDER] [--quick] [--fresh]
[--goals] [--sweep default|full] [--peers NAME ...]``

Forward + backward of single linears, of groups that share x and of all linears of a layer. The
clock sees routing that has to be done a layer; what a step does once for all layers (masks, sorted
order, offsets) is timed apart, as ``routing_ms``. Random data, B not zero. Rows are checked against
float64 first.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import arguments  # noqa: E402
from benchmarks.measure import run_cases  # noqa: E402
from benchmarks.problems import LAYER_8B, LAYER_135M, Case  # noqa: E402

# Past the first rows: the rivals that can win, the ceiling, and ckf.
SHORT = ["single", "dense", "grouped", "bmm", "peft-big", "ckf*"]
OURS = ["dense", "ckf*"]
COMPILED = [
    *("single", "peft-big", "peft-big-compiled", "peft-masks", "peft-masks-compiled"),
    *("peft-loop-by-hand", "peft-loop-compiled", "ckf*"),
]
GOALS = [*SHORT, "peft-masks", "peft-loop-by-hand"]
GPU_SHAPES = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096), (576, 1536))


def linear(m: int, k: int, n: int, **options) -> Case:
    return Case("train", m, ((k, (n,)),), **options)


def cpu_cases() -> list:
    """float32; shapes of a 135M model."""
    return [
        linear(2048, 576, 1536, mix="sorted"),
        linear(2048, 576, 1536, mix="balanced"),
        linear(2048, 576, 1536, mix="token"),
        (linear(2048, 576, 1536, mix="skewed"), SHORT),
        (linear(2048, 1536, 576), SHORT),
        (linear(2048, 576, 576), SHORT),
        (linear(512, 576, 1536, rank=8), SHORT),
        (linear(2048, 576, 1536, dropout=0.1), [*SHORT, "peft-masks"]),
        (linear(2048, 576, 1536, tasks=16), SHORT),
        (linear(2048, 576, 1536), COMPILED),
        Case("train", 1024, LAYER_135M),
    ]


def goal_cases() -> list:
    """What is measured first on a GPU; then a few rows forward, for the table of "auto"."""
    half = {"dtype": "bfloat16", "adapters": "float32"}
    both = {"dtype": "bfloat16", "adapters": "bfloat16"}
    goals: list = [
        (linear(m, 4096, n, dropout=dropout, **half), GOALS)
        for m in (8192, 2048)
        for dropout in (0.0, 0.1)
        for n in (4096, 14336)
    ]
    few = [Case("forward", m, ((4096, (4096,)),), mix="token", **both) for m in (1, 4, 16, 64, 256)]
    return goals + [(case, OURS) for case in few]


def square_goals() -> list:
    """Those of 4096-4096 without dropout, which have a figure to reach."""
    trained = [entry for entry in goal_cases() if entry[0].step == "train"]
    return [(c, names) for c, names in trained if c.groups == ((4096, (4096,)),) and not c.dropout]


def gpu_cases() -> list:
    """bfloat16; float32 adapters unless the case says otherwise. bench_scaling.py has the axes."""
    half = {"dtype": "bfloat16", "adapters": "float32"}
    both = {"dtype": "bfloat16", "adapters": "bfloat16"}
    cases = [
        *goal_cases(),
        (Case("train", 8192, LAYER_8B, **half), SHORT),
        (Case("train", 8192, LAYER_8B[:1], **half), SHORT),
        linear(8192, 4096, 4096, **half),
        linear(8192, 4096, 4096, **both),
    ]
    others = [(k, n) for k, n in GPU_SHAPES if (k, n) not in ((4096, 4096), (4096, 14336))]
    cases += [(linear(8192, k, n, **half), SHORT) for k, n in others]
    cases += [
        (linear(8192, 4096, 4096, tasks=16, rank=64, **half), SHORT),
        (linear(8192, 4096, 14336, tasks=16, rank=64, **half), SHORT),
    ]
    cases += [(linear(2048, k, n, **half), OURS) for k, n in others]
    forward = [replace(linear(m, 4096, 4096, **half), step="forward") for m in (2048, 8192)]
    cases += [(case, [*OURS, "vllm", "sglang"]) for case in forward]
    return [
        *cases,
        (Case("train", 8192, LAYER_8B, **both), SHORT),
        Case("train", 8192, LAYER_8B, **half),
        (linear(8192, 4096, 4096, **half), COMPILED),
        (linear(8192, 4096, 4096, **both), COMPILED),
    ]


def full_cases(device: str) -> list:
    """Every T, mix, rank, m and shape of the rule book against the first case, one at a time."""
    gpu = device == "cuda"
    options = {"dtype": "bfloat16"} if gpu else {}
    shapes = GPU_SHAPES if gpu else ((576, 1536), (1536, 576), (576, 576))
    rows = (1, 4, 16, 64, 256, 2048, 8192, 32768) if gpu else (1, 16, 256, 2048, 8192)
    cases: list = cpu_cases() if not gpu else gpu_cases()
    for adapters in ("float32", "bfloat16") if gpu else ("float32",):
        kind = options | {"adapters": adapters}
        for k, n in shapes:
            m = 8192 if gpu else 2048
            for tasks in (1, 2, 4, 8, 16, 32):
                cases += [linear(m, k, n, tasks=tasks, **kind)]
            for rank in (8, 32, 64):
                cases += [linear(m, k, n, rank=rank, **kind)]
            for mix in ("sorted", "skewed", "token"):
                cases += [linear(m, k, n, mix=mix, **kind)]
            cases += [linear(m, k, n, dropout=0.1, **kind)]
            cases += [linear(m, k, n, **kind) for m in rows if m >= 16]
    return cases


def quick_cases(device: str) -> list:
    if device == "cuda":
        small = linear(32768, 576, 1536, dtype="bfloat16")
        layer = Case("train", 8192, LAYER_8B, dtype="bfloat16")
        return [*goal_cases(), (layer, OURS), (small, OURS)]
    return [linear(256, 64, 96), (Case("train", 64, ((64, (64, 32)),)), OURS)]


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "small cases; on a GPU the goals", "4096-4096 at m 8192 and 2048")
    parser.add_argument("--sweep", default="default", choices=("default", "full"))
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these; NAME* for all such")
    options = parser.parse_args(argv)
    if options.goals and options.device == "cuda":
        cases = square_goals()
    elif options.quick or options.goals:
        cases = quick_cases(options.device)
    elif options.sweep == "full":
        cases = full_cases(options.device)
    else:
        cases = gpu_cases() if options.device == "cuda" else cpu_cases()
    return run_cases("bench_linear", cases, options)


if __name__ == "__main__":
    sys.exit(main())
