"""Timing that can be believed: correct first, then in turn, with spread and the environment beside.

On a GPU the figure is the time of a CUDA graph that runs a provider once on each of several copies
of its tensors, together larger than the L2 cache; eager time and the host's share are kept beside
it. On a CPU it is wall time. Every round times each provider once, so that drift hits all alike,
and begins at another one, so that neighbours change; ratios are taken within a round.
"""

import argparse
import hashlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
ROTATED_BYTES = 160_000_000  # of all copies together; an H200's L2 holds 60 MB
GROUP_MS = 2.0  # a timed group lasts at least this long
WARMUP = 3

Call = Callable[[], object]


@dataclass
class Timing:
    """Milliseconds a call, one figure a round. ``by``: graph, events or wall; ``note``: why."""

    ms: list[float]
    by: str
    eager_ms: float | None = None
    host_ms: float | None = None
    note: str = ""


def time_in_turn(
    providers: dict[str, Sequence[Call]],
    device: torch.device | str = "cpu",
    rounds: int = 15,
    seconds: float = 20.0,
    graphs: dict[str, bool] | None = None,
    after_round: Callable[[dict[str, Timing]], None] = lambda timings: None,
) -> dict[str, Timing]:
    """Time every provider once a round; a provider is one call for each copy of its tensors.

    Args:
        rounds: at most; fewer, but at least 5, where they would last over ``seconds`` together.
        graphs: providers that cannot be captured map to False.
        after_round: is handed what is timed so far.
    """
    if torch.device(device).type == "cuda":
        return _time_gpu(providers, rounds, seconds, graphs or {}, after_round)
    loops, cost = {}, 0.0
    for name, calls in providers.items():
        for _ in range(WARMUP - 1):
            calls[0]()
        once = _wall_ms(calls, 1)
        loops[name] = max(1, round(GROUP_MS / once))
        cost += once * loops[name] * len(calls) / 1e3
    timings = {name: Timing([], "wall") for name in providers}
    for index in range(_rounds(rounds, seconds, cost)):
        for name in rotated(list(providers), index):
            timings[name].ms.append(_wall_ms(providers[name], loops[name]))
        after_round(timings)
    return timings


def rotated(items: list, by: int) -> list:
    """The items from number ``by`` on, then those before it."""
    start = by % len(items) if items else 0
    return items[start:] + items[:start]


def _rounds(rounds: int, seconds: float, cost: float) -> int:
    return max(min(rounds, int(seconds / max(cost, 1e-9))), min(rounds, 5))


def _wall_ms(calls: Sequence[Call], loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        for call in calls:
            call()
    return (time.perf_counter() - start) * 1e3 / (loops * len(calls))


def _time_gpu(
    providers, rounds: int, seconds: float, graphs: dict[str, bool], after_round: Callable
) -> dict[str, Timing]:
    timings, replays, loops, cost = {}, {}, {}, 0.0
    for name, calls in providers.items():
        _warm_up(calls)
        eager = [_event_ms(calls) for _ in range(5)]
        timing = Timing([], "events", statistics.median(eager), _host_ms(calls))
        replay = None
        if graphs.get(name, True):
            try:
                replay = _capture(calls)
                timing.by = "graph"
            except RuntimeError as error:  # the reason goes into the record
                torch.cuda.synchronize()
                timing.note = f"no CUDA graph: {str(error).splitlines()[0][:120]}"
        else:
            timing.note = "no CUDA graph: this provider works on the host"
        replays[name] = [replay] if replay else list(calls)
        scale = 1 / len(calls) if replay else 1.0
        once = _event_ms(replays[name]) * len(replays[name])
        loops[name] = (max(1, round(GROUP_MS / once)), scale)
        cost += once * loops[name][0] / 1e3
        timings[name] = timing
    for index in range(_rounds(rounds, seconds, cost)):
        for name in rotated(list(replays), index):
            count, scale = loops[name]
            timings[name].ms.append(_event_ms(replays[name], count) * scale)
        after_round(timings)
    return timings


def _warm_up(calls: Sequence[Call]) -> None:
    """Beside the main stream, as a capture wants it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def _capture(calls: Sequence[Call]) -> Call:
    """A graph's replay; RuntimeError where the calls wait for the device.

    They are asked beforehand: a capture that fails leaves the stream and the random numbers of the
    process in its state, and all that is measured afterwards with them.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _event_ms(calls: Sequence[Call], loops: int = 1) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(loops):
        for call in calls:
            call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / (loops * len(calls))


def _host_ms(calls: Sequence[Call]) -> float:
    """Until the last launch has returned, the device idle before."""
    samples = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - start) * 1e3 / len(calls))
    torch.cuda.synchronize()
    return statistics.median(samples)


