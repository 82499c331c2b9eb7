"""What the tests of the CPU kernels share."""

from dataclasses import replace
from functools import partial

import pytest

from ckf.kernels import compact_slots, cpu, multi_lora_linear
from tests.kernels.cases import random_case

by_cpu = partial(multi_lora_linear, backend="cpu")


def sets() -> list[str]:
    return cpu._load_extension()[0].instructions() if cpu.available()[0] else []


@pytest.fixture(autouse=True)
def built(request):
    """Skips every test but the one that asks whether they could be run."""
    if not sets() and request.node.name != "test_it_is_built_where_it_can_be":
        pytest.skip(cpu.available()[1])


@pytest.fixture(params=sets() or ["none"])
def instructions(request, monkeypatch):
    monkeypatch.setattr(cpu, "instructions", lambda: request.param)


def constant(case):
    """With gates that need no gradient."""
    return replace(case, gates=case.gates.detach())


def group(m=45, k=40, slots=True):
    """The arguments of run_group: three linears that share x, one of them the update alone."""
    sizes = ((1, 17), (2, 130), (3, 5))
    cases = [random_case(m, k, n, seed=seed, ranks=[2, 3, 1, 4]) for seed, n in sizes]
    live = [(case.gates != 0).tolist() for case in cases]
    table, width = compact_slots(live, [[2, 3, 1, 4]] * 3) if slots else (None, 0)
    arguments = [
        cases[0].x,
        [cases[0].weight, None, cases[2].weight],
        [cases[0].bias, None, cases[2].bias],
        [case.a for case in cases],
        [case.b for case in cases],
        [case.gates for case in cases],
        cases[0].task_ids,
    ]
    return arguments, (table, width)
