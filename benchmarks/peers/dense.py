"""Peers in plain PyTorch: frozen, one LoRA, dense-gated, grouped_mm, gather and bmm."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.base import Provider
from benchmarks.problems import SCALING, SEQUENCE, Case, Problem


class Frozen(Provider):
    """The base linear alone: forward and dx."""

    name, label, peer = "frozen", "frozen linear", "P0"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.bare())

    def forward(self) -> list[Tensor]:
        return [F.linear(self.problem.xs[one.group], one.weight) for one in self.problem.linears]


class _DenseGated(torch.autograd.Function):
    """y = x W^T + (x A^T * gate) B^T in three products; the base lands on the update in place."""

    @staticmethod
    def forward(ctx, x, weight, gate, dropout, *adapters):
        half = len(adapters) // 2
        a = torch.cat([t.to(x.dtype) for t in adapters[:half]])  # (R, k)
        b = torch.cat([t.to(x.dtype) for t in adapters[half:]], dim=1)  # (n, R)
        keep = None
        inputs = x
        if dropout > 0:
            inputs, keep = torch.native_dropout(x, dropout, True)
        h = inputs @ a.t()  # (m, R)
        h *= gate
        y = h @ b.t()
        y.addmm_(x, weight.t())
        ctx.save_for_backward(x, weight, gate, keep, h, *adapters)
        ctx.dropout = dropout
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, gate, keep, h, *adapters = ctx.saved_tensors
        half = len(adapters) // 2
        a = torch.cat([t.to(x.dtype) for t in adapters[:half]])
        b = torch.cat([t.to(x.dtype) for t in adapters[half:]], dim=1)
        ds = dy @ b
        ds *= gate
        dx = ds @ a
        inputs, scale = x, 1 / (1 - ctx.dropout)
        if keep is not None:
            inputs = torch.where(keep, x * scale, 0)
            dx = torch.where(keep, dx * scale, 0)
        dx.addmm_(dy, weight)
        kind = adapters[0].dtype
        da, db = _product(ds.t(), inputs, kind), _product(dy.t(), h, kind)
        ranks = [t.shape[0] for t in adapters[:half]]
        return dx, None, None, None, *da.split(ranks), *db.split(ranks, 1)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """A product whose sum is returned unrounded where the GPU can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


class Dense(Provider):
    """All experts for all rows by matrix products, a mask between: the strongest simple rival."""

    name, label, peer = "dense", "dense-gated cuBLAS", "P9"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        dtype = getattr(torch, problem.case.dtype)
        self.columns = problem.gates.repeat_interleave(problem.case.rank, 1).to(dtype)  # (T, R)
        self.route()
        self.stacks: list[tuple[Tensor, Tensor]] = []  # A^T (k, R), B^T (R, n)
        if problem.case.step == "forward" and not problem.case.dropout:
            self.stacks = [
                (torch.cat(one.a).to(dtype).t(), torch.cat(one.b, 1).to(dtype).t())
                for one in problem.linears
            ]

    def route(self) -> None:
        self.gate = self.columns.index_select(0, self.problem.ids)  # (m, R)

    def forward(self) -> list[Tensor]:
        xs, dropout = self.problem.xs, self.problem.case.dropout
        if self.stacks:
            pairs = zip(self.problem.linears, self.stacks, strict=True)
            return [self._stacked(xs[one.group], one.weight, a, b) for one, (a, b) in pairs]
        return [
            _DenseGated.apply(xs[one.group], one.weight, self.gate, dropout, *one.a, *one.b)
            for one in self.problem.linears
        ]

    def _stacked(self, x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        h = x @ a
        h *= self.gate
        return (h @ b).addmm_(x, weight.t())


class Single(Dense):
    """One LoRA of rank r_s + r_t for all rows: what routing costs is what lies above it."""

    name, label, peer = "single", "one unrouted LoRA", "P0"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.unrouted())


class Permute(torch.autograd.Function):
    """Rows in another order; the gradient by the inverse order instead of an accumulation."""

    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, dy):
        _, inverse = ctx.saved_tensors
        return dy.index_select(0, inverse), None, None


