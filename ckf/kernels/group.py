"""What the backends share: the static side of a call, and the dropped input."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ckf.kernels.dropout import dropout_mask, dropout_scale
from ckf.kernels.selection import bit_mask, select_


@dataclass(frozen=True)
class GroupShape:
    """The static side of a call: ranks[l][e] is the rank of expert e in linear l."""

    ranks: tuple[tuple[int, ...], ...]
    dropout_p: float

    @property
    def linears(self) -> int:
        return len(self.ranks)

    @property
    def experts(self) -> int:
        return sum(len(r) for r in self.ranks)

    @property
    def expert_ranks(self) -> list[int]:
        return [r for ranks in self.ranks for r in ranks]

    @property
    def aligned(self) -> bool:
        """Whether every rank is a multiple of eight: 16-byte loads of 16-bit columns."""
        return all(rank % 8 == 0 for ranks in self.ranks for rank in ranks)

    @property
    def linear_ranks(self) -> list[int]:
        return [sum(ranks) for ranks in self.ranks]

    @property
    def columns(self) -> int:
        """R: the rank columns of all linears."""
        return sum(self.linear_ranks)


def unflatten(shape: GroupShape, tensors):
    """weights, biases, gates (one a linear each), then a and b (one an expert each)."""
    count, experts = shape.linears, shape.experts
    cuts = (0, count, 2 * count, 3 * count, 3 * count + experts, 3 * count + 2 * experts)
    return [tensors[i:j] for i, j in itertools.pairwise(cuts)]


def input_dropout(
    rows: Tensor, shape: GroupShape, seed: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """What drops the elements of (m, k) tensors like ``rows``, always the same ones."""
    p = shape.dropout_p
    if p == 0:
        return lambda tensor: tensor
    if drops_by_kernel(rows):
        from ckf.kernels.triton_drop import drop  # imports triton

        return lambda tensor: drop(tensor, seed, p)
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        from ckf.kernels import cpu  # which imports this module

        if cpu.available()[0]:
            return lambda tensor: cpu.drop(tensor, seed, p)
    keep = bit_mask(dropout_mask(*rows.shape, p, seed, rows.device), rows.dtype)
    return lambda tensor: select_(tensor * dropout_scale(p), keep)


def drops_by_kernel(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype != torch.float64 and kernel_draws(rows.device)


@lru_cache
def kernel_draws(device: torch.device) -> bool:
    """Whether a Triton kernel can draw masks there; one warning says why not."""
    reason = why_no_triton(device)
    if reason is not None:
        warnings.warn(
            f"the dropout mask cannot be drawn by a Triton kernel ({reason}); PyTorch's integer "
            "arithmetic draws it, which can take longer than the linear itself",
            stacklevel=2,
        )
    return reason is None


_WHY_NO_TRITON: dict[torch.device, str | None] = {}


def why_no_triton(device: torch.device, may_try: bool = True) -> str | None:
    """Why no Triton kernel can be launched there; None where one ran.

    may_try: whether one may be launched to see, as in no graph that is being captured.
    """
    if device not in _WHY_NO_TRITON:
        if not may_try:
            return "not tried yet"
        _WHY_NO_TRITON[device] = _launch_one(device)
    return _WHY_NO_TRITON[device]


def _launch_one(device: torch.device) -> str | None:
    try:
        from ckf.kernels.triton_drop import drop

        drop(torch.ones(1, 1, device=device), torch.zeros(1, dtype=torch.int64, device=device), 0.5)
    except Exception as error:  # no triton, no C compiler, an unknown GPU
        return str(error)
    return None


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, accumulated and returned in ``dtype``."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32 and left.dtype.itemsize == 2:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def add_base(
    dx: Tensor | None, dys: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> Tensor | None:
    """dx (m, k) plus dy_l W_l of every linear that has a base, in place; None stands for zeros."""
    for dy, weight in zip(dys, weights, strict=True):
        if weight is not None:
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
    return dx


def base_gradients(
    rows: Tensor, dys: Sequence[Tensor], need_w: Sequence[bool], need_bias: Sequence[bool]
) -> list[Tensor | None]:
    """dW_l = dy_l^T x and dbias_l = sum of dy_l's rows, where needed."""
    dw = [dy.t() @ rows if needed else None for dy, needed in zip(dys, need_w, strict=True)]
    return dw + [dy.sum(0) if needed else None for dy, needed in zip(dys, need_bias, strict=True)]


@dataclass
class Gradients:
    """What a backward pass returns, in tensors that share no memory; None where not needed.

    a: (R, k), the experts of all linears one below the other.
    b: per linear (n_l * R_l,): the (n_l, r_e) gradients of its experts one after the other, so that
        each is contiguous.
    gates: (T, E) over the experts of all linears.
    """

    x: Tensor | None
    base: list[Tensor | None]  # of the weights, then of the biases
    gates: Tensor | None
    a: Tensor | None
    b: list[Tensor | None]

    def packed(self) -> list[Tensor]:
        """Those that exist, in order."""
        every = [self.x, *self.base, self.gates, self.a, *self.b]
        return [t for t in every if t is not None]


def pack_experts(stacked: Tensor, ranks: Sequence[int]) -> Tensor:
    """(n, R) with the experts side by side to (n * R,) with one after the other."""
    if len(set(ranks)) == 1 and ranks[0]:
        return stacked.view(-1, len(ranks), ranks[0]).transpose(0, 1).reshape(-1)
    return torch.cat([part.reshape(-1) for part in stacked.split(list(ranks), 1)])


def expert_parts(packed: Tensor, n: int, ranks: Sequence[int]) -> list[Tensor]:
    """The (n, r_e) views of what ``pack_experts`` made."""
    if len(set(ranks)) == 1 and ranks[0]:
        return list(packed.view(len(ranks), n, ranks[0]).unbind())
    parts = packed.split([n * r for r in ranks])
    return [part.view(n, r) for part, r in zip(parts, ranks, strict=True)]
