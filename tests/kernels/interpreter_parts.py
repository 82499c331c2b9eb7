"""Parts of the Triton backend beside its main kernels, and corners, in Triton's interpreter.

Run by test_triton_interpreter.py like interpreter_suite.py, whose poisoned memory it shares.
"""

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import (
    dropout_mask,
    group,
    launch,
    multi_lora_linear,
    triton_outer,
    triton_update,
    tune,
)
from ckf.kernels.dropout import dropout_scale
from ckf.kernels.group import GroupShape
from ckf.kernels.launch import PLANS, dot_precision, outer_launch
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.stacks import Stacks
from ckf.kernels.triton_drop import drop
from ckf.kernels.triton_gemm import why_not_gemm
from ckf.kernels.triton_outer import Factors, outer, outer_pair
from ckf.kernels.triton_stack import stack
from tests.kernels.cases import assert_as_good_as_reference, random_case, run_with_gradients
from tests.kernels.interpreter_slots import slots_of, triton_with
from tests.kernels.interpreter_suite import cast, poisoned_memory  # noqa: F401

HALF = torch.float16


@pytest.mark.parametrize("adapters, dtype", [(torch.float32, HALF), (HALF, HALF)])
@pytest.mark.parametrize(
    "ranks, widths, k, tasks",
    [
        ([[16] * 3], [40], 48, 2),
        ([[3, 8, 1], [0, 5, 17, 128], [0, 0]], [300, 17, 9], 41, 3),
        ([[0]], [5], 300, 40),
    ],
)
@pytest.mark.parametrize("most", [1, 2, 32])
def test_launches_stack_what_torch_stacks(
    ranks, widths, k, tasks, adapters, dtype, most, monkeypatch
):
    """A launch for every ``most`` experts, also where it ends within a linear."""
    monkeypatch.setattr(launch, "STACK_EXPERTS", most)
    shape = GroupShape(tuple(map(tuple, ranks)), 0.0)
    a = [torch.randn(r, k).to(adapters) for own in ranks for r in own]
    b = [torch.randn(n, r).to(adapters) for own, n in zip(ranks, widths, strict=True) for r in own]
    gates = [torch.randn(tasks, len(own)) for own in ranks]
    with patch.object(Stacks, "of") as by_torch:
        ours = stack(shape, gates, a, b, dtype)
    assert not by_torch.called
    plain = Stacks.of(shape, gates, a, b, dtype)
    for one, other in zip(
        [ours.a, ours.gates, *ours.b], [plain.a, plain.gates, *plain.b], strict=True
    ):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_strided_or_unlike_experts_are_stacked_by_torch(monkeypatch):
    shape = GroupShape(((2, 3),), 0.0)
    a, b = [torch.randn(2, 8), torch.randn(3, 8)], [torch.randn(5, 2), torch.randn(5, 3)]
    gates = [torch.randn(4, 2)]
    plain = Stacks.of(shape, gates, a, b, torch.float32)
    strided = [t.t().contiguous().t() for t in a]
    unlike = [a[0].double(), a[1]]
    with patch.object(Stacks, "of", wraps=Stacks.of) as by_torch:
        for other in (strided, unlike):
            assert torch.equal(stack(shape, gates, other, b, torch.float32).a, plain.a)
    assert by_torch.call_count == 2
    monkeypatch.setattr(launch, "STACK_EXPERTS", 0)
    with patch.object(Stacks, "of", wraps=Stacks.of) as by_torch:
        assert torch.equal(stack(shape, gates, a, b, torch.float32).b[0], plain.b[0])
    assert by_torch.called


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("m, k, row", [(1, 1, 1), (19, 43, 50), (33, 520, 520)])
def test_drop_draws_the_mask(m, k, row, dtype):
    x = torch.randn(m, row).to(dtype)[:, :k]
    keep = dropout_mask(m, k, 0.3, 2**40 + 5)
    expected = torch.where(keep, x * dropout_scale(0.3), 0)
    assert torch.equal(drop(x, torch.tensor([2**40 + 5]), 0.3), expected)
    across = x.t().contiguous().t()
    assert torch.equal(drop(across, torch.tensor([2**40 + 5]), 0.3), expected)
    assert drop(x[:0], torch.tensor([1]), 0.3).shape == (0, k)


