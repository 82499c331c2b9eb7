"""Cases for the Hopper GEMM that makes H itself: what it writes, and the product over it."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ckf.kernels import hopper
from ckf.kernels.slots import compact_slots
from tests.kernels.decode_cases import guarded, hard_column_gates, moved
from tests.kernels.hopper_cases import GemmCase, assert_right, gemm_case

# Of ``shrink_case``: what host and chip are asked.
VARIANTS = [
    {},
    {"padding": 8},
    {"slotted": False},
    {"slotted": False, "soft": True},
    {"ranks": (8, 24, 0, 40, 56)},
    {"ranks": (64, 64, 64, 56)},
    {"ranks": (64, 64, 64, 56), "dx": True},
    {"dx": True},
    {"dx": True, "p": 0.3},
    {"dx": True, "slotted": False},
]


@dataclass
class ShrinkCase:
    """``product.h`` is the ``gated`` of the shrink, or columns of it; for dx ``a`` is B^T."""

    product: GemmCase
    a: Tensor
    gates: Tensor
    ids: Tensor
    gated: Tensor
    slots: Tensor | None
    compact: Tensor | None
    restored: Tensor | None

    def to(self, device: str) -> "ShrinkCase":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        there = {n: moved(t, device) for n, t in tensors.items() if isinstance(t, Tensor)}
        product = self.product.to(device)
        product.h = there["gated"][:, : product.h.shape[1]]
        return replace(self, product=product, **there)

    def shrink(self) -> hopper.Shrink:
        tables = (self.gates, self.ids, self.gated, self.slots, self.compact, self.restored)
        return hopper.Shrink(self.a, *tables)

    def run(self) -> Tensor:
        return self.product.run(self.shrink())


def shrink_case(
    m,
    n,
    k,
    ranks=(16, 16, 16, 16, 16),
    dx=False,
    dtype=torch.bfloat16,
    p=0.0,
    slotted=True,
    soft=False,
    integers=False,
    padding=0,
    seed=0,
) -> ShrinkCase:
    """Sequences of 37 rows; every output starts as poison."""
    g = torch.Generator().manual_seed(seed)
    tasks, columns = len(ranks) - 1, sum(ranks)
    options = {"dx": dx, "dtype": dtype, "p": p, "integers": integers, "padding": padding}
    product = gemm_case(m, n, k, columns, seed=seed, **options)

    def matrix(rows, width, values=None):
        if values is None:
            values = torch.full((rows, width), float("nan"))
        return guarded(values.to(dtype), -width % 8 + padding)

    if integers:
        a = torch.randint(-1, 2, (columns, k), generator=g)
    else:
        a = torch.randn(columns, k, generator=g) * k**-0.5
    gates = hard_column_gates(list(ranks))
    if soft:
        gates = torch.randn(tasks, len(ranks), generator=g)
        gates = gates.repeat_interleave(torch.tensor(ranks), dim=1)
    if integers:
        gates = (gates != 0).float()
    ids = torch.arange(m) // 37 % (tasks + 1) - 1
    slots = compact = None
    if slotted:
        live = [[e in (0, 1 + t) for e in range(len(ranks))] for t in range(tasks)]
        slots, width = compact_slots([live], [list(ranks)])
        values = torch.randn(m, width, generator=g) if dx else None
        compact, slots = matrix(m, width, values), guarded(slots, 3)
    gated = matrix(m, columns)
    product.h = gated
    restored = matrix(m, columns) if dx and slotted else None
    return ShrinkCase(
        product,
        matrix(columns, k, a),
        guarded(gates, 5),
        guarded(ids),
        gated,
        slots,
        compact,
        restored,
    )


def assert_shrunk(case: ShrinkCase, y: Tensor) -> None:
    """H against float64; its copies to the bit; the product over the H that was written."""
    x, a = case.product.x.double().cpu(), case.a.double().cpu()
    gates, ids, tasks = case.gates.cpu().double(), case.ids.cpu(), case.gates.shape[0]
    known = (ids >= 0) & (ids < tasks)
    row_gates = gates[ids.where(known, 0)].where(known[:, None], 0)
    exact = (x @ a.t() * row_gates).where(row_gates != 0, 0)
    magnitude = x.abs() @ a.abs().t() * row_gates.abs()
    error = 2 * (x.shape[1] + 2) * 2.0**-24 * magnitude
    info = torch.finfo(case.gated.dtype)
    allowed = error + info.eps / 2 * (exact.abs() + error) + info.smallest_normal
    gated = case.gated.cpu()
    wrong = ~known & (ids != -1)
    assert gated[wrong].isnan().all()
    assert ((gated.double() - exact).abs() <= allowed)[~wrong].all()
    if case.slots is not None:
        slots = case.slots.cpu().long()[ids.where(known, 0)].where(known[:, None], -1)
        rows, columns = (slots >= 0).nonzero(as_tuple=True)
        packed = case.compact.cpu()[rows, slots[rows, columns]]
        if case.restored is None:
            assert torch.equal(packed, gated[rows, columns])
        else:
            expected = torch.zeros_like(gated)
            expected[rows, columns] = packed
            restored = case.restored.cpu()
            assert restored[wrong].isnan().all()
            assert torch.equal(restored[~wrong], expected[~wrong])
    assert y[wrong.to(y.device)].isnan().all()
    right = case.product
    if wrong.any():  # what the product itself makes of those rows is not asked
        kept = {"x": right.x.clone(), "h": right.h.clone()}
        for tensor in kept.values():
            tensor[wrong.to(y.device)] = 0
        right, y = replace(right, **kept), y.clone()
        y[wrong.to(y.device)] = right.run()[wrong.to(y.device)]
    assert_right(right, y)
