"""The Hopper GEMM's own source on the host, through its bridge.

``csrc/hopper_host.h`` models tile copies, transaction barriers and warpgroup products after the PTX
ISA, copies landing late and in any order. So descriptors, swizzles, fragments, phases, tails and
the order of the tiles are tested on every machine; speed, and whether the ISA was read as the chip
does it, need the chip.
"""

import ctypes
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from ckf.kernels import cuda, hopper
from tests.kernels.decode_cases import assert_poison_around, guarded
from tests.kernels.hopper_cases import DTYPES, GemmCase, assert_right, exact, gemm_case
from tests.kernels.host_build import CSRC, INVALID_VALUE, compile_for_host, copy_changed

POINTERS = ("x", "w", "h", "b", "bias", "seed", "y")
SIZES = ("m", "n", "k", "r", "x_stride", "w_stride", "h_stride", "b_stride", "y_stride")


SHRINK_POINTERS = ("a", "gated", "compact", "restored", "gates", "slots", "task_ids", "done")
SHRINK_STRIDES = ("a", "gated", "compact", "restored", "gates", "slots")


class ShrinkArguments(ctypes.Structure):
    """CkfShrink in csrc/launchers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in SHRINK_POINTERS),
        *((name, ctypes.c_int64) for name in ("columns", "tasks")),
        *((f"{name}_stride", ctypes.c_int64) for name in SHRINK_STRIDES),
    )


class Gemm(ctypes.Structure):
    """CkfGemm in csrc/launchers.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("dx", "dtype", "device", "accumulate")),
        ("shrink", ShrinkArguments),
    )


def fields_of(record: ctypes.Structure) -> dict:
    """By name, a null pointer as 0; the shrink as a dict, left out where there is none."""
    found = {name: getattr(record, name) for name, _ in record._fields_}
    if "shrink" in found:
        shrink = fields_of(found.pop("shrink"))
        found |= {"shrink": shrink} if shrink["columns"] else {}
    return {name: 0 if value is None else value for name, value in found.items()}


def packed(arguments: dict) -> bytes:
    """Of what ``fields_of`` gives, changed."""
    given = {name: value for name, value in arguments.items() if name not in ("stream", "shrink")}
    gemm = Gemm(**given)
    for name, value in arguments.get("shrink", {}).items():
        setattr(gemm.shrink, name, value)
    return bytes(gemm)


@dataclass
class Host:
    """In place of ``ckf._C``; ``clusters`` run at once, threads in the order of ``order``."""

    library: ctypes.CDLL
    clusters: int = 2
    order: int = 0
    calls: list[dict] = field(default_factory=list)

    def build_info(self) -> dict:
        return {"archs": [hopper.ARCH]}

    def hopper_gemm(self, arguments: bytes, stream: int) -> None:
        assert len(arguments) == ctypes.sizeof(Gemm)
        gemm = Gemm.from_buffer_copy(arguments)
        self.calls.append(fields_of(gemm) | {"stream": stream})
        self.library.ckf_host_set_order(ctypes.c_uint(self.order))
        self.library.ckf_host_set_clusters(ctypes.c_int(self.clusters))
        status = self.library.ckf_hopper_gemm(ctypes.byref(gemm), ctypes.c_void_p(stream))
        if status:
            raise RuntimeError(f"hopper_gemm: CUDA error {status}")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return compile_for_host(CSRC / "hopper_gemm.cu", tmp_path_factory.mktemp("host"))


@pytest.fixture(autouse=True)
def asked_anew():
    """What a test pretends about the machine is its own."""
    hopper._usable.cache_clear()
    yield
    hopper._usable.cache_clear()


@pytest.fixture
def host(library, monkeypatch) -> Host:
    """The bridge takes CPU tensors, and its outputs are poisoned, inside and around."""
    there = Host(library)
    pretend(there, monkeypatch)
    return there


