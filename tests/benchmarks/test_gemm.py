"""The products alone: what is measured, and that a wrong one gets no figure."""

import json

import pytest
import torch

from benchmarks import bench_gemm

CPU = torch.device("cpu")


@pytest.mark.parametrize("product", ["y", "dx"])
def test_operands_make_the_product(product):
    case = {"m": 5, "k": 7, "n": 3, "rank": 2, "product": product}
    x, w, h, b = bench_gemm.operands(case, CPU, 0)
    found, missing = bench_gemm.providers(case, CPU)
    expected = (x @ w.T if product == "y" else x @ w) + h @ b
    torch.testing.assert_close(found["addmm"](x, w, h, b), expected)
    assert set(missing) == {"triton", "hopper"}


def test_a_wrong_product_gets_no_figure(monkeypatch):
    real = bench_gemm.providers

    def with_a_wrong_one(case, device, without=(), launches=False):
        found, missing = real(case, device)
        return found | {"wrong": lambda x, w, h, b: found["base"](x, w, h, b)}, missing

    monkeypatch.setattr(bench_gemm, "providers", with_a_wrong_one)
    rows, missing = bench_gemm.measure(bench_gemm.cases("cpu", True)[0], CPU, 5, 1.0)
    assert {row["provider"] for row in rows} == {"base", "addmm"}
    assert missing["wrong"].startswith("RED: result 0 is off by")


def test_the_script_writes_its_record(tmp_path):
    assert bench_gemm.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "bench_gemm.json").read_text())
    assert [case["case"]["product"] for case in record["cases"]] == ["y", "dx"]
    for case in record["cases"]:
        base, addmm = case["rows"]
        assert base["ratio"] == 1 and addmm["error"] < 1e-6 and addmm["base_tflops"] > 0


def test_a_gpu_measures_the_shapes_of_the_goals():
    cases = bench_gemm.cases("cuda", False)
    assert {(c["k"], c["n"]) for c in cases} == set(bench_gemm.SHAPES)
    assert {c["rank"] for c in cases} == {80, 8} and len(cases) == 12
