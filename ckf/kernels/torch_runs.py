"""Multi-LoRA on a CPU by runs, where csrc/cpu is not built or for other dtypes than float32: rows
of one task together, and only the experts that they use.

Rows of one sequence have one task, so a batch is a few runs of neighbouring rows; rows whose tasks
are scattered are gathered, task by task, where many tasks make that pay. A run takes its task's
live experts (gate not zero), stacked: R_t columns, shared + own, instead of all R of them. For a
run of task t, with s = drop(x) A_t^T:

    h = s * gate_t      y_l += h_l B_tl^T     dh = dy B_t      dB_t += dy^T h
    ds = dh * gate_t    dA_t += ds^T drop(x)  dx = drop'(ds A_t) + dy W

At T 4 and equal ranks that is 2/5 of the low-rank work of torch_backend.py. Ids are read on the
host, so this is for CPU tensors; gates are constants here. Saved: x and h, compact in every row.
Sums run in the order of the rows: the same inputs give the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.group import (
    Gradients,
    GroupShape,
    add_base,
    base_gradients,
    expert_parts,
    input_dropout,
    product,
    unflatten,
)

# Costs in what dense products compute in that time, as rows x rank columns x (k + n); measured at
# r 16, k 576, n 1536. One product of a run beyond its work: at T 4, 128 rows break even.
PRODUCT_COST = 6.5e6
GATHER_COST = 40  # a row taken out of its place and put back
LEAST_ROWS = 16  # fewer take no less time: the experts are read all the same

Run = tuple[slice | Tensor, int]  # which rows, their task


def paying_runs(
    shape: GroupShape, task_ids: Tensor, gates: Sequence[Tensor], x: Tensor, b: Sequence[Tensor]
) -> list[Run] | None:
    """Runs of equal ids (m,) on the host; None where dense products win over many small ones."""
    m = task_ids.numel()
    widths = [x.shape[-1] + n for n in _widths(shape, b)]
    cost = PRODUCT_COST * (1 + shape.linears)
    rows = max(m, LEAST_ROWS)
    columns = sum(rank * width for rank, width in zip(shape.linear_ranks, widths, strict=True))
    if m == 0 or rows * columns <= cost:  # also where all of it were spared
        return None
    gain = rows * _spared(shape, gates, widths)
    ids = task_ids.numpy()
    cuts = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    tasks = np.unique(ids)
    as_they_lie = gain - (len(cuts) + 1) * cost
    gathered = gain - len(tasks) * cost - m * sum(widths) * GATHER_COST
    if max(as_they_lie, gathered) <= 0:
        return None
    if as_they_lie >= gathered:
        starts = [0, *cuts.tolist()]
        places = [slice(*pair) for pair in zip(starts, [*starts[1:], m], strict=True)]
        return list(zip(places, ids[starts].tolist(), strict=True))
    order = torch.from_numpy(np.argsort(ids, kind="stable"))
    counts = np.bincount(np.searchsorted(tasks, ids)).tolist()
    return list(zip(order.split(counts), tasks.tolist(), strict=True))


def _spared(shape: GroupShape, gates: Sequence[Tensor], widths: Sequence[int]) -> float:
    """Rank columns x (k + n) that a row does without, in the task that spares least."""
    spared = 0
    for gate, ranks, width in zip(gates, shape.ranks, widths, strict=True):
        own = (gate != 0).numpy() @ np.array(ranks)
        spared += (sum(ranks) - own.max(initial=0)) * width
    return float(spared)


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """The rows (a view where they are neighbours)."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


@dataclass
class TaskBlock:
    """The live experts of one task, stacked over the linears."""

    a: Tensor  # (R_t, k)
    b: list[Tensor]  # per linear (n_l, R_tl)
    gate: Tensor  # (R_t,)
    ranks: list[int]  # R_tl
    experts: list[list[tuple[int, int]]]  # per linear (flat expert index, rank)


