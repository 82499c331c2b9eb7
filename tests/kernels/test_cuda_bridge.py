"""The bridge refuses what must not become a raw pointer; on a GPU, the kernel is right."""

import subprocess
import sys

import pytest
import torch

from ckf.kernels import cuda
from tests.kernels.decode_cases import DTYPES, assert_poison_around, assert_right, decode_case


def arguments(**changes) -> dict[str, torch.Tensor]:
    return decode_case().tensors() | changes


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
    with pytest.raises(ValueError, match=r"y is a torch.strided tensor on cpu; expected .* CUDA"):
        cuda.multi_lora_decode(**arguments())


def test_meta_and_other_types_are_refused():
    with pytest.raises(ValueError, match="on meta"):
        cuda.multi_lora_decode(**arguments(y=torch.empty(5, 24, device="meta")))
    with pytest.raises(ValueError, match="x is a list; expected a torch.Tensor"):
        cuda.multi_lora_decode(**arguments(x=[1.0]))


@pytest.mark.parametrize(
    "name,shape",
    [
        ("x", (6, 40)),
        ("x", (5, 41)),
        ("x", (200,)),
        ("a", (15, 40)),
        ("b", (16, 25)),
        ("b", (15, 24)),
        ("column_gates", (3, 15)),
        ("task_ids", (4,)),
        ("task_ids", (5, 1)),
        ("y", (5, 24, 1)),
    ],
)
def test_sizes_are_checked(name, shape):
    with pytest.raises(ValueError, match="expected"):
        cuda._check_sizes(arguments(**{name: torch.zeros(shape)}))


def test_too_many_rows_or_columns():
    with pytest.raises(ValueError, match="m is 257; expected at most 256 rows"):
        cuda._check_sizes(decode_case(m=257).tensors())
    with pytest.raises(ValueError, match="expected R at most 16384"):
        cuda._check_sizes(decode_case(ranks=(1, 16384)).tensors())


@pytest.mark.parametrize(
    "name,make",
    [
        ("a", lambda t: t.t().contiguous().t()),
        ("b", lambda t: t.t().contiguous().t()),
        ("column_gates", lambda t: t.repeat(1, 2)[:, ::2]),
        ("task_ids", lambda t: t.repeat(2)[::2]),
        ("x", lambda t: t.t().contiguous().t()),
        ("y", lambda t: t.t().contiguous().t()),
        ("y", lambda t: t[:1].expand(5, -1)),
        ("y", lambda t: t.flatten().as_strided(t.shape, (t.shape[1] - 1, 1))),
    ],
)
def test_layouts_are_checked(name, make):
    case = arguments()
    cuda._check_layout(case)
    case[name] = make(case[name].contiguous())
    with pytest.raises(ValueError, match=f"{name} has strides .*call .contiguous"):
        cuda._check_layout(case)


def test_launch_errors_name_the_kernel():
    """Without a device the runtime refuses; that must come up as a RuntimeError."""
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    if torch.cuda.is_available():
        pytest.skip("there is a device here; test_gpu_bad_device covers this")
    from ckf import _C

    numbers = dict.fromkeys(("y", "x", "a", "b", "gates", "task_ids", "stream", "device"), 0)
    sizes = dict.fromkeys(("m", "k", "n", "rank", "tasks", "y_stride", "x_stride"), 1)
    with pytest.raises(RuntimeError, match=r"multi_lora_decode: .* \(CUDA error \d+\)"):
        _C.multi_lora_decode(**numbers, **sizes, dtype=0)


# On a GPU. "small" ones also run under compute-sanitizer (benchmarks/gpu.py).

SMALL = [
    {"m": 1, "k": 1, "n": 1, "ranks": (1, 1)},
    {"m": 4, "k": 577, "n": 727, "ranks": (5, 0, 9)},
    {"m": 9, "k": 264, "n": 264, "ranks": (16, 16, 16, 16, 16)},
    {"m": 70, "k": 32, "n": 1000, "ranks": (4, 4)},
    {"m": 256, "k": 40, "n": 1000, "ranks": (3, 3)},
]
MODEL = [
    {"m": 16, "k": 4096, "n": 4096, "ranks": (16, 16, 16, 16, 16)},
    {"m": 256, "k": 2048, "n": 8192, "ranks": (8, 8, 8, 8, 8, 8, 8, 8, 8)},
    {"m": 2, "k": 64, "n": 64, "ranks": [64] * 256},
]