@pytest.mark.parametrize("layout", ["rows", "columns", "expanded"])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_dense_products_with_the_mask_of_the_kernel(dtype, soft, layout):
    """As on a GPU: with contiguous rows the same bits as with the mask of torch."""
    case = cast(random_case(m=24, k=40, n=17, dropout_p=0.4, soft=soft), dtype)
    dy, x = torch.randn(24, 17), case.x.detach()
    strided = {"rows": x, "columns": x.t().contiguous().t(), "expanded": x[:1].expand(24, 40)}
    case.x = strided[layout].requires_grad_()

    def run(*arguments):
        return multi_lora_linear(*arguments, backend="torch")

    plain = run_with_gradients(run, case, dy)
    with patch.object(group, "drops_by_kernel", lambda rows: True):
        ours = run_with_gradients(run, case, dy)
        assert_as_good_as_reference(run, case)
    if layout == "rows":
        assert all(torch.equal(p, q) for p, q in zip(plain, ours, strict=True))


@pytest.mark.parametrize(
    "kind, ranks, plan",
    [
        ("hard", [8] * 4, "gemm"),
        ("soft", [8] * 4, "expand"),
        ("slots", [8] * 4, "addmm"),
        ("slots", [64] * 4, "expand"),
    ],
)
def test_ops_pass_the_library_checks(kind, ranks, plan):
    """Schema and fake tensors: sizes, strides and dtypes of what the real op returns."""
    case = cast(random_case(m=6, k=16, n=24, ranks=ranks, soft=kind == "soft"), HALF)
    case.a = [t.detach().float() for t in case.a]  # adapters in float32 on a 16-bit base
    case.b = [t.detach().float() for t in case.b]
    slots, width = slots_of(case.gates, case.a) if kind == "slots" else (None, 0)
    lists = [[case.weight], [case.bias], [case.gates.detach()], case.a, case.b]
    last = (case.task_ids, torch.tensor([3]), slots, width, 0.25, kind == "soft", "triton", plan)
    arguments = (case.x.detach(), *lists, *last)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ckf.multi_lora, arguments, test_utils=checks)
    *_, saved = torch.ops.ckf.multi_lora(*arguments)
    needs = [True, True, True, kind == "soft", *[True] * (2 * len(ranks))]
    backward = ([torch.randn(6, 24).half()], arguments[0], saved, *arguments[1:], needs)
    torch.library.opcheck(torch.ops.ckf.multi_lora_backward, backward, test_utils=checks)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_frozen_parts_change_no_other_gradient(data):
    """Any set of leaves may be frozen; the gradients of the others keep their bits."""
    ranks = data.draw(st.sampled_from([[8] * 4, [3, 40, 64, 60]]), "ranks")
    soft = data.draw(st.booleans(), "soft")
    plan = data.draw(st.sampled_from(PLANS), "plan")
    case = cast(random_case(m=20, k=16, n=24, ranks=ranks, soft=soft, dropout_p=0.2), HALF)
    dy = torch.randn(20, 24)
    function = triton_with(plan, not soft)
    y, *every = run_with_gradients(function, case, dy)
    leaves = case.leaves()
    frozen = data.draw(st.sets(st.integers(0, len(leaves) - 1), max_size=len(leaves) - 1), "frozen")
    for index in frozen:
        leaves[index].requires_grad_(False)
    again, *rest = run_with_gradients(triton_with(plan, not case.gates.requires_grad), case, dy)
    kept = [g for index, g in enumerate(every) if index not in frozen]
    if soft and not case.gates.requires_grad:  # H is saved rounded where S was
        return
    assert torch.equal(y, again)
    assert all(torch.equal(p, q) for p, q in zip(kept, rest, strict=True))


