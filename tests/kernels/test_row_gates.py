"""Tables of gates: values, what is kept of them, and for how long."""

import gc

import pytest
import torch

from ckf.kernels import row_gates
from ckf.kernels.group import GroupShape
from ckf.kernels.row_gates import gate_table

SHAPE = GroupShape(((2, 1), (1, 3)), 0.0)


def two_gates() -> list[torch.Tensor]:
    return [torch.tensor([[2.0, 0.0], [0.5, 1.0]]), torch.tensor([[0.0, 3.0], [1.0, 0.0]])]


def test_ids_from_minus_two_to_one_past_the_last():
    values, mask = gate_table(SHAPE, two_gates(), torch.float16)
    nan = [float("nan")] * 7
    wanted = [nan, [0.0] * 7, [2, 2, 0, 0, 3, 3, 3], [0.5, 0.5, 1, 1, 0, 0, 0], nan]
    torch.testing.assert_close(values, torch.tensor(wanted), equal_nan=True)
    assert mask.dtype == torch.int16 and torch.equal(mask != 0, values != 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_gate_of_zero_cuts_whatever_there_is(dtype):
    table = gate_table(SHAPE, two_gates(), dtype)
    s = torch.full((2, 7), 1.5, dtype=dtype)
    s[0, 2], s[0, 3], s[1, 5], s[1, 0] = float("nan"), float("inf"), -float("inf"), float("nan")
    h = table.at(torch.tensor([2, 3]))(s)
    assert h.dtype == dtype
    assert h[0].tolist() == [3, 3, 0, 0, 4.5, 4.5, 4.5]
    assert h[1, 0].isnan() and h[1, 1:].tolist() == [0.75, 1.5, 1.5, 0, 0, 0]
    assert not h[0, 2:4].signbit().any() and not h[1, 4:].signbit().any()


def test_a_table_is_kept_until_gates_change():
    gates = two_gates()
    first = gate_table(SHAPE, gates, torch.float32)
    assert gate_table(SHAPE, gates, torch.float32) is first
    assert gate_table(SHAPE, [gates[0], gates[1].clone()], torch.float32) is not first
    assert gate_table(SHAPE, gates, torch.float16).mask.dtype == torch.int16
    gates[1][0, 1] = 7
    assert gate_table(SHAPE, gates, torch.float32).values[2].tolist() == [2, 2, 0, 0, 7, 7, 7]
    other = GroupShape(((1, 2), (1, 3)), 0.0)
    assert gate_table(other, gates, torch.float32).values[2].tolist() == [2, 0, 0, 0, 7, 7, 7]


def test_nothing_outlives_its_gates():
    gc.collect()  # what others left
    before = len(row_gates._KEPT)
    gate = two_gates()[0]
    gate_table(GroupShape(((2, 1),) * 2, 0.0), [gate, gate], torch.float32)
    assert len(row_gates._KEPT) == before + 1
    del gate
    gc.collect()
    assert len(row_gates._KEPT) == before


@pytest.mark.parametrize("kind", ["learned", "inference", "large"])
def test_what_cannot_be_kept_is_made_anew(kind, monkeypatch):
    gates = two_gates()
    if kind == "learned":
        gates[1].requires_grad_()
    if kind == "inference":
        with torch.inference_mode():
            gates[1] = gates[1].clone()
    if kind == "large":
        monkeypatch.setattr(row_gates, "MOST_KEPT", 34)
    first = gate_table(SHAPE, gates, torch.float32)
    assert gate_table(SHAPE, gates, torch.float32) is not first
