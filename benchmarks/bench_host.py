"""What a training step costs the host on the Triton path: Python, no GPU needed.

``python benchmarks/bench_host.py [--rounds N] [--tasks T]``

Forward and backward of the linears of a decoder layer (q, k, v; o; gate, up; down) with
``backend="triton"`` under a driver that launches nothing, each as small as can be: what is left is
routing, autograd, allocation, the launchers, and torch's own small products. With launches
remembered (``kernels/triton_launcher.py``) and with Triton asked each time, in turn. CPU time, the
least of all rounds. A real launch adds 2 to 3 us of driver.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ckf.kernels import compact_slots, ops, triton_launcher  # noqa: E402
from ckf.kernels.dispatch import Choice  # noqa: E402

ROWS, WIDTH, RANK = 64, 64, 16
GROUPS = {"q, k, v": 3, "o": 1, "gate, up": 2, "down": 1}


class StubDriver:
    """Names a GPU, loads nothing, launches nothing; counts the launches."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 232448}

    def load_binary(self, *_) -> tuple:
        return object(), object(), 32, 0, 1024

    def unload_module(self, _) -> None:
        pass

    def launcher_cls(self, source, metadata):
        def launch(*_) -> None:
            self.launches += 1

        return launch


def a_pass(linears: int, tasks: int, dropout: float = 0.1):
    """A function that runs forward, then backward, and returns the CPU seconds of each."""
    gates = torch.zeros(tasks, tasks + 1)
    gates[:, 0] = gates[range(tasks), range(1, tasks + 1)] = 1.0
    live = (gates != 0).tolist()
    slots = compact_slots([live] * linears, [[RANK] * (tasks + 1)] * linears)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    weights = [torch.randn(WIDTH, WIDTH) for _ in range(linears)]
    shapes = ((RANK, WIDTH), (WIDTH, RANK))
    a, b = (
        [
            [torch.randn(*shape, requires_grad=True) for _ in range(tasks + 1)]
            for _ in range(linears)
        ]
        for shape in shapes
    )
    ids = torch.arange(ROWS) % tasks
    biases, dys = [None] * linears, [torch.ones(ROWS, WIDTH)] * linears
    leaves = [x, *itertools.chain(*a, *b)]

    def run() -> tuple[float, float]:
        start = time.thread_time()
        ys = ops.run_group(
            x, weights, biases, a, b, [gates] * linears, ids, dropout, 1, "triton", *slots
        )
        middle = time.thread_time()
        torch.autograd.backward(ys, dys)
        stop = time.thread_time()
        for tensor in leaves:
            tensor.grad = None
        return middle - start, stop - middle

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    ops.choose_backend = lambda *_: Choice("triton", "stubbed", "expand")  # CPU tensors stand in
    runs = {name: a_pass(linears, options.tasks) for name, linears in GROUPS.items()}
    counts = {}
    for name, run in runs.items():
        run()
        before = driver.launches
        run()
        counts[name] = driver.launches - before
    least = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            for remember in (True, False):
                triton_launcher.REMEMBER = remember
                key = name, remember
                least[key] = [min(p) for p in zip(least.get(key, (1.0, 1.0)), run(), strict=True)]
    print(f"torch {torch.__version__}, triton {triton.__version__}; us forward + backward")
    for name, launches in counts.items():
        new, old = ([round(1e6 * s) for s in least[name, kind]] for kind in (True, False))
        print(
            f"{name:9}{launches:3} launches: {new[0]:5} + {new[1]:5}"
            f"   asking Triton each time {old[0]:5} + {old[1]:5}"
        )
    new, old = (1e6 * sum(sum(least[name, kind]) for name in runs) for kind in (True, False))
    print(
        f"a layer  {sum(counts.values()):3} launches: {new:.0f}   asking Triton each time {old:.0f}"
    )


if __name__ == "__main__":
    main()
