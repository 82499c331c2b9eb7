"""The "gemm" plan where csrc's product takes the operands. Run by test_triton_interpreter.py.

Triton's kernels run in its interpreter, the source of that product on the host.
"""

from unittest.mock import patch

import pytest
import torch

from ckf.kernels import hopper, ops, triton_update
from ckf.kernels.slots import compact_slots
from tests.kernels.cases import assert_as_good_as_reference, random_case
from tests.kernels.interpreter_slots import triton_with
from tests.kernels.test_cuda_hopper_host import Host, host, library  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def on_the_host(host, monkeypatch):  # noqa: F811
    """Its outputs need no poison here, and the interpreter's tensors no guard."""
    monkeypatch.undo()
    take_products(host, monkeypatch)
    return host


def take_products(host: Host, monkeypatch) -> None:  # noqa: F811
    """csrc's products, wherever they take the operands."""
    monkeypatch.setattr(hopper.cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(hopper.cuda, "_load_extension", lambda: (host, ""))
    monkeypatch.setattr(hopper.cuda, "_raw_stream", lambda index: 0)
    monkeypatch.setattr(hopper, "available", lambda device=None: (True, ""))
    monkeypatch.setattr(hopper, "FEWEST_MASKED_TILES", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def launches(host: Host) -> list[tuple[bool, bool]]:  # noqa: F811
    """(dx, whether H or dS was made inside) of every product."""
    return [(call["dx"], "shrink" in call) for call in host.calls]


RANKS = [16, 8, 24, 16]


@pytest.mark.parametrize("compact", [True, False], ids=["compact", "plain"])
@pytest.mark.parametrize("bias", [True, False])
def test_h_and_ds_are_made_inside(on_the_host, compact, bias):
    case = random_case(m=70, k=48, n=40, tasks=3, ranks=RANKS).to(torch.float16)
    if not bias:
        case.bias = None
    with patch.object(triton_update, "shrink", side_effect=AssertionError("a launch too many")):
        assert_as_good_as_reference(triton_with("gemm", compact), case)
    assert launches(on_the_host) == [(False, True), (True, True)]


def test_dropout_keeps_h_apart_and_ds_inside(on_the_host):
    case = random_case(m=70, k=48, n=40, tasks=3, ranks=RANKS, dropout_p=0.3).to(torch.float16)
    assert_as_good_as_reference(triton_with("gemm"), case)
    assert launches(on_the_host) == [(False, False), (True, True)]


def test_few_masked_tiles_keep_both_apart(on_the_host, monkeypatch):
    monkeypatch.setattr(hopper, "FEWEST_MASKED_TILES", 2)
    case = random_case(m=70, k=48, n=40, tasks=3, ranks=RANKS, dropout_p=0.3).to(torch.float16)
    assert_as_good_as_reference(triton_with("gemm"), case)
    assert launches(on_the_host) == [(False, False), (True, False)]
    assert hopper.waits_for_ds(256, 256) and not hopper.waits_for_ds(257, 256)


def test_odd_ranks_and_learned_gates_keep_both_apart(on_the_host):
    for options in ({"ranks": [16, 4, 16, 12]}, {"ranks": RANKS, "soft": True}):
        on_the_host.calls.clear()
        case = random_case(m=40, k=48, n=40, tasks=3, **options).to(torch.float16)
        case.gates.requires_grad_("soft" in options)
        function = triton_with("gemm", compact="soft" not in options)
        assert_as_good_as_reference(function, case)
        assert launches(on_the_host) == [(False, False), (True, False)]


def of_group(experts: int, widths: tuple[int, ...], dropout_p: float = 0.0) -> list[torch.Tensor]:
    """Outputs and gradients of linears that share x, by the "gemm" plan; held against float64."""
    g = torch.Generator().manual_seed(0)
    tasks = experts - 1
    x = torch.randn(50, 48, generator=g)
    weights = [torch.randn(n, 48, generator=g) / 7 for n in widths]
    a = [[torch.randn(16, 48, generator=g) / 7 for _ in range(experts)] for _ in widths]
    b = [[torch.randn(n, 16, generator=g) / 4 for _ in range(experts)] for n in widths]
    gates = torch.eye(tasks, experts).roll(1, 1)
    gates[:, 0] = 0.5
    ids = torch.arange(50) % (tasks + 1) - 1
    dys = [torch.randn(50, n, generator=g) for n in widths]
    live = (gates != 0).tolist()
    slots = compact_slots([live] * len(widths), [[16] * experts] * len(widths))

    def run(dtype, backend, slots):
        def leaf(t):
            return t.to(dtype).requires_grad_()

        own_x = leaf(x)
        own_a, own_b = ([[leaf(t) for t in s] for s in own] for own in (a, b))
        bases = [w.to(dtype) for w in weights], [None] * len(widths)
        wide = [gates.to(torch.float64 if dtype == torch.float64 else torch.float32)] * len(widths)
        group = (own_x, *bases, own_a, own_b, wide, ids, dropout_p, 7, backend, *slots)
        ys = ops.run_group(*group)
        leaves = [own_x, *(t for s in (*own_a, *own_b) for t in s)]
        return [*ys, *torch.autograd.grad(ys, leaves, [dy.to(dtype) for dy in dys])]

    found = run(torch.float16, "triton:gemm", slots)
    exact = run(torch.float64, "torch", (None, 0))
    for one, wanted in zip(found, exact, strict=True):
        allowed = 6 * torch.finfo(torch.float16).eps * wanted.norm()
        assert (one.double() - wanted).norm() <= allowed
    return found


def test_a_group_makes_h_once(on_the_host):
    """Up to 256 columns in all: the first product makes H of all; each dx is added to the last."""
    for experts in (3, 6):
        on_the_host.calls.clear()
        of_group(experts, (40, 24))
        forward, backward = [(False, True), (False, False)], [(True, True)] * 2
        assert launches(on_the_host) == [*forward, *backward]


def test_linears_of_a_wide_group_make_their_own_h(on_the_host):
    with patch.object(triton_update, "shrink", side_effect=AssertionError("a launch too many")):
        of_group(7, (40, 24, 16))
    assert launches(on_the_host) == [(False, True)] * 3 + [(True, True)] * 3


def test_a_wide_group_with_dropout_gathers_forward(on_the_host):
    """What one kind saves the other takes up."""
    of_group(6, (40, 24), dropout_p=0.3)
    assert launches(on_the_host) == [(True, True)] * 2


def test_a_linear_that_the_product_refuses_is_added_apart(on_the_host, monkeypatch):
    """Its n is no multiple of eight."""
    for experts in (3, 5):
        on_the_host.calls.clear()
        of_group(experts, (40, 20, 24))
        assert (True, True) in launches(on_the_host)


def test_a_bias_from_an_odd_element_on(on_the_host):
    """As a slice of a longer one may lie; the product takes its pairs four bytes at a time."""
    case = random_case(m=40, k=48, n=40, tasks=3, ranks=RANKS).to(torch.float16)
    case.bias = torch.cat([case.bias.detach().new_zeros(1), case.bias.detach()])[1:]
    assert case.bias.data_ptr() % 4
    assert_as_good_as_reference(triton_with("gemm"), case)
    assert launches(on_the_host) == [(False, True), (True, True)]


def test_masked_dx_of_few_tiles_is_gathered(on_the_host, monkeypatch):
    """Nothing would be made inside, so what gathers forward gathers backward."""
    monkeypatch.setattr(hopper, "FEWEST_MASKED_TILES", 2)
    with patch.object(triton_update.Dense, "rank_gradients", side_effect=AssertionError("dense")):
        of_group(6, (40, 24), dropout_p=0.3)


def test_left_out_by_the_environment(on_the_host, monkeypatch):
    monkeypatch.setattr(hopper, "available", lambda device=None: (False, "CKF_HOPPER_GEMM=0"))
    case = random_case(m=20, k=48, n=40, tasks=3, ranks=RANKS).to(torch.float16)
    assert_as_good_as_reference(triton_with("gemm"), case)
    assert on_the_host.calls == []
