"""Base and update in one product: who is fastest, and how far from cuBLAS's base alone?

``python benchmarks/bench_gemm.py [--device cuda] [--out FOLDER] [--quick] [--goals] [--fresh]
[--without NAME ...] [--launches]``

y = x W^T + H B^T and dx = dS A + dy W, in bfloat16, as plain products: cuBLAS for the base alone
("base", the floor), expand first and then cuBLAS with beta = 1 ("addmm"), the Triton kernel and
the WGMMA kernel of csrc. R 8 shows the product's own rate, R 80 what four tasks of rank 16 need.
Compared with float64 before any is timed. On a CPU only cuBLAS's rivals in torch can run.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import (  # noqa: E402
    arguments,
    chosen_device,
    copies_wanted,
    environment,
    figures,
    gate,
    time_in_turn,
    why_no_figure,
)
from benchmarks.records import Record  # noqa: E402
from ckf.kernels import hopper  # noqa: E402
from ckf.kernels.launch import GemmLaunch  # noqa: E402

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
RANKS = (80, 8)
# With --launches: rows, columns, depth, rank columns, row tiles in turn, warps, stages.
LAUNCHES = (
    (128, 256, 64, 64, 8, 8, 3), (128, 256, 64, 32, 8, 8, 3), (128, 256, 64, 16, 8, 8, 3),
    (128, 256, 64, 16, 4, 8, 3), (128, 256, 64, 16, 16, 8, 3), (128, 256, 32, 16, 8, 8, 6),
    (128, 128, 64, 16, 8, 4, 4), (128, 128, 64, 16, 8, 8, 4), (128, 128, 64, 16, 8, 4, 3),
    (256, 128, 64, 16, 8, 8, 3), (128, 128, 128, 16, 8, 8, 3),
)  # fmt: skip


def cases(device: str, quick: bool, goals: bool = False) -> list[dict]:
    if device == "cpu":
        return [{"m": 32, "k": 64, "n": 48, "rank": 8, "product": p} for p in ("y", "dx")]
    shapes = SHAPES[:2] if goals else SHAPES[:1] if quick else SHAPES
    return [
        {"m": 8192, "k": k, "n": n, "rank": rank, "product": product}
        for rank in (RANKS[:1] if goals else RANKS)
        for k, n in shapes
        for product in ("y", "dx")
    ]


def operands(case: dict, device: torch.device, seed: int) -> list[torch.Tensor]:
    """x, W, H, B^T of y, or dy, W, dS, A of dx: the left, the base, and the update's two."""
    generator = torch.Generator(device).manual_seed(seed)
    m, k, n, r = (case[name] for name in ("m", "k", "n", "rank"))
    inner, outer = (k, n) if case["product"] == "y" else (n, k)
    shapes = ((m, inner), (n, k), (m, r), (r, outer))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = [torch.randn(s, generator=generator, device=device, dtype=torch.float32) for s in shapes]
    return [t.to(dtype) for t in made]


def providers(
    case: dict, device: torch.device, without: Sequence[str] = (), launches: bool = False
) -> tuple[dict, dict[str, str]]:
    """Functions of the operands by name, and why others are missing."""
    forward = case["product"] == "y"

    def base(x, w, h, b):
        return F.linear(x, w) if forward else x @ w

    def addmm(x, w, h, b):
        return (h @ b).addmm_(x, w.t() if forward else w)

    found, missing = {"base": base, "addmm": addmm}, {}
    if device.type != "cuda":
        return found, {"triton": "needs a GPU", "hopper": "needs a GPU"}
    from ckf.kernels import triton_gemm  # imports triton

    one = operands(case, device, 0)
    refusals = {
        "triton": triton_gemm.why_not_gemm(*one),
        "hopper": hopper.why_not_gemm(*one, dx=not forward),
    }
    fused = {
        "triton": lambda x, w, h, b: (
            triton_gemm.gemm(x, w, None, h, b) if forward else triton_gemm.gemm_dx(x, w, h, b)
        ),
        "hopper": lambda x, w, h, b: (
            hopper.gemm(x, w, None, h, b) if forward else hopper.gemm_dx(x, w, h, b)
        ),
    }
    refusals |= {name: "left out by --without" for name in without if name in refusals}
    for blocks in LAUNCHES if launches else ():
        name = "triton " + "-".join(map(str, blocks))
        refusals[name] = refusals["triton"]
        fused[name] = _with_launch(GemmLaunch(*blocks), forward)
    for name, reason in refusals.items():
        if reason is None:
            found[name] = fused[name]
        else:
            missing[name] = reason
    return found, missing


