"""Cases for the Hopper GEMM, their float64 result and the error that arithmetic allows."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ckf.kernels import hopper
from ckf.kernels.dropout import dropout_mask, dropout_scale, dropout_threshold
from tests.kernels.decode_cases import guarded, moved

DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class GemmCase:
    """Operands by their forward names; with ``dx`` dy, W (k, n), dS and A."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    h: Tensor
    b: Tensor
    dx: bool
    p: float = 0.0
    seed: int = 0
    onto: Tensor | None = None

    def to(self, device: str) -> "GemmCase":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {n: moved(t, device) for n, t in tensors.items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def run(self, shrink: hopper.Shrink | None = None) -> Tensor:
        if not self.dx:
            return hopper.gemm(self.x, self.weight, self.bias, self.h, self.b, shrink)
        dropout = None
        if self.p:
            seed = torch.tensor([self.seed], device=self.x.device)
            dropout = seed, dropout_threshold(self.p), dropout_scale(self.p)
        return hopper.gemm_dx(self.x, self.weight, self.h, self.b, dropout, shrink, self.onto)


def gemm_case(
    m, n, k, r, dx=False, dtype=torch.bfloat16, p=0.0, bias=True, integers=False, padding=0, seed=0
) -> GemmCase:
    """Random numbers in poisoned buffers; ``integers``: small ones, whose sums are exact.

    ``padding``: extra elements between the rows of every operand, on top of those that bring rows
    to 16 bytes.
    """
    g = torch.Generator().manual_seed(seed)

    def matrix(rows, columns, scale=1.0):
        if integers:
            values = torch.randint(-2, 3, (rows, columns), generator=g)
        else:
            values = torch.randn(rows, columns, generator=g) * scale
        return guarded(values.to(dtype), -columns % 8 + padding)

    return GemmCase(
        x=matrix(m, k),
        weight=matrix(k, n, k**-0.5) if dx else matrix(n, k, k**-0.5),
        bias=guarded(matrix(1, n)[0].contiguous()) if bias and not dx else None,
        h=matrix(m, r),
        b=matrix(r, n, r**-0.5),
        dx=dx,
        p=p if dx else 0.0,
        seed=2**40 + seed,
    )


def exact(case: GemmCase) -> tuple[Tensor, Tensor]:
    """The float64 result, and how far a float32 sum rounded once may be from it.

    As ``decode_cases.exact``: p products in any order err by at most p * 2^-24 times the sum of
    their magnitudes to first order, twice that covers the rest; then half a unit of the result.
    """
    m, n = case.x.shape[0], case.b.shape[1]
    mask = torch.ones((), dtype=torch.float64)
    if case.p:
        keep = dropout_mask(m, n, case.p, case.seed).double()
        mask = keep * dropout_scale(case.p)

    def total(x, weight, bias, h, b):
        base = x @ (weight if case.dx else weight.t())
        return mask * (h @ b) + base + (0 if bias is None else bias)

    operands = [
        None if t is None else t.double().cpu()
        for t in (case.x, case.weight, case.bias, case.h, case.b)
    ]
    result = total(*operands)
    magnitude = total(*(None if t is None else t.abs() for t in operands))
    products = case.x.shape[1] + case.h.shape[1] + 2
    error = 2 * products * 2.0**-24 * magnitude
    info = torch.finfo(case.x.dtype)
    return result, error + info.eps / 2 * (result.abs() + error) + info.smallest_normal


def assert_right(case: GemmCase, result: Tensor) -> None:
    wanted, allowed = exact(case)
    excess = (result.double().cpu() - wanted).abs() - allowed
    worst = excess.max().item()
    assert worst <= 0, f"error exceeds the allowed one by {worst:.3e}"
