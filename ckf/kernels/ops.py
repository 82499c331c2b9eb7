"""The public functions: autocast, choice of backend, and the ops with their gradient.

Each pass is one registered op (``ckf::multi_lora``, ``ckf::multi_lora_backward``) under one
autograd.Function, so that torch.compile sees a single node whatever the mix of tasks, and a call
costs one op boundary a pass.
"""

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from ckf.kernels import config, cpu, decode, torch_backend
from ckf.kernels.checks import (
    check_group,
    check_id_range,
    check_seed,
    check_slots,
    check_task_ids,
)
from ckf.kernels.config import choose_backend
from ckf.kernels.decode_cache import DecodeCache, Way, capturing
from ckf.kernels.dispatch import Call, Choice
from ckf.kernels.dropout import dropout_threshold
from ckf.kernels.group import GroupShape, expert_parts, unflatten
from ckf.kernels.listeners import is_plain, may_call_directly


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    task_ids: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    backend: str = "auto",
    slots: tuple[Tensor, int] | None = None,
) -> Tensor:
    """A frozen linear plus the gated low-rank updates of every row's experts, in one pass.

    ``y_i = W x_i + bias + sum_e gates[t_i, e] * B_e A_e drop(x_i)`` (``kernels/reference.py``).

    Args:
        x: (..., k) rows in any order and mix of tasks.
        weight: (n, k); ``bias``: (n,) or None; both of x's dtype.
        a: E tensors (r_e, k); ``b``: E tensors (n, r_e); of x's dtype or float32.
        gates: (T, E) float32, the LoRA scaling (alpha / r) included; may require a gradient.
        task_ids: ints of x's leading shape, in [-1, T); -1 is base only. Ids on the host are
            checked; ids on a GPU are not (no synchronisation): an invalid one makes its row NaN.
        dropout_p: probability of dropping an element of the LoRA input.
        seed: int or one-element int64 tensor on x's device; draws the dropout mask.
        backend: "auto", "torch", "cpu", "triton" or "cuda".
        slots: what ``compact_slots`` makes of the gates that are always zero, its table on x's
            device; made once. Backward then keeps a row's own columns only, and with many rank
            columns the Triton kernels compute no others.

    Returns:
        (..., n) of x's dtype (the autocast dtype under autocast).

    Raises:
        ValueError: shapes, dtypes, devices or ids that do not fit, or a backend that cannot run.
    """
    return multi_lora_group(
        x, [weight], [bias], [a], [b], gates, task_ids, dropout_p, seed, backend, slots
    )[0]


def multi_lora_group(
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    a: Sequence[Sequence[Tensor]],
    b: Sequence[Sequence[Tensor]],
    gates: Tensor | Sequence[Tensor],
    task_ids: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
    backend: str = "auto",
    slots: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, ...]:
    """Several linears fed the same x (q, k, v; gate, up): one shrink, one mask, one saved x.

    Arguments as in :func:`multi_lora_linear`, with one weight, bias, list of A and list of B a
    linear. ``gates`` is one matrix for all linears or one a linear (same T). A weight of None
    returns that linear's low-rank update alone.

    Returns:
        One (..., n_l) tensor a linear.
    """
    if isinstance(gates, Tensor):  # views: a traced node takes no tensor twice
        gates = [gates.view_as(gates) for _ in weights]
    check_group(x, weights, biases, a, b, gates)
    check_seed(seed)
    task_ids = check_task_ids(task_ids, x, gates[0].shape[0])
    table, width = slots or (None, 0)
    if slots is not None:
        check_slots(table, width, a, gates)
    return run_group(
        x, weights, biases, a, b, gates, task_ids, dropout_p, seed, backend, table, width
    )


