"""Multi-LoRA on a CPU where neighbouring rows share a task: only the experts that a row uses.

Rows of one sequence have one task, so a batch is a few runs of rows. Each run takes its task's
live experts (gate not zero), stacked: R_t columns, shared + own, instead of all R of them. For a
run of task t, with s = drop(x) A_t^T:

    h = s * gate_t      y_l += h_l B_tl^T     dh = dy B_t      dB_t += dy^T h
    ds = dh * gate_t    dA_t += ds^T drop(x)  dx = drop'(ds A_t) + dy W

At T 4 and equal ranks that is 2/5 of the low-rank work of torch_backend.py. Ids are read on the
host, so this is for CPU tensors; gates are constants here. Saved: x and h, compact (m, max R_t).
Sums run in the order of the rows: the same inputs give the same bits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckf.kernels.torch_backend import GroupShape, dropped, keep_mask, product, unflatten

LEAST_ROWS = 128  # on average; with shorter runs dense products win over many small ones

Run = tuple[int, int, int]  # first row, row after the last, task


def find_runs(task_ids: Tensor) -> list[Run] | None:
    """Runs of equal ids (m,) on the host; None where they are too short to pay."""
    m = task_ids.numel()
    if m == 0:
        return None
    cuts = (task_ids[1:] != task_ids[:-1]).nonzero().squeeze(1) + 1
    if (cuts.numel() + 1) * LEAST_ROWS > max(m, LEAST_ROWS):
        return None
    starts = [0, *cuts.tolist()]
    tasks = task_ids[starts].tolist()
    return list(zip(starts, [*starts[1:], m], tasks, strict=True))


@dataclass
class _TaskBlock:
    """The live experts of one task, stacked over the linears."""

    a: Tensor  # (R_t, k)
    b: list[Tensor]  # per linear (n_l, R_tl)
    gate: Tensor  # (R_t,)
    ranks: list[int]  # R_tl
    experts: list[list[tuple[int, int]]]  # per linear (flat expert index, rank)


class MultiLoRARuns(torch.autograd.Function):
    """Arguments as the dense function's in torch_backend.py, with the runs before them."""

    @staticmethod
    def forward(ctx, shape: GroupShape, runs: list[Run], x: Tensor, seed: int, *tensors):
        weights, biases, gates, a, b = unflatten(shape, tensors)
        rows = x.reshape(-1, x.shape[-1])  # (m, k)
        blocks = _blocks(shape, runs, gates, a, b, x.dtype)
        inputs = dropped(rows, keep_mask(rows, shape, seed), shape)
        widest = max((block.gate.numel() for block in blocks.values()), default=0)
        h = rows.new_zeros(rows.shape[0], widest)
        sizes = _widths(shape, b)
        outputs = [
            x.new_zeros(*x.shape[:-1], n) if w is None else F.linear(x, w, v).contiguous()
            for w, v, n in zip(weights, biases, sizes, strict=True)
        ]
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        for start, stop, task in runs:
            if task not in blocks:
                continue
            block = blocks[task]
            part = inputs[start:stop] @ block.a.t() * block.gate  # (rows, R_t)
            h[start:stop, : part.shape[1]] = part
            for y, h_l, b_l in zip(flat, part.split(block.ranks, 1), block.b, strict=True):
                y[start:stop].addmm_(h_l, b_l.t())
        ctx.shape, ctx.runs, ctx.seed = shape, runs, seed
        ctx.save_for_backward(x, h, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        shape, runs = ctx.shape, ctx.runs
        x, h, *tensors = ctx.saved_tensors
        weights, _, gates, a, b = unflatten(shape, tensors)
        need_w, need_bias, _, need_a, need_b = unflatten(shape, ctx.needs_input_grad[4:])
        rows = x.reshape(-1, x.shape[-1])
        dys = [g.reshape(rows.shape[0], g.shape[-1]) for g in grads]
        blocks = _blocks(shape, runs, gates, a, b, x.dtype)
        keep = keep_mask(rows, shape, ctx.seed)
        inputs = dropped(rows, keep, shape) if any(need_a) else rows
        dx = torch.zeros_like(rows) if ctx.needs_input_grad[2] else None
        da = [torch.zeros_like(t) if n else None for t, n in zip(a, need_a, strict=True)]
        db = [torch.zeros_like(t) if n else None for t, n in zip(b, need_b, strict=True)]
        for start, stop, task in runs:
            if task not in blocks:
                continue
            block = blocks[task]
            parts = [dy[start:stop] for dy in dys]
            dh = torch.cat([dy @ b_l for dy, b_l in zip(parts, block.b, strict=True)], dim=1)
            ds = dh * block.gate  # (rows, R_t)
            if dx is not None:
                torch.mm(ds, block.a, out=dx[start:stop])
            if any(need_a):
                _add(da, product(ds.t(), inputs[start:stop], a[0].dtype), block, 0)
            if any(need_b):
                own = h[start:stop, : ds.shape[1]].split(block.ranks, 1)
                _add_b(db, parts, own, block, b[0].dtype)
        if dx is not None:
            dx = _finish_dx(dx, keep, shape, dys, weights).view(x.shape)
        dw = [dy.t() @ rows if needed else None for dy, needed in zip(dys, need_w, strict=True)]
        dbias = [dy.sum(0) if needed else None for dy, needed in zip(dys, need_bias, strict=True)]
        return None, None, dx, None, *dw, *dbias, *[None] * shape.linears, *da, *db


def _finish_dx(dx: Tensor, keep: Tensor | None, shape: GroupShape, dys, weights) -> Tensor:
    if keep is not None:
        dx = dropped(dx, keep, shape)
    for dy, weight in zip(dys, weights, strict=True):
        if weight is not None:
            dx.addmm_(dy, weight)
    return dx


def _blocks(shape: GroupShape, runs: list[Run], gates, a, b, dtype) -> dict[int, _TaskBlock]:
    """The stacked experts of every task that has rows; tasks without live experts are left out."""
    blocks = {}
    for task in sorted({task for _, _, task in runs if task >= 0}):
        experts, values, flat = [], [], 0
        for gate, ranks in zip(gates, shape.ranks, strict=True):
            weights = gate[task].tolist()
            live = [(flat + e, r) for e, r in enumerate(ranks) if weights[e] != 0]
            experts.append(live)
            values += [weights[i - flat] for i, r in live for _ in range(r)]
            flat += len(ranks)
        if not values:
            continue
        every = [i for linear in experts for i, _ in linear]
        columns = [
            torch.cat([b[i].to(dtype) for i, _ in linear], dim=1)
            if linear
            else b[0].new_zeros(n, 0, dtype=dtype)
            for linear, n in zip(experts, _widths(shape, b), strict=True)
        ]
        blocks[task] = _TaskBlock(
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


def _add(totals: list, stacked: Tensor, block: _TaskBlock, dim: int) -> None:
    """Add a stacked gradient to the gradients of its experts."""
    experts = [pair for linear in block.experts for pair in linear]
    parts = stacked.split([r for _, r in experts], dim)
    for (index, _), part in zip(experts, parts, strict=True):
        if totals[index] is not None:
            totals[index] += part


def _add_b(totals: list, dys: list[Tensor], h: tuple, block: _TaskBlock, dtype) -> None:
    for dy, h_l, linear in zip(dys, h, block.experts, strict=True):
        if not linear:
            continue
        stacked = product(dy.t(), h_l, dtype)  # (n_l, R_tl)
        for (index, _), part in zip(linear, stacked.split([r for _, r in linear], 1), strict=True):
            if totals[index] is not None:
                totals[index] += part
