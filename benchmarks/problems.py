"""What is computed: a case in words, its random tensors, the float64 result."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ckf.kernels import multi_lora_reference

SCALING = 0.5  # alpha / r of every expert
SEQUENCE = 128  # rows of one task next to each other, in the balanced and skewed mixes
MIXES = ("sorted", "balanced", "skewed", "token")
LAYER_8B = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
LAYER_135M = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))


@dataclass(frozen=True)
class Case:
    """A linear, or several: ``groups`` holds (k, (n, ...)) for each input tensor.

    step: "train" (forward and backward) or "forward". rank: r of the shared and of every task's
    LoRA. mix: rows "sorted" by task, sequences of SEQUENCE rows "balanced" or "skewed" (Zipf) over
    the tasks, or every "token" its own. adapters: dtype of A and B; dtype: of all else.
    """

    step: str
    m: int
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    tasks: int = 4
    rank: int = 16
    mix: str = "balanced"
    dropout: float = 0.0
    dtype: str = "float32"
    adapters: str = "float32"

    @property
    def shape(self) -> str:
        """ "4096-1024" for a linear; "layer" for all linears of one; else the group's sizes."""
        if len(self.groups) > 1:
            return f"layer {self.groups[0][0]}"
        k, widths = self.groups[0]
        return f"{k}-" + "+".join(map(str, widths))

    @property
    def total_rank(self) -> int:
        return self.rank * (self.tasks + 1)

    @property
    def linears(self) -> list[tuple[int, int]]:
        return [(k, n) for k, widths in self.groups for n in widths]

    def columns(self) -> dict:
        """As a record keeps it: plain values, with k and n where there is one linear."""
        row = asdict(self) | {"shape": self.shape, "R": self.total_rank}
        row["pass"] = row.pop("step")
        row["groups"] = ";".join(f"{k}:{'+'.join(map(str, ns))}" for k, ns in self.groups)
        single = len(self.linears) == 1
        k, n = self.linears[0] if single else (None, None)
        return {"pass": row.pop("pass"), "shape": row.pop("shape"), "k": k, "n": n} | row

    def bytes(self) -> int:
        """Of the tensors that a call reads, adapters left out."""
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        inputs = sum(self.m * k for k, _ in self.groups)
        weights = sum(k * n for k, n in self.linears)
        outputs = sum(self.m * n for _, n in self.linears) if self.step == "train" else 0
        return size * (inputs + weights + outputs)


@dataclass
class LinearTensors:
    group: int
    weight: Tensor  # (n, k)
    a: list[Tensor]  # E of (r, k); expert 0 is shared
    b: list[Tensor]  # E of (n, r)