def run_group(
    x, weights, biases, a, b, gates, task_ids, dropout_p, seed, backend,
    slots=None, width=0, decode_cache=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``multi_lora_group`` for arguments that were checked before.

    ``slots``, ``width``: of ``slots.compact_slots``, where gates are hard. ``decode_cache``: this
    group's own, for calls without gradients (of few rows, but on the CPU kernels).
    """
    if decode_cache is not None and dropout_p == 0:
        outputs = _as_before(x, weights, biases, a, b, gates, task_ids, backend, decode_cache)
        if outputs is not None:
            return outputs
    dropout_threshold(dropout_p)
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        raise ValueError(
            "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) would be lost in "
            "ckf's kernels: use backward, or ckf.kernels.reference"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weights = [None if w is None else w.to(dtype) for w in weights]
        biases = [None if v is None else v.to(dtype) for v in biases]
    flat_a, flat_b = [t for s in a for t in s], [t for s in b for t in s]
    tensors = [*weights, *biases, *gates, *flat_a, *flat_b]
    needs_grad = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for t in tensors)
    )
    save_plain = needs_grad and any(g.requires_grad for g in gates)
    ranks = [sum([t.shape[0] for t in experts]) for experts in a]
    call = Call(
        m=x.shape[:-1].numel(),
        k=x.shape[-1],
        n=sum(experts[0].shape[0] for experts in b),
        rank=sum(ranks),
        train=needs_grad,
        dropout=dropout_p > 0,
        linear_rank=max(ranks),
        learned=save_plain,
    )
    choice = choose_backend(backend, x, call)
    if not needs_grad and choice.backend == "torch":
        slots = None  # nothing is kept, so nothing is made compact
    static = _Static(
        tuple(len(experts) for experts in a),
        width,
        dropout_p,
        save_plain,
        choice.backend,
        choice.plan,
    )
    seed = _seed_tensor(seed, x.device) if dropout_p > 0 else None
    with _no_autocast(x):
        way = _decode_way(choice, call) if decode_cache is not None else None
        if way is not None and is_plain(x) and (way.in_graphs or not capturing(x)):
            shape = _shape(gates, flat_a, 0.0)
            made = decode_cache.get(way.make, shape, gates, flat_a, flat_b, x.dtype)
            decode_cache.remember(_kind(backend, x), way)
            return _by_way(way, made, x, weights, biases, gates, task_ids)
        if needs_grad:
            return _MultiLoRA.apply(static, x, task_ids, seed, slots, *tensors)
        return tuple(_forward_op(static, x, task_ids, seed, slots, tensors)[:-1])


def _as_before(
    x, weights, biases, a, b, gates, task_ids, backend: str, cache: DecodeCache
) -> tuple[Tensor, ...] | None:
    """The outputs of a call like an earlier one, of the same experts, unchanged; None: ask anew.

    A decoded token is so little work that the host, not the GPU, would set its pace if every call
    asked again what cannot have changed.
    """
    if not is_plain(x) or torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    flat_a, flat_b = [t for s in a for t in s], [t for s in b for t in s]
    found = cache.way(_kind(backend, x), gates, flat_a, flat_b, x.dtype)
    return None if found is None else _by_way(*found, x, weights, biases, gates, task_ids)


def _by_way(way: Way, made, x, weights, biases, gates, task_ids) -> tuple[Tensor, ...]:
    if way.backend != "cpu":  # whose kernels look at them
        check_id_range(task_ids, gates[0].shape[0])
    return tuple(way.run(made, x, weights, biases, task_ids))


def _kind(backend: str, x: Tensor) -> tuple:
    """What the backend of a call without gradients and dropout depends on beside its experts."""
    return backend, x.shape, x.dtype, x.device, config.tables_read


def _decode_way(choice: Choice, call: Call) -> Way | None:
    """The way that keeps what it makes of the experts, where the backend has one."""
    if call.train or call.dropout:
        return None
    if choice.backend == "cpu":
        return Way("cpu", cpu.transposed_experts, cpu.decode_pass)
    if choice.backend == "torch" and call.m <= torch_backend.DECODE_ROWS:
        return Way("torch", torch_backend.DecodeExperts, torch_backend.decode_pass, False)
    if choice.backend == "cuda":
        return Way("cuda", decode.prepare, partial(decode.decode_pass, plan=choice.plan))
    return None


def _no_autocast(x: Tensor):
    """Nothing is cast behind the ops' back; entering an autocast costs microseconds."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else nullcontext()


class _Static(NamedTuple):
    """The static side of a call, as the ops take it: experts per linear, and the choices made."""

    experts: tuple[int, ...]
    width: int
    dropout_p: float
    save_plain: bool
    backend: str
    plan: str


class _MultiLoRA(torch.autograd.Function):
    """One node for all linears of a group: every A and B enters it, also those without rows."""

    @staticmethod
    def forward(ctx, static: _Static, x, task_ids, seed, slots, *tensors):
        *outputs, saved = _forward_op(static, x, task_ids, seed, slots, tensors)
        outputs = [_no_view(y) for y in outputs]
        ctx.static = static
        ctx.save_for_backward(x, saved, task_ids, seed, slots, *tensors)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, saved, task_ids, seed, slots, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[5:]]
        lists = _lists(ctx.static, tensors)
        op = torch.ops.ckf.multi_lora_backward.default
        if may_call_directly(x, [saved, task_ids, seed, slots, *dys, *tensors], dys):
            op = _multi_lora_backward
        found = op(list(dys), x, saved, *lists, task_ids, seed, slots, *ctx.static[1:], needs)
        *_, gates, a, b = lists
        dx, *rest = _by_input(_shape(gates, a, 0.0), b, found, needs)
        return None, dx, None, None, None, *rest


