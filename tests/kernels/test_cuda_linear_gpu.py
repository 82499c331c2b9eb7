"""The decode kernels that own the base on a GPU: values, bits, spans, streams, graphs, plans.

Tests named "small" also run under compute-sanitizer (benchmarks/gpu.py).
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ckf.kernels import cuda, multi_lora_linear
from ckf.kernels.reference import multi_lora_reference
from tests.kernels.cases import random_case
from tests.kernels.frozen_cases import FrozenCase, assert_frozen_right, frozen_case
from tests.kernels.test_cuda_gpu import gpu as extension  # noqa: F401
from tests.kernels.test_cuda_sanitized import to_gpu

pytestmark = pytest.mark.gpu

SMALL = [
    {"m": 1, "k": 8, "ns": (1,), "ranks": ((1, 1),)},
    {"m": 5, "k": 584, "ns": (727, 24), "ranks": ((5, 0, 9), (0, 0, 0))},
    {"m": 16, "k": 264, "ns": (264,), "ranks": ((16,) * 5,)},
    {"m": 9, "k": 72, "ns": (40, 7), "ranks": ((90, 90, 70), (3, 1, 5))},
    {"m": 13, "k": 776, "ns": (300,), "ranks": ((30, 30, 30),)},
    {"m": 7, "k": 136, "ns": (200, 16), "ranks": ((43, 43, 42), (4, 4, 4))},
    {"m": 4, "k": 1048, "ns": (40, 300), "ranks": ((90, 90, 76), (4, 4, 4))},  # A in two rounds
    {"m": 3, "k": 64, "ns": (20000,), "ranks": ((4, 4, 4),)},  # spans one after the other
    {"m": 16, "k": 64, "ns": (20000,), "ranks": ((4, 4, 4),)},
]
MODEL = [
    {"m": m, "k": 4096, "ns": ns, "ranks": [(16,) * 5] * len(ns)}
    for m in (1, 4, 11, 16)
    for ns in ((4096,), (4096, 1024, 1024), (14336, 14336))
] + [{"m": 4, "k": 14336, "ns": (4096,), "ranks": [(32,) * 5]}]
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
MANY = [
    {"m": 17, "k": 64, "ns": (40,), "ranks": ((4, 4, 4),)},
    {"m": 64, "k": 136, "ns": (264, 24), "ranks": ((16,) * 5, (26, 26, 26, 26, 24))},
    {"m": 40, "k": 1032, "ns": (300,), "ranks": ((0, 3, 0),)},
    {"m": 33, "k": 200, "ns": (72, 8), "ranks": ((0, 0), (5, 2))},
    {"m": 50, "k": 64, "ns": (20000,), "ranks": ((4, 4, 4),)},
]
FORMS = pytest.mark.parametrize("form", list(cuda.FORMS))


def forms_for(ranks) -> list[str]:
    return [form for form in cuda.FORMS if max(map(sum, ranks)) <= cuda.FORMS[form][2]]


@pytest.fixture
def gpu(extension):  # noqa: F811
    if torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("no clusters")


def run(case: FrozenCase, form: str, rows: slice = slice(None)) -> list[torch.Tensor]:
    """The results on the host."""
    there = case.to("cuda")
    group = there.group
    prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
    ids = group.task_ids[rows]
    ys = prepared.linears(group.x[rows], there.weights, there.biases, ids, form)
    assert ys is not None, "the kernel was not for it"
    return [y.cpu() for y in ys]


@HALVES
@pytest.mark.parametrize(
    ("form", "options"),
    [
        *(("loads", options) for options in ({}, {"padding": 8, "bias": False}, {"soft": True})),
        ("wgmma", {}),
        ("wgmma", {"padding": 8, "bias": False, "soft": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", SMALL, ids=lambda s: f"small{s['m']}x{s['k']}x{s['ns'][0]}")
def test_small(gpu, sizes, form, options, dtype):
    if form not in forms_for(sizes["ranks"]):
        pytest.skip("ranks above what this kernel takes")
    case = frozen_case(**sizes, **options, dtype=dtype)
    assert_frozen_right(case, run(case, form))


@HALVES
@pytest.mark.parametrize("sizes", MANY, ids=lambda s: f"small{s['m']}x{s['k']}x{s['ns'][0]}")
def test_small_more_rows(gpu, sizes, dtype):
    case = frozen_case(**sizes, padding=8, soft=True, dtype=dtype)
    first = run(case, "wgmma")
    assert_frozen_right(case, first)
    for _ in range(3):
        again = run(case, "wgmma")
        assert all(torch.equal(r, s) for r, s in zip(first, again, strict=True)), "other bits"


@HALVES
@FORMS
def test_small_ids_and_dead_experts(gpu, form, dtype):
    ids = [-1, 0, 2, 3, -2, 2**40, -(2**62), 1]
    case = frozen_case(m=8, k=264, ns=(520,), ranks=((4, 4, 4, 4),), ids=ids, dtype=dtype)
    (clean,) = run(case, form)
    assert_frozen_right(case, [clean])
    case.group.a[4:6] = float("nan")  # of task 0
    case.group.bs[0][6:8] = float("inf")
    (result,) = run(case, form)
    others = [0, 2, 7]
    assert torch.equal(result[others], clean[others])
    assert not result[1].isfinite().any()


@HALVES
@pytest.mark.parametrize("sizes", MODEL, ids=lambda s: f"{s['m']}x{s['k']}x{s['ns'][0]}")
def test_model_sizes(gpu, sizes, dtype):
    case = frozen_case(**sizes, dtype=dtype)
    for form in forms_for(sizes["ranks"]):
        results = run(case, form)
        assert_frozen_right(case, results)
        for _ in range(3):
            again = run(case, form)
            assert all(torch.equal(r, s) for r, s in zip(results, again, strict=True)), "bits"


@HALVES
@pytest.mark.parametrize("ns", [(4096,), (4096, 1024, 1024), (14336, 14336)], ids=str)
def test_model_sizes_of_more_rows(gpu, ns, dtype):
    for m in (29, 64):
        case = frozen_case(m=m, k=4096, ns=ns, ranks=[(16,) * 5] * len(ns), dtype=dtype)
        assert_frozen_right(case, run(case, "wgmma"))


@FORMS
def test_same_bits_for_fewer_rows(gpu, form):
    """A row's bits do not depend on the other rows."""
    most = cuda.FORMS[form][1]
    case = frozen_case(m=most, k=4096, ns=(4096, 1024), ranks=[(16,) * 5] * 2)
    together = run(case, form)
    for rows in (slice(0, 9), slice(3, 4), slice(5, most - 3)):
        for some, y in zip(run(case, form, rows), together, strict=True):
            assert torch.equal(some, y[rows])


