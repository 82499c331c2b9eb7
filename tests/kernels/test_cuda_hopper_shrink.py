"""H made inside the Hopper GEMM, on the host: the kernel's own source, all clusters at once."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.decode_cases import assert_poison_around
from tests.kernels.hopper_shrink_cases import VARIANTS, ShrinkCase, assert_shrunk, shrink_case
from tests.kernels.host_build import INVALID_VALUE, compile_for_host, copy_changed
from tests.kernels.test_cuda_hopper_host import (  # noqa: F401 (fixtures)
    DTYPES,
    FRAGMENTS,
    KERNEL,
    Host,
    asked_anew,
    host,
    library,
    packed,
    pretend,
)


def run(case: ShrinkCase) -> torch.Tensor:
    y = case.run()
    for tensor in (y, case.gated, case.compact, case.restored):
        if tensor is not None:
            assert_poison_around(tensor)
    return y


@pytest.mark.parametrize("dx", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("sizes", [(1, 8, 8), (129, 264, 40), (300, 264, 200)], ids=str)
def test_integers_exactly(host, sizes, dx):  # noqa: F811
    for dtype in DTYPES:
        case = shrink_case(*sizes, dx=dx, dtype=dtype, integers=True)
        y = run(case)
        assert_shrunk(case, y)
        wanted = case.product.x.double() @ case.a.double().t()
        live = case.gates[case.ids.clamp(min=0)] * (case.ids >= 0)[:, None]
        assert torch.equal(case.gated.double(), wanted * live)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_against_float64(host, options, dtype):  # noqa: F811
    case = shrink_case(280, 264, 136, dtype=dtype, **options)
    assert_shrunk(case, run(case))


def test_any_order_and_number_of_clusters(host):  # noqa: F811
    """Who makes rows of H, and when, changes no bit."""
    for dx in (False, True):
        case = shrink_case(520, 264, 72, dx=dx, p=0.2 * dx)
        first = run(case)
        assert_shrunk(case, first)
        kept = case.gated.clone()
        for host.clusters, host.order in ((1, 1), (4, 3), (6, 4)):
            case.gated.fill_(float("nan"))
            assert torch.equal(first, run(case)) and torch.equal(kept, case.gated)
        host.clusters, host.order = 2, 0


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_sizes(library, data):  # noqa: F811
    """Rows, widths, ranks, clusters and order as they come."""
    sizes = data.draw(st.tuples(st.integers(1, 400), *[st.integers(1, 40)] * 2), "m, n / 8, k / 8")
    ranks = data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=7), "ranks / 8")
    if sum(ranks) == 0:
        ranks[0] = 1
    dx = data.draw(st.booleans(), "dx")
    slotted = data.draw(st.booleans(), "slotted")
    there = Host(library, data.draw(st.integers(1, 5), "clusters"), data.draw(st.integers(0, 9)))
    with pytest.MonkeyPatch.context() as patch:
        pretend(there, patch)
        case = shrink_case(
            sizes[0],
            8 * sizes[1],
            8 * sizes[2],
            tuple(8 * r for r in ranks),
            dx=dx,
            p=data.draw(st.sampled_from([0.0, 0.4]), "p") * dx,
            dtype=data.draw(st.sampled_from(DTYPES)),
            slotted=slotted,
            soft=not slotted and data.draw(st.booleans(), "soft"),
            padding=data.draw(st.sampled_from([0, 8])),
        )
        assert_shrunk(case, run(case))


def test_invalid_ids_become_nan_rows(host):  # noqa: F811
    for dx in (False, True):
        case = shrink_case(140, 264, 64, dx=dx)
        case.ids[[3, 70, 139]] = torch.tensor([4, -2, 2**40])
        y = run(case)
        assert y.isnan().any(1).nonzero().flatten().tolist() == [3, 70, 139]
        assert_shrunk(case, y)


def test_a_gate_of_zero_leaves_an_infinite_expert_out(host):  # noqa: F811
    assert_infinite_expert_left_out()


def assert_infinite_expert_left_out() -> None:
    case = shrink_case(150, 264, 64)
    case.a[16:32] = float("inf")  # of task 0
    finite = run(case).isfinite().all(1)
    assert torch.equal(finite, case.ids != 0)


def test_columns_of_h_for_the_second_linear(host):  # noqa: F811
    """Linears that share x: the first makes H for all, each reads its own columns."""
    case = shrink_case(130, 264, 64, ranks=(16, 16, 16, 16))
    case.product.h, case.product.b = case.gated[:, 32:], case.product.b[:32]
    assert_shrunk(case, run(case))


def test_few_clusters_shrink_where_they_have_time(library):  # noqa: F811
    """Half a tile each; 512 tiles of y leave 16 of 66 clusters one short."""
    count = library.ckf_host_shrinkers
    count.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    assert count(32, 512, 66, 1) == 16  # two each, in the time of one tile of y
    assert count(32, 512, 66, 2) == 16  # one tile more, as if all took part
    assert count(32, 1792, 66, 1) == 32  # 56 are one short
    assert count(32, 526, 66, 1) == 32  # two are one short, and would take eight tiles' time
    assert count(8, 128, 66, 1) == 4
    assert count(3, 3, 66, 1) == 3 and count(32, 66, 66, 1) == 32 and count(1, 1, 1, 1) == 1


REFUSALS = {
    "wide": ({"ranks": (32,) * 9}, "288 rank columns; expected a multiple of eight, 256 at most"),
    "odd": ({"ranks": (16, 20)}, "36 rank columns; expected a multiple of eight"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_ranks(host, name):  # noqa: F811
    options, message = REFUSALS[name]
    case = shrink_case(20, 16, 24, **options)
    with pytest.raises(ValueError, match=message):
        case.run()
    assert host.calls == []


CHANGES = {
    "gates": ({"gates": torch.zeros(4, 80).double()}, "gates are torch.float64 .* expected"),
    "ids": ({"ids": torch.zeros(20, dtype=torch.int32)}, "task ids are torch.int32"),
    "rows of ids": ({"ids": torch.zeros(19, dtype=torch.int64)}, "task ids are .* expected .*20"),
    "slots": ({"slots": None}, "slots without compact H, or the other way round"),
    "slots' shape": ({"slots": torch.zeros(4, 8, dtype=torch.int32)}, "slots are .* expected"),
    "compact": ({"compact": torch.zeros(20, 33).bfloat16()}, "compact H has strides"),
    "shape of H": ({"gated": torch.zeros(20, 88).bfloat16()}, "H has shape"),
    "restored": ({"restored": torch.zeros(20, 80).bfloat16()}, "H is restored for dx"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_refuses_operands(host, name):  # noqa: F811
    changes, message = CHANGES[name]
    case = shrink_case(20, 16, 24)
    for field, value in changes.items():
        setattr(case, field, value)
    with pytest.raises(ValueError, match=message):
        case.run()
    assert host.calls == []


def test_launcher_refuses(host):  # noqa: F811
    """What the bridge cannot let through."""
    run(shrink_case(20, 16, 24))
    right = host.calls[0]
    shrink = right["shrink"]
    wrongs = [
        {"columns": 264},
        {"columns": -8},
        {"columns": 4},
        {"tasks": 0},
        {"a": 0},
        {"done": 0},
    ]
    wrongs += [{"gated": shrink["gated"] + 2}, {"compact_stride": 12}, {"slots": 0}]
    wrongs += [{"restored": shrink["gated"], "restored_stride": 80}]
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match=f"CUDA error {INVALID_VALUE}"):
            host.hopper_gemm(packed(right | {"shrink": shrink | wrong}), 0)


DEFECTS = {
    "rows read before they are there": (
        KERNEL,
        "wait_published(p.shrink.done + own.row_tile(tile.pair), kConsumers * kGroupWarps);",
        "{}",
    ),
    "gates of another block of columns": (FRAGMENTS, "lane / 4 * 4 + w", "lane / 4 * 4"),
    "gates multiplied": (FRAGMENTS, "g != 0.0f ? pack", "true ? pack"),
    "slots of another task": (FRAGMENTS, "(valid ? id[h] : 0) * s.slots_stride", "0"),
    "shared rows of A": (KERNEL, "rank * (kColumns / kPair);", "rank * (kColumns / 2 / kPair);"),
    "a sum that goes on": (KERNEL, "products.add = false;\n            if (is_wide", "if (is_wide"),
}  # fmt: skip


def run_planted(host, folder) -> None:  # noqa: F811
    host.library = compile_for_host(folder / "hopper_gemm.cu", folder, planted=True)
    for host.clusters, host.order in ((1, 0), (4, 1), (3, 2)):
        for dx in (False, True):
            case = shrink_case(300, 264, 72, dx=dx, seed=host.order)
            assert_shrunk(case, run(case))
    assert_infinite_expert_left_out()


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_seen(host, tmp_path, name):  # noqa: F811
    copy_changed(tmp_path, *DEFECTS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        run_planted(host, tmp_path)


def test_without_a_defect_nothing_is_seen(host, tmp_path):  # noqa: F811
    copy_changed(tmp_path, KERNEL, "", "")
    run_planted(host, tmp_path)