def pretend(there: Host, monkeypatch) -> None:
    """That the extension is this one, on a GPU that has the kernel."""
    hopper._usable.cache_clear()
    monkeypatch.setattr(cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cuda, "_load_extension", lambda: (there, ""))
    monkeypatch.setattr(cuda, "available", lambda device=None: (True, ""))
    monkeypatch.setattr(cuda, "_raw_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    def poisoned(m, n, dtype, device):
        return guarded(torch.full((m, n), float("nan"), dtype=dtype, device=device))

    monkeypatch.setattr(torch, "empty", poisoned)


def run(case: GemmCase) -> torch.Tensor:
    y = case.run()
    assert_poison_around(y)
    return y


SMALL = [
    (1, 8, 8, 8),
    (1, 8, 1, 1),
    (128, 256, 64, 64),
    (129, 264, 41, 5),
    (256, 248, 130, 16),
    (300, 520, 200, 80),
]


@pytest.mark.parametrize("dx", [False, True], ids=["forward", "dx"])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_integers_exactly(host, sizes, dx):
    """One element in the wrong place, or read twice, changes a sum of small integers."""
    for dtype in DTYPES:
        case = gemm_case(*sizes, dx=dx, dtype=dtype, integers=True)
        assert torch.equal(run(case), exact(case)[0].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{"bias": False}, {"padding": 8}, {"dx": True}, {"dx": True, "p": 0.3}], ids=str
)
def test_against_float64(host, options, dtype):
    case = gemm_case(140, 264, 136, 24, dtype=dtype, **options)
    assert_right(case, run(case))


def test_many_tiles_a_cluster_in_any_order(host):
    """Persistent: stages and phases go on from tile to tile; who runs when changes no bit."""
    for dx in (False, True):
        case = gemm_case(300, 776, 72, 40, dx=dx, p=0.2)
        first = run(case)
        assert_right(case, first)
        for host.clusters, host.order in ((1, 1), (1, 2), (5, 3)):
            assert torch.equal(first, run(case))
        host.clusters, host.order = 2, 0


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dx_onto_what_is_there(host, p):
    """As of the second linear of a group: added in float32, rounded once."""
    for dtype in DTYPES:
        case = gemm_case(140, 264, 72, 24, dx=True, dtype=dtype, p=p)
        before = guarded(torch.randn(140, 264).to(dtype))
        case.onto = guarded(before.clone())
        y = run(case)
        assert y is case.onto
        wanted, allowed = exact(case)
        eps = torch.finfo(dtype).eps
        wanted = wanted + before.double()
        assert ((y.double() - wanted).abs() <= allowed + eps * wanted.abs()).all()


def test_depth_beyond_the_ring(host):
    """More tiles of depth than stages, so that every barrier goes through several phases."""
    case = gemm_case(16, 16, 64 * 19 + 8, 64 * 5 + 8, integers=True)
    assert torch.equal(run(case), exact(case)[0].to(torch.bfloat16))


def test_tails_meet_no_poison(host):
    """inf beyond the operands' rows and columns must not reach a sum (0 * inf is NaN)."""
    for dx in (False, True):
        case = gemm_case(130, 264, 70, 9, dx=dx)
        for tensor in (case.x, case.weight, case.h, case.b):
            tensor._base.nan_to_num_(nan=float("inf"))
        assert_right(case, run(case))


def test_infinities_of_one_row_stay_there(host):
    case = gemm_case(130, 264, 64, 8)
    case.x[5, 3], case.h[70, 2] = float("inf"), float("nan")
    finite = run(case).isfinite().all(dim=1)
    assert finite.logical_not().nonzero().flatten().tolist() == [5, 70]


def test_every_tile_once(library):
    for pairs, columns in ((1, 1), (3, 7), (8, 2), (9, 16), (35, 56)):
        seen = set()
        pair, column = ctypes.c_int(), ctypes.c_int()
        for index in range(pairs * columns):
            library.ckf_host_tile_at(
                index, pairs, columns, ctypes.byref(pair), ctypes.byref(column)
            )
            seen.add((pair.value, column.value))
        assert seen == {(p, c) for p in range(pairs) for c in range(columns)}


def test_what_reaches_the_kernel(host):
    case = gemm_case(3, 16, 24, 8, dx=True, p=0.25, padding=8)
    y = run(case)
    (seen,) = host.calls
    seed, scale = seen.pop("seed"), seen["scale"]
    assert (
        seed
        and scale == ctypes.c_float(4 / 3).value
        and seen
        == {
            "x": case.x.data_ptr(),
            "w": case.weight.data_ptr(),
            "h": case.h.data_ptr(),
            "b": case.b.data_ptr(),
            "bias": 0,
            "y": y.data_ptr(),
            **{"m": 3, "n": 16, "k": 24, "r": 8},
            **{"x_stride": 32, "w_stride": 24, "h_stride": 16, "b_stride": 24, "y_stride": 16},
            **{"threshold": 16384, "scale": scale, "dx": 1, "dtype": 2, "device": 0, "stream": 77},
            "accumulate": 0,
        }
    )


