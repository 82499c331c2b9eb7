"""Compact H, gathered columns and the plans of the Triton backend, in Triton's interpreter.

Run by test_triton_interpreter.py like interpreter_suite.py, whose poisoned memory it shares.
"""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import ops
from ckf.kernels.group import GroupShape
from ckf.kernels.launch import PLANS, ShrinkLaunch
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.slots import compact_slots
from ckf.kernels.triton_backend import backward_pass, forward_pass
from ckf.kernels.triton_expand import expand
from ckf.kernels.triton_groups import group_rows
from ckf.kernels.triton_shrink import shrink
from tests.kernels.cases import assert_as_good_as_reference, random_case, run_with_gradients
from tests.kernels.interpreter_suite import assert_as_close, cast, poisoned_memory  # noqa: F401

DTYPES = [torch.float32, torch.float16]


def triton_with(plan="expand", compact=True):
    """``multi_lora_linear`` on the Triton kernels, the slots taken from the gates."""

    def run(x, weight, bias, a, b, gates, ids, dropout_p, seed):
        slots, width = slots_of(gates, a) if compact else (None, 0)
        group = (x, [weight], [bias], [a], [b], [gates], ids, dropout_p, seed)
        return ops.run_group(*group, f"triton:{plan}", slots, width)[0]

    return run


def slots_of(gates, a):
    return compact_slots([(gates != 0).tolist()], [[t.shape[0] for t in a]])


