"""Multi-LoRA by dense-gated matrix products: any device and dtype, the rival of every kernel.

For linears l that share x (m, k), experts stacked along the rank R (reference.py has the maths):

    S = drop(x) A^T (m, R)     H = S where gate * S, else 0 (m, R)     y_l = x W_l^T + H_l B_l^T
    dH_l = dy_l B_l            dB_l = dy_l^T H_l                       dS = dH * gate
    dA = dS^T drop(x)          dx = drop'(dS A) + sum_l dy_l W_l       dG[t, e] = sum_i <dH, S>

All linears share one shrink, one dropout mask and one saved x. The expand lands on top of the base
output in place (addmm, beta = 1), so with B = 0 the base's bits survive. Saved for backward: x and
one (m, R) tensor (H, or S where gates need a gradient); the mask is drawn again from the seed.
Stacking A and B copies R (k + n) elements a call, under 0.1% of the base product's traffic at
m 2048. No atomics: the same inputs give the same bits.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels import torch_runs
from ckf.kernels.group import (
    Gradients,
    GroupShape,
    add_base,
    base_gradients,
    input_dropout,
    pack_experts,
    product,
    unflatten,
)
from ckf.kernels.row_gates import RowGates, gate_table
from ckf.kernels.stacks import stack_adapters

COMPACT_ABOVE = 128  # rank columns from which H is saved compact
DECODE_ROWS = 256  # up to which stacks are kept between calls: past this, making them costs little
GATE_BLOCK = 2**24  # elements of a (rows, tasks, experts) tensor in the gradient of gates


def forward_pass(
    shape: GroupShape,
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    task_ids: Tensor,
    seed: Tensor | None,
    save_plain: bool,
    slots: Tensor | None,
    width: int,
) -> tuple[list[Tensor], Tensor]:
    """The outputs (..., n_l) and what backward needs beside x: S (m, R) or H, compact or dense.

    Args:
        x: (..., k); ``weights``, ``biases``, ``gates``: one a linear; a weight of None gives the
            update alone. ``a``, ``b``: the experts of all linears, one after the other.
        seed: one int64, where the shape has dropout.
        save_plain: keep S for the gradient of the gates instead of H.
        slots: where the rank columns of a task lie in a compact row of H of ``width`` columns
            (slots.compact_slots); None: any gate may be non-zero.
    """
    if _takes_runs(x, save_plain):
        runs = torch_runs.paying_runs(shape, task_ids.reshape(-1), gates, x, b)
        if runs is not None:
            columns = width if saves_compact(shape, slots) else shape.columns
            return torch_runs.forward_pass(
                shape, runs, x, weights, biases, gates, a, b, seed, columns
            )
    rows = x.reshape(-1, x.shape[-1])  # (m, k)
    dropout = input_dropout(rows, shape, seed)
    stacked_a, stacked_b = stack_adapters(shape, a, b, x.dtype)
    places = _places(task_ids, gates)
    s = dropout(rows) @ stacked_a.t()  # (m, R)
    h = gate_table(shape, gates, x.dtype).at(places)(s)
    outputs = []
    for weight, bias, h_l, b_l in zip(
        weights, biases, h.split(shape.linear_ranks, 1), stacked_b, strict=True
    ):
        outputs.append(_expand(x, weight, bias, h_l, b_l))
    if save_plain:
        return outputs, s
    if saves_compact(shape, slots):
        index = _slot_index(slots, places, width)  # (m, R)
        h = h.new_zeros(h.shape[0], width + 1).scatter_(1, index, h)[:, :width].contiguous()
    return outputs, h


def backward_pass(
    shape: GroupShape,
    dys: Sequence[Tensor],
    x: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    task_ids: Tensor,
    seed: Tensor | None,
    save_plain: bool,
    slots: Tensor | None,
    width: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that ``needs`` asks for (of x, weights, biases, gates, a, b), packed.

    The other arguments as in ``forward_pass``.
    """
    rows = x.reshape(-1, x.shape[-1])
    dys = [dy.reshape(rows.shape[0], dy.shape[-1]) for dy in dys]
    if _takes_runs(x, save_plain):
        runs = torch_runs.paying_runs(shape, task_ids.reshape(-1), gates, x, b)
        if runs is not None:
            return torch_runs.backward_pass(
                shape, runs, dys, x, saved, weights, gates, a, b, seed, needs
            )
    need_w, need_bias, need_g, need_a, need_b = unflatten(shape, needs[1:])
    stacked_a, stacked_b = stack_adapters(shape, a, b, x.dtype)
    places = _places(task_ids, gates)
    gate = gate_table(shape, gates, x.dtype).at(places)
    parts = [dy @ b_l.t() for dy, b_l in zip(dys, stacked_b, strict=True)]
    dh = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (m, R)
    ds = gate(dh)
    dropout = input_dropout(rows, shape, seed)
    dx = None
    if needs[0]:
        dx = add_base(dropout(ds @ stacked_a), dys, weights).view(x.shape)
    da = None
    if any(need_a):
        da = product(ds.t(), dropout(rows), a[0].dtype)  # (R, k)
    db = [None] * shape.linears
    if any(need_b):
        h = _saved_h(shape, saved, gate, save_plain, slots, places)
        db = _b_gradients(shape, dys, h, b, need_b)
    dg = gate_gradients(shape, dh, saved, gates, task_ids) if any(need_g) else None
    return Gradients(dx, base_gradients(rows, dys, need_w, need_bias), dg, da, db).packed()


