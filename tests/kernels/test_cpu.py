"""The CPU kernels of csrc/cpu against the float64 reference, with every set of instructions."""

import shutil
import sysconfig
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import cpu, multi_lora_group, multi_lora_linear, ops
from ckf.kernels.dropout import dropout_mask, dropout_scale
from tests.kernels.cases import assert_as_good_as_reference, random_case, run_with_gradients
from tests.kernels.cpu_cases import built, by_cpu, constant, group, instructions  # noqa: F401
from tests.kernels.test_cuda_build import build  # noqa: F401


def test_it_is_built_where_it_can_be(build):  # noqa: F811
    """Else every other test here would be skipped in silence."""
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(build.cxx()[0]) is None or not headers.exists():
        pytest.skip("no C++ compiler, or Python without its headers")
    assert cpu.available()[0], cpu.available()[1]


@pytest.fixture
def poisoned():
    """What is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    "sizes",
    [
        {"m": 13, "k": 24, "n": 17},
        {"m": 37, "k": 41, "n": 29, "ranks": [3, 8, 1, 5]},
        {"m": 150, "k": 96, "n": 200, "ranks": [16, 16, 0, 7]},
        {"m": 70, "k": 1, "n": 1, "ranks": [1, 1, 1, 1]},
        {"m": 100, "k": 193, "n": 97, "tasks": 9},
        {"m": 9, "k": 16, "n": 16, "ranks": [128, 64, 33, 2]},
    ],
    ids=lambda sizes: "-".join(str(sizes[name]) for name in "mkn"),
)
def test_matches_reference(instructions, poisoned, sizes, dropout_p, soft):  # noqa: F811
    case = constant(random_case(**sizes, soft=soft, dropout_p=dropout_p))
    assert_as_good_as_reference(by_cpu, case)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_mix_of_rows(data):
    draw = data.draw
    tasks = draw(st.integers(1, 6))
    m, k, n = (draw(st.integers(*limits)) for limits in ((0, 90), (1, 70), (1, 120)))
    case = random_case(
        m, k, n, tasks,
        ranks=draw(st.lists(st.integers(0, 20), min_size=tasks + 1, max_size=tasks + 1)),
        soft=draw(st.booleans()), bias=draw(st.booleans()), seed=draw(st.integers(0, 99)),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.5])),
        ids=torch.tensor(draw(st.lists(st.integers(-1, tasks - 1), min_size=m, max_size=m))).long(),
    )  # fmt: skip
    case = constant(case)
    for leaf in case.leaves():
        leaf.requires_grad_(draw(st.booleans()) or leaf is case.x)
    assert_as_good_as_reference(by_cpu, case)


@pytest.mark.parametrize("slots", [True, False], ids=["slots", "no slots"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_group_equals_torch_products(instructions, poisoned, slots, dropout_p):  # noqa: F811
    found = []
    for backend in ("cpu", "torch"):
        arguments, (table, width) = group(slots=slots)
        ys = ops.run_group(*arguments, dropout_p, 5, backend, table, width)
        leaves = [arguments[0], *(t for s in (*arguments[3], *arguments[4]) for t in s)]
        loss = sum((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() for y in ys)
        found.append([*ys, *torch.autograd.grad(loss, leaves)])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", ["a0", "b2", "x", "all a", "all b"])
def test_frozen_inputs_leave_the_other_gradients(frozen):
    case = random_case(m=60)
    dy = torch.randn(60, 17)
    names = ["x", *(f"a{e}" for e in range(4)), *(f"b{e}" for e in range(4))]
    full = dict(zip(names, run_with_gradients(by_cpu, case, dy)[1:], strict=True))
    still = {n for n in names if n == frozen or (frozen[:4] == "all " and n[0] == frozen[-1])}
    for name, leaf in zip(names, [case.x, *case.a, *case.b], strict=True):
        leaf.requires_grad_(name not in still)
    moving = [name for name in names if name not in still]
    for name, found in zip(moving, run_with_gradients(by_cpu, case, dy)[1:], strict=True):
        assert torch.equal(found, full[name])


def test_a_base_that_trains():
    case = random_case(m=40)
    tensors = [case.weight.requires_grad_(), case.bias.requires_grad_()]
    found = [
        torch.autograd.grad(multi_lora_linear(*case.arguments(), backend=b).square().sum(), tensors)
        for b in ("cpu", "torch")
    ]
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-3)


def test_the_bits_depend_on_no_number_of_threads(instructions):  # noqa: F811
    case = random_case(m=700, k=300, n=500, tasks=7, dropout_p=0.1)
    dy, most = torch.randn(700, 500), torch.get_num_threads()
    base = torch.zeros_like(case.weight)  # PyTorch's own products may depend on it
    case = replace(case, weight=base)
    first = run_with_gradients(by_cpu, case, dy)
    try:
        for threads in (1, 2, 3, 5) * 3:
            torch.set_num_threads(threads)
            again = run_with_gradients(by_cpu, case, dy)
            assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(most)


def test_a_row_has_the_same_bits_whatever_the_others_are(instructions):  # noqa: F811
    case = random_case(m=77, k=50, n=40)
    dy = torch.randn(77, 40)

    def update(rows):
        x = case.x.detach()[rows].requires_grad_()
        ids = case.task_ids[rows]
        y = multi_lora_group(x, [None], [None], [case.a], [case.b], case.gates, ids, backend="cpu")[
            0
        ]
        return y.detach(), torch.autograd.grad(y, x, dy[rows])[0]

    y, dx = update(torch.arange(77))
    order = torch.randperm(77)
    for part in (order[:1], order[:30], order.flip(0), order[5:6]):
        own_y, own_dx = update(part)
        assert torch.equal(own_y, y[part]) and torch.equal(own_dx, dx[part])


def test_threads_may_call_at_the_same_time():
    cases = [random_case(m=200, k=128, n=160, seed=seed) for seed in range(4)]
    dy = torch.randn(200, 160)
    alone, wrong = [run_with_gradients(by_cpu, case, dy) for case in cases], []

    def work(case, expected):
        for _ in range(20):
            found = run_with_gradients(by_cpu, case, dy)
            if not all(torch.equal(p, q) for p, q in zip(found, expected, strict=True)):
                wrong.append(case)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_that_are_strided_or_shared(poisoned):
    case = constant(random_case(m=33, k=24))
    wide = torch.randn(33, 48)
    for x in (
        wide[:, :24],
        wide[:, ::2],
        torch.randn(24, 33).t(),
        torch.randn(1, 24).expand(33, 24),
    ):
        assert_as_good_as_reference(by_cpu, replace(case, x=x.requires_grad_()))
    column = replace(
        case, x=torch.randn(33, 2)[:, :1].requires_grad_(), a=[t[:, :1] for t in case.a]
    )
    column = replace(
        column, weight=case.weight[:, :1], a=[t.detach().requires_grad_() for t in column.a]
    )
    assert_as_good_as_reference(by_cpu, replace(column, dropout_p=0.3))
    signal = torch.randn(60)
    update = replace(case, x=signal.unfold(0, 24, 1)[:33].requires_grad_(), weight=None, bias=None)
    moved = replace(update, x=update.x.detach().clone().requires_grad_())
    for p in (0.0, 0.4):  # rows that overlap
        found = [
            run_with_gradients(by_cpu, replace(one, dropout_p=p), torch.ones(33, 17))
            for one in (update, moved)
        ]
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    y = by_cpu(*case.arguments())
    assert torch.equal(  # a gradient of stride 0, and one whose columns lie apart
        torch.autograd.grad(y.sum(), case.a[0], retain_graph=True)[0],
        torch.autograd.grad(y, case.a[0], torch.ones(17, 33).t())[0],
    )


def test_adapters_that_are_not_contiguous():
    case = random_case(m=30)
    plain = run_with_gradients(by_cpu, case, torch.ones(30, 17))
    case.a = [t.detach().t().contiguous().t().requires_grad_() for t in case.a]
    case.b = [t.detach().t().contiguous().t().requires_grad_() for t in case.b]
    for found, expected in zip(
        run_with_gradients(by_cpu, case, torch.ones(30, 17)), plain, strict=True
    ):
        assert torch.equal(found, expected)


def test_fresh_adapters_keep_the_bits_of_the_base():
    case = random_case(m=64, k=48, n=32)
    for b in case.b:
        b.data.zero_()
    x = case.x.view(4, 16, 48)
    y = by_cpu(x, *case.arguments()[1:6], case.task_ids.view(4, 16))
    assert torch.equal(y, torch.nn.functional.linear(x, case.weight, case.bias))


def test_gates_select_and_bad_rows_stay_alone():
    case = random_case(m=8, ids=torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]))
    case.a[2].data.fill_(float("inf"))  # the expert of task 1
    y, dx, *_ = run_with_gradients(by_cpu, case, torch.ones(8, 17))
    fine = [0, 1, 4, 5, 6, 7]
    assert y[fine].isfinite().all() and dx[fine].isfinite().all()
    assert not y[[2, 3]].isfinite().any()
    case.x.data[4] = float("nan")
    dirty, _, *gradients = run_with_gradients(by_cpu, case, torch.ones(8, 17))
    assert torch.equal(dirty[[0, 1, 5, 6, 7]], y[[0, 1, 5, 6, 7]])
    assert gradients[1].isfinite().all()  # the expert of task 0, which has no such row


@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (70, 128), (33, 129), (40, 577), (0, 5), (5, 0)])
def test_drop_is_the_mask_of_every_backend(size, seed):
    x = torch.randn(size[0], size[1] + 3)[:, : size[1]]
    x[:1, :2] = float("nan")
    for p in (0.1, 0.5, 0.999):
        keep = dropout_mask(*size, p, seed)
        expected = torch.where(keep, x * dropout_scale(p), 0)
        found = cpu.drop(x, torch.tensor([seed]), p)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(), expected.nan_to_num())
