"""Every launch of a group's forward and backward, run and repeated: test_replay.py runs it.

In its own process: Triton's binaries go to the driver that they were made for. That one launches
nothing and keeps what it is handed; csrc's products are stubbed.
"""

import itertools
import os
import struct
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from benchmarks.stub_driver import StubDriver, stub_products
from ckf.kernels import hopper, launch, ops, replay, triton_backend
from ckf.kernels.dispatch import Choice
from ckf.kernels.launch import PLANS
from ckf.kernels.slots import compact_slots

M, K, WIDTHS, RANK = 96, 64, (64, 32, 48), 16

Launches = list[tuple[str, tuple]]


class _Listening(StubDriver):
    """Keeps the name and the arguments of every launch; also as a stand-in of csrc."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Launches = []

    def launched(self, grid, metadata, arguments) -> None:
        self.launches.append((f"{metadata.name} {metadata.hash}", (*grid, *_flat(arguments))))

    def hopper_gemm(self, arguments: bytes, stream: int) -> None:
        values = struct.unpack(hopper._ARGUMENTS.format, arguments)
        self.launches.append(("hopper_gemm", (*values, stream)))


def _flat(values) -> list:
    """Arguments, those of tuples and descriptors too."""
    found = []
    for value in values:
        if hasattr(value, "block_shape"):
            own = tuple(value.shape), tuple(value.strides), tuple(value.block_shape)
            base = value.base if isinstance(value.base, Tensor) else value.base.data_ptr()
            found += [base, *_flat(own)]
        else:
            found += _flat(value) if isinstance(value, tuple) else [value]
    return found


def launches_of(
    driver: _Listening, plan: str, dropout_p: float, tasks: int
) -> tuple[Launches, Launches, list[tuple[int, int]]]:
    """The launches of a call that is run, of the same call repeated, and where its inputs lie.

    Then asserts that the call is another kind's once a setting has changed that its keys must show.
    """
    ops.choose_backend = lambda *_: Choice("triton", "stubbed", plan)

    def new(*shape, dtype=torch.bfloat16) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    x = new(M, K).requires_grad_()
    weights, biases = [new(n, K) for n in WIDTHS], [new(n) for n in WIDTHS]
    a = [[new(RANK, K, dtype=torch.float32) for _ in range(tasks + 1)] for _ in WIDTHS]
    b = [[new(n, RANK, dtype=torch.float32) for _ in range(tasks + 1)] for n in WIDTHS]
    leaves = [t.requires_grad_() for own in (*a, *b) for t in own]
    live = [[e in (0, 1 + t) for e in range(tasks + 1)] for t in range(tasks)]
    gates = [torch.tensor(live, dtype=torch.float32) for _ in WIDTHS]
    slots, width = compact_slots([live] * len(WIDTHS), [[RANK] * (tasks + 1)] * len(WIDTHS))
    ids, seed = torch.arange(M) % tasks, torch.tensor([7])
    dys = [new(M, n) for n in WIDTHS]

    def call() -> Launches:
        driver.launches = []
        group = x, weights, biases, a, b, gates, ids, dropout_p, seed, "auto", slots, width
        ys = ops.run_group(*group)
        torch.autograd.grad(ys, [x, *leaves], dys)
        return driver.launches

    replay.REPLAY = False
    call()  # compiles
    run = call()
    replay.REPLAY = True
    replay.forget()
    call(), call()
    kinds = list(replay._known.values())
    assert len(kinds) == 2 and all(isinstance(known, replay.Recording) for known in kinds)
    inputs = [x, *weights, *biases, *gates, *leaves, slots, ids, seed, *dys]
    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in inputs]
    again = call()

    def is_another_kind() -> None:
        before = len(replay._known)
        call()
        assert len(replay._known) == before + 2, "forward and backward"

    with patch.dict(os.environ, {"CKF_HOPPER_GEMM": "2"}):
        is_another_kind()
    with patch.object(launch, "STACK_EXPERTS", 5):
        is_another_kind()
    weights[0].requires_grad_()
    is_another_kind()
    return run, again, ranges


def main() -> None:
    """Every launch is the same: of the inputs the same addresses, of the rest some."""
    driver = _Listening()
    x, precise = torch.zeros(1), torch.backends.cuda.matmul.fp32_precision
    settings = triton_backend._settings(x)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert triton_backend._settings(x) != settings
    torch.backends.cuda.matmul.fp32_precision = precise
    triton.runtime.driver.set_active(driver)
    stub_products(driver)
    for plan in (*PLANS, "gemm, Triton's"):
        plan, _, others = plan.partition(", ")
        os.environ["CKF_HOPPER_GEMM"] = "0" if others else "1"
        for dropout_p, tasks in itertools.product((0.0, 0.1), (1, 3)):  # of 3 columns are gathered
            run, again, inputs = launches_of(driver, plan, dropout_p, tasks)
            assert len(run) == len(again) > 5, (len(run), len(again))
            pointers = 0
            for (name, values), (other, repeated) in zip(run, again, strict=True):
                assert name == other and len(values) == len(repeated)
                for one, two in zip(values, repeated, strict=True):
                    assert not isinstance(two, Tensor)
                    at = one.data_ptr() if isinstance(one, Tensor) else one
                    if isinstance(one, Tensor) or (isinstance(one, int) and one > 2**32):
                        pointers += 1
                        given = [start <= at < stop for start, stop in inputs]
                        again_given = [start <= two < stop for start, stop in inputs]
                        assert (at == two) if any(given) else two > 2**32 and not any(again_given)
                    else:
                        assert one == two, (name, one, two)
            names = " ".join(name for name, _ in run)
            if tasks == 1 and plan == "gemm":
                assert ("gemm_kernel" if others else "hopper_gemm") in names
            print(f"{plan} {dropout_p} {tasks}: {len(run)} launches, {pointers} pointers")


if __name__ == "__main__":
    main()