def _no_view(y: Tensor) -> Tensor:
    """y in the same memory, as no view: a model may change an output in place, which autograd
    refuses for views; F.linear's output is one where x has three dimensions."""
    if torch.compiler.is_compiling() or type(y) is not Tensor or not y._is_view():
        return y
    return y.new_empty(0).set_(y)


def _by_input(shape: GroupShape, inputs_b, found, needs: list[bool]) -> list[Tensor | None]:
    """The packed gradients by input: x, weights, biases, gates, a, b; None where not needed."""
    packed = iter(found)
    need_w, need_bias, need_g, need_a, need_b = unflatten(shape, needs[1:])
    first = [next(packed) if needed else None for needed in (needs[0], *need_w, *need_bias)]
    counts = [len(ranks) for ranks in shape.ranks]
    gates = next(packed).split(counts, 1) if any(need_g) else [None] * shape.linears
    a = next(packed).split(shape.expert_ranks) if any(need_a) else [None] * shape.experts
    b, start = [], 0
    for ranks in shape.ranks:
        needed = any(need_b[start : start + len(ranks)])
        n = inputs_b[start].shape[0]
        b += expert_parts(next(packed), n, ranks) if needed else [None] * len(ranks)
        start += len(ranks)
    rest = [*gates, *a, *b]
    flags = [*need_g, *need_a, *need_b]
    return first + [t if needed else None for t, needed in zip(rest, flags, strict=True)]


def _forward_op(static: _Static, x, task_ids, seed, slots, tensors) -> list[Tensor]:
    """The outputs, and last the tensor saved beside x."""
    lists = _lists(static, tensors)
    op = torch.ops.ckf.multi_lora.default
    if may_call_directly(x, [task_ids, seed, slots, *tensors], tensors):
        op = _multi_lora
    return op(x, *lists, task_ids, seed, slots, *static[1:])


def _lists(static: _Static, tensors) -> list[list[Tensor]]:
    """weights, biases, gates, a, b."""
    linears, experts = len(static.experts), sum(static.experts)
    cuts = [0, linears, 2 * linears, 3 * linears, 3 * linears + experts, 3 * linears + 2 * experts]
    return [list(tensors[i:j]) for i, j in itertools.pairwise(cuts)]


_TENSORS = (
    "Tensor?[] weights, Tensor?[] biases, Tensor[] gates, Tensor[] a, Tensor[] b, "
    "Tensor task_ids, Tensor? seed, Tensor? slots"
)
_STATIC = "int width, float dropout_p, bool save_plain, str backend, str plan"
_LIBRARY = torch.library.Library("ckf", "DEF")
_LIBRARY.define(f"multi_lora(Tensor x, {_TENSORS}, {_STATIC}) -> Tensor[]")
_LIBRARY.define(
    f"multi_lora_backward(Tensor[] dys, Tensor x, Tensor saved, {_TENSORS}, {_STATIC}, "
    "bool[] needs) -> Tensor[]"
)