def decode_pass(
    experts: "DecodeExperts",
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    task_ids: Tensor,
) -> list[Tensor]:
    """As ``forward_pass``, the outputs alone, without dropout."""
    shape, gates, a, b, _ = experts.arguments
    if x.device.type == "cpu":
        runs = torch_runs.paying_runs(shape, task_ids.reshape(-1), gates, x, b)
        if runs is not None:
            return torch_runs.forward_pass(
                shape, runs, x, weights, biases, gates, a, b, None, shape.columns, experts.blocks
            )[0]
    rows = x.reshape(-1, x.shape[-1])
    stacked_a, stacked_b = experts.stacks
    h = experts.gates.at(_places(task_ids, gates))(rows @ stacked_a.t())  # (m, R)
    parts = zip(weights, biases, h.split(shape.linear_ranks, 1), stacked_b, strict=True)
    return [_expand(x, *part) for part in parts]


class DecodeExperts:
    """What a ``DecodeCache`` keeps of a group's experts, on a CPU each made when first needed."""

    def __init__(self, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> None:
        self.arguments = (shape, gates, a, b, dtype)
        self.blocks: dict[int, torch_runs.TaskBlock | None] = {}  # of torch_runs, by task
        if a[0].device.type != "cpu":  # at once: other streams wait for this moment (DecodeCache)
            self.stacks, self.gates  # noqa: B018

    def kept(self) -> list[Tensor]:
        """What a GPU's other streams read."""
        return [self.stacks[0], *self.stacks[1], *self.gates]

    @cached_property
    def stacks(self) -> tuple[Tensor, list[Tensor]]:
        shape, _, a, b, dtype = self.arguments
        return stack_adapters(shape, a, b, dtype)

    @cached_property
    def gates(self) -> RowGates:
        shape, gates, _, _, dtype = self.arguments
        return gate_table(shape, gates, dtype)


def saves_compact(shape: GroupShape, slots: Tensor | None) -> bool:
    """Whether H is saved compact: compacting a narrow H costs more than it frees."""
    return slots is not None and shape.columns > COMPACT_ABOVE


def _takes_runs(x: Tensor, save_plain: bool) -> bool:
    return x.device.type == "cpu" and not save_plain


def _saved_h(shape, saved, gate: RowGates, save_plain, slots, places) -> Tensor:
    """H (m, R) from what forward saved."""
    if save_plain:
        return gate(saved)
    if not saves_compact(shape, slots):
        return saved
    index = _slot_index(slots, places, saved.shape[1])
    return torch.cat([saved, saved.new_zeros(saved.shape[0], 1)], dim=1).gather(1, index)


def _places(task_ids: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """(m,): where the id of a row lies among -2, -1, 0 .. T; -2 and T stand for all beyond."""
    return task_ids.reshape(-1).clamp(-2, gates[0].shape[0]) + 2


def _slot_index(slots: Tensor, places: Tensor, width: int) -> Tensor:
    """(m, R): the slot of every column in its row; one past the last where it has none."""
    table = F.pad(torch.where(slots < 0, width, slots), (0, 0, 2, 1), value=width)
    return table.long().index_select(0, places)


def _expand(x: Tensor, weight: Tensor | None, bias: Tensor | None, h: Tensor, b: Tensor) -> Tensor:
    """x W^T + bias + H B^T, B transposed as (R, n)."""
    if weight is None:
        return (h @ b).view(*x.shape[:-1], b.shape[1])
    y = F.linear(x, weight, bias).contiguous()
    y.view(-1, y.shape[-1]).addmm_(h, b)
    return y


def _b_gradients(shape: GroupShape, dys, h: Tensor, b, need_b) -> list[Tensor | None]:
    gradients, first = [], 0
    for dy, h_l, ranks in zip(dys, h.split(shape.linear_ranks, 1), shape.ranks, strict=True):
        needed = any(need_b[first : first + len(ranks)])
        stacked = product(dy.t(), h_l, b[first].dtype) if needed else None  # (n_l, R_l)
        gradients.append(pack_experts(stacked, ranks) if needed else None)
        first += len(ranks)
    return gradients


def gate_gradients(shape: GroupShape, dh, s, gates, task_ids) -> Tensor:
    """(T, E), experts of all linears: over the rows of a task, the sum of an expert's <dH, S>."""
    dtype, ranks = gates[0].dtype, shape.expert_ranks
    products = dh.to(dtype) * s  # 16-bit products could underflow
    if len(set(ranks)) == 1 and ranks[0]:
        per_row = products.view(-1, len(ranks), ranks[0]).sum(2)  # (m, E)
    else:
        per_row = torch.stack([p.sum(1) for p in products.split(ranks, 1)], dim=1)
    ids, tasks = task_ids.reshape(-1, 1), torch.arange(gates[0].shape[0], device=dh.device)
    at_once = max(1, GATE_BLOCK // max(1, per_row.numel()))  # selected, so that a NaN stays alone
    selected = [
        torch.where((ids == block).unsqueeze(2), per_row.unsqueeze(1), 0).sum(0)
        for block in tasks.split(at_once)
    ]
    return torch.cat(selected)
