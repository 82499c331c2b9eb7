"""Records with invented figures, in the form of real ones."""

from dataclasses import replace
from pathlib import Path

from benchmarks.bench_scaling import AXES, start
from benchmarks.floors import floor_columns, step_floor
from benchmarks.models import SHAPES
from benchmarks.problems import LAYER_8B, Case
from benchmarks.records import Record

ABOUT = {
    "time": "2026-01-01T00:00:00+00:00",
    "commit": "0" * 40,
    "sources": "1" * 16,
    "device": "NVIDIA H200",
    "cores": 16,
    "threads": 16,
    "load": 0.1,
    "python": "3.12.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": "5.17.0",
    "peft": "0.21.2",
}
PEERS = {"frozen": "P0", "single": "P0", "peft-loop": "P1", "peft-big": "P3"}
FACTORS = {
    "frozen": 1.0,
    "single": 1.06,
    "dense": 1.2,
    "grouped": 1.5,
    "bmm": 1.8,
    "peft-big": 1.3,
    "peft-loop-by-hand": 2.5,
    "ckf-torch": 1.21,
    "ckf-triton": 1.15,
    "ckf-triton:fused": 1.11,
    "ckf": 1.12,
}


def linear_row(case: Case, provider: str, factor: float) -> dict:
    floors = floor_columns(case, ABOUT["device"])
    ms = floors["frozen_floor_ms"] * 1.1 * (1 + (factor - 1) * (1 + case.tasks / 16))
    ratio = ms / (floors["frozen_floor_ms"] * 1.1)
    row = {"provider": provider, "peer": "" if provider.startswith("ckf") else "P"}
    row |= {"error": 1e-3, "ms": ms, "ms_q1": ms * 0.98, "ms_q3": ms * 1.03}
    row |= {"ratio": ratio, "ratio_q1": ratio * 0.99, "ratio_q3": ratio * 1.02}
    row |= {"min_ms": ms * 0.97, "rounds": 15, "eager_ms": ms * 1.2, "host_ms": 0.1}
    row |= {"timed_by": "graph", "note": "", "copies": 2, "peak_bytes": 10**8}
    return row | {"saved_bytes": 10**7} | floors


def write_linear(name: str, cases: list[Case], folder: Path) -> None:
    record = Record(name, folder, ABOUT, {"rounds": 15})
    for case in cases:
        rows = [linear_row(case, provider, factor) for provider, factor in FACTORS.items()]
        record.add(case.columns() | {"providers": "all"}, rows, {"vllm": "forward only"})


def write_all(folder: Path) -> None:
    """Every record that the plots and the report read."""
    base = start("cuda")
    write_linear("bench_linear", [base, Case("train", 8192, LAYER_8B, dtype="bfloat16")], folder)
    axes = [replace(base, **{a: v}) for a, values in AXES["cuda"].items() for v in values]
    write_linear("bench_scaling", [base, *axes], folder)
    forward = replace(base, step="forward", mix="token")
    write_linear("bench_decode", [replace(forward, m=m) for m in (1, 16, 256)], folder)
    model = Record("bench_decode_model", folder, ABOUT, {"rounds": 11})
    for m in (1, 16, 256):
        rows = [linear_row(replace(forward, m=m), p, FACTORS[p]) for p in ("frozen", "ckf")]
        model.add({"model": "8B", "m": m, "context": 512, "tasks": 4, "rank": 16,
                   "dtype": "bfloat16", "adapters": "bfloat16"}, rows)  # fmt: skip
    step = Record("bench_step", folder, ABOUT, {"rounds": 5})
    case = {"model": "8B", "row_count": 16, "mean_length": 256, "dtype": "bfloat16"}
    case |= {"adapters": "float32", "tasks": 4, "rank": 16, "compiled": True}
    rows, floor = [], step_floor(SHAPES["8B"], case, [256] * 16, 100, ABOUT["device"])
    for layout, cost in (("padded", 1.6), ("packed", 1.1), ("labels", 1.0)):
        for provider in ("frozen", "single", "peft-loop", "peft-big", "ckf"):
            ms = 300 * cost * FACTORS.get(provider, 2.6)
            row = {"provider": provider, "peer": PEERS.get(provider, ""), "layout": layout}
            row |= {"rounds": 5, "tokens": 4096, "computed_tokens": int(4096 * cost), "ms": ms}
            row |= {"ms_q1": ms * 0.99, "ms_q3": ms * 1.01, "ms_with_adamw": ms + 10}
            row |= {"tokens_per_s": 4096 / ms * 1e3, "tokens_per_s_with_adamw": 4096 / ms * 1e3}
            row |= {q: ms / 300 / cost for q in ("ratio", "ratio_q1", "ratio_q3")}
            row |= {"peak_bytes": 10**9, "saved_bytes": 10**9}
            rows.append(row | {"gradient_difference": 0.01} | floor)
    step.add(case, rows)
    training = Record("bench_training", folder, ABOUT, {"rounds": 7})
    rows = [
        {"provider": name, "ms": ms, "ms_least": ms, "ms_most": ms, "host_ms": 0.9 * ms,
         "gpu_ms": gpu, "tokens_per_second": round(3e7 / ms), "reserved_bytes": 10**10}
        for name, ms, gpu in (("frozen", 144, 139), ("ckf", 344, 164), ("ckf, graphs", 175, 173))
    ]  # fmt: skip
    rows[-1]["difference"] = 1.4e-6
    training.add({"model": "135M", "row_count": 192, "mean_length": 150, "tasks": 2, "rank": 16,
                  "adapters": "float32", "dtype": "bfloat16"}, rows)  # fmt: skip
