"""What a training step and a decoded token cost the host: Python, no GPU needed.

``python benchmarks/bench_host.py [--rounds N] [--tasks T] [--out FOLDER]``

Forward and backward of the linears of a decoder layer (q, k, v; o; gate, up; down) with
``backend="triton"`` under a driver that launches nothing, each as small as can be: what is left is
routing, autograd, allocation, the launchers, and torch's own small products. In turn with passes
repeated (``kernels/replay.py``), with each of them run, its launches remembered
(``kernels/triton_launcher.py``), and with Triton asked each time. CPU time, the least of all
rounds. A real launch adds 2 to 3 us of driver.

Then a training step of a whole decoder of such layers: frozen, with one LoRA of as many rank
columns by PEFT (no masks, so of one task), and patched; "gemm" is the plan whose products are
csrc's, which launch nothing here. And a token through it in eval mode with the "cuda" backend.
Products of a base are computed (2 us a linear, as the frozen model's) but in "gemm" and in the
plan "linear".
"""

import argparse
import copy
import importlib.util
import sys
import time
from pathlib import Path

import torch
import triton
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import environment  # noqa: E402
from benchmarks.peers.ours import our_providers  # noqa: E402
from benchmarks.problems import Case, make_problem  # noqa: E402
from benchmarks.records import Record  # noqa: E402
from benchmarks.stub_decode import stub_cuda  # noqa: E402
from benchmarks.stub_driver import StubDriver, stub_products  # noqa: E402
from ckf.kernels import ops, replay, triton_launcher  # noqa: E402
from ckf.kernels.dispatch import Choice  # noqa: E402
from ckf.kernels.launch import CUDA_PLANS  # noqa: E402
from ckf.patch import patch_model, patched_layers  # noqa: E402

ROWS, WIDTH, LAYERS, TURNS, RANK = 64, 64, 8, 10, 16
MODES = {"repeated": (True, True), "run": (False, True), "asking Triton": (False, False)}
GROUPS = {"q, k, v": 3, "o": 1, "gate, up": 2, "down": 1}


def a_pass(linears: int, tasks: int):
    """A function that runs forward, then backward, and returns the CPU seconds of each."""
    case = Case("train", ROWS, ((WIDTH, (WIDTH,) * linears),), tasks, mix="token", dropout=0.1)
    (kind,) = [kind for kind in our_providers() if kind.name == "ckf-triton:expand"]
    provider = kind(make_problem(case, torch.device("cpu")))
    leaves, dys = provider.leaves(), provider.problem.dys

    def run() -> list[float]:
        start = time.thread_time()
        ys = provider.forward()
        middle = time.thread_time()
        torch.autograd.grad(ys, leaves, dys)
        return [middle - start, time.thread_time() - middle]

    return run


def _decoder() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).requires_grad_(False)


def steps(rounds: int, tasks: int) -> dict[str, list[float]]:
    """CPU seconds of forward and of backward through ``LAYERS`` decoder layers, by model."""
    stub_products()
    frozen = _decoder().to(torch.bfloat16).train()
    names = [f"task{i}" for i in range(tasks)]
    patched = patch_model(copy.deepcopy(frozen), tasks=names, r=RANK)
    models = {"frozen": frozen, "ckf": patched}
    if importlib.util.find_spec("peft") is not None:
        import peft

        settings = peft.LoraConfig(r=RANK * (tasks + 1), target_modules="all-linear")
        models["PEFT, one LoRA"] = peft.get_peft_model(copy.deepcopy(frozen), settings)
    runs = [(name, "", True) for name in models if name != "ckf"]
    runs += [("ckf", plan, repeat) for plan in ("expand", "gemm") for repeat in (False, True)]
    x = torch.randn(1, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.arange(ROWS)[None] % tasks
    least: dict[str, list[float]] = {}
    for name, plan, repeat in runs * rounds:
        replay.REPLAY = repeat
        ops.choose_backend = lambda *_, plan=plan: Choice("triton", "stubbed", plan)
        routed = {"task_ids": ids} if name == "ckf" else {}
        start = time.thread_time()
        y = models[name](inputs_embeds=x, use_cache=False, **routed).logits
        middle = time.thread_time()
        y.backward(torch.ones_like(y))
        took = [middle - start, time.thread_time() - middle]
        models[name].zero_grad(set_to_none=True)
        key = f"{name} {plan}{', repeated' * repeat}" if plan else name
        least[key] = _least(least.get(key), took)
    replay.REPLAY = True
    return least


def _least(before: list[float] | None, took: list[float]) -> list[float]:
    return list(map(min, before or took, took))


def tokens(rounds: int, tasks: int) -> dict[str, float]:
    """CPU seconds of a token through ``LAYERS`` decoder layers: frozen, and by plan."""
    stub_cuda()
    models = {"frozen": _decoder().eval()}
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
    parser.add_argument("--out", type=Path, help="folder for the record; default: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    driver = StubDriver()
    triton.runtime.driver.set_active(driver)
    ops.choose_backend = lambda *_: Choice("triton", "stubbed", "expand")  # CPU tensors stand in
    runs = {name: a_pass(linears, options.tasks) for name, linears in GROUPS.items()}
    counts = {}
    replay.REPLAY = False
    for name, run in runs.items():
        run()
        before = driver.count
        run()
        counts[name] = driver.count - before
    least: dict[tuple[str, str], list[float]] = {}
    for _ in range(options.rounds):
        for name, run in runs.items():
            for kind, (replay.REPLAY, triton_launcher.REMEMBER) in MODES.items():
                least[name, kind] = _least(least.get((name, kind)), run())
    replay.REPLAY = triton_launcher.REMEMBER = True
    about = environment(torch.device("cpu"))
    settings = {"rounds": options.rounds, "tasks": options.tasks}
    record = Record("bench_host", options.out, about, settings, fresh=True)
    print(f"torch {torch.__version__}, triton {triton.__version__}; us forward + backward")
    linears = [
        _row(f"{name}, {kind}", seconds, launches=counts[name])
        for (name, kind), seconds in least.items()
    ]
    for kind in MODES:
        parts = [seconds for (_, own), seconds in least.items() if own == kind]
        total = [sum(pair) for pair in zip(*parts, strict=True)]
        linears.append(_row(f"a layer, {kind}", total, launches=sum(counts.values())))
    record.add({"host": "linears of a decoder layer"}, linears)
    print(f"a training step of {LAYERS} decoder layers, us a layer:")
    found = steps(options.rounds, options.tasks)
    rows = [_row(name, [s / LAYERS for s in seconds]) for name, seconds in found.items()]
    record.add({"host": "training step, a decoder layer"}, rows)
    print(f"a token through {LAYERS} decoder layers in eval mode, us a layer:")
    found = tokens(options.rounds, options.tasks)
    rows = [_row(name, [seconds / LAYERS]) for name, seconds in found.items()]
    record.add({"host": "decoded token, a decoder layer"}, rows)


def _row(name: str, seconds: list[float], **more) -> dict:
    """Of forward, and of backward where there is one; printed."""
    us = [round(1e6 * s, 1) for s in seconds]
    print(f"  {name:24}" + " + ".join(f"{one:7.0f}" for one in us) + f" = {sum(us):5.0f}")
    return {"provider": name, **dict(zip(("forward_us", "backward_us"), us, strict=False))} | more


if __name__ == "__main__":
    main()