def assert_within_rounding(function, case):
    """As ``assert_as_good_as_reference``, the band taken from the sums of absolute products.

    Outputs of one element and sums that cancel have no scale of their own.
    """
    exact_case = case.to(torch.float64)
    magnitudes = case.to(torch.float64)
    for name in ("x", "weight", "bias", "gates"):
        tensor = getattr(magnitudes, name)
        if tensor is not None:
            tensor.data.abs_()
    for tensor in (*magnitudes.a, *magnitudes.b):
        tensor.data.abs_()
    dy = torch.randn(*case.x.shape[:-1], case.weight.shape[0], dtype=torch.float64)
    exact = run_with_gradients(multi_lora_reference, exact_case, dy)
    sums = run_with_gradients(multi_lora_reference, magnitudes, dy.abs())
    plain = run_with_gradients(multi_lora_reference, case.to(case.x.dtype), dy)
    ours = run_with_gradients(function, case, dy)
    for e, total, p, o in zip(exact, sums, plain, ours, strict=True):
        assert o.shape == e.shape
        if e.numel():
            band = 4 * torch.finfo(case.x.dtype).eps * total.max()
            assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + band


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_mixes(data):
    """Narrow and wide R, with slots and without, rows in runs or in any order."""
    tasks = data.draw(st.sampled_from([1, 2, 3, 5, 9, 33, 70]), "tasks")
    largest = [3, 20, 128] if tasks < 9 else [3, 9]
    rank = st.integers(0, data.draw(st.sampled_from(largest), "largest rank"))
    m = data.draw(st.integers(0, 80), "m")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "ids"))
    ids = torch.randint(-1, tasks, (m,), generator=generator)
    if data.draw(st.booleans(), "runs"):
        ids = ids.sort().values.roll(m // 3)
    case = random_case(
        m=m,
        k=data.draw(st.sampled_from([1, 16, 41]), "k"),
        n=data.draw(st.sampled_from([1, 24, 37, 64]), "n"),
        tasks=tasks,
        ranks=data.draw(st.lists(rank, min_size=tasks + 1, max_size=tasks + 1), "ranks"),
        soft=tasks < 9 and data.draw(st.booleans(), "soft"),
        bias=data.draw(st.booleans(), "bias"),
        dropout_p=data.draw(st.sampled_from([0.0, 0.25]), "dropout_p"),
        seed=data.draw(st.integers(0, 1000), "seed"),
        ids=ids,
    )
    if data.draw(st.booleans(), "strided"):
        wide = torch.randn(m, 2 * case.x.shape[1] + 3, generator=generator)
        case.x = wide[:, 1 : 1 + case.x.shape[1]].detach().requires_grad_()
    case = cast(case, data.draw(st.sampled_from(DTYPES), "dtype"))
    plan = data.draw(st.sampled_from(PLANS), "plan")
    compact = not case.gates.requires_grad and data.draw(st.booleans(), "slots")
    assert_within_rounding(triton_with(plan, compact), case)


@pytest.mark.parametrize("ranks", [[16] * 4, [3, 8, 1, 5], [64, 48, 40, 130]])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("plan", PLANS)
def test_plans_match_reference(plan, dropout_p, ranks):
    case = random_case(m=150, k=48, n=40, ranks=ranks, dropout_p=dropout_p)
    assert_as_good_as_reference(triton_with(plan), cast(case, torch.float16))


@pytest.mark.parametrize("plan", ["expand", "addmm", "gemm"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_bias_may_be_strided(plan, compact):
    ranks = [4, 4, 2, 6] if not compact else [64, 64, 64, 8]
    case = random_case(m=24, ranks=ranks)
    case.bias = torch.stack([case.bias, torch.full_like(case.bias, 1e3)], dim=1)[:, 0]
    assert_within_rounding(triton_with(plan, compact), case)


@pytest.mark.parametrize("compact", [False, True])
def test_gemm_plan_runs_the_fused_product(compact):
    case = cast(random_case(m=40, k=48, n=32, ranks=[8] * 4, dropout_p=0.1), torch.float16)
    from ckf.kernels import triton_gemm

    with (
        patch.object(triton_gemm, "gemm", wraps=triton_gemm.gemm) as forward,
        patch.object(triton_gemm, "gemm_dx", wraps=triton_gemm.gemm_dx) as backward,
    ):
        run_with_gradients(triton_with("gemm", compact), case, torch.randn(40, 32))
    assert forward.call_count == backward.call_count == 1


def unlike_group(ranks, n, x, tasks, dropout_p, ids):
    """Linears of one input: their own widths and ranks, the last without a base."""
    cases = [
        random_case(m=x.shape[0], k=x.shape[1], n=n_l, ranks=r, tasks=tasks, seed=i, ids=ids)
        for i, (n_l, r) in enumerate(zip(n, ranks, strict=True))
    ]
    for case in cases:
        case.x, case.dropout_p, case.seed = x, dropout_p, 5
    return cases


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    "ranks",
    [
        [[4] * 4, [2, 6, 0, 3], [0] * 4],  # R 31
        [[40] * 4, [2, 6, 0, 3], [16, 8, 8, 24]],  # R 227: gathered, ranks not aligned
        [[64, 64, 64, 64], [8, 16, 8, 0], [128, 0, 8, 8]],  # gathered, C over one block
    ],
)
def test_group_with_slots(ranks, dropout_p):
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(-1, 3, (45,), generator=g)
    x = torch.randn(45, 24, generator=g).requires_grad_()
    cases = unlike_group(ranks, [17, 9, 32], x, 3, dropout_p, ids)

    def together(cases):
        live = [(case.gates != 0).tolist() for case in cases]
        slots, width = compact_slots(live, ranks)
        columns = [[getattr(case, name) for case in cases] for name in ("weight", "bias", "a", "b")]
        columns[0][-1] = columns[1][-1] = None
        x, gates = cases[0].x, [case.gates for case in cases]
        return ops.run_group(x, *columns, gates, ids, dropout_p, 5, "triton", slots, width)

    def alone(cases):
        cases[-1].weight, cases[-1].bias = torch.zeros_like(cases[-1].weight), None
        return [multi_lora_reference(*case.arguments()) for case in cases]

    def results(function, cases):
        outputs = function(cases)
        leaves = [cases[0].x] + [t for case in cases for t in case.leaves()[1:]]
        total = sum(y.double().square().sum() for y in outputs)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        return [y.detach() for y in outputs] + [
            torch.zeros_like(t) if d is None else d for t, d in zip(leaves, gradients, strict=True)
        ]

    ours, plain = results(together, cases), results(alone, cases)
    wide = [case.to(torch.float64) for case in cases]
    for case in wide:
        case.x = wide[0].x
    for o, p, e in zip(ours, plain, results(alone, wide), strict=True):
        assert_as_close(o, p, e)


@pytest.mark.parametrize("ranks", [[16] * 4, [64] * 4])
def test_saved_is_compact_and_gradients_equal_the_dense(ranks):
    case = random_case(m=70, k=32, n=48, ranks=ranks, dropout_p=0.1)
    slots, width = slots_of(case.gates, case.a)
    assert width == ranks[0] + ranks[1]
    shape = GroupShape((tuple(ranks),), 0.1)
    x, w, bias, a, b, gates, ids, _, seed = case.arguments()
    arguments = (shape, x, [w], [bias], [gates], a, b, ids, torch.tensor([seed]), False)
    with torch.no_grad():
        _, saved = forward_pass(*arguments, slots, width, "expand")
        _, dense = forward_pass(*arguments, None, 0, "expand")
    assert saved.shape == (70, width) and dense.shape == (70, sum(ranks))
    for row, task in enumerate(ids.tolist()):
        if task >= 0:
            mine = dense[row][slots[task] >= 0]
            torch.testing.assert_close(saved[row, : len(mine)], mine)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("ranks", [[8] * 4, [48] * 4])
def test_invalid_ids_become_nan_rows(ranks, compact):
    """Ids on a GPU are not checked; the op refuses them here, so its passes are called."""
    case = random_case(m=8, ranks=ranks)
    slots, width = slots_of(case.gates, case.a) if compact else (None, 0)
    shape = GroupShape((tuple(ranks),), 0.0)

    def passes(ids):
        x, w, bias, a, b, gates = (getattr(case, f) for f in list(case.__dataclass_fields__)[:6])
        last = (ids, None, False, slots, width)
        with torch.no_grad():
            (y,), saved = forward_pass(shape, x, [w], [bias], [gates], a, b, *last, "expand")
            needs = [True, False, False, False] + [True] * 8
            dx, da, db = backward_pass(
                shape, [torch.ones(8, 17)], x, saved, [w], [gates], a, b, *last, needs, "expand"
            )
        return y, dx, da, db

    ids = torch.tensor([0, 3, 1, -2, 2, 2**40, -1, -(2**40)])
    invalid, valid = [1, 3, 5, 7], [0, 2, 4, 6]
    spoilt = passes(ids)
    clean = passes(torch.where(torch.isin(torch.arange(8), torch.tensor(invalid)), -1, ids))
    for bad, good in zip(spoilt[:2], clean[:2], strict=True):
        assert bad[invalid].isnan().all()
        torch.testing.assert_close(bad[valid], good[valid])
    assert all(gradient.isnan().all() for gradient in spoilt[2:])
    assert all(gradient.isfinite().all() for gradient in clean[2:])


@pytest.mark.parametrize("ranks", [[8] * 4, [48] * 4])
def test_a_bad_row_and_a_bad_expert_stay_alone(ranks):
    case = random_case(m=12, ranks=ranks, ids=torch.tensor([0, 1, 2, -1] * 3))
    clean = triton_with()(*case.arguments())
    case.x.data[5] = float("nan")
    case.a[3].data.fill_(float("inf"))  # the expert of task 2
    dirty = triton_with()(*case.arguments())
    others = [i for i in range(12) if i != 5 and case.task_ids[i] != 2]
    assert torch.equal(clean[others], dirty[others])


@pytest.mark.parametrize("ranks", [[8] * 4, [48] * 4])
def test_rows_of_the_base_alone(ranks):
    case = random_case(m=20, ranks=ranks, ids=torch.full((20,), -1))
    y, dx, *gradients = run_with_gradients(triton_with(), case, torch.ones(20, 17))
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.weight, case.bias))
    torch.testing.assert_close(dx, torch.ones(20, 17) @ case.weight)
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("ranks", [[8] * 4, [48] * 4])
def test_same_bits_on_every_run(ranks):
    case = random_case(m=64, ranks=ranks, dropout_p=0.1)
    dy = torch.randn(64, 17)
    first = run_with_gradients(triton_with(), case, dy)
    again = run_with_gradients(triton_with(), case, dy)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_tasks_without_rows_get_zero_gradients():
    case = random_case(m=9, ranks=[48] * 4, ids=torch.full((9,), 1))
    _, _, *gradients = run_with_gradients(triton_with(), case, torch.ones(9, 17))
    for expert, present in enumerate([True, False, True, False]):
        for gradient in (gradients[expert], gradients[4 + expert]):
            assert gradient.any() == present and gradient.is_contiguous()


