"""The CUDA kernel on a GPU: values, bits, groups, clusters, streams, graphs, overlap.

Tests named "small" also run under compute-sanitizer (benchmarks/gpu.py).
"""

import re

import pytest
import torch

from ckf.kernels import cuda
from tests.kernels.decode_cases import (
    DTYPES,
    GroupCase,
    assert_group_right,
    assert_poison_around,
    assert_right,
    decode_case,
    group_case,
)

pytestmark = pytest.mark.gpu

SMALL = [
    {"m": 1, "k": 1, "n": 1, "ranks": (1, 1)},
    {"m": 4, "k": 577, "n": 727, "ranks": (5, 0, 9)},
    {"m": 9, "k": 264, "n": 264, "ranks": (16, 16, 16, 16, 16)},
    {"m": 70, "k": 32, "n": 1000, "ranks": (4, 4)},
    {"m": 256, "k": 40, "n": 1000, "ranks": (3, 3)},
]
MODEL = [
    {"m": 16, "k": 4096, "n": 4096, "ranks": (16, 16, 16, 16, 16)},
    {"m": 256, "k": 2048, "n": 8192, "ranks": (8, 8, 8, 8, 8, 8, 8, 8, 8)},
    {"m": 2, "k": 64, "n": 64, "ranks": [64] * 256},
]


GROUPS = [
    {"m": 4, "k": 128, "ns": (264, 64, 128), "ranks": ((4, 4, 4), (8, 2, 2), (0, 5, 1))},
    {"m": 3, "k": 41, "ns": (7, 300), "ranks": ((3, 1, 2), (0, 0, 0)), "padding": 1},
    {"m": 6, "k": 32, "ns": (2600, 40), "ranks": ((2, 140, 128), (1, 1, 1)), "offset": 1},
    {"m": 2, "k": 16, "ns": [8] * 8, "ranks": [(2, i, 1) for i in range(8)]},
]
LLAMA = [
    {"m": 16, "k": 4096, "ns": (4096, 1024, 1024), "ranks": [(16,) * 5] * 3},
    {"m": 1, "k": 4096, "ns": (4096, 1024, 1024), "ranks": [(16,) * 5] * 3},
    {"m": 64, "k": 4096, "ns": (14336, 14336), "ranks": [(64,) * 5, (128, 64, 32, 8, 0)]},
    {"m": 16, "k": 14336, "ns": (4096,), "ranks": [(128,) * 5]},
]


def run_group_on_gpu(case: GroupCase, **options) -> list[torch.Tensor]:
    """The results on the host; the case stays as it was."""
    there = case.to("cuda")
    versions = [y._version for y in there.ys]
    cuda.multi_lora_decode_group(**there.tensors(), **options)
    assert all(y._version > v for y, v in zip(there.ys, versions, strict=True)), (
        "autograd was not told of the write"
    )
    for y in there.ys:
        assert_poison_around(y)
    return [y.cpu() for y in there.ys]


def run_on_gpu(case):
    return run_group_on_gpu(case.group())[0]


@pytest.fixture
def gpu():
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    usable, why = cuda.available()
    assert usable, why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [{}, {"padding": 8}, {"padding": 3}, {"offset": 1}], ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=lambda s: f"small{s['m']}x{s['k']}x{s['n']}")
def test_small(gpu, sizes, layout, dtype):
    case = decode_case(**sizes, **layout, dtype=dtype)
    assert_right(case, run_on_gpu(case))


