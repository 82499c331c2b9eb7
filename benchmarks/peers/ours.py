"""ckf itself, backend by backend, the Triton kernels plan by plan."""

import torch
from torch import Tensor

from benchmarks.peers.base import DROPOUT_SEED, Provider
from benchmarks.problems import Case, Problem
from ckf.kernels import config, launch, ops
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.dispatch import Call, load_table
from ckf.kernels.slots import compact_slots


class Ours(Provider):
    """What a patched layer runs: linears that share x in one call, ids checked before, decoding's
    stacks kept."""

    backend = "torch"
    draws_like_reference = True

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        rank = case.total_rank * max(len(widths) for _, widths in case.groups)
        train, dropout = case.step == "train", case.dropout > 0
        call = Call(case.m, 16, 16, rank, train, dropout, case.total_rank)
        x = torch.empty(1, 16, dtype=getattr(torch, case.dtype), device=device)
        try:
            config.choose_backend(cls.backend, x, call)
        except ValueError as error:
            return str(error).split(": ", 1)[-1]
        return None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.slots = []
        self.caches = [DecodeCache() for _ in problem.xs]
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
                decode_cache=self.caches[group],
            )
        return ys


class OursTorch(Ours):
    name, label = "ckf-torch", "ckf (torch)"


class OursCuda(Ours):
    name, label, backend = "ckf-cuda", "ckf (CUDA)", "cuda"


class OursAuto(Ours):
    name, label, backend = "ckf", "ckf (auto)", "auto"

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        if device.type == "cuda" and load_table(torch.cuda.get_device_name(device)) is None:
            return "no table yet"
        return super().refusal(case, device)


def our_providers() -> list[type[Ours]]:
    """One a backend, of the Triton kernels one a plan; the default last."""
    triton = [_with_plan("triton", "Triton", plan) for plan in launch.PLANS]
    cuda = [_with_plan("cuda", "CUDA", plan) for plan in launch.CUDA_PLANS[1:]]
    return [OursTorch, *triton, OursCuda, *cuda, OursAuto]


def _with_plan(name: str, words: str, plan: str) -> type[Ours]:
    backend = f"{name}:{plan}"
    own = {"name": f"ckf-{backend}", "label": f"ckf ({words}, {plan})", "backend": backend}
    return type(f"Ours{words}", (Ours,), own)