@pytest.mark.parametrize("tasks, soft", [(70, False), (20, True)], ids=["hard", "soft"])
def test_many_tasks(tasks, soft):
    ranks = [5 if e < tasks // 2 else 3 for e in range(tasks)] + [33]
    ids = torch.randint(-1, tasks, (40,), generator=torch.Generator().manual_seed(1))
    case = random_case(m=40, k=24, n=17, tasks=tasks, ranks=ranks, soft=soft, ids=ids)
    assert_as_good_as_reference(triton_with(compact=not soft), case)


def test_256_tasks():
    """Row by row, since the reference takes a step for each of 65,792 pairs of task and expert."""
    tasks = 256
    case = random_case(m=30, k=24, n=17, tasks=tasks, ids=torch.randint(-1, tasks, (30,)))
    with torch.no_grad():
        y = triton_with()(*case.arguments())
        wide = case.to(torch.float64)
        exact = torch.nn.functional.linear(wide.x, wide.weight, wide.bias)
        for row, task in enumerate(case.task_ids.tolist()):
            for e in (0, 1 + task) if task >= 0 else ():
                exact[row] += wide.gates[task, e] * (wide.b[e] @ (wide.a[e] @ wide.x[row]))
    assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()  # sums of 24 and 8 float32 products


@pytest.mark.parametrize("plan, ranks", [("gemm", [8] * 4), ("expand", [64] * 4)])
def test_float32_adapters_with_slots(plan, ranks):
    case = cast(random_case(m=33, k=40, n=24, ranks=ranks, dropout_p=0.2), HALF)
    narrow = run_with_gradients(triton_with(plan), case, torch.randn(33, 24))
    torch.manual_seed(0)
    case.a = [t.detach().float().requires_grad_() for t in case.a]
    case.b = [t.detach().float().requires_grad_() for t in case.b]
    wide = run_with_gradients(triton_with(plan), case, torch.randn(33, 24))
    assert all(g.dtype == torch.float32 for g in wide[2:])
    for ours, rounded in zip(wide, narrow, strict=True):  # the same sums, rounded once less
        assert torch.equal(ours.half(), rounded)


def test_small_16_bit_gate_gradients_do_not_vanish():
    """dH * S is 3e-8 an element here, which float16 has no number for."""
    case = cast(random_case(m=32, soft=True), HALF)
    wide = case.to(torch.float64)
    dy = torch.full((32, 17), 2.0**-22)
    for function in (triton_with(compact=False), multi_lora_linear):
        ours = run_with_gradients(function, case, dy)[-1].double()
        exact = run_with_gradients(multi_lora_reference, wide, dy)[-1]
        assert (ours - exact).norm() <= 0.05 * exact.norm()  # dH itself is a few steps of float16


def test_nothing_to_sum():
    for sizes in ((0, 3, 4), (5, 0, 4), (5, 3, 0)):
        m, r, c = sizes
        assert not outer(torch.ones(m, r), torch.ones(m, c), [r], torch.float32, False).any()


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 700),
    widths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    ranks=st.sampled_from([(4,), (16, 16, 16), (1, 1), (24,) * 3]),
    more=st.integers(0, 200),
    dtype=st.sampled_from([torch.float32, HALF]),
    seed=st.integers(0, 99),
)
def test_both_gradients_of_a_linear_at_once(m, widths, ranks, more, dtype, seed):
    """Of B of the last linear and of A of its group, which may have more columns: what two calls
    give, up to the order of the sums."""
    g = torch.Generator().manual_seed(seed)
    r, (n, k) = sum(ranks), widths
    h, dy = torch.randn(m, r + 8, generator=g)[:, :r], torch.randn(m, n, generator=g)
    ds, x = torch.randn(m, r + more, generator=g), torch.randn(m, k, generator=g)
    h, dy, ds, x = (t.to(dtype) for t in (h, dy, ds, x))
    of_b = Factors(h, dy, ranks, torch.float32, True)
    of_a = Factors(ds, x, [r + more], torch.float32, False)
    rule = outer_launch(m, r + more, min(n, k), dtype, False)
    with patch.object(triton_outer, "outer", side_effect=AssertionError("one after the other")):
        db, da = outer_pair(of_b, of_a, rule)
    exact_a = ds.double().T @ x.double()
    exact_b = [part.T.flatten() for part in (h.double().T @ dy.double()).split(ranks)]
    for found, exact in ((da, exact_a), (db, torch.cat(exact_b))):
        assert (found - exact).abs().max() <= 1e-6 * m**0.5 * 10
    assert torch.equal(db, outer_pair(of_b, of_a, rule)[0])
    for found, exact in zip(outer_pair(of_b, of_a), (torch.cat(exact_b), exact_a), strict=True):
        assert (found - exact).abs().max() <= 1e-6 * m**0.5 * 10  # one launch or two, as pays


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["", "a", "b"])
def test_backward_takes_the_pair_where_it_can(dropout, frozen):
    """Where both gradients are needed and nothing masks x; the values are as ever."""
    case = random_case(ranks=[4, 4, 4, 4], dropout_p=dropout)
    for t in {"a": case.a, "b": case.b}.get(frozen, []):
        t.requires_grad_(False)
    with patch.object(triton_update, "outer_pair", side_effect=outer_pair) as pair:
        y = triton_with(compact=True)(*case.arguments())
        y.sum().backward()
    assert pair.called == (dropout == 0 and not frozen)
    found = [t.grad for t in (*case.a, *case.b)]
    for t in (*case.a, *case.b):
        t.grad = None
    multi_lora_reference(*case.arguments()).sum().backward()
    for ours, leaf in zip(found, (*case.a, *case.b), strict=True):
        if leaf.requires_grad:
            torch.testing.assert_close(ours, leaf.grad)


