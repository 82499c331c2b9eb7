"""The analytic floor: the least that must be computed and moved, and how long that takes.

Each row's own two LoRAs and no more; every tensor moves once. Where the peaks of a device are known
the floor is a time, the slower of arithmetic and traffic, forward and backward apart; elsewhere it
is a ratio of FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.problems import Case

if TYPE_CHECKING:
    from benchmarks.models import ModelShape

# Measured: FLOP/s of an 8192^3 bf16 product of random matrices, bytes/s of a copy, both ways.
PEAKS = {"H200": (788e12, 4.3e12), "H100 80GB": (798e12, 3.0e12)}


def peaks_of(device_name: str) -> tuple[float, float] | None:
    return next((peaks for name, peaks in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True)
class Work:
    """The least that must be computed and moved, forward and backward apart."""

    flops: tuple[float, float]
    bytes: tuple[float, float]

    def seconds(self, peaks: tuple[float, float]) -> float:
        pairs = zip(self.flops, self.bytes, strict=True)
        return sum(max(f / peaks[0], b / peaks[1]) for f, b in pairs)

    def __add__(self, other: Work) -> Work:
        pairs = ((self.flops, other.flops), (self.bytes, other.bytes))
        return Work(*(tuple(x + y for x, y in zip(*pair, strict=True)) for pair in pairs))

    def times(self, count: int) -> Work:
        return Work(tuple(count * f for f in self.flops), tuple(count * b for b in self.bytes))


def least_work(case: Case, experts: bool) -> Work:
    """Of the frozen base (forward and dx), or with each row's shared and task LoRA on top.

    Every tensor moves once: x, W, y forward; dy, x, W, dx and the adapters' gradients backward.
    """
    size, wide = bytes_of(case.dtype), bytes_of(case.adapters)
    m, train = case.m, case.step == "train"
    base = sum(2 * m * k * n for k, n in case.linears)
    update = sum(2 * m * 2 * case.rank * (k + n) for k, n in case.linears) if experts else 0
    weights = sum(k * n for k, n in case.linears) * size
    inputs = sum(m * k for k, _ in case.groups) * size
    outputs = sum(m * n for _, n in case.linears) * size
    adapters = sum(case.total_rank * (k + n) for k, n in case.linears) * wide if experts else 0
    forward = inputs + weights + outputs + adapters
    # backward reads dy, W and, for dA, x; writes dx and the gradients of the adapters
    backward = outputs + weights + inputs + (inputs + 2 * adapters if experts else 0)
    return Work(
        (base + update, (base + 2 * update) if train else 0),
        (forward, backward if train else 0),
    )


def bytes_of(dtype: str) -> int:
    return torch.finfo(getattr(torch, dtype)).bits // 8


def floor_columns(case: Case, device_name: str) -> dict:
    """floor_ratio: the least work over the frozen base's, by time where the peaks are known.

    On other devices by FLOPs alone, without milliseconds.
    """
    return columns(least_work(case, True), least_work(case, False), device_name)


def columns(ours: Work, frozen: Work, device_name: str) -> dict:
    row = {"flops": sum(ours.flops), "bytes": sum(ours.bytes)}
    row |= {"frozen_flops": sum(frozen.flops), "frozen_bytes": sum(frozen.bytes)}
    peaks = peaks_of(device_name)
    if peaks is None:
        ratio = sum(ours.flops) / sum(frozen.flops)
        return row | {"floor_ms": None, "frozen_floor_ms": None, "floor_ratio": round(ratio, 4)}
    floor, base = ours.seconds(peaks) * 1e3, frozen.seconds(peaks) * 1e3
    row |= {"floor_ms": float(f"{floor:.4g}"), "frozen_floor_ms": float(f"{base:.4g}")}
    return row | {"floor_ratio": round(floor / base, 4)}


def step_floor(
    shape: ModelShape, case: dict, lengths: list[int], logits: int, device_name: str
) -> dict:
    """Of a training step: real tokens only, ``logits`` of them with logits; attention is causal."""
    pairs = sum(length**2 for length in lengths) / 2
    attention = 4 * shape.hidden * pairs * shape.layers
    extra = Work((attention, 2 * attention), (0, 0))
    return _model_floor(shape, case, "train", (sum(lengths), logits), extra, device_name)


def decode_floor(shape: ModelShape, case: dict, device_name: str) -> dict:
    """Of one new token in each row: the cache of keys and values is read once."""
    m, seen = case["m"], case["context"] + 1
    width = shape.kv_heads * shape.hidden // shape.heads
    cache = 2 * m * seen * width * shape.layers * bytes_of(case["dtype"])
    extra = Work((4 * shape.hidden * m * seen * shape.layers, 0), (cache, 0))
    return _model_floor(shape, case, "forward", (m, m), extra, device_name)


def _model_floor(
    shape: ModelShape, case: dict, step: str, rows: tuple[int, int], extra: Work, device_name: str
) -> dict:
    """Norms, activations and embeddings are left out; the output layer has no LoRA."""
    tokens, logits = rows
    kv = shape.kv_heads * shape.hidden // shape.heads
    h, i = shape.hidden, shape.intermediate
    groups = ((h, (h, kv, kv)), (h, (h,)), (h, (i, i)), (i, (h,)))
    kinds = {name: case[name] for name in ("tasks", "rank", "dtype", "adapters")}
    layer = Case(step, tokens, groups, **kinds)
    head = least_work(Case(step, logits, ((h, (shape.vocabulary,)),), **kinds), False) + extra
    ours, frozen = (
        least_work(layer, experts).times(shape.layers) + head for experts in (True, False)
    )
    return columns(ours, frozen, device_name)
