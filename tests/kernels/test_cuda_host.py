"""The CUDA kernel's own source, compiled by the host's C++ compiler and run thread by thread.

``csrc/host_shim.h`` stands in for the GPU, so that indices, tails, votes and barriers are tested on
every machine. What it cannot show (memory coalescing, races inside a warp) needs a GPU.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels.cuda import _DTYPES
from tests.kernels.decode_cases import (
    DTYPES,
    GUARD,
    DecodeCase,
    assert_poison_around,
    assert_right,
    decode_case,
)

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INVALID_VALUE, LAUNCH_FAILURE = 1, 719  # of cudaError_t


def compile_for_host(source: Path, folder: Path, strict: bool = True) -> ctypes.CDLL:
    cxx = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(cxx[0]) is None:
        pytest.skip(f"no C++ compiler: {cxx[0]} is not on PATH")
    library = folder / f"{source.stem}.so"
    flags = ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC", "-DCKF_HOST_SHIM"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"] if strict else ["-w"]
    command = [*cxx, *flags, *warnings, f"-I{CSRC}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_host(CSRC / "multi_lora_decode.cu", tmp_path_factory.mktemp("host"))


def call(host: ctypes.CDLL, case: DecodeCase, order: int = 0, **changes) -> int:
    (m, k), (rank, n) = case.x.shape, case.b.shape
    sizes = {"m": m, "k": k, "n": n, "rank": rank, "tasks": case.column_gates.shape[0]}
    sizes |= {"y_stride": case.y.stride(0), "x_stride": case.x.stride(0)}
    host.ckf_host_set_order(ctypes.c_uint(order))
    return host.ckf_multi_lora_decode(
        *(ctypes.c_void_p(t.data_ptr()) for t in case.tensors().values()),
        *map(ctypes.c_int64, (sizes | changes).values()),
        ctypes.c_int(_DTYPES[case.y.dtype]),
        ctypes.c_int(0),
        ctypes.c_void_p(None),
    )


def run(host: ctypes.CDLL, case: DecodeCase, order: int = 0) -> torch.Tensor:
    """The result; y of the case stays as it was, and nothing around y may change."""
    before = case.y._base.clone()
    assert call(host, case, order) == 0
    result = case.y.clone()
    assert_poison_around(case.y)
    case.y._base.copy_(before)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 1, "k": 1, "n": 1, "ranks": (1, 1)},
        {"m": 3, "k": 7, "n": 5, "ranks": (3, 1, 2)},
        {"m": 5, "k": 64, "n": 256, "ranks": (8, 8, 8)},
        {"m": 9, "k": 264, "n": 264, "ranks": (16, 16, 16, 16, 16)},
        {"m": 4, "k": 577, "n": 727, "ranks": (5, 0, 9)},
        {"m": 2, "k": 24, "n": 8, "ranks": (0, 300, 1)},
    ],
    ids=lambda s: "x".join(str(s[name]) for name in ("m", "k", "n")),
)
@pytest.mark.parametrize("layout", [{}, {"padding": 3}, {"offset": 1}], ids=str)
def test_against_float64(host, sizes, dtype, layout):
    case = decode_case(**sizes, dtype=dtype, **layout)
    assert_right(case, run(host, case))


@pytest.mark.parametrize("m,n", [(70, 520), (70, 1000), (256, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_and_four_rows_a_block(host, m, n, dtype):
    case = decode_case(m=m, n=n, k=16, ranks=(3, 3, 3, 3), dtype=dtype)
    assert_right(case, run(host, case))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    k=st.integers(0, 70),
    n=st.integers(0, 300),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    dtype=st.sampled_from(DTYPES),
    soft=st.booleans(),
    padding=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 99),
)
def test_any_sizes(host, m, k, n, ranks, dtype, soft, padding, seed):
    ids = torch.randint(-3, len(ranks) + 1, (m,), generator=torch.Generator().manual_seed(seed))
    case = decode_case(m, k, n, ranks, dtype, seed, ids, soft, padding)
    assert_right(case, run(host, case))


def test_rank_16384(host):
    case = decode_case(m=2, k=8, n=8, ranks=[64] * 256, ids=[0, 254])
    assert_right(case, run(host, case))


# 64 slices of n: few enough blocks for one row each at m = 1, enough for four rows each at m = 8.
WIDE = 64 * 128


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("n", [24, WIDE], ids=["a row a block", "four rows a block"])
def test_a_gate_of_zero_is_a_selection(host, bad, n):
    """inf and NaN in A and B of an expert stay with the rows of its own task."""
    case = decode_case(m=8, n=n, ranks=(4, 4, 4), ids=[0, 1, 0, 1, -1, 0, 1, 1])
    clean = run(host, case)
    case.a[4:6] = bad  # columns of task 0
    case.b[6:8] = bad
    result = run(host, case)
    others = case.task_ids != 0
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


def test_overflow_of_s_stays_out(host):
    """A finite A and x whose product overflows float32, behind a gate of zero."""
    case = decode_case(m=8, k=64, n=WIDE, ranks=(4, 4, 4), ids=[0, 1, 0, 1, 0, 1, 0, 1])
    case.a[4:8] = 3e38
    case.x[:] = 3e38
    case.a[0:4] = 1e-30
    case.a[8:12] = 1e-30
    result = run(host, case)
    assert not result[::2].isfinite().any()
    assert result[1::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ids(host, dtype):
    wild = [-1, 0, 2, 3, -2, 2**40, -(2**62), 1]
    case = decode_case(m=8, ranks=(2, 2, 2, 2), dtype=dtype, ids=wild)
    case.y[0, :2] = torch.tensor([float("nan"), -0.0], dtype=dtype)
    before = case.y.clone()
    result = run(host, case)
    assert torch.equal(result[0].view(torch.uint8), before[0].view(torch.uint8)), "row -1 changed"
    assert result[[3, 4, 5, 6]].isnan().all()
    assert_right(case, result)


def test_without_tasks_or_columns(host):
    for ranks in ([0], [3], [0, 0]):
        case = decode_case(m=3, ranks=ranks, ids=[-1, 5, -1])
        assert_right(case, run(host, case))


def test_neighbours_do_not_matter(host):
    """A row alone (one row a block) and among seven others (four rows a block): the same bits."""
    case = decode_case(m=8, k=40, n=WIDE, ranks=(5, 6, 7), seed=3)
    together = run(host, case)
    for i in (0, 5):
        tensors = case.tensors()
        for name in ("y", "x", "task_ids"):
            view = tensors[name]
            tensors[name] = view._base.as_strided(
                (1, *view.shape[1:]), view.stride(), view.storage_offset() + i * view.stride(0)
            )
        alone = DecodeCase(**tensors)
        assert call(host, alone) == 0
        assert torch.equal(alone.y[0], together[i])


def test_empty(host):
    for sizes in ({"m": 0}, {"n": 0}, {"k": 0}):
        case = decode_case(**sizes)
        assert_right(case, run(host, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits(host, dtype):
    """Twice, in other thread orders, next to other rows, and on unaligned memory."""
    case = decode_case(m=12, k=72, n=272, ranks=(6, 6, 6, 6), dtype=dtype)
    first = run(host, case).view(torch.uint8)
    assert torch.equal(first, run(host, case).view(torch.uint8))
    for order in (1, 2, 3):
        assert torch.equal(first, run(host, case, order).view(torch.uint8)), f"order {order}"
    moved = decode_case(m=12, k=72, n=272, ranks=(6, 6, 6, 6), dtype=dtype, offset=1)
    assert torch.equal(first, run(host, moved).view(torch.uint8))
    permuted = torch.arange(11, -1, -1)
    turned = decode_case(m=12, k=72, n=272, ranks=(6, 6, 6, 6), dtype=dtype)
    for name in ("y", "x", "task_ids"):
        getattr(turned, name).copy_(getattr(case, name)[permuted])
    assert torch.equal(first, run(host, turned)[permuted].contiguous().view(torch.uint8))


def test_launcher_refuses(host):
    case = decode_case()
    for wrong in ({"m": -1}, {"k": -1}, {"m": 65536}, {"rank": 2**31}, {"tasks": 2**40}):
        assert call(host, case, **wrong) == INVALID_VALUE, wrong


def test_the_poison_works():
    """If guard elements were ordinary numbers, reads past the end would go unseen."""
    case = decode_case()
    assert case.x._base[:GUARD].isnan().all()
    assert case.x._base[-GUARD:].isnan().all()
    assert (case.task_ids._base[-GUARD:] > 10**14).all()


def test_conversions_of_the_shim(host):
    host.ckf_host_half_to_float.restype = ctypes.c_float
    host.ckf_host_float_to_half.argtypes = [ctypes.c_float]
    host.ckf_host_float_to_bfloat16.argtypes = [ctypes.c_float]
    for name in ("ckf_host_float_to_half", "ckf_host_float_to_bfloat16"):
        getattr(host, name).restype = ctypes.c_uint16
    bits = torch.arange(0, 65536, 7, dtype=torch.int32)
    halves = bits.to(torch.int16).view(torch.float16)
    ours = torch.tensor([host.ckf_host_half_to_float(ctypes.c_uint16(b)) for b in bits.tolist()])
    assert torch.equal(ours.nan_to_num(nan=7.0), halves.float().nan_to_num(nan=7.0))
    g = torch.Generator().manual_seed(0)
    floats = torch.randn(4000, generator=g) * 10.0 ** torch.randint(-9, 7, (4000,), generator=g)
    for dtype, convert in (
        (torch.float16, host.ckf_host_float_to_half),
        (torch.bfloat16, host.ckf_host_float_to_bfloat16),
    ):
        ours = torch.tensor([convert(v) for v in floats.tolist()], dtype=torch.int32)
        assert torch.equal(ours.to(torch.int16), floats.to(dtype).view(torch.int16))


DEFECTS = {
    "tail of k": ("out.v[v] = v < left ? p[v]", "out.v[v] = v <= left ? p[v]"),
    "no barrier": ("    __syncthreads();\n", ""),
    "gate by multiplication": (
        "!present[j] || !(row_live[r] >> source[j] & 1u)",
        "!present[j]",
    ),
    "id not checked": (
        'from_float<T>(task >= 0 && task < p.tasks ? to_float(*y) + sum : nanf(""))',
        "from_float<T>(to_float(*y) + sum)",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_seen(tmp_path, name):
    """A planted defect must show: else the tests above prove nothing."""
    source = (CSRC / "multi_lora_decode.cu").read_text()
    right, wrong = DEFECTS[name]
    assert right in source, f"the source has no {right!r}: update this test"
    broken = tmp_path / "broken.cu"
    broken.write_text(source.replace(right, wrong))
    library = compile_for_host(broken, tmp_path, strict=False)
    case = decode_case(m=8, k=13, n=WIDE, ranks=(3, 3, 3), ids=[0, 1, 5, -1, 0, 1, 1, 0])
    case.b[3:6, ::2] = float("inf")
    with pytest.raises(AssertionError):
        for order in (0, 1):
            assert_right(case, run(library, case, order))


def test_divergent_barrier_is_reported(tmp_path):
    """A barrier that one warp never reaches is an error of the launch, not a hang."""
    source = (CSRC / "multi_lora_decode.cu").read_text()
    broken = tmp_path / "divergent.cu"
    broken.write_text(source.replace("__syncthreads();", "if (warp != 3) __syncthreads();"))
    library = compile_for_host(broken, tmp_path, strict=False)
    assert call(library, decode_case()) == LAUNCH_FAILURE
