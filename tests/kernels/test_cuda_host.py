"""The CUDA kernel's own source, compiled by the host's C++ compiler and run thread by thread.

``csrc/host_shim.h`` stands in for the GPU, so that indices, tails, votes, barriers and clusters are
tested on every machine. What it cannot show (memory coalescing, races inside a warp) needs a GPU.
"""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import cuda
from ckf.kernels.cuda import _DTYPES
from tests.kernels.decode_cases import (
    DTYPES,
    GUARD,
    DecodeCase,
    GroupCase,
    assert_group_right,
    assert_poison_around,
    assert_right,
    decode_case,
    exact,
    group_case,
    stub_cuda,
)
from tests.kernels.host_build import CSRC, INVALID_VALUE, compile_for_host


class Linear(ctypes.Structure):
    """CkfLinear in csrc/launchers.h."""

    _fields_ = (
        ("y", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("y_stride", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("rank", ctypes.c_int64),
    )


@dataclass
class Host:
    """The compiled kernel; ``clusters``: of eight blocks, as on Hopper, or blocks alone."""

    library: ctypes.CDLL
    clusters: bool = True


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_host(CSRC / "multi_lora_decode.cu", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module", params=["clusters", "blocks"])
def host(library, request) -> Host:
    return Host(library, request.param == "clusters")


def call(host: Host, case: DecodeCase | GroupCase, order: int = 0, **changes) -> int:
    group = case.group() if isinstance(case, DecodeCase) else case
    (m, k), tasks = group.x.shape, group.column_gates.shape[0]
    sizes = {"m": m, "k": k, "tasks": tasks, "x_stride": group.x.stride(0)}
    linears = [
        Linear(y.data_ptr(), b.data_ptr(), y.stride(0), b.shape[1], changes.get("rank", b.shape[0]))
        for y, b in zip(group.ys, group.bs, strict=True)
    ]
    host.library.ckf_host_set_order(ctypes.c_uint(order))
    host.library.ckf_host_set_clusters(ctypes.c_int(host.clusters))
    tensors = (group.x, group.a, group.column_gates, group.task_ids)
    return host.library.ckf_multi_lora_decode(
        (Linear * len(linears))(*linears),
        ctypes.c_int(changes.get("count", len(linears))),
        *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
        *(ctypes.c_int64(changes.get(name, size)) for name, size in sizes.items()),
        ctypes.c_int(_DTYPES[group.x.dtype]),
        ctypes.c_int(0),
        ctypes.c_int(0),
        ctypes.c_void_p(None),
    )


def run_group(host: Host, case: GroupCase, order: int = 0) -> list[torch.Tensor]:
    """The results; the case stays as it was, and nothing around a y may change."""
    before = [y._base.clone() for y in case.ys]
    assert call(host, case, order) == 0
    results = [y.clone() for y in case.ys]
    for y, base in zip(case.ys, before, strict=True):
        assert_poison_around(y)
        y._base.copy_(base)
    return results


def run(host: Host, case: DecodeCase, order: int = 0) -> torch.Tensor:
    return run_group(host, case.group(), order)[0]


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


@pytest.fixture
def scalar(host):
    """16-bit types by the scalar kernel, as a GPU takes it for few rows."""
    host.library.ckf_host_set_scalar_rows(ctypes.c_int64(16))
    yield host
    host.library.ckf_host_set_scalar_rows(ctypes.c_int64(0))


@pytest.mark.parametrize("m", [1, 5, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_few_rows_of_16_bits(scalar, m, dtype):
    """On either side of where the tiles begin; odd sizes as well."""
    for sizes in ({"k": 264, "n": 264, "ranks": (16,) * 5}, {"k": 41, "n": 29, "ranks": (3, 1, 9)}):
        case = decode_case(m=m, **sizes, dtype=dtype)
        assert_right(case, run(scalar, case))


# One a kernel: the other 16-bit type differs from bfloat16 in a conversion.
KERNELS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.mark.parametrize("m,n", [(70, 520), (70, 1000), (256, 300), (70, 8200)])
@KERNELS
def test_many_rows(host, m, n, dtype):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 5, "k": 64, "ns": (264, 64, 128), "ranks": ((4, 4, 4), (8, 2, 2), (0, 5, 1))},
        {"m": 3, "k": 41, "ns": (7, 300), "ranks": ((3, 1, 2), (0, 0, 0)), "padding": 1},
        {"m": 2, "k": 48, "ns": (16, 0, 24), "ranks": ((2, 2, 2), (3, 3, 3), (1, 1, 1))},
        {"m": 2, "k": 16, "ns": [8] * 8, "ranks": [(2, i, 1) for i in range(8)]},
        {"m": 6, "k": 32, "ns": (2600, 40), "ranks": ((2, 140, 128), (1, 1, 1)), "offset": 1},
    ],
    ids=lambda s: "-".join(map(str, s["ns"])),
)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_group_of_unlike_linears(host, sizes, dtype, soft):
    case = group_case(**sizes, dtype=dtype, soft=soft, ids=[-1, 0, 1, 7, 0, 1][: sizes["m"]])
    assert_group_right(case, run_group(host, case))


def test_same_bits_in_a_group_and_alone(library):
    """Nor does it matter whether eight blocks share the sum over k."""
    sizes = {"m": 6, "k": 2100, "ns": (520, 2056), "ranks": ((4, 4, 4), (8, 2, 2))}
    case = group_case(**sizes, dtype=torch.float16, seed=4)
    together = run_group(Host(library), case)
    for linear, result in zip(case.linears(), together, strict=True):
        linear.column_gates = linear.column_gates.contiguous()
        for clusters in (True, False):
            y = linear.y.clone()
            alone = GroupCase(
                [y], linear.x, linear.a, [linear.b], linear.column_gates, linear.task_ids
            )
            assert call(Host(library, clusters), alone) == 0
            assert torch.equal(y, result)


@pytest.mark.parametrize("n,k", [(24, 33), (4200, 33), (4200, 40)])
@KERNELS
def test_many_columns_with_gaps(host, n, k, dtype):
    """More than a window of 256 (80) columns and a vote of 1024; most columns dead."""
    case = decode_case(m=3, k=k, n=n, ranks=(2, 1500, 3, 700, 5), ids=[1, 3, -1], dtype=dtype)
    assert_right(case, run(host, case))


@KERNELS
def test_rank_16384(host, dtype):
    case = decode_case(m=2, k=8, n=8, ranks=[64] * 256, ids=[0, 254], dtype=dtype)
    assert_right(case, run(host, case))


def test_many_windows_and_slices(host):
    """160 live columns; so many clusters that each takes several slices of n."""
    case = decode_case(m=66, k=24, n=8200, ranks=(50, 61, 49), dtype=torch.bfloat16)
    assert_right(case, run(host, case))


# 64 slices of n: few enough blocks for one row each at m = 1, enough for four rows each at m = 8.
WIDE = 64 * 128


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("n", [24, WIDE], ids=["a row a block", "four rows a block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_of_zero_is_a_selection(host, bad, n, dtype):
    """inf and NaN in A and B of an expert stay with the rows of its own task."""
    case = decode_case(m=8, n=n, ranks=(4, 4, 4), ids=[0, 1, 0, 1, -1, 0, 1, 1], dtype=dtype)
    clean = run(host, case)
    case.a[4:6] = bad  # columns of task 0
    case.b[6:8] = bad
    result = run(host, case)
    others = case.task_ids != 0
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_of_b_are_multiplied(host, dtype):
    """inf and NaN where and only where arithmetic gives them, in a live expert and beside one."""
    case = decode_case(m=20, k=40, n=72, ranks=(4, 4, 4), dtype=dtype)
    case.b[1, 3], case.b[6, 5], case.b[9, ::3] = float("inf"), float("nan"), -float("inf")
    case.a[5] = 0  # a live h of zero times inf is NaN
    case.b[5, 7] = float("inf")
    result = run(host, case)
    assert_right(case, result)
    assert torch.equal(result.isinf(), exact(case)[0].isinf())
    assert result[:, 5].isnan().any() and result[:, 7].isnan().any()


@KERNELS
def test_overflow_of_s_stays_out(host, dtype):
    """A finite A and x whose product overflows float32, behind a gate of zero."""
    case = decode_case(
        m=8, k=64, n=WIDE, ranks=(4, 4, 4), ids=[0, 1, 0, 1, 0, 1, 0, 1], dtype=dtype
    )
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


@pytest.mark.parametrize("ranks", [(5, 6, 7), (5, 60, 70)], ids=str)
@KERNELS
def test_neighbours_do_not_matter(host, dtype, ranks):
    """A row alone (one row a block) and among seven others (four rows a block): the same bits."""
    case = decode_case(m=8, k=40, n=WIDE, ranks=ranks, seed=3, dtype=dtype)
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


def test_through_the_bridge(library, monkeypatch):
    """ckf.kernels.cuda with this kernel in the extension's place: each pointer and size arrives."""

    class OnHost:
        def __init__(self, a, b, n, rank, gates, k, tasks, dtype, device):
            self.linears = list(zip(b, n, rank, strict=True))
            self.a, self.gates, self.k, self.tasks = a, gates, k, tasks
            self.dtype, self.device = dtype, device

        def __call__(self, y, y_strides, x, x_stride, task_ids, m, overlap, stream):
            linears = [
                Linear(y_l, b, stride, n, rank)
                for y_l, stride, (b, n, rank) in zip(y, y_strides, self.linears, strict=True)
            ]
            status = library.ckf_multi_lora_decode(
                (Linear * len(linears))(*linears),
                ctypes.c_int(len(linears)),
                *map(ctypes.c_void_p, (x, self.a, self.gates, task_ids)),
                *map(ctypes.c_int64, (m, self.k, self.tasks, x_stride)),
                *map(ctypes.c_int, (self.dtype, self.device, overlap)),
                ctypes.c_void_p(stream),
            )
            assert status == 0

    stub_cuda(monkeypatch, OnHost)
    case = group_case(m=6, k=72, ns=(264, 40), padding=8, dtype=torch.bfloat16)
    versions = [y._version for y in case.ys]
    expected = case.to("cpu")
    cuda.multi_lora_decode_group(**case.tensors())
    assert_group_right(expected, case.ys)
    assert [y._version for y in case.ys] > versions, "autograd was not told of the write"


def test_launcher_refuses(host):
    case = decode_case()
    wrongs = [{"m": -1}, {"k": -1}, {"m": 65536}, {"rank": 2**31}, {"tasks": 2**40}]
    for wrong in (*wrongs, {"count": 9}, {"count": -1}):
        assert call(host, case, **wrong) == INVALID_VALUE, wrong


def test_the_poison_works():
    """If guard elements were ordinary numbers, reads past the end would go unseen."""
    case = decode_case()
    assert case.x._base[:GUARD].isnan().all()
    assert case.x._base[-GUARD:].isnan().all()
    assert (case.task_ids._base[-GUARD:] > 10**14).all()


def test_conversions_of_the_shim(library):
    library.ckf_host_half_to_float.restype = ctypes.c_float
    library.ckf_host_float_to_half.argtypes = [ctypes.c_float]
    library.ckf_host_float_to_bfloat16.argtypes = [ctypes.c_float]
    for name in ("ckf_host_float_to_half", "ckf_host_float_to_bfloat16"):
        getattr(library, name).restype = ctypes.c_uint16
    bits = torch.arange(0, 65536, 7, dtype=torch.int32)
    halves = bits.to(torch.int16).view(torch.float16)
    ours = torch.tensor([library.ckf_host_half_to_float(ctypes.c_uint16(b)) for b in bits.tolist()])
    assert torch.equal(ours.nan_to_num(nan=7.0), halves.float().nan_to_num(nan=7.0))
    g = torch.Generator().manual_seed(0)
    floats = torch.randn(4000, generator=g) * 10.0 ** torch.randint(-9, 7, (4000,), generator=g)
    for dtype, convert in (
        (torch.float16, library.ckf_host_float_to_half),
        (torch.bfloat16, library.ckf_host_float_to_bfloat16),
    ):
        ours = torch.tensor([convert(v) for v in floats.tolist()], dtype=torch.int32)
        assert torch.equal(ours.to(torch.int16), floats.to(dtype).view(torch.int16))
