"""Decoding: one new token a row, each row its own task, by linear and by whole model.

``python benchmarks/bench_decode.py [--device cpu|cuda] [--out FOLDER] [--quick] [--fresh]``

Two records: ``bench_decode`` (a linear and the q, k, v group) and ``bench_decode_model`` (a step of
a whole decoder with random weights and a full static cache). On a GPU the figure is a CUDA graph's;
eager time and the host's share are beside it.
"""

import copy
import gc
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.floors import decode_floor  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    Progress,
    arguments,
    chosen_device,
    device_name,
    environment,
    figures,
    gate,
    time_in_turn,
    why_no_figure,
    words,
)
from benchmarks.measure import run_cases  # noqa: E402
from benchmarks.models import SHAPES, adding_loras, make_adapters, make_base  # noqa: E402
from benchmarks.peers.models import (  # noqa: E402
    BigModel,
    FrozenModel,
    MasksModel,
    MixedModel,
    ModelProvider,
    OursModel,
    ours_with,
    runnable,
)
from benchmarks.problems import Case  # noqa: E402
from benchmarks.records import Outcome, Record  # noqa: E402

TASKS, RANK, CONTEXT = 4, 16, 512
ROWS = (1, 4, 16, 64, 256)
GPU_GROUPS = (((4096, (4096,)),), ((4096, (4096, 1024, 1024)),))
CPU_GROUPS = (((576, (1536,)),), ((576, (576, 192, 192)),))


QUICK = ["single", "dense", "grouped", "peft-big", "ckf*"]


def linear_cases(device: str, quick: bool) -> list:
    gpu = device == "cuda"
    kinds = {"dtype": "bfloat16", "adapters": "bfloat16"} if gpu else {}
    if quick and gpu:
        few = [Case("forward", m, GPU_GROUPS[0], mix="token", **kinds) for m in (1, 4, 16, 64)]
        return [(case, QUICK) for case in few]
    if quick:
        return [Case("forward", 4, ((32, (48,)),), mix="token")]
    cases: list = [
        Case("forward", m, groups, mix="token", **kinds)
        for groups in (GPU_GROUPS if gpu else CPU_GROUPS)
        for m in ROWS
    ]
    if gpu:  # as they come from training
        wide = {"mix": "token", "dtype": "bfloat16", "adapters": "float32"}
        cases += [(Case("forward", m, GPU_GROUPS[0], **wide), ["dense", "ckf*"]) for m in ROWS]
    return cases


class FullCache:
    """Keys and values of earlier tokens; a step's own land in the last place, again and again."""

    def __init__(self, config, rows: int, context: int, device, dtype: torch.dtype) -> None:
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        size = (config.num_hidden_layers, 2, rows, heads, context + 1, width)
        self.tensors = torch.randn(size, device=device, dtype=dtype)
        self.context = context

    def row(self, index: int) -> "FullCache":
        """The cache of one row."""
        one = copy.copy(self)
        one.tensors = self.tensors[:, :, index : index + 1]
        return one

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs):
        kept_keys, kept_values = self.tensors[layer_idx]
        kept_keys[:, :, -1:].copy_(keys)
        kept_values[:, :, -1:].copy_(values)
        return kept_keys, kept_values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.context


def model_cases(device: str, quick: bool) -> list[dict]:
    if quick and device == "cuda":
        sizes, dtype = [("1B", m, CONTEXT) for m in (4, 64)], "bfloat16"
    elif quick:
        sizes, dtype = [("tiny", 4, 16)], "float32"
    elif device == "cpu":
        sizes, dtype = [("135M, 4 layers", m, 128) for m in (1, 16, 64)], "float32"
    else:
        sizes, dtype = [("8B", m, CONTEXT) for m in ROWS], "bfloat16"
    fixed = {"tasks": TASKS, "rank": RANK, "dtype": dtype, "adapters": dtype}
    return [{"model": name, "m": m, "context": context, **fixed} for name, m, context in sizes]


def decode_inputs(config, m: int, context: int, device, dtype: torch.dtype) -> dict:
    """What a model's forward takes for one new token in each of m rows."""
    return {
        "input_ids": torch.arange(m, device=device).unsqueeze(1) % config.vocab_size,
        "position_ids": torch.full((m, 1), context, device=device),
        "attention_mask": torch.ones(m, 1, 1, context + 1, dtype=torch.bool, device=device),
        "past_key_values": FullCache(config, m, context, device, dtype),
        "use_cache": True,
    }


@torch.no_grad()
def check_small(kind: type[ModelProvider], device: torch.device) -> str | None:
    """What is wrong with a provider's logits, held against a small model row by row.

    Dtype and band as in ``bench_step.check_small``.
    """
    shape, m, context = SHAPES["tiny"], 5, 7
    base = make_base(shape, device, kind.checked_in)
    adapters = make_adapters(base, TASKS, 8, kind.checked_in)
    if kind.checked_in.itemsize == 2:  # what rounding alone must not hide
        adapters = {key: t * 16 if key[1] == "B" else t for key, t in adapters.items()}
    provider = kind(base, adapters, TASKS)
    provider.model.eval()
    inputs = decode_inputs(base.config, m, context, device, kind.checked_in)
    logits = provider.decode((torch.arange(m) % TASKS).to(device), **inputs)
    exact = []
    for row in range(m):
        own = {name: inputs[name][row : row + 1] for name in ("input_ids", "position_ids")}
        own["attention_mask"] = inputs["attention_mask"][row : row + 1]
        own["past_key_values"] = inputs["past_key_values"].row(row)
        with adding_loras(base, {} if kind is FrozenModel else adapters, row % TASKS):
            exact.append(base(**own, use_cache=True).logits)
    exact = torch.cat(exact)
    band = torch.finfo(torch.float32).eps * shape.intermediate
    if kind.checked_in.itemsize == 2:
        band = _band(base.config, kind.checked_in)
    return gate([logits], [exact.double()], [exact], band).failure


