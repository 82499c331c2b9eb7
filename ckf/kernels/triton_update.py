"""The update of a group's linears in two forms with the same steps, for triton_backend.py.

``Dense``: all R columns of every row, one kernel block of them up to DENSE_RANK. ``Gathered``: the
C columns of a row's own task. A step launches kernels and nothing else; what later steps of the
same pass read (H; dS, dH) stays on the object.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels import hopper, triton_gemm
from ckf.kernels.dropout import dropout_scale, dropout_threshold
from ckf.kernels.group import GroupShape
from ckf.kernels.stacks import Stacks
from ckf.kernels.triton_expand import expand
from ckf.kernels.triton_gather import gather_expand, gather_shrink
from ckf.kernels.triton_gather_outer import gather_outer
from ckf.kernels.triton_groups import group_rows
from ckf.kernels.triton_outer import Factors, outer, outer_pair
from ckf.kernels.triton_shrink import shrink


class _Update:
    """What both forms share: the columns of every linear, and how base and update meet."""

    ds: Tensor
    dh: Tensor | None = None

    def __init__(
        self,
        shape: GroupShape,
        stacks: Stacks,
        task_ids: Tensor,
        seed: Tensor | None,
        save_plain: bool,
        slots: Tensor | None,
        width: int,
    ) -> None:
        self.shape, self.stacks, self.aligned = shape, stacks, shape.aligned
        self.ids = task_ids.reshape(-1).contiguous()
        self.save_plain, self.slots, self.width = save_plain, slots, width
        self.dropout = None
        if seed is not None:
            p = shape.dropout_p
            self.dropout = seed, dropout_threshold(p), dropout_scale(p)
        ends = itertools.accumulate(shape.linear_ranks, initial=0)
        self.columns = [slice(*pair) for pair in itertools.pairwise(ends)]

    def output(self, x: Tensor, rows: Tensor, linear: int, weight, bias, plan: str) -> Tensor:
        """x W^T + bias + update, (..., n); the update alone where there is no weight."""
        n = self.stacks.b[linear].shape[1]
        if plan == "gemm" and weight is not None:
            fused = self.fused_output(rows, linear, weight, bias)
            if fused is not None:
                return fused.view(*x.shape[:-1], n)
        self.make_h()
        if weight is None or plan == "addmm":
            y = x.new_empty(*x.shape[:-1], n)
            self.expand(
                linear, y.view(-1, n), accumulate=False, bias=None if weight is None else bias
            )
            if weight is not None:
                y.view(-1, n).addmm_(rows, weight.t())
            return y
        y = F.linear(x, weight, bias).contiguous()
        self.expand(linear, y.view(-1, n), accumulate=True)
        return y

    def input_gradient(self, dys: Sequence[Tensor], weights, plan: str) -> Tensor:
        """drop'(dS A) + sum over linears of dy W, (m, k)."""
        bases = [(dy, w) for dy, w in zip(dys, weights, strict=True) if w is not None]
        dx = self.fused_input_gradient(*bases[0]) if plan == "gemm" and bases else None
        if dx is None:
            dx = self.ds.new_empty(self.ds.shape[0], self.stacks.a.shape[1])
            self.expand_back(dx)
        else:
            bases = bases[1:]
        for dy, weight in bases:
            dx.addmm_(dy, weight)
        return dx

    def make_h(self) -> None:
        """H, where it is not there yet."""

    def fused_output(self, rows, linear: int, weight, bias) -> Tensor | None:
        """Base and update in one product, where the operands allow it."""
        return None

    def fused_input_gradient(self, dy, weight) -> Tensor | None:
        return None


