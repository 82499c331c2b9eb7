"""Multi-LoRA on the Triton kernels: what torch_backend.py computes and saves, in fewer passes.

For linears l that share x (m, k), with the experts of all of them stacked along R:

    forward   H = shrink(x, A)                  y_l = x W_l^T + bias_l, then += H_l B_l^T in place
    backward  dS_l = shrink(dy_l, B_l^T)        dB_l^T = outer(H_l, dy_l)    dA = outer(dS, x)
              dx = mask * (dS A), then += dy_l W_l by cuBLAS (a later mask would hit dy W too)

Gates act where the shrink stores, dropout where x is loaded: no (m, k) or (m, n) tensor exists
beside x, y, dy and dx. Saved: x and one (m, R) tensor (H, or S where gates need a gradient).
No host synchronisation, no shape that depends on values, no atomics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckf.kernels.dropout import dropout_scale, dropout_threshold
from ckf.kernels.torch_backend import GroupShape, gate_gradients, unflatten
from ckf.kernels.triton_expand import expand
from ckf.kernels.triton_gemm import gemm, why_not_gemm
from ckf.kernels.triton_outer import outer
from ckf.kernels.triton_shrink import shrink


def multi_lora_group_triton(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    gates: Sequence[Tensor],
    task_ids: Tensor,
    dropout_p: float,
    seed: int | Tensor,
    fuse_base: bool = False,
) -> tuple[Tensor, ...]:
    """Linears that share x (..., k); arguments as in ``ops.multi_lora_group``, already checked.

    A weight of None gives the LoRA update alone, without a base. ``fuse_base`` computes base and
    update in one product (triton_gemm.py) where sizes are aligned for it.
    """
    shape = GroupShape(tuple(tuple(t.shape[0] for t in experts) for experts in a), dropout_p)
    flat_a = [t for experts in a for t in experts]
    flat_b = [t for experts in b for t in experts]
    ids = task_ids.reshape(-1).contiguous()
    seed = _seed_tensor(seed, x.device) if dropout_p > 0 else None
    save_plain = torch.is_grad_enabled() and any(g.requires_grad for g in gates)
    call = _Call(shape, save_plain, fuse_base)
    tensors = (*weights, *biases, *gates, *flat_a, *flat_b)
    return _MultiLoRATriton.apply(call, x, ids, seed, *tensors)


@dataclass(frozen=True)
class _Call:
    """The static side of a call; ``save_plain``: gates need a gradient, so S is kept, not H."""

    shape: GroupShape
    save_plain: bool
    fuse_base: bool


class _MultiLoRATriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, x, task_ids, seed, *tensors):
        shape = call.shape
        weights, biases, gates, a, b = unflatten(shape, tensors)
        rows = _rows(x)  # (m, k)
        with torch.cuda.device_of(x):
            stacks = _Stacks.of(shape, gates, a, b, x.dtype)
            h = rows.new_empty(rows.shape[0], stacks.a.shape[0])  # (m, R)
            s = torch.empty_like(h) if call.save_plain else None
            dropout = _dropout(shape, seed)
            shrink(rows, stacks.a, stacks.gates, task_ids, h, s, dropout)
            outputs = []
            for weight, bias, h_l, b_l in zip(
                weights, biases, h.split(shape.linear_ranks, 1), stacks.b, strict=True
            ):
                outputs.append(_base_and_update(x, weight, bias, h_l, b_l, call.fuse_base))
        ctx.call = call
        ctx.save_for_backward(x, h if s is None else s, task_ids, seed, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        shape: GroupShape = ctx.call.shape
        x, saved, task_ids, seed, *tensors = ctx.saved_tensors
        weights, _, gates, a, b = unflatten(shape, tensors)
        need_w, need_bias, need_g, need_a, need_b = unflatten(shape, ctx.needs_input_grad[4:])
        rows = _rows(x)
        dys = [_rows(g) for g in grads]
        dx = None
        da, db = [None] * shape.experts, [None] * shape.experts
        dg = [None] * shape.linears
        with torch.cuda.device_of(x):
            stacks = _Stacks.of(shape, gates, a, b, x.dtype)
            dropout = _dropout(shape, seed)
            ds, dh = _rank_gradients(shape, dys, stacks, task_ids, saved, any(need_g))
            if ctx.needs_input_grad[1]:
                dx = _input_gradient(ds, stacks.a, dys, weights, dropout).view(x.shape)
            if any(need_a):
                da = outer(ds, rows, _widest(a), dropout).split(shape.expert_ranks, 0)
            if any(need_b):
                h = _regated(saved, stacks.gates, task_ids) if ctx.call.save_plain else saved
                db = _b_gradients(shape, dys, h, b, need_b)
            if any(need_g):
                dg = gate_gradients(shape, dh, saved, gates, task_ids)
            dw = [dy.t() @ rows if n else None for dy, n in zip(dys, need_w, strict=True)]
            dbias = [dy.sum(0) if n else None for dy, n in zip(dys, need_bias, strict=True)]
        return None, dx, None, None, *dw, *dbias, *dg, *da, *db


@dataclass(frozen=True)
class _Stacks:
    """The experts of a group as the kernels read them."""

    a: Tensor  # (R, k)
    b: list[Tensor]  # per linear (R_l, n_l): B transposed
    gates: Tensor  # (T, R) float32, one column a rank column

    @classmethod
    def of(cls, shape: GroupShape, gates, a, b, dtype: torch.dtype) -> "_Stacks":
        stacked_b, start = [], 0
        for ranks in shape.ranks:
            experts = b[start : start + len(ranks)]
            stacked_b.append(torch.cat([t.to(dtype).t() for t in experts]).contiguous())
            start += len(ranks)
        columns = [
            _column_gates(gate.detach(), ranks)
            for gate, ranks in zip(gates, shape.ranks, strict=True)
        ]
        return cls(
            a=torch.cat([t.to(dtype) for t in a]).contiguous(),
            b=stacked_b,
            gates=torch.cat(columns, dim=1).contiguous(),
        )


def _column_gates(gate: Tensor, ranks: Sequence[int]) -> Tensor:
    """(T, E) to (T, R_l) float32: every gate as often as its expert has rank columns."""
    gate = gate.float()
    if len(set(ranks)) == 1:
        return gate.unsqueeze(2).expand(*gate.shape, ranks[0]).flatten(1)
    columns = [gate[:, e : e + 1].expand(gate.shape[0], rank) for e, rank in enumerate(ranks)]
    return torch.cat(columns, dim=1)


def _rows(x: Tensor) -> Tensor:
    """(m, k) with neighbouring columns side by side; a copy only where they are not."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """One int64 on the device: a captured graph can draw afresh, a kernel never recompiles."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64, non_blocking=True)
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=device)


