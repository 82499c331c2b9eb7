"""One Triton kernel at a time: how far is its launch rule from the floor, and from other launches?

``python benchmarks/bench_kernels.py [--device cuda] [--out FOLDER] [--quick] [--processes N]``

bfloat16, four tasks of rank 16 beside a shared one, at the shapes of the goals and of a small
model. "rule" is what ckf/kernels/launch.py chooses; the others are variations of it. Every launch
is held against float64 before it is timed. The floor is the kernel's own bytes over the rate of a
copy, or its products over the rate of a large one. All launches are compiled first, by several
processes: Triton compiles one at a time in each. On a CPU nothing is timed.
"""

import concurrent.futures
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.floors import peaks_of  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    arguments,
    chosen_device,
    copies_wanted,
    environment,
    figures,
    gate,
    time_in_turn,
    why_no_figure,
    words,
)
from benchmarks.problems import hard_gates, task_ids  # noqa: E402
from benchmarks.records import Record  # noqa: E402
from ckf.kernels import launch as rules  # noqa: E402
from ckf.kernels.dropout import dropout_mask, dropout_scale, dropout_threshold  # noqa: E402
from ckf.kernels.slots import compact_slots  # noqa: E402

TASKS, RANK, DROPOUT = 4, 16, 0.1
COMPILED_ROWS = 256  # m is no constant of any kernel: few rows compile the same binary
SHAPES = ((8192, 4096), (8192, 14336), (2048, 4096), (32768, 576))
DTYPE = torch.bfloat16
SIZE = 2  # bytes of an element


@dataclass(frozen=True)
class Case:
    """``width``: of what the kernel reads or writes beside the rank columns, k or n."""

    kernel: str
    m: int
    width: int
    dropout: bool = False

    @property
    def rank(self) -> int:
        return RANK * (TASKS + 1)


@dataclass
class Tensors:
    """Of a case: ``wide`` (m, width), ``narrow`` (m, R), ``stacked`` (R, width)."""

    wide: Tensor
    narrow: Tensor
    stacked: Tensor
    gates: Tensor
    ids: Tensor
    slots: Tensor
    packed: Tensor
    dropout: tuple[Tensor, int, float] | None


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(DTYPE)

    gates = hard_gates(TASKS)
    slots, width = compact_slots([(gates != 0).tolist()], [[RANK] * (TASKS + 1)])
    dropout = None
    if case.dropout:
        seed_tensor = torch.tensor([seed], device=device)
        dropout = seed_tensor, dropout_threshold(DROPOUT), dropout_scale(DROPOUT)
    return Tensors(
        normal(case.m, case.width),
        normal(case.m, case.rank),
        normal(case.rank, case.width),
        (gates * 0.5).repeat_interleave(RANK, 1).to(device),
        task_ids(case.m, TASKS, "balanced").to(device),
        slots.to(device),
        normal(case.m, width),
        dropout,
    )


def run(case: Case, t: Tensors, launch) -> list[Tensor]:
    """The kernel of a case, as a training step calls it; what it wrote."""
    from ckf.kernels.triton_expand import expand
    from ckf.kernels.triton_outer import Factors, outer, outer_pair
    from ckf.kernels.triton_shrink import shrink

    if case.kernel == "shrink":
        gated, packed = torch.empty_like(t.narrow), torch.empty_like(t.packed)
        more = {"dropout": t.dropout, "slots": t.slots, "packed": packed, "launch": launch}
        shrink(t.wide, t.stacked, t.gates, t.ids, gated, **more)
        return [gated, packed]
    if case.kernel == "shrink back":
        gated, restored = torch.empty_like(t.narrow), torch.empty_like(t.narrow)
        more = {"slots": t.slots, "saved": t.packed, "restored": restored, "launch": launch}
        shrink(t.wide, t.stacked, t.gates, t.ids, gated, **more)
        return [gated, restored]
    if case.kernel == "expand":
        expand(t.narrow, t.stacked, t.wide, accumulate=True, launch=launch)
        return [t.wide]
    if case.kernel == "expand back":
        dx = torch.empty_like(t.wide)
        expand(t.narrow, t.stacked, dx, accumulate=False, dropout=t.dropout, launch=launch)
        return [dx]
    ranks = [RANK] * (TASKS + 1)
    if case.kernel == "outer pair":
        of_b, of_a = (Factors(t.narrow, t.wide, ranks, torch.float32, b) for b in (True, False))
        return [out.flatten() for out in outer_pair(of_b, of_a, launch)]
    transposed = case.kernel == "outer b"
    out = outer(t.narrow, t.wide, ranks, torch.float32, transposed, t.dropout, launch)
    return [out.flatten()]