class Dense(_Update):
    """H and dS (m, R)."""

    _left: tuple[Tensor, Tensor] | None = None  # rows and saved of a shrink that is still to do
    _dx: Tensor | None = None  # as far as the products that made dS have made it
    _last_b: tuple[int, Factors] | None = None  # a linear whose gradient of B is still to do

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self._in_dx: set[int] = set()  # linears

    def shrink(self, rows: Tensor, saved: Tensor) -> None:
        """H, and what is saved of it: S, H itself, or H packed by the slots.

        Left to the first product, which may make H itself.
        """
        new = self.save_plain or self._packs
        self.h = rows.new_empty(rows.shape[0], self.stacks.a.shape[0]) if new else saved
        self._left = rows, saved

    @property
    def _packs(self) -> bool:
        return self.slots is not None and not self.save_plain

    def make_h(self) -> None:
        if self._left is None:
            return
        rows, saved = self._left
        self._left = None
        shrink(
            rows,
            self.stacks.a,
            self.stacks.gates,
            self.ids,
            gated=self.h,
            plain=saved if self.save_plain else None,
            dropout=self.dropout,
            slots=self.slots if self._packs else None,
            packed=saved if self._packs else None,
        )

    def _shrink_inside(
        self,
        x: Tensor,
        a: Tensor,
        at: slice,
        gated: Tensor,
        compact: Tensor,
        restored: Tensor | None = None,
    ) -> hopper.Shrink | None:
        """The shrink as a part of the product of x with a base, where csrc's kernel takes it.

        at: of the group's rank columns; ``gated`` and ``restored`` hold all of them.
        """
        if self.save_plain or not self.aligned:
            return None
        saved = ()
        if self._packs:
            saved = self.slots[:, at], compact, None if restored is None else restored[:, at]
        gates = self.stacks.gates[:, at]
        inside = hopper.Shrink(a, gates, self.ids, gated[:, at], *saved)
        dx = restored is not None
        return inside if hopper.why_not_shrink(x, inside, dx) is None else None

    def expand(self, linear: int, y: Tensor, accumulate: bool, bias: Tensor | None = None) -> None:
        h = self.h[:, self.columns[linear]]
        expand(h, self.stacks.b[linear], y, accumulate, bias=bias)

    def expand_back(self, dx: Tensor) -> None:
        expand(self.ds, self.stacks.a, dx, accumulate=False, dropout=self.dropout)

    def fused_output(self, rows, linear: int, weight, bias) -> Tensor | None:
        h, b = self.h[:, self.columns[linear]], self.stacks.b[linear]
        products = _products(rows, weight, h, b)
        if products is hopper and bias is not None and bias.data_ptr() % 4:
            bias = bias.clone()  # a slice from an odd element on
        if products is hopper and self._left is not None and self.dropout is None:
            every = slice(0, self.shape.columns)
            at = every if every.stop <= hopper.MAX_SHRINK else self.columns[linear]
            a, saved = self.stacks.a[at], self._left[1]
            inside = self._shrink_inside(rows, a, at, self.h, saved)
            if inside is not None:
                if at.stop == every.stop:
                    self._left = None
                return hopper.gemm(rows, weight, bias, h, b, inside, checked=True)
        self.make_h()
        if products is hopper:
            return hopper.gemm(rows, weight, bias, h, b, checked=True)
        return products and products.gemm(rows, weight, bias, h, b)

    def fused_input_gradient(self, dy, weight) -> Tensor | None:
        ds, a = self.ds, self.stacks.a
        products = _products(dy, weight, ds, a, dx=True)
        if products is hopper:
            return hopper.gemm_dx(dy, weight, ds, a, self.dropout, checked=True)
        return products and products.gemm_dx(dy, weight, ds, a, self.dropout)

    def rank_gradients(
        self, dys, saved: Tensor, needed: Sequence[bool], dtypes, keep_dh: bool, bases, pair: bool
    ) -> list[Tensor | None]:
        """dS of all linears (and dH if asked for), and the gradients of B right behind each.

        pair: A's gradient is needed as well, and the last of B's is left to ``a_gradient``.
        """
        self.ds = saved.new_empty(saved.shape[0], self.stacks.a.shape[0])
        self.dh = torch.empty_like(self.ds) if keep_dh else None
        h = torch.empty_like(self.ds) if self._packs or self.save_plain else None
        gradients: list[Tensor | None] = []
        for linear, (dy, ranks, at, need, dtype) in enumerate(
            zip(dys, self.shape.ranks, self.columns, needed, dtypes, strict=True)
        ):
            weight = bases[linear] if bases else None
            if not self._shrink_with_dx(linear, dy, saved, h, weight):
                self._shrink_back(linear, dy, saved, h)
            left = (saved if h is None else h)[:, at]
            gradients.append(None)
            if not need:
                continue
            own = Factors(left, dy, ranks, dtype, transposed=True)
            if pair and self.dropout is None and not any(needed[linear + 1 :]):
                self._last_b = linear, own
            else:
                gradients[-1] = outer(*own)
        return gradients

    def _shrink_back(self, linear: int, dy, saved: Tensor, h: Tensor | None) -> None:
        at, packed = self.columns[linear], self._packs
        shrink(
            dy,
            self.stacks.b[linear],
            self.stacks.gates[:, at],
            self.ids,
            gated=self.ds[:, at],
            plain=None if self.dh is None else self.dh[:, at],
            slots=self.slots[:, at] if packed else None,
            saved=saved if packed else saved[:, at] if self.save_plain else None,
            restored=None if h is None else h[:, at],
        )

    def _shrink_with_dx(self, linear: int, dy, saved: Tensor, h, weight) -> bool:
        """dS and H of a linear by the product that adds its part of dx, where csrc's kernel takes
        it."""
        at = self.columns[linear]
        ds, a = self.ds[:, at], self.stacks.a[at]
        if self.dropout is not None and hopper.waits_for_ds(dy.shape[0], a.shape[1]):
            return False
        if weight is None or _products(dy, weight, ds, a, dx=True) is not hopper:
            return False
        inside = self._shrink_inside(dy, self.stacks.b[linear], at, self.ds, saved, h)
        if inside is None:
            return False
        self._dx = hopper.gemm_dx(
            dy, weight, ds, a, self.dropout, inside, onto=self._dx, checked=True
        )
        self._in_dx.add(linear)
        return True

    def input_gradient(self, dys: Sequence[Tensor], weights, plan: str) -> Tensor:
        if self._dx is None:
            return super().input_gradient(dys, weights, plan)
        for linear, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
            if linear in self._in_dx:
                continue
            at = self.columns[linear]
            expand(self.ds[:, at], self.stacks.a[at], self._dx, True, self.dropout)
            if weight is not None:
                self._dx.addmm_(dy, weight)
        return self._dx

    def a_gradient(self, rows: Tensor, dtype: torch.dtype, db: list[Tensor | None]) -> Tensor:
        """A's, and in db what ``rank_gradients`` left."""
        own = Factors(self.ds, rows, self.shape.expert_ranks, dtype, transposed=False)
        if self._last_b is None:
            return outer(*own, dropout=self.dropout)
        linear, of_b = self._last_b
        db[linear], da = outer_pair(of_b, own)
        return da