def _with_launch(launch: GemmLaunch, forward: bool):
    from ckf.kernels import triton_gemm

    if forward:
        return lambda x, w, h, b: triton_gemm.gemm(x, w, None, h, b, launch)
    return lambda x, w, h, b: triton_gemm.gemm_dx(x, w, h, b, None, launch)


def measure(
    case: dict,
    device: torch.device,
    rounds: int,
    seconds: float,
    without: Sequence[str] = (),
    launches: bool = False,
) -> tuple[list[dict], dict[str, str]]:
    """(rows, provider to the reason why it has none)."""
    found, missing = providers(case, device, without, launches)
    first = operands(case, device, 0)
    size = sum(t.numel() * t.element_size() for t in first)
    copies = [first, *(operands(case, device, s) for s in range(1, copies_wanted(device, size)))]
    exact = found["addmm"](*(t.double() for t in first))
    plain = found["base"](*first) + first[2] @ first[3]
    good = {"base": found["base"]}
    errors = {"base": None}
    for name, function in found.items():
        if name == "base":
            continue
        try:
            result = function(*first)
            verdict = gate([result], [exact], [plain], torch.finfo(first[0].dtype).eps)
        except Exception as error:  # costs this provider alone
            missing[name] = why_no_figure(error)
            continue
        if verdict.failure is None:
            good[name], errors[name] = function, float(f"{verdict.error:.3g}")
        else:
            missing[name] = f"RED: {verdict.failure}"
    del exact, plain
    calls = {
        name: [lambda f=function, o=own: f(*o) for own in copies] for name, function in good.items()
    }
    timings = time_in_turn(calls, device, rounds, seconds)
    flops = 2 * case["m"] * case["k"] * case["n"]
    rows = []
    for name, timing in timings.items():
        row = {"provider": name, "error": errors[name]} | figures(timing, timings["base"])
        row["base_tflops"] = float(f"{flops / row['ms'] / 1e9:.4g}")  # the base's work alone
        rows.append(row | {"copies": len(copies)})
    return rows, missing


def main(argv: list[str] | None = None) -> int:
    goals = "R 80 of two shapes, without Triton's"  # so that base and hopper are neighbours
    parser = arguments(__doc__, "one shape", goals)
    parser.add_argument("--without", nargs="+", default=[], choices=("triton", "hopper"))
    parser.add_argument("--launches", action="store_true", help="other blocks of Triton's as well")
    options = parser.parse_args(argv)
    device = chosen_device(options.device)
    settings = {"rounds": 5 if options.quick else 15, "seconds": 1.0 if options.quick else 2.0}
    record = Record("bench_gemm", options.out, environment(device), settings, options.fresh)
    red = 0
    without = [*options.without, *(["triton"] if options.goals else [])]
    for case in cases(device.type, options.quick, options.goals):
        if record.done(case):
            continue
        try:
            choice = {"without": without, "launches": options.launches}
            rows, missing = measure(case, device, **settings, **choice)
        except Exception as error:  # costs this case alone
            rows, missing = [], {"case": why_no_figure(error)}
        record.add(case, rows, missing)
        print("  ".join(f"{name} {value}" for name, value in case.items()))
        for row in rows:
            rate = f"{row['base_tflops']:.4g} TFLOP/s of the base"
            print(f"  {row['provider']:32s} {row['ms']:10.4f} ms  x {row['ratio']:.3f}  {rate}")
        for name, why in missing.items():
            print(f"  {name}: {why}")
        red += any(why.startswith("RED") for why in missing.values())
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
