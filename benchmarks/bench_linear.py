"""What does Multi-LoRA cost over the frozen linear, by each backend that can run here?

``python benchmarks/bench_linear.py [--device cpu|cuda] [--out FOLDER] [--quick]``

Forward and backward, or forward alone for a few rows (decoding). All are timed in turn in one run;
results are checked against the float64 reference first, and a backend whose check fails gives no
figure. T tasks, rank r for the shared and every task LoRA, random
data, B not zero. Rows: "sorted" by task, as ckf's own batches are packed, or sequences of 64 rows
with tasks "interleaved".
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import environment, summary, time_in_turn, write_records  # noqa: E402
from ckf.kernels import multi_lora_linear, multi_lora_reference  # noqa: E402
from ckf.kernels.config import choose_backend  # noqa: E402


@dataclass(frozen=True)
class Shape:
    m: int
    k: int
    n: int
    tasks: int
    rank: int
    dropout: float = 0.0
    rows: str = "interleaved"

    @property
    def forward_only(self) -> bool:
        return self.m <= 256

    @property
    def floor(self) -> float:
        """FLOPs of forward and backward over the frozen linear's, dense over all experts."""
        ranks = self.rank * (self.tasks + 1)
        passes = 1 if self.forward_only else 1.5  # of the update, for each of the base's
        return 1 + passes * ranks * (self.k + self.n) / (self.k * self.n)


CPU_SHAPES = [
    Shape(2048, 576, 1536, 4, 16, rows="sorted"),
    Shape(2048, 576, 1536, 4, 16),
    Shape(2048, 1536, 576, 4, 16),
    Shape(2048, 576, 576, 4, 16),
    Shape(2048, 576, 1536, 4, 16, dropout=0.1),
    Shape(512, 576, 1536, 4, 8),
    Shape(2048, 576, 1536, 16, 16),
]
GPU_SHAPES = [
    Shape(8192, 4096, 4096, 4, 16),
    Shape(8192, 4096, 4096, 4, 16, dropout=0.1),
    Shape(8192, 4096, 14336, 4, 16),
    Shape(8192, 14336, 4096, 4, 16),
    Shape(8192, 4096, 1024, 4, 16),
    Shape(2048, 4096, 4096, 4, 16),
    Shape(8192, 4096, 4096, 16, 64),
    *(Shape(m, 4096, 4096, 4, 16) for m in (1, 4, 16, 64, 256)),
]


class Problem:
    """Random tensors of a shape, and the two computations timed."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

        s, experts = shape, shape.tasks + 1
        self.shape = shape
        self.x = normal(s.m, s.k).requires_grad_()
        self.weight = normal(s.n, s.k, scale=s.k**-0.5)
        self.a = [normal(s.rank, s.k, scale=s.k**-0.5).requires_grad_() for _ in range(experts)]
        self.b = [normal(s.n, s.rank, scale=s.rank**-0.5).requires_grad_() for _ in range(experts)]
        gates = torch.eye(s.tasks, experts).roll(1, 1)
        gates[:, 0] = 1
        self.gates = gates.to(device)
        length = 64 if s.rows == "interleaved" else -(-s.m // s.tasks)
        self.ids = (torch.arange(s.m, device=device) // length) % s.tasks
        self.dy = normal(s.m, s.n)

    def frozen(self):
        y = F.linear(self.x, self.weight)
        return [y] if self.shape.forward_only else torch.autograd.grad(y, [self.x], self.dy)

    def multi_lora(self, backend: str):
        if self.shape.forward_only:
            with torch.no_grad():
                return [multi_lora_linear(*self._arguments(torch.float32), backend=backend)]
        y = multi_lora_linear(*self._arguments(torch.float32), backend=backend)
        return torch.autograd.grad(y, [self.x, *self.a, *self.b], self.dy)

    def backends(self) -> list[str]:
        """The backends that can compute this shape here, "torch" first."""
        names = []
        for name in ("torch", "triton", "cuda"):
            try:
                choose_backend(name, self.x, needs_grad=not self.shape.forward_only)
            except ValueError:
                continue
            names.append(name)
        return names

    def _arguments(self, gate_dtype):
        gates = self.gates.to(gate_dtype)
        dropout = self.shape.dropout
        return self.x, self.weight, None, self.a, self.b, gates, self.ids, dropout, 1

    def worst_error(self, backend: str) -> float:
        """Largest relative error of the results, by norm, against float64."""
        ours = self.multi_lora(backend)
        wide = Problem.__new__(Problem)
        wide.shape, wide.ids = self.shape, self.ids

        def double(tensor):
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        wide.x, wide.weight, wide.dy = double(self.x), double(self.weight), double(self.dy)
        wide.a, wide.b = [double(t) for t in self.a], [double(t) for t in self.b]
        wide.gates = self.gates
        y = multi_lora_reference(*wide._arguments(torch.float64))
        exact = [y.detach()]
        if not self.shape.forward_only:
            exact = torch.autograd.grad(y, [wide.x, *wide.a, *wide.b], wide.dy)
        return max(
            ((o.double() - e).norm() / e.norm()).item() for o, e in zip(ours, exact, strict=True)
        )


def measure(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[list[dict], bool]:
    """A row for each backend of a shape, printed as well, and whether a check failed."""
    problem, failed = Problem(shape, device, dtype), False
    calls, errors = {"frozen": problem.frozen}, {}
    for backend in problem.backends():
        errors[backend] = problem.worst_error(backend)
        if errors[backend] < (1e-5 if dtype == torch.float32 else 2e-2):
            calls[backend] = partial(problem.multi_lora, backend)
        else:
            print(f"{shape}: {backend} is off by {errors[backend]:.2e}; no figure")
            failed = True
    seconds = time_in_turn(calls, 21, device)
    frozen, rows, s = summary(seconds["frozen"]), [], shape
    for backend in list(calls)[1:]:
        ours = summary(seconds[backend])
        ratio = ours["median_ms"] / frozen["median_ms"]
        size = (
            f"{s.m:5d} {s.k:5d} {s.n:5d} {s.tasks:3d} {s.rank:3d}  {s.dropout:4.2f}  {s.rows:>11s}"
        )
        both = f"{frozen['median_ms']:10.3f}  {ours['median_ms']:13.3f}"
        print(f"{size}  {backend:>7s}  {both}  {ratio:5.3f}  {s.floor:8.3f}")
        row = {**s.__dict__, "dtype": str(dtype), "backend": backend, "error": errors[backend]}
        row |= {"ratio": round(ratio, 4), **{f"frozen_{k}": v for k, v in frozen.items()}}
        rows.append(row | {f"multi_lora_{k}": v for k, v in ours.items()})
    return rows, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder for bench_linear.csv and .json")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    shapes = CPU_SHAPES if device.type == "cpu" else GPU_SHAPES
    about, rows, failed = environment(device), [], False
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {dtype}")
    print(
        "    m     k     n   T   r  drop         rows  backend   frozen ms  multi-lora ms  ratio"
        "  by FLOPs"
    )
    for shape in shapes[:1] if options.quick else shapes:
        new, wrong = measure(shape, device, dtype)
        rows, failed = rows + new, failed or wrong
        if options.out and rows:
            write_records(rows, about, options.out, "bench_linear")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
