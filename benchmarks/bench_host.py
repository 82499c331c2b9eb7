"""What a training step and a decoded token cost the host: Python, no GPU needed.

``python benchmarks/bench_host.py [--rounds N] [--tasks T]``

Forward and backward of the linears of a decoder layer (q, k, v; o; gate, up; down) with
``backend="triton"`` under a driver that launches nothing, each as small as can be: what is left is
routing, autograd, allocation, the launchers, and torch's own small products. With launches
remembered (``kernels/triton_launcher.py``) and with Triton asked each time, in turn. CPU time, the
least of all rounds. A real launch adds 2 to 3 us of driver.

Then a token through a decoder of such layers in eval mode with the "cuda" backend, whose launches
do nothing either: the whole model, frozen and patched. The base of the plan "update" is computed
(2 us a linear, as the frozen model's), that of "linear" is not.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import triton
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers.ours import our_providers  # noqa: E402
from benchmarks.problems import Case, make_problem  # noqa: E402
from benchmarks.stub_decode import stub_cuda  # noqa: E402
from benchmarks.stub_driver import StubDriver  # noqa: E402
from ckf.kernels import ops, triton_launcher  # noqa: E402
from ckf.kernels.dispatch import Choice  # noqa: E402
from ckf.kernels.launch import CUDA_PLANS  # noqa: E402
from ckf.patch import patch_model, patched_layers  # noqa: E402

ROWS, WIDTH, LAYERS, TURNS = 64, 64, 8, 10
GROUPS = {"q, k, v": 3, "o": 1, "gate, up": 2, "down": 1}


def a_pass(linears: int, tasks: int):
    """A function that runs forward, then backward, and returns the CPU seconds of each."""
    case = Case("train", ROWS, ((WIDTH, (WIDTH,) * linears),), tasks, mix="token", dropout=0.1)
    (kind,) = [kind for kind in our_providers() if kind.name == "ckf-triton:expand"]
    provider = kind(make_problem(case, torch.device("cpu")))
    leaves, dys = provider.leaves(), provider.problem.dys

    def run() -> tuple[float, float]:
        start = time.thread_time()
        ys = provider.forward()
        middle = time.thread_time()
        torch.autograd.grad(ys, leaves, dys)
        return middle - start, time.thread_time() - middle

    return run


def tokens(rounds: int, tasks: int) -> dict[str, float]:
    """CPU seconds of a token through ``LAYERS`` decoder layers: frozen, and by plan."""
    stub_cuda()
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    models = {"frozen": LlamaForCausalLM(config).eval()}
    names = [f"task{i}" for i in range(tasks)]
    for plan in CUDA_PLANS:
        models[plan] = patch_model(copy.deepcopy(models["frozen"]), tasks=names, r=4).eval()
        for layer in patched_layers(models[plan]).values():
            layer.backend = plan
    ops.choose_backend = lambda plan, *_: Choice("cuda", "stubbed", plan)
    token, ids = torch.ones(1, 1, dtype=torch.int64), torch.tensor([0])
    least: dict[str, float] = {}
    with torch.no_grad():
        for name in [*models] * TURNS:  # many at a time, so that caches are warm, but in turns
            routed = {} if name == "frozen" else {"task_ids": ids}
            for _ in range(-(-rounds // TURNS)):
                start = time.thread_time()
                models[name](input_ids=token, use_cache=False, **routed)
                took = time.thread_time() - start
                least[name] = min(least.get(name, took), took)
    return least


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
        before = driver.count
        run()
        counts[name] = driver.count - before
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
    print(f"a token through {LAYERS} decoder layers in eval mode, us a layer:")
    for name, seconds in tokens(options.rounds, options.tasks).items():
        print(f"  {name:7}{1e6 * seconds / LAYERS:6.0f}")


if __name__ == "__main__":
    main()
