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


@pytest.fixture
def passes_for_a_gpu(monkeypatch):
    """CPU tensors stand in; what is asked of the stream is noted."""
    asked = []

    class Place:
        @classmethod
        def here(cls, tensor):
            asked.append("made")
            return cls()

        def wait(self, table):
            asked.append("waited")

    monkeypatch.setattr(row_gates, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(row_gates, "capturing", lambda tensor: "capturing" in asked)
    monkeypatch.setattr(row_gates, "Made", Place)
    return asked


def test_on_a_gpu_other_streams_wait_and_graphs_make_their_own(passes_for_a_gpu):
    gates = two_gates()
    first = gate_table(SHAPE, gates, torch.float32)
    assert gate_table(SHAPE, gates, torch.float32) is first
    assert passes_for_a_gpu == ["made", "waited"]
    passes_for_a_gpu.append("capturing")
    captured = gate_table(SHAPE, gates, torch.float32)
    assert captured is not first and torch.equal(captured.mask, first.mask)
    assert passes_for_a_gpu == ["made", "waited", "capturing"]


@pytest.mark.gpu
def test_tables_on_a_gpu():
    gates = [gate.cuda() for gate in two_gates()]
    first = gate_table(SHAPE, gates, torch.float32)
    assert gate_table(SHAPE, gates, torch.float32) is first
    plain = gate_table(SHAPE, two_gates(), torch.float32)
    torch.testing.assert_close(first.values.cpu(), plain.values, equal_nan=True)
    torch.cuda.synchronize()
    for _ in range(20):  # made on one stream behind long work, read on another
        gates = [gate.cuda() for gate in two_gates()]
        busy = torch.empty(1 << 26, device="cuda")
        torch.cuda.synchronize()
        busy.normal_()
        gate_table(SHAPE, gates, torch.float32)
        with torch.cuda.stream(torch.cuda.Stream()):
            seen = gate_table(SHAPE, gates, torch.float32).values.clone()
        torch.cuda.synchronize()
        torch.testing.assert_close(seen.cpu(), plain.values, equal_nan=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate_table(SHAPE, gates, torch.float32).values
    graph.replay()
    torch.testing.assert_close(captured.cpu(), plain.values, equal_nan=True)