def run_on_gpu(case):
    """The result on the host; the case stays as it was."""
    moved = case.to("cuda")
    version = moved.y._version
    cuda.multi_lora_decode(**moved.tensors())
    assert moved.y._version > version, "autograd was not told of the write"
    assert_poison_around(moved.y)
    return moved.y.cpu()


@pytest.fixture
def gpu():
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    usable, why = cuda.available()
    assert usable, why


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [{}, {"padding": 8}, {"padding": 3}, {"offset": 1}], ids=str)
@pytest.mark.parametrize("sizes", SMALL, ids=lambda s: f"small{s['m']}x{s['k']}x{s['n']}")
def test_gpu_small(gpu, sizes, layout, dtype):
    case = decode_case(**sizes, **layout, dtype=dtype)
    assert_right(case, run_on_gpu(case))


@pytest.mark.gpu
def test_gpu_small_ids(gpu):
    case = decode_case(m=8, ranks=(2, 2, 2, 2), ids=[-1, 0, 2, 3, -2, 2**40, -(2**62), 1])
    assert_right(case, run_on_gpu(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", MODEL, ids=lambda s: f"{s['m']}x{s['k']}x{s['n']}")
def test_gpu_model_sizes(gpu, sizes, dtype):
    """Within the rule of the other backends too: at most twice the error of same-dtype torch."""
    case = decode_case(**sizes, dtype=dtype)
    result = run_on_gpu(case)
    assert_right(case, result)
    assert torch.equal(result, run_on_gpu(case)), "not the same bits twice"
    y, x, a, b = (t.to("cuda") for t in (case.y, case.x, case.a, case.b))
    gates = torch.cat([case.column_gates, torch.zeros_like(case.column_gates[:1])]).to("cuda")
    gates = gates[case.task_ids.to("cuda")]  # -1 takes the extra row of zeros
    same_dtype = (y + ((x @ a.t()) * gates).to(dtype) @ b).double()
    wide = y.double() + ((x.double() @ a.double().t()) * gates.double()) @ b.double()
    band = torch.finfo(dtype).eps * wide.abs().max()
    ours = (result.to("cuda").double() - wide).abs().max()
    assert ours <= 2 * (same_dtype - wide).abs().max() + band


@pytest.mark.gpu
def test_gpu_selection(gpu):
    case = decode_case(m=8, n=8192, ranks=(4, 4, 4), ids=[0, 1, 0, 1, -1, 0, 1, 1])
    clean = run_on_gpu(case)
    case.a[4:6] = float("inf")
    case.b[6:8] = float("nan")
    result = run_on_gpu(case)
    others = case.task_ids != 0
    assert torch.equal(result[others], clean[others])
    assert not result[~others].isfinite().any()


@pytest.mark.gpu
def test_gpu_stream_and_graph(gpu):
    """The launch goes to the current stream and is captured by a CUDA graph."""
    case = decode_case(m=4, k=256, n=512).to("cuda")
    start, wanted = case.y.clone(), run_on_gpu(decode_case(m=4, k=256, n=512))
    cuda.multi_lora_decode(**case.tensors())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.multi_lora_decode(**case.tensors())
    for _ in range(2):
        case.y.copy_(start)
        graph.replay()
        assert torch.equal(case.y.cpu(), wanted)


@pytest.mark.gpu
def test_gpu_mixed_devices_are_refused(gpu):
    case = decode_case()
    with pytest.raises(ValueError, match="x is a torch.strided tensor on cpu"):
        cuda.multi_lora_decode(**(case.to("cuda").tensors() | {"x": case.x}))
    with pytest.raises(ValueError, match="a is torch.float16; expected torch.float32"):
        cuda.multi_lora_decode(**(case.to("cuda").tensors() | {"a": case.a.half().cuda()}))


@pytest.mark.gpu
def test_gpu_bad_device(gpu):
    from ckf import _C

    numbers = dict.fromkeys(("y", "x", "a", "b", "gates", "task_ids", "stream"), 0)
    sizes = dict.fromkeys(("m", "k", "n", "rank", "tasks", "y_stride", "x_stride"), 1)
    with pytest.raises(RuntimeError, match="multi_lora_decode: .*invalid device"):
        _C.multi_lora_decode(**numbers, **sizes, dtype=0, device=torch.cuda.device_count())
