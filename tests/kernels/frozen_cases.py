"""Cases for decode_linear: those of multi_lora_decode, each linear with its frozen weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.decode_cases import (
    GroupCase,
    allowed_error,
    assert_within,
    group_case,
    guarded,
    moved,
    update_of,
)


@dataclass
class FrozenCase:
    """A group whose ``ys`` are yet to be written, poisoned like all around them."""

    group: GroupCase
    weights: list[Tensor]
    biases: list[Tensor | None]

    def to(self, device: str) -> "FrozenCase":
        biases = [None if bias is None else moved(bias, device) for bias in self.biases]
        weights = [moved(weight, device) for weight in self.weights]
        return FrozenCase(self.group.to(device), weights, biases)


def frozen_case(
    m=5, k=40, ns=(24, 8), ranks=((4, 4, 4), (2, 6, 0)), seed=0, bias=True, dtype=torch.bfloat16,
    random_weights=True, **options,
) -> FrozenCase:  # fmt: skip
    """Random numbers; options: group_case's. ``padding``: of a weight's rows too, in 16 bytes."""
    group = group_case(m, k, ns, ranks, seed, dtype=dtype, **options)
    for y in group.ys:
        y.fill_(float("nan"))
    g = torch.Generator().manual_seed(seed + 7)
    padding = -options.get("padding", 0) % 8
    padding = 8 if options.get("padding") else padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    return FrozenCase(
        group,
        [guarded(normal(n, k) * max(k, 1) ** -0.5, padding) for n in ns if random_weights],
        [guarded(normal(n), 0, 1) if bias else None for n in ns],
    )


def exact(case: FrozenCase) -> list[tuple[Tensor, Tensor]]:
    """For each linear the float64 result, and how far a float32 sum rounded once may be from it."""
    found = []
    for linear, weight, bias in zip(case.group.linears(), case.weights, case.biases, strict=True):
        update, magnitude, known = update_of(linear)
        x, w = linear.x.double(), weight.double()
        offset = torch.zeros(len(w)) if bias is None else bias.double()
        result = x @ w.T + offset + update
        magnitude = x.abs() @ w.abs().T + offset.abs() + magnitude
        products = sum(linear.a.shape) + w.shape[1] + 8
        allowed = allowed_error(weight.dtype, result, magnitude, products)
        wrong = ~known & (linear.task_ids != -1)
        result[wrong] = float("nan")
        found.append((result, allowed))
    return found


def assert_frozen_right(case: FrozenCase, results: list[Tensor]) -> None:
    for (wanted, allowed), result in zip(exact(case), results, strict=True):
        assert_within(result, wanted, allowed)