def test_launcher_refuses(host):
    """What the bridge cannot let through, and what would become a wrong tensor map."""
    run(gemm_case(3, 16, 24, 8))
    right = host.calls[0]
    wrongs = [{"m": 0}, {"r": 0}, {"n": 12}, {"k": 2**31}, {"x": 0}, {"dtype": 0}]
    wrongs += [{"w": right["w"] + 8}, {"h_stride": 7}, {"b_stride": 8}, {"bias": right["bias"] + 2}]
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match=f"CUDA error {INVALID_VALUE}"):
            host.hopper_gemm(packed(right | wrong), 0)
    host.clusters = 0
    with pytest.raises(RuntimeError, match="CUDA error 801"):
        host.hopper_gemm(packed(right), 0)


KERNEL, PARTS, FRAGMENTS = "hopper_gemm.h", "hopper.h", "hopper_fragments.h"
DEFECTS = {
    "a stage given back while it is read": (KERNEL, "wait_products<1, T>", "wait_products<2, T>"),
    "a stage given back by one block": (
        KERNEL,
        "if (lane < kPair) arrive_at(memory.empty(stage), lane)",
        "if (lane < kPair) arrive_at(memory.empty(stage), 0)",
    ),
    "a stage filled without asking": (
        KERNEL,
        "wait_barrier(memory.empty(ring.stage), ring.parity);",
        "",
    ),
    "phases not told apart": (KERNEL, "parity ^= 1;", ""),
    "sums touched in flight": (KERNEL, "wait_products<0, T>", "wait_products<1, T>"),
    "a block leaves early": (KERNEL, "cluster_wait<kPair>();  // nobody leaves", "//"),
    "no barrier at the start": (
        KERNEL,
        "    __syncwarp();\n    cluster_arrive<kPair>();\n    cluster_wait<kPair>();\n    if",
        "    if",
    ),
    "leading offset": (PARTS, "return descriptor(start, chunk,", "return descriptor(start, 1024,"),
    "stride": (PARTS, "descriptor(start, 16, kAtomBytes)", "descriptor(start, 16, kAtomBytes / 2)"),
    "step along rows of n": (PARTS, "kStepK * kRowBytes", "kStepK * 2"),
    "half of W": (KERNEL, "column + rank * (kColumns / kPair)", "column"),
    "mask left out": (
        KERNEL,
        "return kDx && p.seed != nullptr;",
        "return false;",
    ),
    "last depth of the update": (KERNEL, "at < depth &&", "at + 16 < depth &&"),
    "row tail": (FRAGMENTS, "at.row + 8 * h < p.m", "at.row + 8 * h + 1 < p.m"),
    "column tail": (FRAGMENTS, "< p.m && column < p.n", "< p.m && column < p.n + 8"),
    "quad": (
        FRAGMENTS,
        "for (int distance = 1; distance <= 2",
        "for (int distance = 1; distance < 2",
    ),
}


def run_planted(host: Host, folder: Path) -> None:
    host.library = compile_for_host(folder / "hopper_gemm.cu", folder, planted=True)
    host.clusters = 1
    for host.order in (0, 1, 2):
        for dx in (False, True):
            case = gemm_case(130, 264, 328, 24, dx=dx, p=0.2)
            assert_right(case, run(case))


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_seen(host, tmp_path, name):
    """A planted defect must show: else the tests above prove nothing."""
    copy_changed(tmp_path, *DEFECTS[name])
    with pytest.raises((AssertionError, RuntimeError)):
        run_planted(host, tmp_path)


def test_without_a_defect_nothing_is_seen(host, tmp_path):
    copy_changed(tmp_path, KERNEL, "", "")
    run_planted(host, tmp_path)


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.t().contiguous().t()


