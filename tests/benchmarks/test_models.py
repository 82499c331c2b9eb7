"""Whole models: every provider's loss and gradients equal a row-by-row computation."""

import pytest
import torch

from benchmarks import bench_decode
from benchmarks.bench_decode import check_small as check_decoding
from benchmarks.bench_step import MODELS, check_small
from benchmarks.models import LAYOUTS
from benchmarks.peers.models import (
    BigCompiledModel,
    BigModel,
    FrozenModel,
    MasksModel,
    MixedModel,
    OursModel,
    ours_with,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [*MODELS, OursModel], ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_provider_is_exact(kind, layout):
    assert check_small(kind, layout, CPU) is None


@pytest.mark.parametrize(
    "kind", [FrozenModel, MasksModel, BigModel, MixedModel, OursModel], ids=lambda kind: kind.name
)
def test_a_model_provider_decodes_exactly(kind):
    assert check_decoding(kind, CPU) is None


def test_a_kernel_of_16_bits_alone_is_checked_in_them():
    class Half(OursModel):
        checked_in = torch.bfloat16

    class Wrong(Half):
        def decode(self, task_ids, **inputs):
            return super().decode((task_ids + 1) % self.tasks, **inputs)

    assert ours_with("cuda:linear").checked_in == torch.bfloat16
    assert check_decoding(Half, CPU) is None
    assert "off by" in check_decoding(Wrong, CPU)


@pytest.mark.slow
def test_the_compiled_one_is_exact():
    assert check_small(BigCompiledModel, "labels", CPU) is None


def test_a_wrong_route_is_seen():
    class Wrong(BigModel):
        def set_mask(self, task_ids):
            super().set_mask((task_ids + 1) % self.tasks)

    assert "off by" in check_small(Wrong, "padded", CPU)
    assert "off by" in check_decoding(Wrong, CPU)


def test_a_wrong_model_is_not_timed(monkeypatch):
    class Wrong(BigModel):
        name = "wrong"

        def set_mask(self, task_ids):
            super().set_mask((task_ids + 1) % self.tasks)

    monkeypatch.setattr(bench_decode, "BigModel", Wrong)
    case = bench_decode.model_cases("cpu", quick=True)[0]
    models, reasons = bench_decode.build_models(case, CPU)
    assert "wrong" not in models and reasons["wrong"].startswith("RED")
    rows, _ = bench_decode.measure_model(case, models, CPU, rounds=2)
    assert {"frozen", "peft-masks", "peft-mixed", "ckf"} == {row["provider"] for row in rows}
