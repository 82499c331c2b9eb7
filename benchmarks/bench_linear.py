"""What does Multi-LoRA cost over the frozen linear, forward and backward?

``python benchmarks/bench_linear.py [--device cpu|cuda] [--out FOLDER] [--quick]``

Both are timed in turn in one run; gradients are checked against the float64 reference first, and a
shape whose check fails gives no figure. T tasks, rank r for the shared and every task LoRA, random
data, B not zero. Rows: "sorted" by task, as ckf's own batches are packed, or sequences of 64 rows
with tasks "interleaved".
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import environment, summary, time_in_turn, write_records  # noqa: E402
from ckf.kernels import multi_lora_linear, multi_lora_reference  # noqa: E402


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
    def floor(self) -> float:
        """FLOPs of forward and backward over the frozen linear's, dense over all experts."""
        ranks = self.rank * (self.tasks + 1)
        return 1 + 3 * ranks * (self.k + self.n) / (2 * self.k * self.n)


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
        return torch.autograd.grad(y, [self.x], self.dy)

    def multi_lora(self):
        y = multi_lora_linear(*self._arguments(torch.float32), backend="auto")
        return torch.autograd.grad(y, [self.x, *self.a, *self.b], self.dy)

    def _arguments(self, gate_dtype):
        gates = self.gates.to(gate_dtype)
        dropout = self.shape.dropout
        return self.x, self.weight, None, self.a, self.b, gates, self.ids, dropout, 1

    def worst_error(self) -> float:
        """Largest relative error of the gradients, by norm, against float64."""
        ours = self.multi_lora()
        wide = Problem.__new__(Problem)
        wide.shape, wide.ids = self.shape, self.ids

        def double(tensor):
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        wide.x, wide.weight, wide.dy = double(self.x), double(self.weight), double(self.dy)
        wide.a, wide.b = [double(t) for t in self.a], [double(t) for t in self.b]
        wide.gates = self.gates
        y = multi_lora_reference(*wide._arguments(torch.float64))
        exact = torch.autograd.grad(y, [wide.x, *wide.a, *wide.b], wide.dy)
        return max(
            ((o.double() - e).norm() / e.norm()).item() for o, e in zip(ours, exact, strict=True)
        )


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
        "    m     k     n   T   r  drop         rows   frozen ms  multi-lora ms  ratio  by FLOPs"
    )
    for shape in shapes[:1] if options.quick else shapes:
        problem = Problem(shape, device, dtype)
        error = problem.worst_error()
        if not error < (1e-5 if dtype == torch.float32 else 2e-2):
            print(f"{shape}: gradients are off by {error:.2e}; no figure")
            failed = True
            continue
        calls = {"frozen": problem.frozen, "multi_lora": problem.multi_lora}
        seconds = time_in_turn(calls, repeats=21)
        frozen, ours = summary(seconds["frozen"]), summary(seconds["multi_lora"])
        ratio = ours["median_ms"] / frozen["median_ms"]
        s = shape
        size = (
            f"{s.m:5d} {s.k:5d} {s.n:5d} {s.tasks:3d} {s.rank:3d}  {s.dropout:4.2f}  {s.rows:>11s}"
        )
        both = f"{frozen['median_ms']:10.3f}  {ours['median_ms']:13.3f}"
        print(f"{size}  {both}  {ratio:5.3f}  {s.floor:8.3f}")
        row = {**s.__dict__, "dtype": str(dtype), "error": error, "ratio": round(ratio, 4)}
        row |= {f"frozen_{k}": v for k, v in frozen.items()}
        row |= {f"multi_lora_{k}": v for k, v in ours.items()}
        rows.append(row)
    if options.out and rows:
        write_records(rows, about, options.out, "bench_linear")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