class SortedRows(Provider):
    """For peers that need rows sorted by task.

    A data loader can sort whole sequences, so for those mixes the rows lie sorted before the clock
    starts; where every token has its own task the sorting of x and y is timed.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.route()
        self.presorted = problem.case.mix != "token"
        self.xs, self.dys = problem.xs, problem.dys
        if self.presorted:
            train = problem.case.step == "train"
            self.xs = [x.detach()[self.order].requires_grad_(train) for x in problem.xs]
            self.dys = [dy[self.order] for dy in problem.dys] if train else problem.dys

    def route(self) -> None:
        self.order = torch.argsort(self.problem.ids, stable=True)
        self.inverse = torch.argsort(self.order)
        self.counts = torch.bincount(self.problem.ids, minlength=self.problem.case.tasks)

    def sorted_inputs(self) -> list[Tensor]:
        if self.presorted:
            return self.xs
        return [Permute.apply(x, self.order, self.inverse) for x in self.xs]

    def restored(self, y: Tensor) -> Tensor:
        return y if self.presorted else Permute.apply(y, self.inverse, self.order)

    def leaves(self) -> list[Tensor]:
        return [*self.xs, *self.problem.leaves()[len(self.xs) :]]

    def train(self) -> tuple[list[Tensor], list[Tensor]]:
        ys = self.forward()
        return ys, list(torch.autograd.grad(ys, self.leaves(), self.dys))

    def outputs(self, ys: list[Tensor]) -> list[Tensor]:
        return [y[self.inverse] for y in ys] if self.presorted else ys

    def gradients(self, grads: list[Tensor]) -> list[Tensor]:
        count = len(self.xs)
        dxs = [g[self.inverse] for g in grads[:count]] if self.presorted else grads[:count]
        return [*dxs, *grads[count:]]


class StackedTasks(Provider):
    """For peers that keep the tasks' A (T, r, k) and B (T, n, r) as one parameter each."""

    def stack(self) -> None:
        train = self.problem.case.step == "train"
        self.stacks = [
            [torch.stack(t[1:]).detach().requires_grad_(train) for t in (one.a, one.b)]
            for one in self.problem.linears
        ]

    def inputs(self) -> list[Tensor]:
        """The leaves among the inputs."""
        return self.problem.xs

    def leaves(self) -> list[Tensor]:
        leaves = list(self.inputs())
        for one, (a, b) in zip(self.problem.linears, self.stacks, strict=True):
            leaves += [one.a[0], a, one.b[0], b]
        return leaves

    def gradients(self, grads: list[Tensor]) -> list[Tensor]:
        count = len(self.problem.xs)
        result = super().gradients(grads[:count])
        for i in range(count, len(grads), 4):
            shared_a, a, shared_b, b = grads[i : i + 4]
            result += [shared_a, *a, shared_b, *b]
        return result

    def parameters(self) -> list[Tensor]:
        return [*super().parameters(), *(t for pair in self.stacks for t in pair)]


def _base_and_shared(x: Tensor, one) -> tuple[Tensor, Tensor]:
    shared = F.linear(F.linear(x, one.a[0].to(x.dtype)), one.b[0].to(x.dtype))
    return F.linear(x, one.weight), shared


class Grouped(StackedTasks, SortedRows):
    """Rows sorted by task, ``grouped_mm`` for the tasks' A and B, a dense shared LoRA."""

    name, label, peer = "grouped", "sorted + grouped_mm", "P5"
    multiple: ClassVar[int] = 8

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
        if case.dtype not in ("bfloat16", "float32"):
            return f"dtype {case.dtype}; grouped_mm takes bfloat16 (float32 on a CPU)"
        if device.type == "cuda" and case.dtype != "bfloat16":
            return f"dtype {case.dtype}; grouped_mm takes bfloat16 on a GPU"
        if case.rank % cls.multiple:
            return f"rank {case.rank}; grouped_mm needs multiples of {cls.multiple}"
        if case.dropout:
            return "dropout is not part of this peer"
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.stack()

    def route(self) -> None:
        super().route()
        self.offsets = self.counts.cumsum(0).to(torch.int32)

    def inputs(self) -> list[Tensor]:
        return self.xs

    def forward(self) -> list[Tensor]:
        xs, ys = self.sorted_inputs(), []
        for one, (a, b) in zip(self.problem.linears, self.stacks, strict=True):
            x = xs[one.group]
            y, shared = _base_and_shared(x, one)
            h = F.grouped_mm(x, a.to(x.dtype).transpose(1, 2), offs=self.offsets)
            own = F.grouped_mm(h, b.to(x.dtype).transpose(1, 2), offs=self.offsets)
            ys.append(self.restored(y + SCALING * (shared + own)))
        return ys


class BatchedGather(StackedTasks):
    """A and B gathered for every sequence (every row, where tasks change by the row), then bmm."""

    name, label, peer = "bmm", "gather + bmm", "P6"
    largest: ClassVar[int] = 4 << 30

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        size = torch.finfo(getattr(torch, case.dtype)).bits // 8
        rows = case.m // cls._length(case)
        most = max(rows * case.rank * max(k, n) * size for k, n in case.linears)
        limit = cls.largest if device.type == "cuda" else cls.largest // 32
        if most > limit:
            return f"the gathered weights of one linear would take {most >> 20} MiB"
        if case.dropout:
            return "dropout is not part of this peer"
        return None

    @staticmethod
    def _length(case: Case) -> int:
        """Rows that are sure to share a task."""
        if case.mix == "token":
            return 1
        if case.mix == "sorted":
            return case.m // case.tasks if case.m % case.tasks == 0 else 1
        length = max(1, min(SEQUENCE, case.m // case.tasks))
        return length if case.m % length == 0 else 1

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.length = self._length(problem.case)
        self.route()
        self.stack()

    def route(self) -> None:
        self.owners = self.problem.ids[:: self.length].contiguous()  # (B,)

    def forward(self) -> list[Tensor]:
        ys = []
        for one, (a, b) in zip(self.problem.linears, self.stacks, strict=True):
            x = self.problem.xs[one.group]
            rows = x.view(-1, self.length, x.shape[1])  # (B, S, k)
            y, shared = _base_and_shared(x, one)
            own_a = a.to(x.dtype).index_select(0, self.owners)  # (B, r, k)
            own_b = b.to(x.dtype).index_select(0, self.owners)  # (B, n, r)
            own = torch.bmm(torch.bmm(rows, own_a.transpose(1, 2)), own_b.transpose(1, 2))
            ys.append(y + SCALING * (shared + own.view_as(y)))
        return ys
