"""The decode kernels that own the base, their own sources on the host, as in test_cuda_host.py:
decode_linear (csrc/host_shim.h) and decode_wgmma (csrc/hopper_host.h)."""

import ctypes
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import cuda
from ckf.kernels.cuda import _DTYPES
from tests.kernels.decode_cases import assert_poison_around, stub_cuda
from tests.kernels.frozen_cases import FrozenCase, assert_frozen_right, exact, frozen_case
from tests.kernels.host_build import CSRC, INVALID_VALUE, NOT_SUPPORTED, compile_for_host

HALVES = (torch.float16, torch.bfloat16)


class FrozenLinear(ctypes.Structure):
    """CkfFrozenLinear in csrc/launchers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("y", "w", "bias", "b")),
        *((name, ctypes.c_int64) for name in ("y_stride", "w_stride", "n", "rank")),
    )


@dataclass
class Form:
    """A kernel by its name in ckf/kernels/cuda.py."""

    library: ctypes.CDLL
    name: str
    most_spans: int = 1 << 30  # of "wgmma"

    @property
    def most_rows(self) -> int:
        return cuda.FORMS[self.name][1]

    @property
    def most_rank(self) -> int:
        return cuda.FORMS[self.name][2]


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Form]:
    sources = {"loads": "decode_linear.cu", "wgmma": "decode_wgmma.cu"}
    return {
        name: Form(compile_for_host(CSRC / source, tmp_path_factory.mktemp("host")), name)
        for name, source in sources.items()
    }


@pytest.fixture(scope="module")
def tiles(forms) -> Form:
    return forms["wgmma"]


@pytest.fixture(scope="module", params=list(cuda.FORMS))
def form(forms, request) -> Form:
    return forms[request.param]


def call(form: Form, case: FrozenCase, order: int = 0, clusters: int = 1 << 20, **changes) -> int:
    """``clusters``: how many the device runs at once."""
    group = case.group
    (m, k), tasks = group.x.shape, group.column_gates.shape[0]
    sizes = {"m": m, "k": k, "tasks": tasks, "x_stride": group.x.stride(0)}
    linears = [
        FrozenLinear(
            y.data_ptr(), w.data_ptr(), None if bias is None else bias.data_ptr(), b.data_ptr(),
            y.stride(0), w.stride(0), b.shape[1], changes.get("rank", b.shape[0]),
        )
        for y, w, bias, b in zip(group.ys, case.weights, case.biases, group.bs, strict=True)
    ]  # fmt: skip
    form.library.ckf_host_set_order(ctypes.c_uint(order))
    form.library.ckf_host_set_clusters(ctypes.c_int(clusters))
    tensors = (group.x, group.a, group.column_gates, group.task_ids)
    return launch(
        form,
        linears,
        [t.data_ptr() for t in tensors],
        [changes.get(name, size) for name, size in sizes.items()],
        _DTYPES[changes.get("dtype", group.x.dtype)],
        count=changes.get("count", len(linears)),
    )


def launch(
    form: Form, linears, pointers, sizes, dtype: int, device=0, stream=None, count=None
) -> int:
    """The launcher; pointers: x, a, gates, ids; sizes: m, k, tasks, x_stride."""
    arguments = (
        (FrozenLinear * len(linears))(*linears),
        ctypes.c_int(len(linears) if count is None else count),
        *map(ctypes.c_void_p, pointers),
        *map(ctypes.c_int64, sizes),
        ctypes.c_int(dtype),
        ctypes.c_int(device),
    )
    if form.name == "wgmma":
        spans = ctypes.c_int(form.most_spans)
        return form.library.ckf_decode_wgmma(*arguments, spans, ctypes.c_void_p(stream))
    return form.library.ckf_decode_linear(*arguments, ctypes.c_void_p(stream))


def run(form: Form, case: FrozenCase, order=0, clusters=1 << 20) -> list[torch.Tensor]:
    """The results; nothing around a y may change."""
    for y in case.group.ys:
        y.fill_(float("nan"))
    assert call(form, case, order, clusters) == 0
    for y in case.group.ys:
        assert_poison_around(y)
    return [y.clone() for y in case.group.ys]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 1, "k": 8, "ns": (1,), "ranks": ((1, 1),)},
        {"m": 3, "k": 1048, "ns": (300, 24), "ranks": ((3, 3, 3), (2, 4, 1))},
        {"m": 16, "k": 264, "ns": (264,), "ranks": ((16,) * 5,)},
        {"m": 5, "k": 72, "ns": (40, 7), "ranks": ((90, 90, 70), (0, 0, 5))},
        {"m": 9, "k": 512, "ns": (727,), "ranks": ((0, 0),)},
        {"m": 13, "k": 776, "ns": (136, 9), "ranks": ((30, 30), (16, 0))},
        {"m": 16, "k": 136, "ns": (200,), "ranks": ((43, 43, 42),)},
        {"m": 2, "k": 600, "ns": (600,), "ranks": ((0, 3, 0),)},
        {"m": 2, "k": 16, "ns": [8] * 8, "ranks": [(2, i, 1) for i in range(8)]},
    ],
    ids=lambda s: f"{s['m']}x{s['k']}x{'-'.join(map(str, s['ns']))}",
)
@pytest.mark.parametrize("options", [{}, {"padding": 8, "bias": False}, {"soft": True}], ids=str)
def test_against_float64(form, sizes, dtype, options):
    if max(map(sum, sizes["ranks"])) > form.most_rank:
        pytest.skip("another test's: what it refuses")
    case = frozen_case(**sizes, dtype=dtype, **options)
    assert_frozen_right(case, run(form, case))


@pytest.mark.parametrize("m", [4, 13])
@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_spans_one_after_the_other(form, m, clusters):
    """Fewer clusters than spans of n; the same bits as with one span each."""
    case = frozen_case(m=m, k=520, ns=(1100, 300), ranks=((4, 4, 4), (2, 6, 1)), seed=3)
    wide = run(form, case)
    narrow = run(form, case, 0, clusters)
    assert_frozen_right(case, narrow)
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 17, "k": 64, "ns": (40,), "ranks": ((4, 4, 4),)},
        {"m": 64, "k": 136, "ns": (264, 24), "ranks": ((16,) * 5, (26, 26, 26, 26, 24))},
        {"m": 40, "k": 1032, "ns": (300,), "ranks": ((0, 3, 0),)},
        {"m": 33, "k": 200, "ns": (72, 8), "ranks": ((0, 0), (5, 2))},
        {"m": 52, "k": 1032, "ns": (250,), "ranks": ((3, 3, 3),)},
        {"m": 13, "k": 1032, "ns": (500,), "ranks": ((3, 3, 3),)},
    ],
    ids=lambda s: f"{s['m']}x{s['k']}",
)
@pytest.mark.parametrize("clusters", [1 << 20, 1])
def test_more_rows(tiles, sizes, clusters):
    """Rings of other lengths; every order of threads, copies long on their way in one of them."""
    case = frozen_case(**sizes, padding=8, soft=True)
    first = run(tiles, case, 0, clusters)
    assert_frozen_right(case, first)
    for order in (1, 2, 3):
        for one, other in zip(first, run(tiles, case, order, clusters), strict=True):
            assert torch.equal(one.view(torch.int16), other.view(torch.int16)), f"order {order}"


def test_one_span_alone_where_asked(tiles):
    """What the launcher refuses then: more columns than all clusters take at once, 64 a block."""
    one = Form(tiles.library, tiles.name, most_spans=1)
    case = frozen_case(m=3, k=72, ns=(1024,), ranks=((5, 5, 5),), seed=6)
    assert call(one, case, clusters=1) == NOT_SUPPORTED
    assert all(y.isnan().all() for y in case.group.ys), "something was written"
    assert call(one, case, clusters=2) == 0


@pytest.mark.parametrize(("clusters", "n"), [(16, 4096), (13, 4096), (11, 4096), (9, 4096)])
def test_every_width_of_a_tile_has_the_same_bits(tiles, clusters, n):
    """32, 40, 48 and 64 columns of n a block, by how many clusters run at once."""
    case = frozen_case(m=3, k=72, ns=(n,), ranks=((5, 5, 5),), seed=6)
    wide, narrow = run(tiles, case), run(tiles, case, 2, clusters)
    assert_frozen_right(case, narrow)
    assert torch.equal(wide[0].view(torch.int16), narrow[0].view(torch.int16))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 64),
    k=st.integers(1, 40).map(lambda k: 8 * k),
    n=st.integers(0, 300),
    ranks=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    dtype=st.sampled_from(HALVES),
    soft=st.booleans(),
    padding=st.sampled_from([0, 8]),
    order=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_sizes(form, m, k, n, ranks, dtype, soft, padding, order, seed):
    m = min(m, form.most_rows) if m % 3 else m % 17
    ids = torch.randint(-3, len(ranks) + 1, (m,), generator=torch.Generator().manual_seed(seed))
    case = frozen_case(m, k, (n,), (ranks,), seed, dtype=dtype, ids=ids, soft=soft, padding=padding)
    assert_frozen_right(case, run(form, case, order))


def test_ids(form):
    wild = [-1, 0, 2, 3, -2, 2**40, -(2**62), 1]
    case = frozen_case(m=8, k=64, ns=(40,), ranks=((2, 2, 2, 2),), ids=wild)
    (result,) = run(form, case)
    assert result[[3, 4, 5, 6]].isnan().all()
    assert_frozen_right(case, [result])


def test_dead_experts_do_not_matter(form):
    """inf and NaN in A and B of one task, and an S that overflows, stay in its rows."""
    case = frozen_case(m=14, k=64, ns=(72,), ranks=((4, 4, 4),), ids=[0, 1] * 7)
    (clean,) = run(form, case)
    case.group.a[4:6], case.group.a[6] = float("nan"), 3e38
    case.group.bs[0][7] = float("inf")
    (result,) = run(form, case)
    assert torch.equal(result[1::2], clean[1::2])
    assert not result[::2].isfinite().any()


def test_special_values_spread_as_arithmetic_says(form):
    """inf in a row of x, NaN in a row of W, inf in a live B times h."""
    case = frozen_case(m=5, k=64, ns=(72,), ranks=((4, 4, 4),), ids=[0, 1, 0, -1, 1])
    case.group.x[1, 3] = float("inf")
    case.weights[0][5, 40] = float("nan")
    case.group.bs[0][1, 9] = float("inf")  # shared: live in every row but -1
    (result,) = run(form, case)
    assert result[:, 5].isnan().all()
    assert not result[[0, 2, 4], 9].isfinite().any() and result[3, 9].isfinite()
    others = [c for c in range(72) if c not in (5, 9)]
    assert result[[0, 2, 3, 4]][:, others].isfinite().all()
    wanted = exact(case)[0][0]
    assert torch.equal(result.isnan(), wanted.isnan())


@pytest.mark.parametrize("m", [2, 8, 12])
def test_same_bits(form, m):
    """Twice, in other thread orders, and with the rows turned round."""
    case = frozen_case(m=m, k=600, ns=(272, 40), ranks=((6, 6, 6), (5, 0, 2)), seed=2)
    first = run(form, case)
    for order in (0, 1, 2, 3):
        for one, other in zip(first, run(form, case, order), strict=True):
            assert torch.equal(one.view(torch.int16), other.view(torch.int16)), f"order {order}"
    for name in ("x", "task_ids"):
        tensor = getattr(case.group, name)
        tensor.copy_(tensor.flip(0))
    for one, other in zip(first, run(form, case), strict=True):
        assert torch.equal(one.view(torch.int16), other.flip(0).view(torch.int16))


def test_a_row_and_a_linear_alone(form):
    """The same bits whatever the number of rows and whatever the group."""
    case = frozen_case(m=16, k=600, ns=(272, 40), ranks=((6, 6, 6), (5, 0, 2)), seed=2)
    together = run(form, case)
    group = case.group
    for rows in (1, 7, 9):
        group.x, group.task_ids = group.x[:rows], group.task_ids[:rows]
        short = [y[:rows] for y in group.ys]
        for y in short:
            y.fill_(float("nan"))
        group.ys = short
        assert call(form, case) == 0
        for y, all_rows in zip(short, together, strict=True):
            assert torch.equal(y.view(torch.int16), all_rows[:rows].view(torch.int16))
        case = frozen_case(m=16, k=600, ns=(272, 40), ranks=((6, 6, 6), (5, 0, 2)), seed=2)
        group = case.group
    alone = frozen_case(m=16, k=600, ns=(272, 40), ranks=((6, 6, 6), (5, 0, 2)), seed=2)
    first = sum((6, 6, 6))
    alone.group.a = alone.group.a[first:].clone()
    alone.group.column_gates = alone.group.column_gates[:, first:].contiguous()
    alone.group.ys, alone.group.bs = alone.group.ys[1:], alone.group.bs[1:]
    alone.weights, alone.biases = alone.weights[1:], alone.biases[1:]
    (result,) = run(form, alone)
    assert torch.equal(result.view(torch.int16), together[1].view(torch.int16))


def test_unaligned_b(form):
    """Rows of b that begin anywhere, where n is no multiple of eight or b a view."""
    case = frozen_case(m=6, k=64, ns=(264,), ranks=((4, 4, 4),))
    b = case.group.bs[0]
    shifted = torch.full((b.numel() + 1,), float("nan"), dtype=b.dtype)
    shifted[1:] = b.flatten()
    aligned = run(form, case)
    case.group.bs[0] = shifted[1:].view(b.shape)
    assert torch.equal(run(form, case)[0].view(torch.int16), aligned[0].view(torch.int16))


def test_without_tasks_rows_or_columns(form):
    for sizes in (
        {"m": 3, "ns": (24,), "ranks": ((3,),), "ids": [-1, 5, -1]},
        {"m": 0},
        {"ns": (0, 0)},
        {"m": 2, "ns": (16, 0, 24), "ranks": ((2, 2, 2), (3, 3, 3), (1, 1, 1))},
    ):
        case = frozen_case(**sizes)
        assert_frozen_right(case, run(form, case))


def test_launcher_refuses(form):
    case = frozen_case(k=64)
    for wrong in ({"m": -1}, {"k": -1}, {"rank": 2**31}, {"tasks": 2**40}, {"count": 9}):
        assert call(form, case, **wrong) == INVALID_VALUE, wrong
    most = {"m": form.most_rows + 1}, {"rank": form.most_rank + 1}
    for unable in (*most, {"k": 60}, {"x_stride": 63}, {"dtype": torch.float32}):
        assert call(form, case, **unable) == NOT_SUPPORTED, unable
    assert call(form, case, clusters=0) == NOT_SUPPORTED
    shifted = frozen_case(k=64, offset=1)
    assert call(form, shifted) == NOT_SUPPORTED
    assert all(y.isnan().all() for y in case.group.ys), "something was written"


@pytest.mark.parametrize("m", [1, 16, 17, 64])
def test_python_knows_the_most_columns(forms, m):
    """What "auto" goes by is what one of the launchers takes."""
    most = cuda.most_linear_rank(m)
    for rank, wanted in ((most, {0, NOT_SUPPORTED}), (most + 1, {NOT_SUPPORTED})):
        case = frozen_case(m=m, k=8, ns=(8,), ranks=((rank,),), ids=[-1] * m)
        found = [call(form, case) for form in forms.values()]
        assert set(found) <= wanted and min(found) == min(wanted)
    assert cuda.most_linear_rank(cuda.MAX_LINEAR_ROWS + 1) == 0


def test_through_the_bridge(form, monkeypatch):
    """ckf.kernels.cuda with this kernel in the extension's place: each pointer and size arrives."""

    class OnHost:
        def __init__(self, a, b, n, rank, gates, k, tasks, dtype, device):
            self.own = (a, gates, k, tasks, dtype, device)
            self.linears_of = list(zip(b, n, rank, strict=True))

        def linears(self, y, w, w_strides, bias, x, x_stride, task_ids, m, number, stream):
            assert number == cuda.FORMS[form.name][0]
            a, gates, k, tasks, dtype, device = self.own
            frozen = [
                FrozenLinear(y_l, w_l, bias_l or None, b, n, stride, n, rank)
                for y_l, w_l, stride, bias_l, (b, n, rank) in zip(
                    y, w, w_strides, bias, self.linears_of, strict=True
                )
            ]
            pointers, sizes = (x, a, gates, task_ids), (m, k, tasks, x_stride)
            status = launch(form, frozen, pointers, sizes, dtype, device, stream)
            assert status in (0, NOT_SUPPORTED)
            return status == 0

    stub_cuda(monkeypatch, OnHost)
    form.library.ckf_host_set_clusters(ctypes.c_int(9))
    case = frozen_case(m=6, k=72, ns=(264, 40), padding=8)
    group, weights, biases = case.group, case.weights, [case.biases[0], None]
    case.biases[1] = None
    prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)
    ids, kind = group.task_ids, {"form": form.name}
    assert_frozen_right(case, prepared.linears(group.x, weights, biases, ids, **kind))
    assert prepared.linears(group.x[:0], weights, biases, ids[:0], **kind)[1].shape == (0, 40)
    whole = prepared.linears(group.x.contiguous(), weights, biases, ids, **kind)
    sequences = group.x.contiguous().view(2, 3, 72), weights, biases, ids.view(2, 3)
    for y, wanted in zip(prepared.linears(*sequences, **kind), whole, strict=True):
        assert y.shape == (2, 3, wanted.shape[1]) and torch.equal(y.view(6, -1), wanted)
    (y, _), one = prepared.linears(group.x[0], weights, biases, ids[0], **kind), whole[0][0]
    assert y.shape == one.shape and torch.allclose(y, one)
    with pytest.raises(ValueError, match="x has strides .* expected a contiguous tensor"):
        prepared.linears(sequences[0].transpose(0, 1), *sequences[1:], **kind)
    shorter = frozen_case(m=6, k=60, ns=(264, 40)).group  # rows that do not begin at 16 bytes
    odd = cuda.DecodeGroup(shorter.a, shorter.bs, shorter.column_gates)
    assert odd.linears(shorter.x, [w[:, :60] for w in weights], biases, ids, **kind) is None