@dataclass
class Problem:
    """Random tensors of a case. xs: one a group; dys: one a linear; ids (m,); gates (T, E)."""

    case: Case
    xs: list[Tensor]
    dys: list[Tensor]
    linears: list[LinearTensors]
    gates: Tensor
    ids: Tensor

    def leaves(self) -> list[Tensor]:
        """What gets a gradient: every x, then A and B linear by linear."""
        adapters = [t for linear in self.linears for t in (*linear.a, *linear.b)]
        return [*self.xs, *adapters]

    def to(self, dtype: torch.dtype, adapters: torch.dtype) -> "Problem":
        """A copy with fresh leaves."""

        def copy(tensor: Tensor, kind: torch.dtype) -> Tensor:
            return tensor.detach().to(kind, copy=True).requires_grad_(tensor.requires_grad)

        linears = [
            LinearTensors(
                one.group,
                one.weight.to(dtype),
                [copy(t, adapters) for t in one.a],
                [copy(t, adapters) for t in one.b],
            )
            for one in self.linears
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        xs, dys = [copy(x, dtype) for x in self.xs], [d.to(dtype) for d in self.dys]
        return Problem(self.case, xs, dys, linears, self.gates.to(wide), self.ids)

    def bare(self) -> "Problem":
        """The same without experts: the frozen base."""
        linears = [LinearTensors(one.group, one.weight, [], []) for one in self.linears]
        gates = self.gates[:, :0]
        return Problem(self.case, self.xs, self.dys, linears, gates, self.ids)

    def unrouted(self) -> "Problem":
        """The same with the experts of task 0 for all rows: one LoRA of rank r_s + r_t."""
        linears = [
            LinearTensors(one.group, one.weight, one.a[:2], one.b[:2]) for one in self.linears
        ]
        gates, ids = self.gates[:1, :2], torch.zeros_like(self.ids)
        return Problem(self.case, self.xs, self.dys, linears, gates, ids)


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Normal tensors, B not zero; the same seed gives the same tensors on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapters = getattr(torch, case.dtype), getattr(torch, case.adapters)

    def normal(*size, scale=1.0, kind=dtype):
        values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return (values * scale).to(kind)

    train, r = case.step == "train", case.rank
    xs = [normal(case.m, k).requires_grad_(train) for k, _ in case.groups]
    linears, dys = [], []
    for group, (k, widths) in enumerate(case.groups):
        for n in widths:
            a = [normal(r, k, scale=k**-0.5, kind=adapters) for _ in range(case.tasks + 1)]
            b = [normal(n, r, scale=r**-0.5, kind=adapters) for _ in range(case.tasks + 1)]
            for tensor in (*a, *b):
                tensor.requires_grad_(train)
            linears.append(LinearTensors(group, normal(n, k, scale=k**-0.5), a, b))
            dys.append(normal(case.m, n) if train else xs[0])
    gates = hard_gates(case.tasks)
    ids = task_ids(case.m, case.tasks, case.mix)
    return Problem(case, xs, dys, linears, (gates * SCALING).to(device), ids.to(device))


def hard_gates(tasks: int) -> Tensor:
    """(T, T + 1): one for the shared expert and for a task's own."""
    gates = torch.eye(tasks, tasks + 1).roll(1, 1)
    gates[:, 0] = 1
    return gates


def task_ids(m: int, tasks: int, mix: str) -> Tensor:
    """(m,) int64 on the host; every task has rows where m allows."""
    if mix == "sorted":
        return torch.arange(m) * tasks // m
    generator = torch.Generator().manual_seed(m + tasks)
    if mix == "token":
        ids = torch.arange(m) % tasks
        return ids[torch.randperm(m, generator=generator)]
    if mix not in MIXES:
        raise ValueError(f"mix is {mix!r}; expected one of {', '.join(MIXES)}")
    length = max(1, min(SEQUENCE, m // tasks))
    count = -(-m // length)
    if mix == "balanced":
        owners = torch.arange(count) % tasks
    else:  # task t of the sequences in proportion to 1 / (t + 1), at least one each
        share = 1 / torch.arange(1, tasks + 1)
        extra = (share / share.sum() * (count - tasks)).floor().long().clamp(min=0)
        owners = torch.repeat_interleave(torch.arange(tasks), extra + 1)
        owners = torch.cat([owners, owners.new_zeros(max(count - len(owners), 0))])[:count]
    owners = owners[torch.randperm(count, generator=generator)]
    return torch.repeat_interleave(owners, length)[:m]


def reference_outcome(problem: Problem, dropout: float, seed: int) -> list[Tensor]:
    """Outputs, then (train) the gradients of ``problem.leaves()``, by the specification."""
    ys = []
    gates = problem.gates.cpu()  # read one by one: no synchronisation for each
    for one in problem.linears:
        options = (gates, problem.ids, dropout, seed)
        ys.append(
            multi_lora_reference(
                problem.xs[one.group],
                one.weight,
                None,
                [t.to(one.weight.dtype) for t in one.a],
                [t.to(one.weight.dtype) for t in one.b],
                *options,
            )
        )
    if problem.case.step == "forward":
        return [y.detach() for y in ys]
    leaves = problem.leaves()
    gradients = torch.autograd.grad(ys, leaves, problem.dys, allow_unused=True)
    gradients = [
        torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)
    ]
    return [*(y.detach() for y in ys), *gradients]
