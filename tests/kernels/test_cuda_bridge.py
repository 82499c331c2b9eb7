"""The bridge refuses what must not become a raw pointer, and passes on the rest as it is."""

import subprocess
import sys

import pytest
import torch

from ckf.kernels import cuda
from tests.kernels.decode_cases import decode_case, group_case, stub_cuda


def arguments(**changes) -> dict:
    """Of a group of two linears, n 24 and 8, R 12 + 8, m 5, k 40, T 2."""
    return group_case().tensors() | changes


@pytest.fixture
def launches(monkeypatch) -> list[dict]:
    """What the bridge hands to the extension, on CPU tensors."""
    seen = []

    class Recorder:
        def __init__(self, **static):
            self.static = static

        def __call__(self, *moving):
            names = ("y", "y_strides", "x", "x_stride", "task_ids", "m", "overlap", "stream")
            seen.append(self.static | dict(zip(names, moving, strict=True)))

    stub_cuda(monkeypatch, Recorder)
    return seen


def test_import_asks_the_hardware_nothing():
    code = "import torch, ckf.kernels.cuda as c; assert not torch.cuda.is_initialized(); " + (
        "import sys; assert 'ckf._C' not in sys.modules; assert isinstance(c.available()[1], str)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_available_gives_a_reason():
    usable, why = cuda.available()
    assert usable or why
    if not torch.cuda.is_available():
        assert not usable


def test_reason_without_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "ckf._C", None)
    assert cuda.available()[0] is False
    assert "nvcc" in cuda.available()[1]
    assert cuda.build_info()["built"] is False


@pytest.mark.parametrize(
    "archs,capability,fits",
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_80", "compute_80"], (12, 0), True),
        (["sm_100"], (10, 3), True),
        (["compute_100"], (9, 0), False),
    ],
)
def test_arch_coverage(archs, capability, fits):
    assert cuda._covers(archs, capability) is fits


def test_cpu_tensors_are_refused():
    with pytest.raises(ValueError, match="a is on cpu; expected a CUDA tensor"):
        cuda.multi_lora_decode(**decode_case().tensors())
    with pytest.raises(ValueError, match="a is on meta"):
        meta = {name: t.to("meta") for name, t in decode_case().tensors().items()}
        cuda.multi_lora_decode(**meta)


def test_what_reaches_the_kernel(launches):
    case = group_case(padding=3)
    cuda.multi_lora_decode_group(**case.tensors(), overlap=True)
    (seen,) = launches
    assert seen == {
        "a": case.a.data_ptr(),
        "b": [b.data_ptr() for b in case.bs],
        "n": [24, 8],
        "rank": [12, 8],
        "gates": case.column_gates.data_ptr(),
        "k": 40,
        "tasks": 2,
        "dtype": 0,
        "device": 0,
        "y": [y.data_ptr() for y in case.ys],
        "y_strides": [27, 11],
        "x": case.x.data_ptr(),
        "x_stride": 43,
        "task_ids": case.task_ids.data_ptr(),
        "m": 5,
        "overlap": True,
        "stream": 77,
    }


def test_prepared_once_called_often(launches):
    case = group_case()
    group = cuda.DecodeGroup(case.a, case.bs, case.column_gates)
    for _ in range(2):
        group(case.ys, case.x, case.task_ids)
    assert len(launches) == 2
    assert launches[0] == launches[1]
    assert launches[0]["overlap"] is False
    with torch.inference_mode():
        group([y.clone() for y in case.ys], case.x, case.task_ids)
    assert len(launches) == 3


def test_replaced_tensors_stay_alive(launches):
    """A pointer of the group never dangles, whatever its tensors become."""
    a = torch.nn.Parameter(torch.randn(4, 8))
    group = cuda.DecodeGroup(a, [torch.randn(4, 8)], torch.ones(1, 4))
    pointer = a.data_ptr()
    a.data = torch.randn(4, 8)
    group([torch.zeros(1, 8)], torch.ones(1, 8), torch.zeros(1, dtype=torch.int64))
    assert launches[0]["a"] == pointer == group._tensors[0].data_ptr()


def test_no_rows_no_launch(launches):
    cuda.multi_lora_decode_group(**group_case(m=0).tensors())
    assert launches == []


class Alias(torch.Tensor):
    """A subclass, as DTensor and FakeTensor are: its pointer may mean nothing."""


def transposed(t):
    return t.t().contiguous().t()