def build_models(
    case: dict, device: torch.device, outcome: Outcome | None = None
) -> tuple[dict, dict[str, str]]:
    """(name to provider, reasons of the others), around one base for all row counts."""
    outcome = outcome or Outcome()
    kinds = [FrozenModel, MasksModel, BigModel, MixedModel, OursModel]
    if device.type == "cuda":
        kinds += [ours_with("triton"), ours_with("cuda"), ours_with("cuda:linear")]
    base = make_base(SHAPES[case["model"]], device, getattr(torch, case["dtype"]))
    adapters = make_adapters(base, TASKS, RANK, getattr(torch, case["adapters"]))
    kinds, outcome.reasons = runnable(kinds)
    models = {}
    for kind in kinds:
        try:
            failure = check_small(kind, device)
            if failure is None:
                models[kind.name] = kind(base, adapters, TASKS)
                models[kind.name].model.eval()
                outcome.right(kind.name, "on a small model")
            else:
                outcome.fails(kind.name, f"RED: {failure}")
        except Exception as error:
            outcome.fails(kind.name, why_no_figure(error))
    return models, outcome.reasons


@torch.no_grad()
def measure_model(
    case: dict, models: dict, device: torch.device, rounds: int, outcome: Outcome | None = None
) -> tuple[list[dict], dict[str, str]]:
    """(rows, red or unable provider to reason). At full size logits are held to the first one's."""
    outcome = outcome or Outcome()
    m, config, dtype = case["m"], models["frozen"].base.config, getattr(torch, case["dtype"])
    ids = (torch.arange(m) % TASKS).to(device)
    inputs = decode_inputs(config, m, case["context"], device, dtype)
    first = next(name for name in models if name != "frozen")
    exact = models[first].decode(ids, **inputs).float()
    calls, errors = {}, {}
    for name, provider in models.items():
        try:
            logits = provider.decode(ids, **inputs).float()
        except Exception as error:
            outcome.fails(name, why_no_figure(error))
            continue
        if name != "frozen":  # which has no LoRA and is the base itself
            verdict = gate([logits], [exact.double()], [exact], _band(config, dtype))
            errors[name] = verdict.error
            if verdict.failure is not None:
                outcome.fails(name, f"RED: {verdict.failure}")
                continue
            outcome.right(name, "at full size")
        calls[name] = [_decoder(provider, ids, inputs)]
    captures = {name: models[name].captures for name in calls}
    floor = decode_floor(SHAPES[case["model"]], case, device_name(device))

    def after_round(timings: dict) -> None:
        rows = {}
        for name, timing in timings.items():
            row = {"provider": name, "error": float(f"{errors.get(name, 0.0):.3g}")}
            rows[name] = row | figures(timing, timings["frozen"]) | floor
        outcome.measured(rows)

    time_in_turn(calls, device, rounds, 10.0, captures, after_round)
    return outcome.rows, outcome.reasons


def _decoder(provider, ids: Tensor, inputs: dict):
    def call() -> Tensor:
        with torch.no_grad():
            return provider.decode(ids, **inputs)

    return call


def _band(config, dtype: torch.dtype) -> float:
    """Of rounding alone, ten times a layer: routes are judged by ``check_small``."""
    return torch.finfo(dtype).eps * (10 * config.num_hidden_layers) ** 0.5


def run_models(options) -> int:
    device = chosen_device(options.device)
    about, rounds = environment(device), 3 if options.quick else 11
    record = Record("bench_decode_model", options.out, about, {"rounds": rounds}, options.fresh)
    open_cases = [c for c in model_cases(options.device, options.quick) if not record.done(c)]
    models, unable, red = None, {}, 0
    progress = Progress(len(open_cases))
    for case in open_cases:
        progress.before(f"{case['model']}, m {case['m']}")
        outcome = Outcome(record, case)
        try:
            if models is None:
                models, unable = build_models(case, device, outcome)
            outcome.reasons = dict(unable)
            rows, reasons = measure_model(case, models, device, rounds, outcome)
        except Exception as error:  # costs this case alone
            rows, reasons = outcome.rows, outcome.reasons | {"case": f"RED: {words(error)}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        record.add(case, rows, reasons)
        floor = f"  floor {rows[0]['floor_ratio']:.3f}" if rows else ""
        print(f"\n{case['model']}  m {case['m']}  context {case['context']}{floor}")
        for row in rows:
            eager = "" if row["eager_ms"] is None else f"  eager {row['eager_ms']:.3f}"
            print(f"  {row['provider']:12s} {row['ms']:9.3f} ms  x {row['ratio']:.3f}{eager}")
        for name, why in reasons.items():
            print(f"  not timed: {name}: {why}")
            red += why.startswith("RED")
    return 1 if red else 0


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, "tiny sizes; on a GPU few").parse_args(argv)
    linears = run_cases("bench_decode", linear_cases(options.device, options.quick), options)
    return max(linears, run_models(options))


if __name__ == "__main__":
    sys.exit(main())