def exact(case: Case, t: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """The same in plain PyTorch, in ``dtype``; ``wide`` as it was before the kernel."""
    wide, narrow, stacked = (x.to(dtype) for x in (t.wide, t.narrow, t.stacked))
    keep = None
    if t.dropout is not None:
        keep = dropout_mask(*t.wide.shape, DROPOUT, t.dropout[0], t.wide.device).to(dtype)
        keep = keep * t.dropout[2]
    gates = t.gates.to(dtype)[t.ids]
    slots = t.slots.long()[t.ids]
    if case.kernel.startswith("shrink"):
        h = (wide if keep is None else wide * keep) @ stacked.t() * gates
        if case.kernel == "shrink":
            live = slots >= 0
            packed = h.new_zeros(t.packed.shape)
            packed.scatter_(1, slots[live].view(len(h), -1), h[live].view(len(h), -1))
            return [h, packed]
        restored = t.packed.to(dtype).gather(1, slots.clamp(min=0)) * (slots >= 0)
        return [h, restored]
    if case.kernel.startswith("expand"):
        update = narrow @ stacked
        if case.kernel == "expand":
            return [wide + update]
        return [update if keep is None else update * keep]
    gradient = narrow.t() @ (wide if keep is None else wide * keep)
    of_b = gradient.view(TASKS + 1, RANK, -1).transpose(1, 2).flatten()
    kinds = {"outer a": [gradient.flatten()], "outer b": [of_b]}
    return kinds.get(case.kernel, [of_b, gradient.flatten()])


def rule(case: Case):
    """What launch.py chooses."""
    m, width, r = case.m, case.width, case.rank
    if case.kernel.startswith("shrink"):
        return rules.shrink_launch(m, width, r, DTYPE, case.dropout)
    if case.kernel.startswith("expand"):
        return rules.expand_launch(m, width, r, DTYPE)
    if case.kernel == "outer pair":  # of one x, read twice
        return rules.outer_pair_launch(m, r, width, r, width, DTYPE)
    return rules.outer_launch(m, r, width, DTYPE, case.dropout)


def variations(case: Case) -> Iterator:
    """Other launches: blocks, warps and stages, and what else a kernel lets one choose."""
    base = rule(case)
    if case.kernel.startswith("shrink"):
        for m, k, warps, stages in (
            (64, 64, 4, 4), (64, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 6), (64, 128, 4, 3),
            (64, 128, 8, 2), (32, 64, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3), (16, 128, 4, 4),
            (128, 64, 8, 4), (128, 64, 8, 3), (128, 32, 8, 6),
        ):  # fmt: skip
            one = replace(base, block_m=m, block_k=k, num_warps=warps, num_stages=stages)
            for split in {base.split, 1, 2, 4} if m >= 64 else {1}:
                yield replace(one, split=split)
    elif case.kernel.startswith("expand"):
        for m, n, r, warps, stages in (
            (64, 128, 128, 4, 1), (64, 128, 128, 8, 1), (64, 128, 32, 4, 3), (64, 128, 16, 4, 4),
            (64, 128, 64, 8, 2), (128, 128, 128, 8, 1), (128, 128, 64, 8, 2), (128, 128, 32, 8, 3),
            (64, 256, 128, 8, 1), (64, 256, 64, 8, 2), (32, 256, 64, 4, 2), (32, 128, 64, 4, 2),
            (64, 64, 64, 4, 2), (128, 64, 128, 4, 1), (128, 64, 64, 4, 2), (16, 256, 64, 4, 2),
        ):  # fmt: skip
            one = replace(base, block_m=m, block_n=n, block_r=r)
            yield replace(one, num_warps=warps, num_stages=stages)
    else:
        for m, c, warps, stages in (
            (64, 128, 8, 4), (64, 128, 8, 2), (64, 128, 4, 3), (32, 128, 8, 4), (32, 128, 8, 6),
            (128, 128, 8, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 256, 8, 3), (32, 256, 8, 4),
        ):  # fmt: skip
            one = replace(base, block_m=m, block_c=c, num_warps=warps, num_stages=stages)
            for factor in (0.5, 1, 2):
                chunk = max(m, int(base.chunk * factor) // m * m)
                yield replace(one, chunk=chunk)


def launches(case: Case) -> dict[str, object]:
    """By a name: the rule first, every launch once."""
    found = {rule(case): "rule"}
    for one in variations(case):
        found.setdefault(one, " ".join(f"{k}={v}" for k, v in vars(one).items()))
    return {name: one for one, name in found.items()}


def cases(quick: bool) -> list[Case]:
    shapes = SHAPES[:1] if quick else SHAPES
    kinds = (
        ("shrink", False), ("shrink", True), ("shrink back", False), ("expand", False),
        ("expand back", False), ("expand back", True), ("outer b", False), ("outer a", False),
        ("outer a", True), ("outer pair", False),
    )  # fmt: skip
    return [Case(kernel, *shape, dropout) for shape in shapes for kernel, dropout in kinds]


def floor_ms(case: Case, device_name: str) -> float | None:
    """Bytes that must move, or products; partial sums of an outer are not counted."""
    peaks = peaks_of(device_name)
    if peaks is None:
        return None
    pair = case.kernel == "outer pair"
    wide = case.m * case.width * SIZE * (2 if case.kernel == "expand" or pair else 1)
    narrow = case.m * case.rank * SIZE * (2 if case.kernel == "shrink back" or pair else 1)
    stacked = case.rank * case.width * (4 if case.kernel.startswith("outer") else SIZE)
    stacked *= 2 if pair else 1
    flops = 2 * case.m * case.rank * case.width * (2 if pair else 1)
    return float(f"{1e3 * max((wide + narrow + stacked) / peaks[1], flops / peaks[0]):.4g}")


def compile_all(jobs: Sequence[tuple[Case, object]], processes: int) -> None:
    """Into Triton's cache on disk; what does not compile is said again where it is measured."""
    jobs = list({_binary(*job): job for job in jobs}.values())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        for why in pool.map(compile_one, jobs, chunksize=4):
            if why:
                print(f"not compiled: {why}", flush=True)


def _binary(case: Case, launch) -> tuple:
    """Equal for launches of one binary: rows a chunk and parts of k, beyond one, are arguments."""
    blocks = tuple(v for k, v in vars(launch).items() if k not in ("chunk", "split"))
    return case.kernel, case.dropout, case.width % 16, blocks, getattr(launch, "split", 1) > 1


def compile_one(job: tuple[Case, object]) -> str | None:
    case, launch = job
    try:
        small = replace(case, m=COMPILED_ROWS)
        run(small, make_tensors(small, torch.device("cuda")), launch)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{case.kernel} {launch}: {words(error)}"
    return None


def measure(case: Case, device: torch.device, rounds: int, seconds: float):
    """(rows, launch to the reason why it has none)."""
    size = SIZE * case.m * case.width
    copies = [make_tensors(case, device, s) for s in range(copies_wanted(device, size))]
    wanted = exact(case, copies[0], torch.float64)
    plain = [t.to(DTYPE) for t in wanted]  # no more than one rounding of the result
    before = copies[0].wide.clone()
    good, errors, missing = {}, {}, {}
    for name, launch in launches(case).items():
        copies[0].wide.copy_(before)
        try:
            got = run(case, copies[0], launch)
            verdict = gate(got, wanted, plain, torch.finfo(DTYPE).eps)
        except Exception as error:  # costs this launch alone
            missing[name] = why_no_figure(error)
            continue
        if verdict.failure is None:
            good[name], errors[name] = launch, float(f"{verdict.error:.3g}")
        else:
            missing[name] = f"RED: {verdict.failure}"
    if "rule" not in good:
        return [], missing
    calls: dict[str, list[Callable]] = {
        name: [lambda c=case, t=own, one=launch: run(c, t, one) for own in copies]
        for name, launch in good.items()
    }
    timings = time_in_turn(calls, device, rounds, seconds)
    floor = floor_ms(case, environment(device)["device"])
    rows = [
        {"launch": name, "error": errors[name]} | figures(timing, timings["rule"])
        | {"floor_ms": floor, "copies": len(copies)} | vars(good[name])
        for name, timing in timings.items()
    ]  # fmt: skip
    return rows, missing


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__, "one shape, few rounds")
    processes = max(1, (os.cpu_count() or 2) - 2)
    parser.add_argument("--processes", type=int, default=processes, help="0: compile when due")
    parser.add_argument("--only-compile", action="store_true", help="fill Triton's cache, no more")
    options = parser.parse_args(argv)
    device = chosen_device(options.device)
    if device.type != "cuda":
        print("on a CPU there is nothing to time")
        return 0
    wanted = cases(options.quick)
    if options.processes:
        compile_all([(c, one) for c in wanted for one in launches(c).values()], options.processes)
    if options.only_compile:
        return 0
    settings = {"rounds": 5, "seconds": 1.0}
    record = Record("bench_kernels", options.out, environment(device), settings, options.fresh)
    red = 0
    for case in wanted:
        key = vars(case) | {"rank": case.rank}
        if record.done(key):
            continue
        try:
            rows, missing = measure(case, device, **settings)
        except Exception as error:  # costs this case alone
            rows, missing = [], {"case": words(error)}
        record.add(key, rows, missing)
        show(case, rows, missing)
        red += any(why.startswith("RED") for why in missing.values())
    return 1 if red else 0


def show(case: Case, rows: list[dict], missing: dict[str, str]) -> None:
    """The rule and the five fastest."""
    floor = f"floor {rows[0]['floor_ms'] * 1e3:.1f} us" if rows and rows[0]["floor_ms"] else ""
    print(f"{case.kernel}  m {case.m}  width {case.width}  dropout {case.dropout}  {floor}")
    fastest = sorted(rows, key=lambda row: row["ms"])
    for row in [*rows[:1], *fastest[:5]]:
        print(f"  {row['ms'] * 1e3:8.1f} us  x {row['ratio']:.3f}  {row['launch']}", flush=True)
    for name, why in missing.items():
        print(f"  {name}: {why[:120]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
