"""The interface of a provider: one way to compute a problem."""

from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.harness import Verdict, gate
from benchmarks.problems import Case, Problem, reference_outcome

DROPOUT_SEED = 1


class Provider:
    """One way to compute a problem.

    name: in records. label: in plots. peer: id in the list of peers, or "" for ckf itself.
    captures: whether a CUDA graph can hold it. draws_like_reference: its dropout mask is the
    reference's, so the gate runs with dropout; else the gate runs the same code at dropout 0.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    peer: ClassVar[str] = ""
    captures: ClassVar[bool] = True
    draws_like_reference: ClassVar[bool] = False

    @classmethod
    def refusal(cls, case: Case, device: torch.device) -> str | None:
        """None where this provider runs the case on the device; else the reason."""
        return None

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def route(self) -> None:
        """What a step does once for all layers, from the rows' ids; timed apart."""

    def forward(self) -> list[Tensor]:
        """One output a linear."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """What ``train`` makes gradients of, in an order that ``gradients`` understands."""
        return self.problem.leaves()

    def train(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the gradients of ``leaves()``."""
        ys = self.forward()
        return ys, list(torch.autograd.grad(ys, self.leaves(), self.problem.dys))

    def step(self) -> object:
        """What is timed."""
        if self.problem.case.step == "train":
            return self.train()
        with torch.no_grad():
            return self.forward()

    def outputs(self, ys: list[Tensor]) -> list[Tensor]:
        """As the reference orders rows."""
        return ys

    def gradients(self, grads: list[Tensor]) -> list[Tensor]:
        """As the reference orders leaves."""
        return grads

    def outcome(self) -> list[Tensor]:
        """What the gate compares."""
        if self.problem.case.step == "train":
            ys, grads = self.train()
            ys = [y.detach() for y in self.outputs(ys)]
            return [*ys, *self.gradients(grads)]
        with torch.no_grad():
            return self.outputs(self.forward())

    def saved_forward(self) -> object:
        """The part whose saved bytes count."""
        return self.forward()

    def parameters(self) -> list[Tensor]:
        """Not counted among saved bytes."""
        linears = self.problem.linears
        return [t for one in linears for t in (one.weight, *one.a, *one.b)]


def check(provider: Provider, exact: list[Tensor], plain: list[Tensor]) -> Verdict:
    """The provider's results against float64, given the reference's in float64 and in its dtype."""
    eps = torch.finfo(getattr(torch, provider.problem.case.dtype)).eps
    return gate(provider.outcome(), exact, plain, eps)


def references(problem: Problem, dropout: float) -> tuple[list[Tensor], list[Tensor]]:
    """(float64, same dtype) results of the specification."""
    dtype = getattr(torch, problem.case.dtype)
    exact = reference_outcome(problem.to(torch.float64, torch.float64), dropout, DROPOUT_SEED)
    plain = reference_outcome(problem.to(dtype, dtype), dropout, DROPOUT_SEED)
    return exact, plain