REFUSALS = {
    "float32": ({"x": torch.zeros(3, 24)}, "x is torch.float32; expected float16 or bfloat16"),
    "mixed": ({"h": torch.zeros(3, 8).half()}, "H is torch.float16; expected .* all alike"),
    "meta": ({"b": torch.zeros(8, 16, device="meta").bfloat16()}, r"B\^T is on meta"),
    "list": ({"h": [1.0]}, "H is a list; expected a strided torch.Tensor"),
    "empty": ({"h": torch.zeros(3, 0).bfloat16()}, r"H has shape \(3, 0\); expected two"),
    "flat": ({"x": torch.zeros(72).bfloat16()}, "x has shape"),
    "transposed": ({"weight": transposed(torch.zeros(16, 24).bfloat16())}, "W has strides"),
    "pitch": ({"x": torch.zeros(3, 25).bfloat16()[:, :24]}, r"x has strides \(25, 1\); rows must"),
    "start": ({"x": torch.zeros(3, 32).bfloat16()[:, 4:28]}, "x has strides .* multiples of 16"),
    "rows overlap": ({"x": torch.zeros(1, 24).bfloat16().expand(3, -1)}, "x has strides"),
    "shape of W": ({"weight": torch.zeros(16, 32).bfloat16()}, r"W has shape .* expected \(16, 24"),
    "shape of H": ({"h": torch.zeros(4, 8).bfloat16()}, r"H has shape \(4, 8\); expected \(3, 8\)"),
    "odd n": (
        {"b": torch.zeros(8, 24).bfloat16()[:, :20], "weight": torch.zeros(20, 24).bfloat16()},
        "n is 20; rows of y need",
    ),
    "bias": ({"bias": torch.zeros(8).bfloat16()}, r"bias has shape \(8,\).*expected \(16,\)"),
    "half bias": ({"bias": torch.zeros(16).half()}, "bias is torch.float16"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(host, name):
    changes, message = REFUSALS[name]
    case = gemm_case(3, 16, 24, 8)
    operands = {n: getattr(case, n) for n in ("x", "weight", "bias", "h", "b")} | changes
    with pytest.raises(ValueError, match=message):
        hopper.gemm(**operands)
    assert host.calls == []


def test_wrong_seeds_are_refused(host):
    case = gemm_case(3, 16, 24, 8, dx=True)
    for seed, threshold in ((torch.zeros(2, dtype=torch.int64), 5), (torch.zeros(1), 5)):
        with pytest.raises(ValueError, match="seed"):
            hopper.gemm_dx(case.x, case.weight, case.h, case.b, (seed, threshold, 1.0))
    with pytest.raises(ValueError, match="threshold is 65536"):
        seed = torch.zeros(1, dtype=torch.int64)
        hopper.gemm_dx(case.x, case.weight, case.h, case.b, (seed, 65536, 1.0))
    assert host.calls == []


def test_other_devices_are_refused(host, monkeypatch):
    case = gemm_case(3, 16, 24, 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    hopper._usable.cache_clear()
    assert "compute capability (10, 0)" in hopper.why_not_gemm(case.x, case.weight, case.h, case.b)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Host, "build_info", lambda self: {"archs": ["sm_90", "compute_90"]})
    hopper._usable.cache_clear()
    with pytest.raises(ValueError, match="rebuild with CKF_CUDA_ARCHS=sm_90a"):
        case.run()


def test_without_a_gpu_it_says_why():
    case = gemm_case(3, 16, 24, 8)
    assert "x is on cpu" in hopper.why_not_gemm(case.x, case.weight, case.h, case.b)
    usable, why = hopper.available()
    assert why and (usable or torch.cuda.is_available() or "CUDA" in why or "ckf._C" in why)


def test_extension_refuses_and_names_the_kernel():
    """Sizes first; then the runtime, of a device that is not there."""
    if not cuda.build_info()["built"]:
        pytest.skip(cuda.build_info()["reason"])
    from ckf import _C

    right = dict.fromkeys(POINTERS, 16) | {"bias": 0, "seed": 0} | dict.fromkeys(SIZES, 8)
    right |= {"scale": 1.0, "dtype": 2}
    right["device"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(RuntimeError, match=r"hopper_gemm: .* \(CUDA error \d+\)") as refused:
        _C.hopper_gemm(packed(right), 0)
    assert "invalid argument" not in str(refused.value)
    with pytest.raises(RuntimeError, match=r"hopper_gemm: invalid argument \(CUDA error 1\)"):
        _C.hopper_gemm(packed(right | {"n": 0}), 0)
    with pytest.raises(ValueError, match="3 bytes of arguments; expected"):
        _C.hopper_gemm(b"abc", 0)


def test_the_gemm_plan_takes_it_unless_told_not_to(monkeypatch):
    pytest.importorskip("triton")
    from ckf.kernels import triton_gemm, triton_update

    operands = [torch.zeros(16, 16, dtype=torch.bfloat16)] * 4
    monkeypatch.setattr(hopper.cuda, "available", lambda device=None: (True, ""))
    monkeypatch.setattr(hopper.cuda, "build_info", lambda: {"archs": [hopper.ARCH]})
    monkeypatch.setattr(hopper.cuda, "_DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    hopper._usable.cache_clear()
    for said, module in (("", hopper), ("1", hopper), ("0", triton_gemm)):
        monkeypatch.setenv("CKF_HOPPER_GEMM", said)
        assert triton_update._products(*operands) is module
    monkeypatch.delenv("CKF_HOPPER_GEMM")
    operands = [torch.zeros(16, 16)] * 4  # float32: neither takes it
    assert triton_update._products(*operands) is None
