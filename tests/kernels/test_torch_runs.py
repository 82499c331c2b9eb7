"""Runs of rows of one task on a CPU: the same results as dense-gated products."""

import pytest
import torch

from ckf.kernels import multi_lora_group, multi_lora_linear, torch_runs
from ckf.kernels.group import GroupShape
from ckf.kernels.torch_runs import paying_runs
from tests.kernels.cases import (
    assert_as_good_as_reference,
    random_case,
    run_with_gradients,
)

SORTED = [0] * 140 + [2] * 133 + [-1] * 135 + [1] * 1 + [2] * 270


def by_runs(*arguments):
    return multi_lora_linear(*arguments, backend="torch")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Counts the calls that go by runs; here all that may do."""
    count = []
    monkeypatch.setattr(torch_runs, "PRODUCT_COST", -1.0)
    original = torch_runs.forward_pass
    monkeypatch.setattr(torch_runs, "forward_pass", lambda *a: count.append(1) or original(*a))
    return count


def sorted_case(**options):
    ids = torch.tensor(options.pop("ids", SORTED))
    return random_case(m=len(ids), ids=ids, **options)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("ranks", [None, [3, 8, 1, 5]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matches_reference(calls, dtype, ranks, dropout_p):
    case = sorted_case(k=41, n=29, ranks=ranks, dropout_p=dropout_p).to(dtype)
    case.gates = case.gates.detach().float()
    assert_as_good_as_reference(by_runs, case)
    assert calls


@pytest.fixture
def gathered(monkeypatch):
    """Rows are gathered by task, whatever it costs."""
    monkeypatch.setattr(torch_runs, "GATHER_COST", -1e12)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scattered_rows_match_reference(calls, gathered, dtype, dropout_p):
    case = random_case(m=151, ranks=[3, 8, 1, 5], dropout_p=dropout_p).to(dtype)
    case.gates = case.gates.detach().float()
    case.task_ids[::7] = -1
    assert_as_good_as_reference(by_runs, case)
    assert calls


def test_scattered_rows_give_the_same_bits_on_every_run(calls, gathered):
    case = random_case(m=300, dropout_p=0.1)
    dy = torch.randn(300, 17)
    first = run_with_gradients(by_runs, case, dy)
    again = run_with_gradients(by_runs, case, dy)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True)) and calls


def test_scattered_rows_of_fresh_adapters_keep_the_bits_of_the_base(calls, gathered):
    case = random_case(m=300)
    for b in case.b:
        b.data.zero_()
    y = by_runs(*case.arguments())
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.weight, case.bias)) and calls


def test_soft_gates_without_gradient_and_live_experts_of_other_tasks(calls):
    case = sorted_case(soft=True)
    case.gates = case.gates.detach()
    case.gates[1] = 0  # task 1 has no live expert at all
    assert_as_good_as_reference(by_runs, case)
    assert calls


def test_scattered_ids_go_the_dense_way(calls, monkeypatch):
    monkeypatch.setattr(torch_runs, "PRODUCT_COST", 6.5e6)
    assert_as_good_as_reference(by_runs, random_case(m=200))
    assert not calls


def test_learned_gates_go_the_dense_way(calls):
    assert_as_good_as_reference(by_runs, sorted_case(soft=True))
    assert not calls


def test_base_only_batch(calls):
    case = sorted_case(ids=[-1] * 150)
    y, dx, *rest = run_with_gradients(by_runs, case, torch.ones(150, 17))
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.weight, case.bias))
    assert not any(g.any() for g in rest) and dx.any() and calls


def test_expert_of_another_task_may_be_infinite(calls):
    case = sorted_case()
    case.a[2].data.fill_(float("inf"))  # task 1
    y = by_runs(*case.arguments())
    assert y[case.task_ids != 1].isfinite().all() and calls


def test_group_with_different_experts_and_an_update_alone(calls, monkeypatch):
    first = sorted_case(seed=1, n=17, dtype=torch.float64)
    second = sorted_case(seed=2, n=9, ranks=[2, 6, 1, 3], dtype=torch.float64)
    x, leaves = first.x, [first.x, *first.a, *first.b, *second.a[1:], *second.b[1:]]

    def run():
        outputs = multi_lora_group(
            x,
            [first.weight, None],
            [first.bias, None],
            [first.a, second.a[1:]],
            [first.b, second.b[1:]],
            [first.gates, second.gates[:, 1:]],
            first.task_ids,
            dropout_p=0.25,
            seed=5,
            backend="torch",
        )
        return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves)]

    by_run = run()
    assert len(calls) == 1
    monkeypatch.setattr("ckf.kernels.torch_runs.paying_runs", lambda *a: None)
    for fast, dense in zip(by_run, run(), strict=True):
        torch.testing.assert_close(fast, dense)
    assert len(calls) == 1


def test_equals_the_dense_way(monkeypatch):
    case = sorted_case(dropout_p=0.2, dtype=torch.float64)
    dy = torch.randn(len(SORTED), 17, dtype=torch.float64)
    runs = run_with_gradients(by_runs, case, dy)
    monkeypatch.setattr("ckf.kernels.torch_runs.paying_runs", lambda *a: None)
    dense = run_with_gradients(by_runs, case, dy)
    for p, q in zip(runs, dense, strict=True):
        torch.testing.assert_close(p, q)


def test_same_bits_on_every_run():
    case = sorted_case(dropout_p=0.1)
    dy = torch.randn(len(SORTED), 17)
    first = run_with_gradients(by_runs, case, dy)
    again = run_with_gradients(by_runs, case, dy)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_gradcheck():
    case = random_case(
        m=140, k=3, n=4, tasks=2, ranks=[2, 1, 3], dropout_p=0.3, dtype=torch.float64,
        ids=torch.tensor([1] * 140),
    )  # fmt: skip
    case.x = case.x.detach()
    a, b = case.a, case.b

    def function(*tensors):
        return by_runs(
            case.x, case.weight, case.bias, tensors[:3], tensors[3:], case.gates, case.task_ids,
            0.3, 1,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, [*a, *b], eps=1e-6, atol=1e-7)


def runs_of(ids, ranks, k=576, n=1536, linears=1):
    """``paying_runs`` of hard gates."""
    experts = len(ranks)
    gate = torch.tensor(
        [[float(e in (0, 1 + t)) for e in range(experts)] for t in range(experts - 1)]
    )
    shape = GroupShape((tuple(ranks),) * linears, 0.0)
    b = [torch.empty(n, r, device="meta") for r in ranks] * linears
    x = torch.empty(len(ids), k, device="meta")
    return paying_runs(shape, torch.tensor(ids, dtype=torch.int64), [gate] * linears, x, b)


def test_runs_are_found_or_refused(monkeypatch):
    assert runs_of([1, 1, 0], [4] * 4) == [(slice(0, 2), 1), (slice(2, 3), 0)]
    assert runs_of([], [4] * 4) is None
    monkeypatch.setattr(torch_runs, "PRODUCT_COST", 6.5e6)
    four, many = [16] * 5, [16] * 65
    assert runs_of([2] * 140 + [0] * 200, four) == [(slice(0, 140), 2), (slice(140, 340), 0)]
    assert runs_of([2] * 100 + [0] * 100, four) is None  # dense products of 80 columns are faster
    assert len(runs_of([t for t in range(64) for _ in range(16)], many)) == 64
    assert runs_of(list(range(64)), many) is None  # a run a row
    scattered = runs_of([t % 64 for t in range(2048)], many)
    assert [task for _, task in scattered] == list(range(64))
    assert all(rows.tolist() == list(range(task, 2048, 64)) for rows, task in scattered)
    assert (
        runs_of([t % 4 for t in range(2048)], four) is None
    )  # gathering costs more than it spares
    few = runs_of([3, -1, 3, 200], [16] * 257)  # few rows, but all those experts would be read
    assert [(rows.tolist(), task) for rows, task in few] == [([1], -1), ([0, 2], 3), ([3], 200)]
    assert runs_of([2] * 140 + [0] * 140, four, k=64, n=64) is None  # small products
    assert runs_of([0] * 5000, [16, 16]) is None  # one task: nothing is spared