def copies_wanted(device: torch.device, bytes_each: int) -> int:
    """How many copies of the tensors push each other out of the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    return min(64, max(2, -(-ROTATED_BYTES // max(bytes_each, 1))))


def spread(values: Sequence[float], name: str, digits: int = 5) -> dict[str, float]:
    """Median and quartiles under ``name``, ``name_q1``, ``name_q3``."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    named = {name: middle, f"{name}_q1": low, f"{name}_q3": high}
    return {key: float(f"{value:.{digits}g}") for key, value in named.items()}


def figures(timing: Timing, frozen: Timing) -> dict:
    """The columns of a record: milliseconds, ratio to the frozen base in the same round."""
    ratios = [t / f for t, f in zip(timing.ms, frozen.ms, strict=True)]
    row = spread(timing.ms, "ms") | spread(ratios, "ratio")
    row |= {"min_ms": float(f"{min(timing.ms):.5g}"), "rounds": len(timing.ms)}
    for name in ("eager_ms", "host_ms"):
        value = getattr(timing, name)
        row[name] = None if value is None else float(f"{value:.5g}")
    return row | {"timed_by": timing.by, "note": timing.note}


@dataclass(frozen=True)
class Verdict:
    """Of a correctness gate: the worst relative error by norm, and what failed, if anything."""

    error: float
    failure: str | None


def gate(
    outcome: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor], eps: float
) -> Verdict:
    """Compare results with float64; no provider is timed whose verdict has a failure.

    Allowed is twice the error that the plain reference makes in the same dtype, plus a rounding
    band of 4 eps; all by norm, relative to the exact tensor. A tensor that is exactly zero (an
    expert without rows) must be zero.
    """
    if len(outcome) != len(exact):
        return Verdict(float("inf"), f"{len(outcome)} results; expected {len(exact)}")
    worst = 0.0
    for index, (got, wanted, same) in enumerate(zip(outcome, exact, plain, strict=True)):
        if got.shape != wanted.shape:
            shapes = f"{tuple(got.shape)}; expected {tuple(wanted.shape)}"
            return Verdict(float("inf"), f"result {index} has shape {shapes}")
        scale = wanted.norm().item() or 1.0
        error = (got.double() - wanted).norm().item() / scale
        allowed = 2 * (same.double() - wanted).norm().item() / scale + 4 * eps
        if not error <= allowed:  # NaN fails as well
            return Verdict(error, f"result {index} is off by {error:.2e}; allowed {allowed:.2e}")
        worst = max(worst, error)
    return Verdict(worst, None)


def environment(device: torch.device) -> dict:
    """What a reader needs to repeat or to doubt the numbers."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted": uncommitted(),
        "sources": sources_digest(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("torch", "triton", "transformers", "peft")},
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        if names:
            return names[0].split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """What CKF_COMMIT says of a copy, else the commit checked out; None without git."""
    if told := os.environ.get("CKF_COMMIT"):
        return told
    return (_git("rev-parse", "HEAD") or None) if (ROOT / ".git").exists() else None


def uncommitted() -> bool | None:
    """Whether code that counts (see ``sources_digest``) differs from the commit; None: no git."""
    if os.environ.get("CKF_COMMIT") or not (ROOT / ".git").exists():
        return None
    changed = _git("status", "--porcelain", "--", "ckf", "csrc", "benchmarks")
    endings = (".py", ".cu", ".cuh", ".cpp", ".h")
    return None if changed is None else any(s.endswith(endings) for s in changed.splitlines())


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def sources_digest() -> str:
    """Of the code that is measured and of the code that measures, committed or not."""
    digest = hashlib.sha256()
    files = [*ROOT.glob("ckf/**/*.py"), *ROOT.glob("csrc/*"), *ROOT.glob("benchmarks/**/*.py")]
    for path in sorted(p for p in files if p.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Progress:
    """What is left, in a line before each case: the mean of those measured stands for the rest."""

    def __init__(self, total: int) -> None:
        self.total, self.finished, self.start = total, 0, time.monotonic()

    def before(self, title: str) -> None:
        spent = time.monotonic() - self.start
        left = ""
        if self.finished:
            rest = spent / self.finished * (self.total - self.finished)
            left = f", {spent / 60:.1f} min so far, about {rest / 60:.1f} to go"
        self.finished += 1
        print(f"-- {self.finished} of {self.total}{left}: {title}", flush=True)


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def why_no_figure(error: Exception) -> str:
    """For a record; red, unless it is a refusal or a lack of memory."""
    if isinstance(error, ValueError):
        return str(error)[:300]
    return words(error) if isinstance(error, torch.OutOfMemoryError) else f"RED: {words(error)}"


def arguments(doc: str, quick: str, goals: str | None = None) -> argparse.ArgumentParser:
    """The options that all benchmarks share; ``goals``: what --goals measures."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for the record (.json and .csv)")
    parser.add_argument("--quick", action="store_true", help=quick)
    if goals is not None:
        what = f"on a GPU, in all rounds: {goals}"
        parser.add_argument("--goals", action="store_true", help=what)
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    return parser


def chosen_device(name: str) -> torch.device:
    """The device, with a sentence instead of a traceback where it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device; use --device cpu")
    return torch.device(name)
