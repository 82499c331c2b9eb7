"""The "cpu" backend: csrc/cpu, where each row is multiplied with its own experts and no others.

For a row of task t, the experts whose gate is not zero stacked as A_t (R_t, k) and B_tl (n_l, R_t):

    h = drop(x) A_t^T * gate_t      y_l = x W_l^T + bias_l + h_l B_tl^T
    ds = dy B_t * gate_t            dA_t += ds^T drop(x)      dB_tl += dy_l^T h_l
    dx = drop'(ds A_t) + sum_l dy_l W_l

Products with W are PyTorch's. Rows may lie in any order; at T 4 and equal ranks that is 2/5 of the
low-rank work of torch_backend.py, at T 64 1/32. float32 alone, gates that need no gradient. Saved
for backward: x and h, compact in every row. The update has the same bits whatever the number of
threads.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.dropout import dropout_threshold
from ckf.kernels.extension import extension_info, load_extension
from ckf.kernels.group import (
    Gradients,
    GroupShape,
    add_base,
    base_gradients,
    input_dropout,
    unflatten,
)

DTYPE = torch.float32


@lru_cache
def available() -> tuple[bool, str]:
    """Whether the kernels can run here, and with which instructions; else why not."""
    extension, reason = _load_extension()
    if extension is None:
        return False, reason
    if not extension.has_threads():
        return False, "PyTorch was built without OpenMP, whose threads the CPU kernels use"
    return True, f"ckf._cpu ({instructions()}), float32"


def instructions() -> str:
    """The best set of instructions that this CPU has, of those that the extension is built for."""
    return _load_extension()[0].instructions()[0]


def build_info() -> dict:
    """What the extension was built from: host compiler, hash of the sources.

    Without an extension: ``{"built": False, "reason": ...}``.
    """
    return extension_info(*_load_extension())


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
    """As ``torch_backend.forward_pass``; H is always compact where there are slots."""
    columns = width if saves_compact(shape, slots) else shape.columns
    rows = x.reshape(-1, x.shape[-1])
    inputs = _rows(input_dropout(rows, shape, seed)(rows))
    h = inputs.new_zeros(inputs.shape[0], columns)  # a row's own columns are written
    experts = Experts(shape, gates, a, b)
    return experts.forward(x, inputs, weights, biases, task_ids, h), h


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
    """As ``torch_backend.backward_pass``."""
    need_w, need_bias, _, need_a, need_b = unflatten(shape, needs[1:])
    rows = x.reshape(-1, x.shape[-1])
    dys = [_rows(dy.reshape(rows.shape[0], dy.shape[-1])) for dy in dys]
    dropout = input_dropout(rows, shape, seed)
    inputs = _rows(dropout(rows) if any(need_a) else rows)
    masked = shape.dropout_p > 0  # the mask is of the update alone
    dx = None
    if needs[0]:
        dx = None if masked else add_base(None, dys, weights)
        dx = inputs.new_zeros(inputs.shape) if dx is None else dx
    da = inputs.new_zeros(shape.columns, inputs.shape[1]) if any(need_a) else None
    db = []
    for dy, ranks, columns in zip(dys, shape.ranks, shape.linear_ranks, strict=True):
        needed, need_b = any(need_b[: len(ranks)]), need_b[len(ranks) :]
        db.append(inputs.new_zeros(dy.shape[1] * columns) if needed else None)
    Experts(shape, gates, a, b).backward(dys, inputs, saved, task_ids, dx, da, db)
    if dx is not None:
        dx = (add_base(dropout(dx), dys, weights) if masked else dx).view(x.shape)
    return Gradients(dx, base_gradients(rows, dys, need_w, need_bias), None, da, db).packed()


def decode_pass(
    experts: "Experts",
    x: Tensor,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    task_ids: Tensor,
) -> list[Tensor]:
    """As ``forward_pass``, the outputs alone, of :func:`transposed_experts`; no dropout."""
    inputs = x if x.is_contiguous() else _rows(x.reshape(-1, x.shape[-1]))
    return experts.forward(x, inputs, weights, biases, task_ids, None)


def drop(tensor: Tensor, seed: Tensor, p: float) -> Tensor:
    """``tensor`` (m, k) where ``dropout_mask`` keeps it, scaled; +0 where it does not.

    float32 on a CPU; seed: one int64 there.
    """
    rows = _rows(tensor)
    out = rows.new_empty(rows.shape)
    _check("x", rows, rows.shape, rows=True)
    _load_extension()[0].drop(
        rows.data_ptr(),
        rows.stride(0),
        *rows.shape,
        int(seed),
        dropout_threshold(p),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def saves_compact(shape: GroupShape, slots: Tensor | None) -> bool:
    """Whether a row of H has its own columns alone."""
    return slots is not None


class Experts:
    """The experts of a group as the extension sees them; their memory is held, not copied.

    Args:
        gates: per linear (T, E_l); ``a``, ``b``: the experts of all linears, one after the other.
    """

    def __init__(self, shape: GroupShape, gates, a, b) -> None:
        extension, reason = _load_extension()
        if extension is None:
            raise RuntimeError(f"the cpu backend: {reason}")
        self._k, tasks = a[0].shape[1], gates[0].shape[0]
        gates, a, b = ([_matrix(t) for t in tensors] for tensors in (gates, a, b))
        self._tensors = (gates, a, b)
        self._widths, expert = [], 0
        for gate, ranks in zip(gates, shape.ranks, strict=True):
            _check("gates", gate, (tasks, len(ranks)))
            self._widths.append(b[expert].shape[0])
            for rank in ranks:
                _check("a", a[expert], (rank, self._k))
                _check("b", b[expert], (self._widths[-1], rank))
                expert += 1
        self._group = extension.MultiLora(
            self._k,
            tasks,
            _pointers(gates),
            self._widths,
            [len(ranks) for ranks in shape.ranks],
            _pointers(a),
            _pointers(b),
            shape.expert_ranks,
            instructions(),
        )

    def keep_transposed(self) -> None:
        """Transpose every B once, for calls to come."""
        self._group.keep_transposed(torch.get_num_threads())

    def forward(self, x: Tensor, inputs: Tensor, weights, biases, task_ids, h) -> list[Tensor]:
        """The outputs (..., n_l) for x (..., k) with ``inputs``, its rows (m, k) as the experts see
        them, or contiguous as x is; ``h`` (m, columns) is written, None: not kept."""
        lead = x.shape[:-1]
        ys, m = [], lead.numel()
        ids = _ids(task_ids, m)
        self._group.check_ids(ids.data_ptr(), m)  # before the base is computed
        whole = inputs.dim() != 2
        _check("x", inputs, (*lead, self._k) if whole else (m, self._k), rows=not whole)
        for weight, bias, n in zip(weights, biases, self._widths, strict=True):
            base = x.new_zeros(*lead, n) if weight is None else F.linear(x, weight, bias)
            ys.append(base.contiguous())
            _check("y", ys[-1], (*lead, n))
        self._group.forward(
            inputs.data_ptr(),
            self._k if whole else inputs.stride(0),
            ids.data_ptr(),
            m,
            _pointers(ys),
            self._widths,
            *(0, 0) if h is None else (h.data_ptr(), h.shape[1]),
            torch.get_num_threads(),
        )
        return ys

    def backward(self, dys, inputs: Tensor, h: Tensor, task_ids: Tensor, dx, da, db) -> None:
        """Add to dx (m, k); write da (R, k) and db (``Gradients.b``) over zeros, where wanted."""
        m = inputs.shape[0]
        _check("x", inputs, (m, self._k), rows=True)
        _check("h", h, (m, h.shape[1]))
        for dy, n in zip(dys, self._widths, strict=True):
            _check("dy", dy, (m, n), rows=True)
        ids = _ids(task_ids, m)
        self._group.backward(
            _pointers(dys),
            [dy.stride(0) for dy in dys],
            inputs.data_ptr(),
            inputs.stride(0),
            h.data_ptr(),
            h.shape[1],
            ids.data_ptr(),
            m,
            *_pointers([dx, da]),
            _pointers(db),
            torch.get_num_threads(),
        )


def transposed_experts(shape: GroupShape, gates, a, b, dtype: torch.dtype) -> Experts:
    """What a ``DecodeCache`` keeps of a group's experts: also every B transposed."""
    experts = Experts(shape, gates, a, b)
    if not any(t.is_inference() for t in b):  # the cache keeps nothing of those
        experts.keep_transposed()
    return experts


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = DTYPE,
    rows: bool = False,
) -> None:
    """ValueError where a pointer would be taken that the kernels must not follow.

    rows: they may lie apart.
    """
    lies = tensor.is_contiguous() or (rows and _lies_in_rows(tensor))
    # one that computes for itself (DTensor, FakeTensor) may have no memory, or another's shape
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    plain = plain and tensor.is_cpu
    if tensor.shape != shape or tensor.dtype is not dtype or not plain or not lies:
        raise ValueError(
            f"{name} is a {type(tensor).__name__} of {tensor.dtype}, shape {tuple(tensor.shape)} "
            f"and strides {tensor.stride()} on {tensor.device}; the CPU kernels expected a plain "
            f"tensor of {dtype} and shape {tuple(shape)} on the CPU, contiguous"
        )


def _ids(task_ids: Tensor, m: int) -> Tensor:
    """The m ids as the kernels read them, in any shape."""
    if task_ids.dtype is not torch.int64 or not task_ids.is_contiguous():
        task_ids = task_ids.to(torch.int64).contiguous()
    fits = task_ids.shape if task_ids.numel() == m else (m,)
    _check("task_ids", task_ids, fits, torch.int64)
    return task_ids


def _matrix(tensor: Tensor) -> Tensor:
    if tensor.dtype is DTYPE and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(DTYPE).contiguous()


def _rows(matrix: Tensor) -> Tensor:
    """With each row's elements side by side."""
    return matrix if _lies_in_rows(matrix) else matrix.contiguous()


def _lies_in_rows(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] < 2


def _pointers(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


@lru_cache
def _load_extension() -> tuple[ModuleType | None, str]:
    return load_extension("_cpu", "with a C++ compiler run CKF_BUILD_CPU=1 pip install -e .")
