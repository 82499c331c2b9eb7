"""Drawn cases for the backends that need a GPU, without one: Triton in its interpreter, and the
CUDA source compiled for the host and run thread by thread.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hardening.test_kernels import share
from tests.kernels.decode_cases import assert_group_right, group_case
from tests.kernels.host_build import CSRC, compile_for_host
from tests.kernels.test_cuda_host import Host, run_group

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(1800)
def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(HERE / "interpreter_fuzz.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return compile_for_host(CSRC / "multi_lora_decode.cu", tmp_path_factory.mktemp("host"))


@share(0.1)
@given(
    m=st.integers(0, 20),
    k=st.integers(0, 80),
    shapes=st.lists(
        st.tuples(st.integers(0, 150), st.lists(st.integers(0, 20), min_size=4, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    tasks=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    soft=st.booleans(),
    padding=st.sampled_from([0, 1, 8]),
    offset=st.sampled_from([0, 1]),
    clusters=st.booleans(),
    order=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**32),
)
def test_the_decode_kernel(
    library, m, k, shapes, tasks, dtype, soft, padding, offset, clusters, order, seed
):
    """Groups of unlike linears, ids out of range too, threads in any order, all around poisoned."""
    ids = torch.randint(-3, tasks + 2, (m,), generator=torch.Generator().manual_seed(seed))
    case = group_case(
        m, k, [n for n, _ in shapes], [ranks[: tasks + 1] for _, ranks in shapes],
        seed=seed, padding=padding, offset=offset, dtype=dtype, ids=ids, soft=soft,
    )  # fmt: skip
    assert_group_right(case, run_group(Host(library, clusters), case, order))