def forward_pass(
    shape: GroupShape,
    runs: list[Run],
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    seed: Tensor | None,
    columns: int,
    blocks: dict[int, TaskBlock | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """As torch_backend.forward_pass: outputs, and H (m, columns), compact in every row.

    ``blocks``: those of earlier calls with the same experts, by task; what is missing is added.
    """
    rows = x.reshape(-1, x.shape[-1])  # (m, k)
    blocks = _blocks(shape, runs, gates, a, b, x.dtype, blocks)
    inputs = input_dropout(rows, shape, seed)(rows)
    h = rows.new_zeros(rows.shape[0], columns)
    outputs = [
        x.new_zeros(*x.shape[:-1], n) if w is None else F.linear(x, w, v).contiguous()
        for w, v, n in zip(weights, biases, _widths(shape, b), strict=True)
    ]
    flat = [y.view(-1, y.shape[-1]) for y in outputs]
    for place, task in runs:
        block = blocks.get(task)
        if block is None:
            continue
        part = _take(inputs, place) @ block.a.t() * block.gate  # (rows, R_t)
        h[place, : part.shape[1]] = part
        for y, h_l, b_l in zip(flat, part.split(block.ranks, 1), block.b, strict=True):
            taken = _take(y, place).addmm_(h_l, b_l.t())
            if not isinstance(place, slice):
                y.index_copy_(0, place, taken)
    return outputs, h


def backward_pass(
    shape: GroupShape,
    runs: list[Run],
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor | None],
    gates: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    seed: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """As torch_backend.backward_pass, for gates that need no gradient."""
    need_w, need_bias, _, need_a, need_b = unflatten(shape, needs[1:])
    rows = x.reshape(-1, x.shape[-1])
    blocks = _blocks(shape, runs, gates, a, b, x.dtype)
    dropout = input_dropout(rows, shape, seed)
    inputs = dropout(rows) if any(need_a) else rows
    dx = torch.zeros_like(rows) if needs[0] else None
    da = a[0].new_zeros(shape.columns, rows.shape[1]) if any(need_a) else None
    db = [
        b[0].new_zeros(n * rank)
        for n, rank in zip(_widths(shape, b), shape.linear_ranks, strict=True)
    ]
    a_parts = list(da.split(shape.expert_ranks)) if any(need_a) else []
    b_parts = [
        part
        for packed, n, ranks in zip(db, _widths(shape, b), shape.ranks, strict=True)
        for part in expert_parts(packed, n, ranks)
    ]
    for place, task in runs:
        block = blocks.get(task)
        if block is None:
            continue
        parts = [_take(dy, place) for dy in dys]
        dh = torch.cat([dy @ b_l for dy, b_l in zip(parts, block.b, strict=True)], dim=1)
        ds = dh * block.gate  # (rows, R_t)
        if dx is not None and isinstance(place, slice):
            torch.mm(ds, block.a, out=dx[place])
        elif dx is not None:
            dx.index_copy_(0, place, ds @ block.a)
        if any(need_a):
            _add(a_parts, product(ds.t(), _take(inputs, place), a[0].dtype), block, 0)
        if any(need_b):
            own = _take(h, place)[:, : ds.shape[1]].split(block.ranks, 1)
            _add_b(b_parts, parts, own, block, b[0].dtype)
    if dx is not None:
        dx = add_base(dropout(dx), dys, weights).view(x.shape)
    needed = iter(need_b)
    own = [[next(needed) for _ in ranks] for ranks in shape.ranks]
    db = [packed if any(flags) else None for packed, flags in zip(db, own, strict=True)]
    return Gradients(dx, base_gradients(rows, dys, need_w, need_bias), None, da, db).packed()


def _blocks(
    shape: GroupShape, runs: list[Run], gates, a, b, dtype, blocks: dict | None = None
) -> dict[int, TaskBlock | None]:
    """The stacked experts of every task that has rows, None for a task without live experts."""
    blocks = {} if blocks is None else blocks
    for task in sorted({task for _, task in runs if task >= 0} - blocks.keys()):
        experts, values, flat = [], [], 0
        for gate, ranks in zip(gates, shape.ranks, strict=True):
            weights = gate[task].tolist()
            live = [(flat + e, r) for e, r in enumerate(ranks) if weights[e] != 0]
            experts.append(live)
            values += [weights[i - flat] for i, r in live for _ in range(r)]
            flat += len(ranks)
        if not values:
            blocks[task] = None
            continue
        every = [i for linear in experts for i, _ in linear]
        columns = [
            torch.cat([b[i].to(dtype) for i, _ in linear], dim=1)
            if linear
            else b[0].new_zeros(n, 0, dtype=dtype)
            for linear, n in zip(experts, _widths(shape, b), strict=True)
        ]
        blocks[task] = TaskBlock(
            a=torch.cat([a[i].to(dtype) for i in every]),
            b=columns,
            gate=torch.tensor(values, dtype=dtype),
            ranks=[sum(r for _, r in linear) for linear in experts],
            experts=experts,
        )
    return blocks


def _widths(shape: GroupShape, b) -> list[int]:
    """n of every linear."""
    firsts, flat = [], 0
    for ranks in shape.ranks:
        firsts.append(b[flat].shape[0])
        flat += len(ranks)
    return firsts


def _add(totals: list, stacked: Tensor, block: TaskBlock, dim: int) -> None:
    """Add a stacked gradient to the gradients of its experts."""
    experts = [pair for linear in block.experts for pair in linear]
    parts = stacked.split([r for _, r in experts], dim)
    for (index, _), part in zip(experts, parts, strict=True):
        totals[index] += part


def _add_b(totals: list, dys: list[Tensor], h: tuple, block: TaskBlock, dtype) -> None:
    for dy, h_l, linear in zip(dys, h, block.experts, strict=True):
        if not linear:
            continue
        stacked = product(dy.t(), h_l, dtype)  # (n_l, R_tl)
        for (index, _), part in zip(linear, stacked.split([r for _, r in linear], 1), strict=True):
            totals[index] += part
