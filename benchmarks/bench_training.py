"""What does a training step of a small model wait for, and what do CUDA graphs and Liger change?

``python benchmarks/bench_training.py [--device cpu|cuda] [--out FOLDER] [--quick] [--fresh]``

Loss at the label tokens, backward, AdamW, on packed rows of two tasks; lengths change from step to
step. ``ms``: a step on the wall; ``host_ms``: until Python has launched it; ``gpu_ms``: its kernels
alone. ``difference``: of the gradients from those of plain ckf, over their norm; with 16 bits
rounding alone makes some percent (``ckf-torch``: the same by other kernels).
"""

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import arguments, chosen_device, environment, why_no_figure  # noqa: E402
from benchmarks.models import (  # noqa: E402
    SHAPES,
    label_tokens,
    make_adapters,
    make_base,
    make_batch,
    make_rows,
)
from benchmarks.peers.models import FrozenModel, OursModel, ours_with  # noqa: E402
from benchmarks.records import Outcome, Record  # noqa: E402
from ckf.layer_graphs import LayerGraphs  # noqa: E402
from ckf.liger import using_liger  # noqa: E402

TASKS, RANK, BATCHES = 2, 16, 4
VARIANTS = {  # provider, CUDA graphs, Liger
    "frozen": (FrozenModel, False, False),
    "frozen, liger": (FrozenModel, False, True),
    "ckf": (OursModel, False, False),
    "ckf-torch": (ours_with("torch"), False, False),
    "ckf, liger": (OursModel, False, True),
    "ckf, graphs": (OursModel, True, False),
    "ckf, graphs, liger": (OursModel, True, True),
}
QUICK = ("frozen", "ckf", "ckf, graphs", "ckf, graphs, liger")
WRONG = 0.25  # of the gradients' norm: more than rounding to 16 bits


def cases(device: str, quick: bool) -> list[dict]:
    fixed = {"tasks": TASKS, "rank": RANK, "adapters": "float32"}
    if device == "cpu":
        sizes = [("tiny", 8, 24)] if quick else [("135M, 4 layers", 12, 64)]
        dtype = "float32"
    else:
        sizes = [("135M", 192, 150)] if quick else [("135M", 192, 150), ("1B", 64, 150)]
        dtype = "bfloat16"
    names = ("model", "row_count", "mean_length")
    return [dict(zip(names, s, strict=True)) | fixed | {"dtype": dtype} for s in sizes]


class Steps:
    """Training steps of one variant, a batch after another."""

    def __init__(self, provider, batches) -> None:
        self.provider, self.batches, self.done = provider, batches, 0
        trained = provider.parameters() if not isinstance(provider, FrozenModel) else []
        self.optimizer = torch.optim.AdamW(trained, lr=0.0) if trained else None

    def __call__(self) -> float:
        """Seconds until the host has launched it."""
        start = time.perf_counter()
        batch = self.batches[self.done % len(self.batches)]
        self.done += 1
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        self.provider.backward([batch])
        if self.optimizer is not None:
            self.optimizer.step()
        return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_ms(steps: Steps, device: torch.device) -> float | None:
    """Of all kernels of a step, one after another."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps()
        synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(e.device_time for e in profile.events() if e.device_type == on_gpu) / 1e3


def measure_one(steps: Steps, device: torch.device, rounds: int) -> dict:
    walls, hosts = [], []
    for _ in range(3):
        steps()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in steps.batches:
            hosts.append(steps())
        synchronize(device)
        walls.append((time.perf_counter() - start) / len(steps.batches))
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    wall, tokens = statistics.median(walls), [b.input_ids.numel() for b in steps.batches]
    return {
        "ms": round(1e3 * wall, 2),
        "ms_least": round(1e3 * min(walls), 2),
        "ms_most": round(1e3 * max(walls), 2),
        "host_ms": round(1e3 * statistics.median(hosts), 2),
        "gpu_ms": None if (own := kernel_ms(steps, device)) is None else round(own, 2),
        "tokens_per_second": round(statistics.mean(tokens) / wall),
        "reserved_bytes": peak,
    }


def gradients(steps: Steps) -> dict:
    """Of the first batch."""
    steps.done = 0
    steps()
    return {key: g.double() for key, g in steps.provider.gradients().items()}


def difference(found: dict, wanted: dict) -> float:
    off = sum((found[key] - g).square().sum() for key, g in wanted.items())
    return (off / sum(g.square().sum() for g in wanted.values())).sqrt().item()


def measure(
    case: dict,
    device: torch.device,
    rounds: int,
    names: Sequence[str] = tuple(VARIANTS),
    outcome: Outcome | None = None,
) -> tuple[list[dict], dict[str, str]]:
    """(rows, variant to the reason why it has none)."""
    outcome = outcome or Outcome()
    base = make_base(SHAPES[case["model"]], device, getattr(torch, case["dtype"]))
    adapters = make_adapters(base, TASKS, RANK, torch.float32)
    batches = []
    for i in range(BATCHES):
        length, words = case["mean_length"] + i, base.config.vocab_size
        rows = make_rows(TASKS, case["row_count"], length, words, 0.2)
        batches.append(make_batch(rows, "labels", label_tokens(rows)).to(device))
    wanted = None
    for name in names:
        kind, graphs, liger = VARIANTS[name]
        try:
            with ExitStack() as stack:
                provider = kind(base, adapters, TASKS)
                if liger:
                    stack.enter_context(using_liger(provider.model))
                if graphs:
                    layers = LayerGraphs(provider.model)
                    stack.callback(layers.remove)
                steps = Steps(provider, batches)
                row = {"provider": name} | measure_one(steps, device, rounds)
                if graphs:
                    row["captures"] = layers.captures
                    if layers.off:
                        outcome.fails(name, "RED: capturing failed")
                        continue
                if kind is not FrozenModel:
                    own = gradients(steps)
                    wanted = wanted or own
                    row["difference"] = float(f"{difference(own, wanted):.3g}")
                    if not row["difference"] < WRONG:
                        outcome.fails(name, f"RED: gradients are {row['difference']} off")
                        continue
                outcome.measured({name: row})
        except Exception as error:  # costs this variant alone
            outcome.fails(name, why_no_figure(error))
        provider = steps = own = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return outcome.rows, outcome.reasons


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, "one model, few rounds").parse_args(argv)
    device = chosen_device(options.device)
    settings = {"rounds": 3 if options.quick else 7, "batches": BATCHES}
    names = QUICK if options.quick and device.type == "cuda" else tuple(VARIANTS)
    record = Record("bench_training", options.out, environment(device), settings, options.fresh)
    red = 0
    for case in cases(device.type, options.quick):
        if record.done(case):
            continue
        outcome = Outcome(record, case)
        rows, missing = measure(case, device, settings["rounds"], names, outcome)
        record.add(case, rows, missing)
        print(f"{case['model']}, {case['row_count']} rows of some {case['mean_length']} tokens")
        for row in rows:
            gpu = "" if row["gpu_ms"] is None else f"  gpu {row['gpu_ms']:8.1f}"
            print(
                f"  {row['provider']:20s} {row['ms']:8.1f} ms  host {row['host_ms']:8.1f}{gpu}"
                f"  {row['tokens_per_second']:8,d} tokens/s  gradients off by "
                f"{row.get('difference', 0):.3g}",
                flush=True,
            )
        for name, why in missing.items():
            print(f"  not timed: {name}: {why}")
            red += why.startswith("RED")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