def _products(x: Tensor, weight: Tensor, h: Tensor, b: Tensor, dx: bool = False):
    """The module that multiplies them, or None: csrc's where it takes the operands."""
    if hopper.why_not_gemm(x, weight, h, b, dx) is None:
        return hopper
    return triton_gemm if triton_gemm.why_not_gemm(x, weight, h, b) is None else None


class Gathered(_Update):
    """H and dS compact, (m, C); rows grouped by task."""

    def __init__(self, shape: GroupShape, stacks: Stacks, task_ids, *arguments) -> None:
        super().__init__(shape, stacks, task_ids, *arguments)
        self.groups = group_rows(self.ids, self.slots, self.width)

    def shrink(self, rows: Tensor, saved: Tensor) -> None:
        self.h = saved
        self._shrink(rows, self.stacks.a, 0, saved, self.dropout)

    def _shrink(self, rows: Tensor, a: Tensor, low: int, h: Tensor, dropout=None) -> None:
        gates, groups = self.stacks.gates, self.groups
        gather_shrink(rows, a, gates, groups, low, h, self.aligned, dropout)

    def expand(self, linear: int, y: Tensor, accumulate: bool, bias: Tensor | None = None) -> None:
        gather_expand(
            self.h,
            self.stacks.b[linear],
            y,
            self.groups,
            low=self.columns[linear].start,
            aligned=self.aligned,
            accumulate=accumulate,
            bias=bias,
        )

    def expand_back(self, dx: Tensor) -> None:
        gather_expand(
            self.ds,
            self.stacks.a,
            dx,
            self.groups,
            low=0,
            aligned=self.aligned,
            accumulate=False,
            dropout=self.dropout,
        )

    def rank_gradients(
        self, dys, saved: Tensor, needed: Sequence[bool], dtypes, keep_dh: bool, bases, pair: bool
    ) -> list[Tensor | None]:
        """dS of all linears, and the gradients of B right behind each."""
        assert not keep_dh, "gates that need a gradient are not hard"
        self.ds = torch.empty_like(saved)
        gradients: list[Tensor | None] = []
        for dy, b_l, ranks, at, need, dtype in zip(
            dys, self.stacks.b, self.shape.ranks, self.columns, needed, dtypes, strict=True
        ):
            self._shrink(dy, b_l, at.start, self.ds)
            gradients.append(None)
            if need:
                gradients[-1] = self._outer(saved, dy, ranks, dtype, True, at.start)
        return gradients

    def a_gradient(self, rows: Tensor, dtype: torch.dtype, db) -> Tensor:
        ranks = self.shape.expert_ranks
        return self._outer(self.ds, rows, ranks, dtype, False, 0, self.dropout)

    def _outer(self, left, x, ranks, dtype, transposed: bool, low: int, dropout=None):
        return gather_outer(
            left,
            x,
            ranks,
            dtype,
            transposed,
            self.groups,
            self.slots,
            low,
            self.aligned,
            dropout,
        )
