"""The Hopper GEMM on its chip: values, bits, streams, graphs.

Tests named "small" also run under compute-sanitizer (benchmarks/gpu.py).
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ckf.kernels import hopper, multi_lora_linear
from ckf.kernels.dropout import dropout_mask, dropout_scale
from tests.kernels.cases import assert_as_good_as_reference, on_gpu, random_case
from tests.kernels.decode_cases import GUARD, assert_poison_around
from tests.kernels.hopper_cases import DTYPES, GemmCase, assert_right, exact, gemm_case
from tests.kernels.hopper_shrink_cases import VARIANTS, assert_shrunk, shrink_case

pytestmark = pytest.mark.gpu

SMALL = [
    (1, 8, 8, 8),
    (1, 8, 1, 1),
    (129, 264, 41, 5),
    (256, 248, 130, 16),
    (700, 1032, 328, 80),
]
MODEL = [
    (8192, 4096, 4096, 80),
    (2048, 14336, 4096, 80),
    (2048, 4096, 14336, 80),
    (2048, 1024, 4096, 512),
    (8191, 4104, 4096, 72),
]


@pytest.fixture(autouse=True)
def chip():
    usable, why = hopper.available()
    if not usable:
        pytest.skip(why)


@pytest.mark.parametrize("dx", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("sizes", SMALL, ids=lambda s: "small" + "x".join(map(str, s)))
def test_small_integers_exactly(sizes, dx):
    for dtype in DTYPES:
        case = gemm_case(*sizes, dx=dx, dtype=dtype, integers=True)
        assert torch.equal(case.to("cuda").run().cpu(), exact(case)[0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"padding": 8}, {"dx": True}, {"dx": True, "p": 0.3}],
    ids=lambda o: "small-" + "-".join(o),
)
def test_small_against_float64(options, dtype):
    case = gemm_case(140, 264, 136, 24, dtype=dtype, **options)
    assert_right(case, case.to("cuda").run())


def by_cublas(case: GemmCase, dtype: torch.dtype) -> torch.Tensor:
    """The same from torch's own products in ``dtype``."""
    x, w, h, b = (t.to(dtype) for t in (case.x, case.weight, case.h, case.b))
    if not case.dx:
        bias = None if case.bias is None else case.bias.to(dtype)
        return F.linear(x, w, bias) + h @ b
    update = h @ b
    if case.p:
        keep = dropout_mask(x.shape[0], b.shape[1], case.p, case.seed, x.device)
        update = torch.where(keep, update * dropout_scale(case.p), 0)
    return update + x @ w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"dx": True}, {"dx": True, "p": 0.1}], ids=str)
@pytest.mark.parametrize("sizes", MODEL, ids=lambda s: "x".join(map(str, s)))
def test_model_sizes(sizes, options, dtype):
    """At most twice the error of same-dtype torch, plus a unit of the largest element."""
    case = gemm_case(*sizes, dtype=dtype, **options).to("cuda")
    wide = by_cublas(case, torch.float64)
    band = torch.finfo(dtype).eps * wide.abs().max()
    ours = (case.run().double() - wide).abs().max()
    torchs = (by_cublas(case, dtype).double() - wide).abs().max()
    assert ours <= 2 * torchs + band


def test_same_bits_a_hundred_times():
    for dx in (False, True):
        case = gemm_case(2048, 4096, 4096, 80, dx=dx, p=0.1).to("cuda")
        first = case.run()
        for _ in range(100):
            assert torch.equal(first, case.run())


def test_small_every_element_is_written_and_no_other(monkeypatch):
    def poisoned(m, n, dtype, device):
        buffer = torch.full((m * n + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        return buffer.as_strided((m, n), (n, 1), GUARD)

    for dx in (False, True):
        case = gemm_case(300, 520, 72, 16, dx=dx).to("cuda")
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            y = case.run()
        assert y.isfinite().all()
        assert_poison_around(y)


def test_stream_and_graph():
    case = gemm_case(300, 520, 200, 80).to("cuda")
    wanted = case.run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(case.run(), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run()
    for _ in range(2):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted)
    case.x.mul_(2)
    graph.replay()
    assert torch.equal(y, case.run())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_plan_takes_it(monkeypatch, dropout_p):
    """With H and dS made inside, but with dropout on the input, or a mask on few tiles."""
    calls = []
    for name in ("gemm", "gemm_dx"):
        real = getattr(hopper, name)

        def counted(*arguments, name=name, real=real, **options):
            alone = not any(isinstance(argument, hopper.Shrink) for argument in arguments)
            calls.append((name, alone))
            return real(*arguments, **options)

        monkeypatch.setattr(hopper, name, counted)
    case = on_gpu(
        random_case(m=300, k=256, n=264, ranks=[16] * 4, dropout_p=dropout_p), torch.bfloat16
    )
    with torch.device("cuda"):  # the reference makes its mask there
        assert_as_good_as_reference(partial(multi_lora_linear, backend="triton:gemm"), case)
    assert calls == [("gemm", bool(dropout_p)), ("gemm_dx", bool(dropout_p))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "small-" + "-".join(o))
def test_small_h_made_inside(options, dtype):
    for sizes in ((1, 8, 8), (280, 264, 136), (700, 1032, 328)):
        case = shrink_case(*sizes, dtype=dtype, **options).to("cuda")
        assert_shrunk(case, case.run())


@pytest.mark.parametrize("options", [{}, {"dx": True}, {"dx": True, "p": 0.1}], ids=str)
@pytest.mark.parametrize(
    "sizes", [(8192, 4096, 4096), (2048, 14336, 4096), (2048, 4096, 14336), (33000, 576, 1536)]
)
def test_h_made_inside_at_model_sizes(sizes, options):
    """Rows of H that are read before they are there, or late, would change the bits of some run."""
    case = shrink_case(*sizes, **options).to("cuda")
    first = case.run()
    h = case.gated.clone()
    x, a = case.product.x.double(), case.a.double()
    gates = case.gates[case.ids.clamp(min=0)] * (case.ids >= 0)[:, None]
    wide = x @ a.t() * gates
    assert (h.double() - wide).norm() <= 2 * torch.finfo(h.dtype).eps * wide.norm()
    product = by_cublas(case.product, torch.float64)
    assert (first.double() - product).norm() <= torch.finfo(h.dtype).eps * product.norm()
    for _ in range(50):
        case.gated.fill_(float("nan"))
        assert torch.equal(case.run(), first) and torch.equal(case.gated, h)


def test_h_made_inside_in_a_graph_and_beside_itself():
    """Two streams at once: neither may wait for blocks that the other keeps out."""
    cases = [shrink_case(3000, 1024, 512, dx=dx, seed=int(dx)).to("cuda") for dx in (False, True)]
    wanted = [case.run() for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    found = [[], []]
    for _ in range(50):
        for index, (case, stream) in enumerate(zip(cases, streams, strict=True)):
            with torch.cuda.stream(stream):
                found[index].append(case.run())
    torch.cuda.synchronize()
    for index, ys in enumerate(found):
        assert all(torch.equal(y, wanted[index]) for y in ys)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cases[0].run()
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted[0])
