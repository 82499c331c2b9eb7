"""Remembered launches: the binary that Triton itself would take, the same arguments, less time.

Under a driver that names a GPU and records what it is handed; Triton compiles for it as always.
"""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from benchmarks.stub_driver import StubDriver  # noqa: E402
from ckf.kernels import triton_launcher  # noqa: E402
from ckf.kernels.triton_expand import expand, expand_kernel  # noqa: E402
from ckf.kernels.triton_launcher import RememberedKernel, remembered  # noqa: E402


@triton.jit(do_not_specialize=["m"])
def probe_kernel(p_x, p_more, p_y, d_t, m, k, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    o_k = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + m * k + o_k) * scale
    if FLAG and p_y is not None:
        tl.store(p_y + o_k, b_x)


class RecordingDriver(StubDriver):
    """Keeps what it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = []

    def launched(self, grid, metadata, arguments) -> None:
        self.launches.append((grid, metadata.name, metadata.hash, arguments))


@pytest.fixture
def driver():
    config = triton.runtime.driver
    before, config._active = config._active, RecordingDriver()
    expand_kernel._binaries.clear()  # what they launch goes to the driver they were made for
    yield config._active
    config._active = before
    expand_kernel._binaries.clear()


# addresses that are a multiple of 16 bytes, and that are not
TENSORS = st.sampled_from(
    [
        torch.zeros(64, dtype=dtype)[start:]
        for dtype in (torch.float32, torch.bfloat16, torch.int32)
        for start in (0, 1)
    ]
)
DESCRIPTORS = st.sampled_from(
    [
        TensorDescriptor.from_tensor(torch.zeros(rows, 64, dtype=dtype)[:, :columns], block)
        for dtype in (torch.float32, torch.bfloat16)
        for rows, columns, block in [
            (8, 64, [8, 16]),
            (9, 64, [8, 16]),
            (8, 32, (8, 16)),
            (8, 64, [8, 32]),
        ]
    ]
)
POSITIVE = [0, 1, 2, 15, 16, 17, 64, 2**31 - 1, 2**31, 2**31 + 16, 2**40, 2**62, 2**63, 2**63 + 1]
INTS = st.sampled_from([*POSITIVE, -1, -16, -(2**31), -(2**31) - 16, -(2**40)])
ARGUMENTS = st.fixed_dictionaries(
    {
        "p_x": TENSORS,
        "p_more": st.tuples(TENSORS, TENSORS) | st.just(()),
        "p_y": TENSORS | st.none(),
        "d_t": DESCRIPTORS,
        "m": INTS,
        "k": INTS,
        "scale": st.sampled_from([0.5, 1.0, 16.0, 1, 16]),
        "FLAG": st.sampled_from([True, False, 1, 0]),
        "BLOCK": st.sampled_from([16, 32]),
        "num_warps": st.sampled_from([4, 8]),
    }
)


@settings(max_examples=300, deadline=None)
@given(ARGUMENTS, ARGUMENTS)
def test_equal_keys_are_one_binary_of_triton(one, other):
    """A call, and the same with each of its arguments changed in turn."""
    config = triton.runtime.driver
    before, config._active = config._active, RecordingDriver()
    try:
        *_, bind_of_triton = probe_kernel.device_caches[config._active.arch]
        kernel, found = RememberedKernel(probe_kernel), {}
        for call in [one, other, *(one | {name: other[name]} for name in one)]:
            bound, specialised, options = bind_of_triton(**call)
            key, values = kernel.bind(**call)
            assert len(values) == len(bound)
            assert all(a is b for a, b in zip(values, bound.values(), strict=True))
            theirs = (str(specialised), str(options))
            assert found.setdefault(key, theirs) == theirs
    finally:
        config._active = before


def operands(m: int, n: int, r: int, dtype=torch.bfloat16) -> tuple:
    return tuple(torch.zeros(*shape, dtype=dtype) for shape in ((m, r), (r, n), (m, n)))


def test_a_remembered_launch_hands_over_what_triton_would(driver, monkeypatch):
    """The same calls with and without memory: grids, binaries and arguments are the same."""
    calls = [
        (*operands(64, 128, 16), True),
        (*operands(64, 128, 16), True),  # the same again
        (*operands(128, 128, 16), True),  # other rows: the same binary
        (*operands(64, 128, 16), False),  # a constexpr
        (*operands(64, 120, 24), True),
        (*operands(64, 128, 16, torch.float16), True),
        (*(t[:, 1:] for t in operands(64, 129, 17)), True),  # addresses that are no multiple of 16
    ]
    for h, b, y, accumulate in calls * 2:
        expand(h, b, y, accumulate)
    remembered_launches, driver.launches[:] = list(driver.launches), []
    monkeypatch.setattr(triton_launcher, "REMEMBER", False)
    for h, b, y, accumulate in calls * 2:
        expand(h, b, y, accumulate)
    assert len(remembered_launches) == len(driver.launches) == 2 * len(calls)
    for mine, theirs in zip(remembered_launches, driver.launches, strict=True):
        assert mine[:3] == theirs[:3]
        assert all(a is b or a == b for a, b in zip(mine[3], theirs[3], strict=True))
    assert len({line[2] for line in driver.launches}) == 5


def test_a_remembered_launch_takes_the_host_less_time(driver, monkeypatch):
    """The least of many, of CPU time: whatever else runs on the machine only adds."""
    h, b, y = operands(64, 128, 16)

    def least() -> float:
        times = []
        for _ in range(300):
            start = time.thread_time()
            expand(h, b, y, True)
            times.append(time.thread_time() - start)
        return min(times)

    mine = least()
    monkeypatch.setattr(triton_launcher, "REMEMBER", False)
    assert mine < 0.7 * least()


def test_an_argument_that_is_missing_is_named(driver):
    with pytest.raises(KeyError, match="ACCUMULATE"):
        expand_kernel[(1,)](p_h=torch.zeros(4))


def test_in_the_interpreter_a_kernel_is_itself():
    def interpreted():
        pass

    assert remembered(interpreted) is interpreted