def test_gathering_reads_no_expert_of_another_task():
    case = random_case(m=32, ranks=[64] * 4, ids=torch.full((32,), 1))
    for expert in (1, 3):
        case.a[expert].data.fill_(float("nan"))
        case.b[expert].data.fill_(float("nan"))
    results = run_with_gradients(triton_with(), case, torch.ones(32, 17))
    assert all(t.isfinite().all() for t in results)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.lists(st.integers(-3, 80), max_size=60))
def test_rows_are_grouped_in_their_order(tasks, ids):
    slots, width = compact_slots([[[True] + [t == e for e in range(tasks)] for t in range(tasks)]],
                                 [[1] * (tasks + 1)])  # fmt: skip
    groups = group_rows(torch.tensor(ids, dtype=torch.int64), slots, width)
    key = [i if 0 <= i < tasks else tasks if i == -1 else tasks + 1 for i in ids]
    assert groups.rows.tolist() == sorted(range(len(ids)), key=lambda row: key[row])
    counts = [sum(k < group for k in key) for group in range(tasks + 3)]
    assert groups.starts.tolist() == counts
    for task, row in enumerate(groups.columns.tolist()):
        assert row == [0, 1 + task] + [-1] * (width - 2)


@pytest.mark.parametrize("split", [2, 3, 5])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink_on_parts_of_k(split, p):
    m, k, ranks = 37, 150, [16, 8, 24, 5]
    case = random_case(m=m, k=k, ranks=ranks)
    a, ids = torch.cat(case.a).detach(), case.task_ids
    gates = case.gates.repeat_interleave(torch.tensor(ranks), dim=1)
    slots, width = slots_of(case.gates, case.a)
    dropout = (torch.tensor([3]), round(p * 65536), 1 / (1 - p)) if p else None

    def both(launch):
        h, s = torch.empty(m, sum(ranks)), torch.empty(m, sum(ranks))
        packed, restored = torch.empty(m, width), torch.empty(m, sum(ranks))
        x = case.x.detach()
        shrink(x, a, gates, ids, h, s, dropout, slots, packed, launch=launch)
        shrink(x, a, gates, ids, s, None, dropout, slots, None, packed, restored, launch=launch)
        assert torch.equal(restored, h)
        return h, s

    whole = both(ShrinkLaunch(16, 64, 32, 4, 1))
    parts = both(ShrinkLaunch(16, 64, 32, 4, 1, split))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [[8] * 4, [48] * 4])
