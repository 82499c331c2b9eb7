"""ckf itself, backend by backend, the Triton kernels plan by plan."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.peers.base import DROPOUT_SEED, Provider
from benchmarks.problems import Case, Problem, make_problem
from ckf.kernels import launch, ops
from ckf.kernels.slots import compact_slots


class Ours(Provider):
    """What a patched layer runs: linears that share x in one call, ids checked before."""

    backend = "torch"
    draws_like_reference = True

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        # asked of the package itself: a small problem with the case's rows, ranks and dtypes
        probe = make_problem(replace(case, groups=((16, (16,)),)), device)
        try:
            cls(probe).step()
        except ValueError as error:
            return str(error).split(": ", 1)[-1]
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.slots = []
        live = (problem.gates != 0).tolist()
        for group in range(len(problem.xs)):
            count = sum(one.group == group for one in problem.linears)
            ranks = [problem.case.rank] * (problem.case.tasks + 1)
            slots, width = compact_slots([live] * count, [ranks] * count)
            self.slots.append((slots.to(problem.ids.device), width))

    def forward(self) -> list[Tensor]:
        ys, problem = [], self.problem
        for group, x in enumerate(problem.xs):
            linears = [one for one in problem.linears if one.group == group]
            slots, width = self.slots[group]
            ys += ops.run_group(
                x,
                [one.weight for one in linears],
                [None] * len(linears),
                [one.a for one in linears],
                [one.b for one in linears],
                [problem.gates] * len(linears),
                problem.ids,
                problem.case.dropout,
                DROPOUT_SEED,
                self.backend,
                slots=slots,
                width=width,
            )
        return ys


class OursTorch(Ours):
    name, label = "ckf-torch", "ckf (torch)"


class OursCuda(Ours):
    name, label, backend = "ckf-cuda", "ckf (CUDA)", "cuda"


class OursAuto(Ours):
    name, label, backend = "ckf", "ckf (auto)", "auto"


def our_providers() -> list[type[Ours]]:
    """One a backend, of the Triton kernels one a plan; the default last."""
    return [OursTorch, *map(_with_plan, launch.PLANS), OursCuda, OursAuto]


def _with_plan(plan: str) -> type[Ours]:
    """A provider for one plan of the Triton kernels.

    Users cannot ask for a plan; here the package's own choice is replaced during the call.
    """

    class OursTriton(Ours):
        name, label, backend = f"ckf-triton:{plan}", f"ckf (Triton, {plan})", "triton"

        def forward(self) -> list[Tensor]:
            choose = ops.choose_backend
            ops.choose_backend = lambda *args, **kwargs: replace(choose(*args, **kwargs), plan=plan)
            try:
                return super().forward()
            finally:
                ops.choose_backend = choose

    return OursTriton
