"""The Triton kernels without a GPU: the suites, each in a process with TRITON_INTERPRET=1."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckf.kernels.config import choose_backend, usable_backends
from ckf.kernels.dispatch import Call

HERE = Path(__file__).parent
CALL = Call(m=2, k=3, n=3, rank=1, train=True, dropout=False)
installed = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not installed, reason="triton is not installed")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "suite",
    [
        "interpreter_suite.py",
        "interpreter_slots.py",
        "interpreter_parts.py",
        "interpreter_hopper.py",
        "interpreter_replay.py",
    ],
)
def test_in_the_interpreter(suite):
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / suite)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


def test_says_why_it_is_not_usable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usable, why = usable_backends()["triton"]
    assert not usable and ("CUDA" in why or "installed" in why)
    with pytest.raises(ValueError, match="backend='triton' cannot compute this call"):
        choose_backend("triton", torch.zeros(2, 3), CALL)


def test_says_that_triton_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    usable, why = usable_backends()["triton"]
    assert not usable and "not installed" in why


@pytest.mark.skipif(not installed, reason="triton is not installed")
def test_refuses_dtypes_without_a_kernel(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="float64"):
        choose_backend("triton", torch.zeros(2, 3, dtype=torch.float64), CALL)
    assert choose_backend("auto", torch.zeros(2, 3), CALL).backend != "triton"