REFUSALS = {
    "subclass a": ({"a": torch.zeros(20, 40).as_subclass(Alias)}, "a is a Alias; expected a torch"),
    "list x": ({"x": [1.0]}, "x is a list; expected a torch.Tensor"),
    "meta y": (
        {"ys": [torch.empty(5, 24, device="meta"), torch.empty(5, 8)]},
        "y is a torch.strided tensor on meta; expected a strided tensor on cpu",
    ),
    "meta ids": ({"task_ids": torch.empty(5, dtype=torch.int64, device="meta")}, "on meta"),
    "sparse x": ({"x": torch.zeros(5, 40).to_sparse()}, "x is a torch.sparse_coo tensor"),
    "half b": (
        {"bs": [torch.zeros(12, 24), torch.zeros(8, 8).half()]},
        r"bs\[1\] is torch.float16",
    ),
    "double all": ({"a": torch.zeros(20, 40).double()}, "a is torch.float64; expected one of"),
    "double gates": ({"column_gates": torch.zeros(2, 20).double()}, "expected torch.float32"),
    "bfloat16 y": (
        {"ys": [torch.zeros(5, 24).bfloat16(), torch.zeros(5, 8)]},
        "y is torch.bfloat16; expected torch.float32; convert it",
    ),
    "int32 ids": ({"task_ids": torch.zeros(5, dtype=torch.int32)}, "task_ids is torch.int32"),
    "rows of x": ({"x": torch.zeros(6, 40)}, r"y has shape \(5, 24\); expected \(6, 24\)"),
    "columns of x": ({"x": torch.zeros(5, 41)}, r"x has shape \(5, 41\); expected \(m, 40\)"),
    "flat x": ({"x": torch.zeros(200)}, "x has shape"),
    "flat a": ({"a": torch.zeros(800)}, "a has shape .*; expected 2 dimensions"),
    "columns of a": ({"a": torch.zeros(19, 40)}, r"a has 19 columns.*12 \+ 8; expected the same R"),
    "columns of gates": ({"column_gates": torch.zeros(2, 19)}, "column_gates 19"),
    "width of y": (
        {"ys": [torch.zeros(5, 24), torch.zeros(5, 9)]},
        r"y has shape \(5, 9\); expected \(5, 8\)",
    ),
    "a missing y": ({"ys": [torch.zeros(5, 24)]}, "ys has 1 entries; expected 2"),
    "no linear": ({"ys": [], "bs": []}, "bs has 0 entries; expected 1 to 8"),
    "nine linears": ({"bs": [torch.zeros(1, 8)] * 9}, "bs has 9 entries; expected 1 to 8"),
    "ids of others": ({"task_ids": torch.zeros(4, dtype=torch.int64)}, "task_ids has shape"),
    "ids in a column": ({"task_ids": torch.zeros(5, 1, dtype=torch.int64)}, "task_ids has shape"),
    "strided a": ({"a": transposed(torch.zeros(20, 40))}, "a has strides .*call .contiguous"),
    "strided b": (
        {"bs": [torch.zeros(12, 24), transposed(torch.zeros(8, 8))]},
        r"bs\[1\] has strides .*call .contiguous",
    ),
    "strided gates": ({"column_gates": torch.zeros(2, 40)[:, ::2]}, "column_gates has strides"),
    "strided ids": ({"task_ids": torch.zeros(10, dtype=torch.int64)[::2]}, "task_ids has strides"),
    "columns of x apart": ({"x": transposed(torch.zeros(5, 40))}, "x has strides"),
    "columns of y apart": (
        {"ys": [transposed(torch.zeros(5, 24)), torch.zeros(5, 8)]},
        "y has strides .*last dimension contiguous",
    ),
    "one row of y for all": (
        {"ys": [torch.zeros(1, 24).expand(5, -1), torch.zeros(5, 8)]},
        "its rows overlap",
    ),
    "rows of y overlap": (
        {"ys": [torch.zeros(120).as_strided((5, 24), (23, 1)), torch.zeros(5, 8)]},
        "its rows overlap",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(launches, name):
    changes, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        cuda.multi_lora_decode_group(**arguments(**changes))
    assert launches == []


def test_too_many_rows_or_columns(launches):
    with pytest.raises(ValueError, match="m is 257; expected at most 256 rows"):
        cuda.multi_lora_decode(**decode_case(m=257).tensors())
    with pytest.raises(ValueError, match="expected R at most 16384"):
        cuda.multi_lora_decode(**decode_case(ranks=(1, 16384)).tensors())
    assert launches == []


def test_another_device_is_guarded(launches, monkeypatch):
    """The launch happens with the tensors' device current, whatever it was before."""
    entered = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append((self.index, len(launches)))

        def __exit__(self, *error):
            entered.append(("left", len(launches)))

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    cuda.multi_lora_decode_group(**arguments())
    assert entered == [(0, 0), ("left", 1)]


def test_a_failed_launch_marks_nothing_as_written(launches, monkeypatch):
    case = arguments()

    class Refusing:
        def __init__(self, **static): ...

        def __call__(self, *moving):
            raise RuntimeError("multi_lora_decode: out of luck")

    stub_cuda(monkeypatch, Refusing)
    versions = [y._version for y in case["ys"]]
    with pytest.raises(RuntimeError, match="multi_lora_decode"):
        cuda.multi_lora_decode_group(**case)
    assert [y._version for y in case["ys"]] == versions


def test_without_extension_a_right_call_says_why(monkeypatch):
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setitem(sys.modules, "ckf._C", None)
    with pytest.raises(RuntimeError, match="multi_lora_decode: .*ckf._C"):
        cuda.multi_lora_decode(**decode_case().tensors())


def plan(count=1, **changes):
    """The extension's object over null pointers, of ``count`` linears."""
    from ckf import _C

    sizes = {"n": [1] * count, "rank": [1] * count, "b": [0] * count}
    numbers = {"a": 0, "gates": 0, "k": 1, "tasks": 1, "dtype": 0, "device": 0}
    return _C.MultiLoraDecode(**(sizes | numbers | changes))


def test_extension_refuses():
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    with pytest.raises(ValueError, match="one entry a linear"):
        plan(n=[1, 1])
    with pytest.raises(ValueError, match="one entry a linear"):
        plan(9)
    with pytest.raises(ValueError, match="y needs one entry a linear"):
        plan(2)([0], [1], 0, 1, 0, 1, False, 0)
    plan()([0], [1], 0, 1, 0, 0, False, 0)  # no rows: nothing to launch
    with pytest.raises(
        RuntimeError, match=r"multi_lora_decode: .*invalid argument \(CUDA error 1\)"
    ):
        plan(k=-1)([0], [1], 0, 1, 0, 1, False, 0)


def test_launch_errors_name_the_kernel():
    """Without a device the runtime refuses; that must come up as a RuntimeError."""
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    bad = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(RuntimeError, match=r"multi_lora_decode: .* \(CUDA error \d+\)"):
        plan(device=bad)([0], [1], 0, 1, 0, 1, False, 0)