@FORMS
def test_stress(gpu, form):
    """Many launches one after another on fresh memory: the same bits every time."""
    for m in [m for m in (3, 9, 16, 29, 40, 52, 64) if m <= cuda.FORMS[form][1]]:
        there = frozen_case(m=m, k=2048, ns=(2048, 512), ranks=[(16,) * 5] * 2).to("cuda")
        group = there.group
        prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
        arguments = (group.x, there.weights, there.biases, group.task_ids, form)
        first = [y.clone() for y in prepared.linears(*arguments)]
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(1000):
            for y, wanted in zip(prepared.linears(*arguments), first, strict=True):
                wrong += (y != wanted).sum()
                y.fill_(float("nan"))
        assert wrong.item() == 0


@FORMS
def test_graph_and_no_synchronisation(gpu, form):
    there = frozen_case(m=4, k=512, ns=(512,), ranks=((8, 8, 8),)).to("cuda")
    group = there.group
    prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
    arguments = (group.x, there.weights, there.biases, group.task_ids, form)
    (wanted,) = prepared.linears(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepared.linears(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        group.x.mul_(-1)
        (y,) = prepared.linears(*arguments)
    for _ in range(2):  # the second replay sees the first x again
        graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("rows", [4, 16, 64])
def test_as_a_plan_of_the_backend(gpu, rows):
    """At most twice the error of same-dtype torch; not for more rows."""
    made = random_case(m=rows, k=264, n=136, ranks=[16, 16, 16], tasks=2)
    case, backend, most = to_gpu(made, torch.bfloat16), "cuda:linear", cuda.MAX_LINEAR_ROWS
    with torch.no_grad():
        exact = multi_lora_reference(*case.to(torch.float64).arguments())
        plain = multi_lora_reference(*case.arguments())
        ours = multi_lora_linear(*case.arguments(), backend=backend)
        band = 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
        allowed = 2 * (plain.double() - exact).abs().max() + band
        assert (ours.double() - exact).abs().max() <= allowed
        compiled = torch.compile(partial(multi_lora_linear, backend=backend), fullgraph=True)
        assert torch.equal(compiled(*case.arguments()), ours)
        many = random_case(m=most + 1, k=264, n=136, ranks=[16, 16, 16], tasks=2)
        many = to_gpu(many, torch.bfloat16)
        with pytest.raises(ValueError, match=f"{most + 1} rows; this plan is for {most}"):
            multi_lora_linear(*many.arguments(), backend=backend)


@FORMS
def test_the_first_call_inside_a_capture_on_a_side_stream(gpu, form):
    """In a process of its own: modules are loaded, attributes asked while a graph is captured."""
    code = f"""
import torch
from ckf.kernels import cuda
from tests.kernels.frozen_cases import assert_frozen_right, frozen_case

case = frozen_case(m=16, k=512, ns=(520, 24), ranks=[(8, 8, 8)] * 2)
there = case.to("cuda")
group = there.group
prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
    ys = prepared.linears(group.x, there.weights, there.biases, group.task_ids, {form!r})
graph.replay()
torch.cuda.synchronize()
assert_frozen_right(case, [y.cpu() for y in ys])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_weight_of_more_than_2_31_elements(gpu):
    """The last rows of W are those that a 32-bit offset would miss."""
    n, k = 2**18 + 9, 8192
    if torch.cuda.mem_get_info()[0] < 3 * n * k:
        pytest.skip(f"takes {3 * n * k / 2**30:.0f} GiB")
    case = frozen_case(m=2, k=k, ns=(n,), ranks=((4, 4, 4),), bias=False, random_weights=False)
    there = case.to("cuda")
    group = there.group
    weight = torch.zeros(n, k, dtype=torch.bfloat16, device="cuda")
    weight[-9:] = torch.randn(9, k, device="cuda") / k**0.5
    prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
    (y,) = prepared.linears(group.x, [weight], [None], group.task_ids)
    case.weights = [weight[-9:].cpu()]
    case.group.bs, case.group.ys = [case.group.bs[0][:, -9:]], [case.group.ys[0][:, -9:]]
    assert_frozen_right(case, [y[:, -9:].cpu()])