def test_gradients_that_are_no_pair():
    """Unlike ranks, nothing to sum, two dtypes: one after the other."""
    ones = torch.ones
    for ranks, m, n, dtype in (
        ((2, 3), 4, 6, torch.float32), ((5,), 0, 6, torch.float32), ((), 4, 6, torch.float32),
        ((5,), 4, 0, torch.float32), ((5,), 4, 6, HALF),
    ):  # fmt: skip
        of_b = Factors(ones(m, sum(ranks)), ones(m, n), ranks, torch.float32, True)
        of_a = Factors(ones(m, 7, dtype=dtype), ones(m, 9, dtype=dtype), [7], torch.float32, False)
        db, da = outer_pair(of_b, of_a)
        assert torch.equal(db, torch.full((n * sum(ranks),), float(m)))
        assert torch.equal(da, torch.full((7, 9), float(m)))


def test_overlapping_rows_are_no_descriptor():
    x, w, h, b = (torch.zeros(s).half() for s in [(4, 16), (8, 16), (4, 8), (8, 8)])
    assert "must not overlap" in why_not_gemm(x[:1].expand(4, 16), w, h, b)


def test_tf32_set_by_either_name():
    assert dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert dot_precision(torch.float32) == "tf32" and dot_precision(HALF) == "ieee"
    torch.set_float32_matmul_precision("highest")
    assert dot_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert dot_precision(torch.float32) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert dot_precision(torch.float32) == "ieee"


def test_backward_inside_autocast_keeps_its_precision():
    case = cast(random_case(m=20, dropout_p=0.1), torch.float32)
    leaves = case.leaves()
    for backend in ("torch", "triton"):
        with torch.autocast("cpu", dtype=HALF):
            y = multi_lora_linear(*case.arguments(), backend=backend)
            inside = torch.autograd.grad(y.float().sum(), leaves, retain_graph=True)
        outside = torch.autograd.grad(y.float().sum(), leaves)
        assert all(torch.equal(p, q) for p, q in zip(inside, outside, strict=True))


def test_tuning_measures_every_plan(tmp_path, monkeypatch):
    """``ckf tune`` with real kernels; the figures are the interpreter's and mean nothing."""
    for name, value in {"ROUNDS": 1, "ROUND_SECONDS": 0.0, "CACHED_BYTES": 1}.items():
        monkeypatch.setattr(tune, name, value)
    calls = [
        tune.Timed("train", 9, 16, (16, 8), tasks=2, rank=4, dropout=0.1),
        tune.Timed("forward", 3, 16, (16,), tasks=2, rank=4),
    ]
    said: list[str] = []
    file = tune.tune(calls, "cpu", said.append, tmp_path)
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 2 and all(row["triton"] > 0 for row in rows)
    for line in said:
        assert all(f"triton:{plan} " in line for plan in PLANS) and "no triton" not in line


@pytest.mark.parametrize("index", range(10))
def test_what_the_benchmark_of_launches_holds_them_against(index, monkeypatch):
    """benchmarks/bench_kernels.py: its plain formulas, for the rule and for another launch."""
    from benchmarks import bench_kernels

    monkeypatch.setattr(bench_kernels, "DTYPE", torch.float16)
    case = replace(bench_kernels.cases(True)[index], m=96, width=64)
    launches = list(bench_kernels.launches(case).values())
    for chosen in (launches[0], launches[-1]):
        tensors = bench_kernels.make_tensors(case, torch.device("cpu"))
        wanted = bench_kernels.exact(case, tensors, torch.float64)
        found = bench_kernels.run(case, tensors, chosen)
        plain = [t.half() for t in wanted]
        assert bench_kernels.gate(found, wanted, plain, 2**-10).failure is None
        wrong = [t + 0.1 * t.norm() / t.numel() ** 0.5 for t in found]
        assert bench_kernels.gate(wrong, wanted, plain, 2**-10).failure is not None