def _dropout(shape: GroupShape, seed: Tensor | None) -> tuple[Tensor, int, float] | None:
    if seed is None:
        return None
    return seed, dropout_threshold(shape.dropout_p), dropout_scale(shape.dropout_p)


def _base_and_update(x: Tensor, weight, bias, h: Tensor, b: Tensor, fuse_base: bool) -> Tensor:
    """x W^T + bias + H B^T; the update alone where there is no weight."""
    n = b.shape[1]
    if fuse_base and weight is not None and why_not_gemm(_rows(x), weight, h, b) is None:
        return gemm(_rows(x), weight, bias, h, b).view(*x.shape[:-1], n)
    if weight is None:
        y = x.new_empty(*x.shape[:-1], n)
    else:
        y = F.linear(x, weight, bias).contiguous()
    expand(h, b, y.view(-1, n), accumulate=weight is not None)
    return y


def _rank_gradients(
    shape: GroupShape, dys, stacks: _Stacks, task_ids: Tensor, like: Tensor, plain: bool
) -> tuple[Tensor, Tensor | None]:
    """dS = gate * dH and, where asked for, dH = dy B; both (m, R)."""
    ds = torch.empty_like(like)
    dh = torch.empty_like(like) if plain else None
    start = 0
    for dy, b_l, rank in zip(dys, stacks.b, shape.linear_ranks, strict=True):
        columns = slice(start, start + rank)
        gates = stacks.gates[:, columns].contiguous()
        dh_l = None if dh is None else dh[:, columns]
        shrink(dy, b_l, gates, task_ids, ds[:, columns], dh_l)
        start += rank
    return ds, dh


def _input_gradient(ds: Tensor, a: Tensor, dys, weights, dropout) -> Tensor:
    dx = ds.new_empty(ds.shape[0], a.shape[1])  # (m, k)
    expand(ds, a, dx, accumulate=False, dropout=dropout)
    for dy, weight in zip(dys, weights, strict=True):
        if weight is not None:
            dx.addmm_(dy, weight)
    return dx


def _b_gradients(shape: GroupShape, dys, h: Tensor, b, need_b) -> list[Tensor | None]:
    gradients: list[Tensor | None] = []
    for dy, h_l, ranks in zip(dys, h.split(shape.linear_ranks, 1), shape.ranks, strict=True):
        start = len(gradients)
        if not any(need_b[start : start + len(ranks)]):
            gradients += [None] * len(ranks)
            continue
        stacked = outer(h_l, dy, b[start].dtype)  # (R_l, n_l)
        gradients += [part.t() for part in stacked.split(list(ranks), 0)]
    return gradients


def _regated(s: Tensor, column_gates: Tensor, task_ids: Tensor) -> Tensor:
    """H from S as the shrink kernel stores it: 0 for id -1, NaN for an invalid id."""
    tasks = column_gates.shape[0]
    valid = (task_ids >= 0) & (task_ids < tasks)
    gate = column_gates.index_select(0, torch.where(valid, task_ids, 0))
    gate = torch.where(valid.unsqueeze(1), gate, 0)
    gate.masked_fill_((~valid & (task_ids != -1)).unsqueeze(1), float("nan"))
    return torch.where(gate != 0, s * gate, 0).to(s.dtype)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """float32 if any of them is; else the dtype they share."""
    dtypes = {t.dtype for t in tensors}
    return torch.float32 if torch.float32 in dtypes else dtypes.pop()
