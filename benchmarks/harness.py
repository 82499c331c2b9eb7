"""Timing that can be believed: providers in turn, medians with spread, the environment beside."""

import csv
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def time_in_turn(
    providers: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 3,
) -> dict[str, list[float]]:
    """Seconds a call; every round times each provider once, so that drift hits all alike.

    On a GPU a round is a group of calls between two events, so that launch gaps count as they do in
    use and the clock's grain does not.
    """
    timer = _gpu_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    for _ in range(warmup):
        for call in providers.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            seconds[name].append(timer(call))
    return seconds


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Callable[[], object], calls: int = 10) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles and minimum in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    values = {"median_ms": middle, "q1_ms": low, "q3_ms": high, "min_ms": min(seconds)}
    return {name: round(value * 1e3, 4) for name, value in values.items()}


def environment(device: torch.device) -> dict:
    """What a reader needs to repeat or to doubt the numbers."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or None,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_records(rows: list[dict], about: dict, out: Path, name: str) -> None:
    """``name``.csv with the rows and ``name``.json with rows and environment."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    record = json.dumps({"environment": about, "rows": rows}, indent=1)
    (out / f"{name}.json").write_text(record + "\n", encoding="utf-8")
