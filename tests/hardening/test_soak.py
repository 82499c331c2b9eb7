"""The soak test of scripts/soak.py: what it sees, and a minute of it."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import soak

ROOT = Path(__file__).parents[2]


def history(**last) -> list[dict]:
    still = {"rss_mb": 100.0, "tensors": 50, "gpu_mb": 0, "kernels": 3, "files": 9, "threads": 1}
    return [dict(still) for _ in range(20)] + [still | last for _ in range(10)]


def test_growth_is_seen_by_name_and_noise_is_not():
    assert soak.grown(history(), soak.MARGINS) == {}
    assert soak.grown(history(rss_mb=110.0), soak.MARGINS) == {}
    grown = soak.grown(history(rss_mb=160.0, tensors=51, files=10, kernels=4), soak.MARGINS)
    assert grown == {"rss_mb": 60.0, "tensors": 1, "files": 1, "kernels": 1}


def test_what_is_held_is_counted():
    while gc.collect():  # what earlier tests left goes in more than one round
        pass
    before = soak.figures("cpu")
    held = [torch.ones(1) for _ in range(7)] + [open(__file__)]
    after = soak.figures("cpu")
    held[-1].close()
    assert (after["tensors"] - before["tensors"], after["files"] - before["files"]) == (7, 1)


@pytest.mark.slow
def test_a_minute_leaves_nothing_behind():
    command = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--seconds", "60"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
