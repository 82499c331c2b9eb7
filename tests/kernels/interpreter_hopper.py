"""The "gemm" plan where csrc's product takes the operands. Run by test_triton_interpreter.py.

Triton's kernels run in its interpreter, the source of that product on the host.
"""

from unittest.mock import patch

import pytest
import torch

from ckf.kernels import hopper, multi_lora_linear, triton_update
from ckf.kernels.slots import compact_slots
from tests.kernels.cases import assert_as_good_as_reference, random_case
from tests.kernels.interpreter_slots import triton_with
from tests.kernels.test_cuda_hopper_host import Host, host, library  # noqa: F401 (fixtures)


@pytest.fixture(autouse=True)
def on_the_host(host, monkeypatch):  # noqa: F811
    """Its outputs need no poison here, and the interpreter's tensors no guard."""
    monkeypatch.undo()
    monkeypatch.setattr(hopper.cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(hopper.cuda, "_load_extension", lambda: (host, ""))
    monkeypatch.setattr(hopper.cuda, "_raw_stream", lambda index: 0)
    monkeypatch.setattr(hopper, "available", lambda device=None: (True, ""))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return host


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


def test_odd_ranks_and_learned_gates_keep_both_apart(on_the_host):
    for options in ({"ranks": [16, 4, 16, 12]}, {"ranks": RANKS, "soft": True}):
        on_the_host.calls.clear()
        case = random_case(m=40, k=48, n=40, tasks=3, **options).to(torch.float16)
        case.gates.requires_grad_("soft" in options)
        function = triton_with("gemm", compact="soft" not in options)
        assert_as_good_as_reference(function, case)
        assert launches(on_the_host) == [(False, False), (True, False)]


def test_a_group_makes_h_once(on_the_host):
    """The first linear's product makes H of all; dS of each is made before the only dx."""
    from ckf.kernels import ops

    x = torch.randn(50, 48, dtype=torch.float16, requires_grad=True)
    ranks, widths = [16, 16, 16], (40, 24)
    weights = [torch.randn(n, 48, dtype=torch.float16) / 7 for n in widths]
    a = [[torch.randn(r, 48, dtype=torch.float16) / 7 for r in ranks] for _ in widths]
    b = [[torch.randn(n, r, dtype=torch.float16) / 4 for r in ranks] for n in widths]
    for tensor in (t for own in (*a, *b) for t in own):
        tensor.requires_grad_()
    gates = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    ids = torch.arange(50) % 3 - 1
    slots, width = compact_slots([(gates != 0).tolist()] * 2, [ranks] * 2)
    bases = (weights, [None] * 2)
    arguments = (x, *bases, a, b, [gates] * 2, ids, 0.0, 0, "triton:gemm", slots, width)
    ys = ops.run_group(*arguments)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    assert launches(on_the_host) == [(False, True), (False, False), (True, False)]
    for y, weight, own_a, own_b in zip(ys, weights, a, b, strict=True):
        alone = multi_lora_linear(
            x.double(), weight.double(), None, [t.double() for t in own_a],
            [t.double() for t in own_b], gates, ids, backend="torch",
        )  # fmt: skip
        assert (y.double() - alone).norm() <= 4 * torch.finfo(torch.float16).eps * alone.norm()


def test_left_out_by_the_environment(on_the_host, monkeypatch):
    monkeypatch.setattr(hopper, "available", lambda device=None: (False, "CKF_HOPPER_GEMM=0"))
    case = random_case(m=20, k=48, n=40, tasks=3, ranks=RANKS).to(torch.float16)
    assert_as_good_as_reference(triton_with("gemm"), case)
    assert on_the_host.calls == []