def test_what_the_bridge_leaves_to_others(monkeypatch):
    """None, and nothing reaches the kernel, where a weight is not what it reads."""

    class Never:
        def __init__(self, **static):
            pass

        def linears(self, *arguments):
            raise AssertionError("launched")

    stub_cuda(monkeypatch, Never)
    case = frozen_case(m=6, k=72, ns=(24,), ranks=((4, 4, 4),))
    group, (w,), (bias,) = case.group, case.weights, case.biases
    prepared = cuda.DecodeGroup(group.a, group.bs, group.column_gates)

    class Quantized(torch.Tensor):
        pass

    wrong = [w.float(), w[:, :64], w.t().contiguous().t(), w.as_subclass(Quantized), w[:8]]
    for weight in wrong:
        assert prepared.linears(group.x, [weight], [bias], group.task_ids) is None
    for offset in (bias.float(), bias[:3], bias[None]):
        assert prepared.linears(group.x, [w], [offset], group.task_ids) is None
    many = torch.zeros(65, 72, dtype=group.x.dtype)
    assert prepared.linears(many, [w], [bias], torch.zeros(65, dtype=torch.int64)) is None
    with pytest.raises(ValueError, match="task_ids has shape"):
        prepared.linears(group.x, [w], [bias], group.task_ids[:2])
    with pytest.raises(ValueError, match="x is torch.float32"):
        prepared.linears(group.x.float(), [w], [bias], group.task_ids)
    with pytest.raises(ValueError, match="form is 'bulk'; expected None or one of loads, wgmma"):
        prepared.linears(group.x, [w], [bias], group.task_ids, "bulk")