def _multi_lora(
    x, weights, biases, gates, a, b, ids, seed, slots, width, p, save_plain, backend, plan
):
    if backend != "cpu":  # whose kernels look at them
        check_id_range(ids, gates[0].shape[0])
    shape = _shape(gates, a, p)
    if backend == "cuda":
        outputs = decode.forward_pass(shape, x, weights, biases, gates, a, b, ids, plan=plan)
        return [*outputs, x.new_empty(0)]
    passes = _passes(backend)
    extra = (plan,) if backend == "triton" else ()
    outputs, saved = passes.forward_pass(
        shape, x, weights, biases, gates, a, b, ids, seed, save_plain, slots, width, *extra
    )
    return [*outputs, saved]


def _multi_lora_backward(
    dys, x, saved, weights, biases, gates, a, b, ids, seed, slots, width, p, save_plain, backend,
    plan, needs,
):  # fmt: skip
    shape = _shape(gates, a, p)
    passes = _passes(backend)
    extra = (plan,) if backend == "triton" else ()
    with _no_autocast(x):  # backward() may be called inside one
        return passes.backward_pass(
            shape, dys, x, saved, weights, gates, a, b, ids, seed, save_plain, slots, width, needs,
            *extra,
        )  # fmt: skip


def _multi_lora_fake(
    x, weights, biases, gates, a, b, ids, seed, slots, width, p, save_plain, backend, plan
):
    shape = _shape(gates, a, p)
    firsts = itertools.accumulate([0, *(len(r) for r in shape.ranks[:-1])])
    outputs = [x.new_empty(*x.shape[:-1], b[first].shape[0]) for first in firsts]
    if backend == "cuda":
        return [*outputs, x.new_empty(0)]
    compact = not save_plain and _passes(backend).saves_compact(shape, slots)
    columns = width if compact else shape.columns
    return [*outputs, x.new_empty(math.prod(x.shape[:-1]), columns)]


def _multi_lora_backward_fake(
    dys, x, saved, weights, biases, gates, a, b, ids, seed, slots, width, p, save_plain, backend,
    plan, needs,
):  # fmt: skip
    shape = _shape(gates, a, p)
    need_w, need_bias, need_g, need_a, need_b = unflatten(shape, needs[1:])
    pairs = zip([x, *weights, *biases], [needs[0], *need_w, *need_bias], strict=True)
    found = [t.new_empty(t.shape) for t, needed in pairs if needed]
    if any(need_g):
        found.append(gates[0].new_empty(gates[0].shape[0], shape.experts))
    if any(need_a):
        found.append(a[0].new_empty(shape.columns, x.shape[-1]))
    start = 0
    for ranks in shape.ranks:
        if any(need_b[start : start + len(ranks)]):
            found.append(b[start].new_empty(b[start].shape[0] * sum(ranks)))
        start += len(ranks)
    return found


for _name, _function, _fake in (
    ("multi_lora", _multi_lora, _multi_lora_fake),
    ("multi_lora_backward", _multi_lora_backward, _multi_lora_backward_fake),
):
    for _device in ("CPU", "CUDA"):
        _LIBRARY.impl(_name, _function, _device)
    torch.library.register_fake(f"ckf::{_name}", _fake, lib=_LIBRARY)


def _shape(gates, a, dropout_p: float) -> GroupShape:
    ranks, first = [], 0
    for gate in gates:
        experts = gate.shape[1]
        ranks.append(tuple(t.shape[0] for t in a[first : first + experts]))
        first += experts
    return GroupShape(tuple(ranks), dropout_p)


_IMPORTED = {"torch": torch_backend, "cpu": cpu}


def _passes(backend: str):
    """The module whose ``forward_pass`` and ``backward_pass`` compute the ops."""
    if backend not in _IMPORTED:
        from ckf.kernels import triton_backend  # imports triton

        _IMPORTED[backend] = triton_backend
    return _IMPORTED[backend]


def _seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """One int64 on the device: a captured graph can draw afresh, a kernel never recompiles."""
    if isinstance(seed, Tensor):
        waits = device.type == "cpu"  # which reads it at once
        return seed.reshape(1).to(device=device, dtype=torch.int64, non_blocking=not waits)
    signed = (seed + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=device)
