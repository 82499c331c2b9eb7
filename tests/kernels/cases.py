"""Random Multi-LoRA cases and the error rule shared by the kernel tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ckf.kernels import ops
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.slots import compact_slots


@dataclass
class Case:
    """The arguments of ``multi_lora_linear``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: list[Tensor]
    b: list[Tensor]
    gates: Tensor
    task_ids: Tensor
    dropout_p: float = 0.0
    seed: int = 0

    def arguments(self) -> tuple:
        return tuple(getattr(self, f) for f in self.__dataclass_fields__)

    def leaves(self) -> list[Tensor]:
        tensors = [self.x, *self.a, *self.b, self.gates]
        return [t for t in tensors if t.requires_grad]

    def to(self, dtype: torch.dtype) -> "Case":
        """A detached copy; leaves that need gradients need them again."""

        def copy(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        return replace(
            self,
            x=copy(self.x),
            weight=copy(self.weight),
            bias=None if self.bias is None else copy(self.bias),
            a=[copy(t) for t in self.a],
            b=[copy(t) for t in self.b],
            gates=copy(self.gates),
        )


def hard_gates(tasks: int, scaling: list[float]) -> Tensor:
    """Expert 0 shared, expert 1 + t for task t."""
    gates = torch.zeros(tasks, tasks + 1)
    gates[:, 0] = scaling[0]
    for t in range(tasks):
        gates[t, 1 + t] = scaling[1 + t]
    return gates


def random_case(
    m=13,
    k=24,
    n=17,
    tasks=3,
    ranks=None,
    soft=False,
    bias=True,
    dropout_p=0.0,
    seed=0,
    dtype=torch.float32,
    ids=None,
) -> Case:
    """Everything random, B not zero, task ids in [-1, tasks)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    ranks = ranks or [4] * (tasks + 1)
    gates = torch.rand(tasks, tasks + 1, generator=g) if soft else None
    if gates is None:
        gates = hard_gates(tasks, [0.5 + e for e in range(tasks + 1)])
    if ids is None:
        ids = torch.randint(-1, tasks, (m,), generator=g)
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        x=normal(m, k).requires_grad_(),
        weight=normal(n, k, scale=k**-0.5),
        bias=normal(n) if bias else None,
        a=[normal(r, k, scale=k**-0.5).requires_grad_() for r in ranks],
        b=[normal(n, r, scale=max(r, 1) ** -0.5).requires_grad_() for r in ranks],
        gates=gates.to(gate_dtype).requires_grad_(soft),
        task_ids=ids,
        dropout_p=dropout_p,
        seed=seed + 7,
    )


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    """The case on the GPU in ``dtype``, its gates in float32."""
    gates = case.gates.detach().float().cuda().requires_grad_(case.gates.requires_grad)
    case = case.to(dtype)
    for name in ("x", "weight", "bias"):
        tensor = getattr(case, name)
        setattr(case, name, tensor.detach().cuda().requires_grad_(tensor.requires_grad))
    case.a = [t.detach().cuda().requires_grad_() for t in case.a]
    case.b = [t.detach().cuda().requires_grad_() for t in case.b]
    case.gates, case.task_ids = gates, case.task_ids.cuda()
    return case


def slots_on_gpu(ranks: list[int], plan: str = "expand"):
    """``multi_lora_linear`` on the Triton kernels by a plan, with the slots of hard gates."""
    live = [[e in (0, 1 + t) for e in range(len(ranks))] for t in range(len(ranks) - 1)]
    slots, width = compact_slots([live], [ranks])
    slots = slots.cuda()

    def run(x, weight, bias, a, b, gates, ids, dropout_p, seed):
        group = (x, [weight], [bias], [a], [b], [gates], ids, dropout_p, seed)
        return ops.run_group(*group, f"triton:{plan}", slots, width)[0]

    return run


def run_with_gradients(function, case: Case, dy: Tensor) -> list[Tensor]:
    """The output and the gradient of every leaf."""
    y = function(*case.arguments())
    gradients = torch.autograd.grad(y, case.leaves(), dy.to(y.dtype), allow_unused=True)
    zeros = [torch.zeros_like(t) for t in case.leaves()]
    return [y.detach(), *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


def assert_as_good_as_reference(function, case: Case) -> None:
    """Error against the float64 reference at most twice that of the same-dtype reference."""
    wide = case.to(torch.float64)
    generator = torch.Generator().manual_seed(case.seed if isinstance(case.seed, int) else 0)
    sizes = (*case.x.shape[:-1], case.weight.shape[0])
    dy = torch.randn(*sizes, dtype=torch.float64, generator=generator, device="cpu")
    dy = dy.to(case.x.device)
    exact = run_with_gradients(multi_lora_reference, wide, dy)
    plain = run_with_gradients(multi_lora_reference, case.to(case.x.dtype), dy)
    ours = run_with_gradients(function, case, dy)
    band = 4 * torch.finfo(case.x.dtype).eps
    if case.x.dtype.itemsize >= 4:  # sums of so many terms in any order are not rounded once
        band *= max(*case.x.shape, *case.weight.shape, 1) ** 0.5
    for index, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert o.shape == e.shape
        if e.numel() == 0:
            continue
        scale = e.abs().max().item()
        error = (o.double() - e).abs().max().item()
        allowed = 2 * (p.double() - e).abs().max().item() + band * scale
        assert error <= allowed, f"output {index}: error {error:.3e}, allowed {allowed:.3e}"