def test_small_ids(gpu):
    case = decode_case(m=8, ranks=(2, 2, 2, 2), ids=[-1, 0, 2, 3, -2, 2**40, -(2**62), 1])
    assert_right(case, run_on_gpu(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MODEL, ids=lambda s: f"{s['m']}x{s['k']}x{s['n']}")
def test_model_sizes(gpu, sizes, dtype):
    """Within the rule of the other backends too: at most twice the error of same-dtype torch."""
    case = decode_case(**sizes, dtype=dtype)
    result = run_on_gpu(case)
    assert_right(case, result)
    assert torch.equal(result, run_on_gpu(case)), "not the same bits twice"
    y, x, a, b = (t.to("cuda") for t in (case.y, case.x, case.a, case.b))
    gates = torch.cat([case.column_gates, torch.zeros_like(case.column_gates[:1])]).to("cuda")
    gates = gates[case.task_ids.to("cuda")]  # -1 takes the extra row of zeros
    same_dtype = (y + ((x @ a.t()) * gates).to(dtype) @ b).double()
    wide = y.double() + ((x.double() @ a.double().t()) * gates.double()) @ b.double()
    band = torch.finfo(dtype).eps * wide.abs().max()
    ours = (result.to("cuda").double() - wide).abs().max()
    assert ours <= 2 * (same_dtype - wide).abs().max() + band


def test_selection(gpu):
    case = decode_case(m=8, n=8192, ranks=(4, 4, 4), ids=[0, 1, 0, 1, -1, 0, 1, 1])
    clean = run_on_gpu(case)
    case.a[4:6] = float("inf")
    case.b[6:8] = float("nan")
    result = run_on_gpu(case)
    others = case.task_ids != 0
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@HALVES
def test_small_tiles(gpu, dtype):
    """More rows than the scalar kernel takes: ids of all kinds, unlike linears, odd sizes."""
    ids = [-1, 0, 2, 3, -2, 2**40, -(2**62), 1] * 3
    for sizes in ({"k": 64, "n": 264}, {"k": 41, "n": 29, "padding": 3}):
        case = decode_case(m=24, ranks=(2, 20, 2, 2), ids=ids, dtype=dtype, **sizes)
        assert_right(case, run_on_gpu(case))
    for sizes in GROUPS:
        sizes = sizes | {"m": 24}
        case = group_case(**sizes, dtype=dtype, ids=[-1, 0, 1, 7, 0, 1] * 4)
        assert_group_right(case, run_group_on_gpu(case))


@HALVES
def test_small_tiles_select(gpu, dtype):
    case = decode_case(m=24, n=512, ranks=(4, 4, 4), ids=[0, 1, 0, 1, -1, 0, 1, 1] * 3, dtype=dtype)
    clean = run_on_gpu(case)
    case.a[4:6] = float("inf")
    case.b[6:8] = float("nan")
    result = run_on_gpu(case)
    others = case.task_ids != 0
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


@pytest.mark.parametrize("overlap", [0, 1, cuda.EARLY])
def test_tiles_in_a_graph(gpu, overlap):
    """After a kernel that writes y alone, as a base product does."""
    case = decode_case(m=24, k=256, n=512, dtype=torch.bfloat16).to("cuda")
    start = case.y.clone()
    wanted = run_on_gpu(decode_case(m=24, k=256, n=512, dtype=torch.bfloat16))
    group = cuda.DecodeGroup(case.a, [case.b], case.column_gates)
    group([case.y], case.x, case.task_ids, overlap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.y.copy_(start)
        group([case.y], case.x, case.task_ids, overlap)
    for _ in range(20):
        graph.replay()
        assert torch.equal(case.y.cpu(), wanted)


@pytest.mark.parametrize("overlap", [False, True])
def test_stream_and_graph(gpu, overlap):
    """The launch goes to the current stream and is captured by a CUDA graph."""
    case = decode_case(m=4, k=256, n=512).to("cuda")
    start, wanted = case.y.clone(), run_on_gpu(decode_case(m=4, k=256, n=512))
    group = cuda.DecodeGroup(case.a, [case.b], case.column_gates)
    group([case.y], case.x, case.task_ids, overlap)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.x.add_(0)
        group([case.y], case.x, case.task_ids, overlap)
    for _ in range(2):
        case.y.copy_(start)
        graph.replay()
        assert torch.equal(case.y.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("sizes", GROUPS, ids=lambda s: "small" + "-".join(map(str, s["ns"])))
def test_group_of_unlike_linears(gpu, sizes, dtype, soft):
    case = group_case(**sizes, dtype=dtype, soft=soft, ids=[-1, 0, 1, 7, 0, 1][: sizes["m"]])
    assert_group_right(case, run_group_on_gpu(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LLAMA, ids=lambda s: f"{s['m']}x{s['k']}x{s['ns'][0]}")
def test_group_of_model_sizes(gpu, sizes, dtype):
    case = group_case(**sizes, dtype=dtype)
    results = run_group_on_gpu(case)
    assert_group_right(case, results)
    again = run_group_on_gpu(case)
    assert all(torch.equal(r, s) for r, s in zip(results, again, strict=True)), "not the same bits"


def test_same_bits_in_a_group_and_alone(gpu):
    """A row's bits depend on neither the other rows nor the other linears."""
    case = group_case(
        m=16, k=4096, ns=(4096, 1024), ranks=[(16,) * 5] * 2, dtype=torch.bfloat16
    ).to("cuda")
    before = [y.clone() for y in case.ys]
    cuda.multi_lora_decode_group(**case.tensors())
    for linear, start, together in zip(case.linears(), before, case.ys, strict=True):
        for rows in (slice(0, 16), slice(3, 4), slice(5, 12)):
            y = start[rows].clone()
            gates, ids = linear.column_gates.contiguous(), case.task_ids[rows]
            cuda.multi_lora_decode(y, case.x[rows], linear.a, linear.b, gates, ids)
            assert torch.equal(y, together[rows])


def test_clusters_are_used(gpu):
    """Bits are the same without, so only the kernel's name tells."""
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no clusters before sm_90")
    case = decode_case(m=4, k=256, n=512).to("cuda")
    cuda.multi_lora_decode(**case.tensors())
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        cuda.multi_lora_decode(**case.tensors())
        torch.cuda.synchronize()
    names = [e.key for e in profile.key_averages() if "multi_lora_decode_kernel" in e.key]
    # template arguments: type, rows, cluster, aligned
    assert names and all(re.search(r"<\w+, (\(int\))?\d, (\(int\))?8, ", n) for n in names), names


@pytest.mark.parametrize(
    "preceding,overlap",
    [("x", 1), ("y", 1), ("ids", 1), ("nothing", 1), ("y", cuda.EARLY), ("nothing", cuda.EARLY)],
)
def test_overlap_small_reads_what_was_just_written(gpu, preceding, overlap):
    """Whichever tensor the kernel before wrote, plain or slow, the update sees all of it."""
    m = 24 if overlap == cuda.EARLY else 8  # the scalar kernel knows no early start
    case = group_case(m=m, k=2048, ns=(2048, 512), ranks=[(8, 8, 8)] * 2, dtype=torch.bfloat16)
    expected = run_group_on_gpu(case)
    for _ in range(20):
        there = case.to("cuda")
        x, ys = there.x.clone(), [y.clone() for y in there.ys]
        ids = there.task_ids.clone()
        if preceding == "x":
            there.x.fill_(7)
        elif preceding == "ids":
            there.task_ids.fill_(-1)
        elif preceding == "y":
            for y in there.ys:
                y.fill_(3)
        busy = torch.empty(1 << 26, device="cuda")
        torch.cuda.synchronize()
        busy.normal_()
        if preceding == "x":
            there.x.copy_(x)
        elif preceding == "ids":
            there.task_ids.copy_(ids)
        elif preceding == "y":
            for y, start in zip(there.ys, ys, strict=True):
                y.copy_(start)
        cuda.multi_lora_decode_group(**there.tensors(), overlap=overlap)
        assert all(torch.equal(y.cpu(), e) for y, e in zip(there.ys, expected, strict=True))


def test_mixed_devices_are_refused(gpu):
    case = decode_case()
    with pytest.raises(ValueError, match="x is a torch.strided tensor on cpu"):
        cuda.multi_lora_decode(**(case.to("cuda").tensors() | {"x": case.x}))
    with pytest.raises(ValueError, match=r"bs\[0\] is torch.float16; expected torch.float32"):
        cuda.multi_lora_decode(**(case.to("cuda").tensors() | {"b": case.b.half().cuda()}))


def test_fake_tensors_are_refused(gpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = {name: torch.empty(2, 8, device="cuda") for name in ("y", "x", "a", "b")}
        ids = torch.zeros(2, dtype=torch.int64, device="cuda")
        gates = torch.ones(1, 2, device="cuda")
    with pytest.raises(ValueError, match="a is a FakeTensor"):
        cuda.multi_lora_decode(**fake, column_gates=gates, task_ids=ids)


def test_no_synchronisation(gpu):
    case = decode_case(m=4, k=256, n=512).to("cuda")
    cuda.multi_lora_decode(**case.tensors())
    torch.cuda.set_sync_debug_mode("error")
    try:
        cuda.multi_lora_decode(**case.tensors())
    finally:
        torch.cuda.set_sync_debug_mode("default")
