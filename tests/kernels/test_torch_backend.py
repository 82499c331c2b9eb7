"""The torch backend against the float64 reference: values, gradients, edges."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from ckf.kernels import compact_slots, multi_lora_group, multi_lora_linear
from ckf.kernels.reference import multi_lora_reference
from tests.kernels.cases import assert_as_good_as_reference, random_case, run_with_gradients

torch_backend = partial(multi_lora_linear, backend="torch")


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, dropout_p, soft):
    case = random_case(m=37, k=41, n=29, ranks=[3, 8, 1, 5], soft=soft, dropout_p=dropout_p)
    case = case.to(dtype)
    case.gates = case.gates.detach().float().requires_grad_(soft)
    assert_as_good_as_reference(torch_backend, case)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(soft, dropout_p):
    case = random_case(
        m=6, k=5, n=4, tasks=2, ranks=[2, 1, 3], soft=soft, dropout_p=dropout_p, dtype=torch.float64
    )
    leaves = case.leaves()

    def function(*tensors):
        x, rest = tensors[0], list(tensors[1:])
        a, b = rest[:3], rest[3:6]
        gates = rest[6] if soft else case.gates
        return torch_backend(
            x, case.weight, case.bias, a, b, gates, case.task_ids, dropout_p, case.seed
        )

    assert gradcheck(function, leaves, eps=1e-6, atol=1e-7)


def test_gate_gradient_is_exact_at_zero():
    case = random_case(m=16, soft=True, dtype=torch.float64)
    with torch.no_grad():
        case.gates[:, 1:] = 0
    assert_as_good_as_reference(torch_backend, case)
    gates_gradient = run_with_gradients(torch_backend, case, torch.ones(16, 17))[-1]
    assert (gates_gradient[:, 1:] != 0).any()


@pytest.mark.parametrize("m", [0, 1])
def test_empty_and_single_rows(m):
    assert_as_good_as_reference(torch_backend, random_case(m=m, dropout_p=0.2))


def test_tasks_without_rows_get_zero_gradients():
    case = random_case(m=9, ids=torch.full((9,), 1))
    _, _, *gradients = run_with_gradients(torch_backend, case, torch.ones(9, 17))
    da, db = gradients[:4], gradients[4:8]
    for expert in (2 + 1, 0 + 1):  # tasks 2 and 0
        assert not da[expert].any() and not db[expert].any()
    for expert in (0, 1 + 1):  # the shared expert and task 1
        assert da[expert].any() and db[expert].any()


@pytest.mark.parametrize("frozen", ["a0", "b2", "x", "all a", "all b"])
@pytest.mark.parametrize("rows", [13, 400], ids=["dense", "runs"])
def test_frozen_inputs_leave_the_other_gradients(rows, frozen):
    ids = torch.arange(rows) * 3 // rows
    case = random_case(m=rows, ids=ids, dtype=torch.float64)
    dy = torch.randn(rows, 17, dtype=torch.float64)
    names = ["x", *(f"a{e}" for e in range(4)), *(f"b{e}" for e in range(4))]
    full = dict(zip(names, run_with_gradients(torch_backend, case, dy)[1:], strict=True))
    still = {n for n in names if n == frozen or (frozen[:4] == "all " and n[0] == frozen[-1])}
    for name, leaf in zip(names, [case.x, *case.a, *case.b], strict=True):
        leaf.requires_grad_(name not in still)
    gradients = run_with_gradients(torch_backend, case, dy)[1:]
    moving = [name for name in names if name not in still]
    for name, gradient in zip(moving, gradients, strict=True):
        torch.testing.assert_close(gradient, full[name])


def test_base_only_rows_equal_the_frozen_linear():
    case = random_case(ids=torch.full((13,), -1))
    y = torch_backend(*case.arguments())
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.weight, case.bias))


def test_zero_b_keeps_the_bits_of_the_base():
    case = random_case(m=64, k=48, n=32)
    for b in case.b:
        b.data.zero_()
    x = case.x.view(4, 16, 48)
    y = torch_backend(x, *case.arguments()[1:6], case.task_ids.view(4, 16))
    assert torch.equal(y, torch.nn.functional.linear(x, case.weight, case.bias))


def test_gate_of_zero_selects_even_over_infinities():
    case = random_case(m=8, ids=torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]))
    case.a[2].data.fill_(float("inf"))  # the expert of task 1
    y = torch_backend(*case.arguments())
    assert y[[0, 1, 4, 5, 6, 7]].isfinite().all()
    assert not y[[2, 3]].isfinite().any()


def test_bad_row_never_reaches_another_row():
    case = random_case(m=8)
    clean = torch_backend(*case.arguments())
    case.x.data[3] = float("nan")
    dirty = torch_backend(*case.arguments())
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(clean[others], dirty[others])


def test_row_order_does_not_matter():
    case = random_case(m=21)
    order = torch.randperm(21)
    y = torch_backend(*case.arguments())
    case.x, case.task_ids = case.x[order], case.task_ids[order]
    torch.testing.assert_close(torch_backend(*case.arguments()), y[order])


def test_non_contiguous_input():
    case = random_case(m=24, k=13)
    wide = torch.randn(24, 26)
    case.x = wide[:, ::2].requires_grad_()
    assert_as_good_as_reference(torch_backend, case)


def test_same_bits_on_every_run():
    case = random_case(m=64, dropout_p=0.1, soft=True)
    dy = torch.randn(64, 17)
    first = run_with_gradients(torch_backend, case, dy)
    for _ in range(3):
        again = run_with_gradients(torch_backend, case, dy)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_float32_adapters_on_a_bfloat16_base():
    case = random_case(m=33, k=40, n=24).to(torch.bfloat16)
    case.gates = case.gates.detach().float()
    case.a = [t.detach().float().requires_grad_() for t in case.a]
    case.b = [t.detach().float().requires_grad_() for t in case.b]
    results = run_with_gradients(torch_backend, case, torch.randn(33, 24))
    assert results[0].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in results[2:])


def test_group_equals_linears_alone():
    first, second = random_case(seed=1, n=17), random_case(seed=2, n=9, ranks=[2, 6, 1, 3])
    second.x, second.task_ids = first.x, first.task_ids
    together = multi_lora_group(
        first.x,
        [first.weight, second.weight],
        [first.bias, None],
        [first.a, second.a],
        [first.b, second.b],
        [first.gates, second.gates],
        first.task_ids,
        dropout_p=0.25,
        seed=5,
        backend="torch",
    )
    second.bias = None
    for case, y in zip((first, second), together, strict=True):
        case.dropout_p, case.seed = 0.25, 5
        torch.testing.assert_close(y, torch_backend(*case.arguments()))
    sum(y.sum() for y in together).backward()
    dx = first.x.grad.clone()
    first.x.grad = None
    (torch_backend(*first.arguments()).sum() + torch_backend(*second.arguments()).sum()).backward()
    torch.testing.assert_close(dx, first.x.grad)


def test_update_alone_without_a_base():
    case = random_case()
    alone = multi_lora_group(
        case.x, [None], [None], [case.a], [case.b], case.gates, case.task_ids, backend="torch"
    )[0]
    case.weight, case.bias = torch.zeros_like(case.weight), None
    torch.testing.assert_close(alone, multi_lora_reference(*case.arguments()))


def test_saves_the_input_and_one_rank_tensor():
    case = random_case(m=50, k=24, ranks=[4, 4, 4, 4])
    own = {t.data_ptr() for t in (case.weight, case.bias, case.gates, *case.a, *case.b)}
    saved = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        torch_backend(*case.arguments()[:7], 0.5, 3)
    assert sorted(saved) == sorted([(1,), (50,), (50, 24), (50, 16)])  # seed, ids, x, H


@pytest.mark.parametrize("rows", [50, 400], ids=["dense", "runs"])
@pytest.mark.parametrize(
    ("ranks", "width", "kept"), [([40, 40, 20, 60], 112, 112), ([8, 8, 4, 12], 32, 32)]
)
def test_slots_keep_a_rows_own_columns(rows, ranks, width, kept):
    """Those of many rank columns, H (m, 160): 40 + 60, to the next 16; of few all are kept."""
    case = random_case(m=rows, k=24, ranks=ranks, ids=torch.arange(rows) * 3 // rows)
    slots = compact_slots([(case.gates != 0).tolist()], [ranks])
    assert slots[1] == width
    dy = torch.randn(rows, 17)
    plain = run_with_gradients(torch_backend, case, dy)
    compact = run_with_gradients(partial(torch_backend, slots=slots), case, dy)
    assert all(torch.equal(p, q) for p, q in zip(compact, plain, strict=True))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        torch_backend(*case.arguments(), slots=slots)
    sizes = [tuple(t.shape) for t in saved if t.shape[0] == rows and t.dim() == 2]
    assert sizes == [(rows, 24), (rows, kept)]


def test_wrong_slots_are_refused():
    case = random_case(ranks=[4, 4, 2, 6])
    slots = compact_slots([[[True, False, False, False]] * 3], [[4, 4, 2, 6]])
    with pytest.raises(ValueError, match="slots leave out a gate that is not zero"):
        torch_backend(*case.arguments(), slots=slots)
    with pytest.raises(ValueError, match=r"expected \(3, 16\)"):
        torch_backend(*case.arguments(), slots=(slots[0][:, 1:], slots[1]))


def test_autocast_is_honoured():
    case = random_case()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch_backend(*case.arguments())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert case.x.grad.dtype == torch.float32 and case.a[0].grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_ids": torch.tensor([5] * 13)}, "task id 5 is out of range; expected 0 to 2"),
        ({"task_ids": torch.tensor([-2] * 13)}, "task id -2 is out of range"),
        ({"task_ids": torch.zeros(12, dtype=torch.int64)}, r"shape \(12,\); expected .* \(13,\)"),
        ({"task_ids": torch.zeros(13)}, "task_ids are torch.float32"),
        ({"weight": torch.zeros(17, 23)}, r"weight has shape \(17, 23\); expected \(17, 24\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\)"),
        ({"gates": torch.zeros(3, 7)}, r"gates of shape \(3, 7\)"),
        ({"weight": torch.zeros(17, 24, dtype=torch.float64)}, "weight is torch.float64"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        ({"x": [[1.0]]}, "x is a list; expected a tensor"),
        ({"x": np.zeros((13, 24))}, "x is a ndarray; expected a tensor"),
        ({"a": [None] * 4}, "linear 0: a is .*NoneType.*one matrix an expert"),
        ({"b": torch.zeros(4, 17, 2)}, "linear 0: b is one tensor; .*unbind a stack"),
        ({"seed": None}, "seed is None; expected an int"),
        ({"seed": 1.5}, "seed is 1.5; expected an int"),
    ],
)
def test_mistakes_name_the_fix(change, message):
    case = random_case()
    for name, value in change.items():
        setattr(case, name, value)
    with pytest.raises(ValueError, match=message):
        torch_backend(*case.arguments())


def test_unusable_backends_say_why():
    case = random_case()
    for backend, message in (("cuda", "on cpu"), ("fast", "expected one of auto")):
        with pytest.raises(ValueError, match=message):
            multi_lora_linear(*case.arguments(), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forward_mode_is_refused_and_not_lost(backend):
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    a, b, gates = [torch.randn(2, 4)], [torch.randn(5, 2)], torch.ones(1, 1)

    ids = torch.zeros(3, dtype=torch.int64)

    def run(x):
        return multi_lora_linear(x, weight, None, a, b, gates, ids, backend=backend)

    def reference(x):
        return multi_lora_reference(x, weight, None, a, b, gates, ids)

    with pytest.raises(ValueError, match=r"forward-mode .* ckf\.kernels\.reference"):
        torch.func.jvp(run, (x,), (x,))
    y, along = torch.func.jvp(reference, (x,), (x,))  # linear in x
    torch.testing.assert_close(along, y)
    torch.testing.assert_close(run(x), y)