def test_addresses_past_two_to_the_31(ranks, tmp_path):
    """Rows so far apart that a 32-bit offset would wrap; a sparse file, so nothing lies between."""
    rows, width, gap = 18, 16, 2**27

    def spread(values):
        size = rows * gap
        far = torch.from_file(f"{tmp_path}/{len(list(tmp_path.iterdir()))}", True, size)
        view = far.as_strided((rows, width), (gap, 1))
        return view.copy_(values)

    case = random_case(m=rows, k=width, n=width, ranks=ranks, ids=torch.arange(rows) % 4 - 1)
    dy = torch.randn(rows, width)
    near = run_with_gradients(triton_with(), case, dy)
    y = spread(near[0])
    case.x = spread(case.x.detach()).requires_grad_()
    far = run_with_gradients(triton_with(), case, spread(dy))
    assert all(torch.equal(p, q) for p, q in zip(near, far, strict=True))
    expand(torch.ones(rows, 1), torch.ones(1, width), y, accumulate=True)
    assert torch.equal(y, near[0] + 1)


def test_slots_by_hand():
    live = [[[True, True, False], [True, False, True]], [[False, True], [True, True]]]
    slots, width = compact_slots(live, [[2, 3, 1], [0, 20]])
    first = [0, 1, 2, 3, 4, -1, *range(5, 25)]
    second = [0, 1, -1, -1, -1, 2, *range(3, 23)]
    assert slots.tolist() == [first, second] and width == 32
    assert compact_slots([[[False]]], [[4]])[0].tolist() == [[-1] * 4]
    with pytest.raises(ValueError, match=r"linear 0: live is \(1, 2\); expected \(1, 1\)"):
        compact_slots([[[True, True]]], [[4]])
    with pytest.raises(ValueError, match="live for 1 linears, ranks for 2"):
        compact_slots([[[True]]], [[4], [4]])
