"""A whole training step on rows of mixed tasks: tokens a second and peak memory, ckf and peers.

``python benchmarks/bench_step.py [--device cpu|cuda] [--out FOLDER] [--quick] [--goals] [--fresh]``

Random weights in the shape of a known model; the same rows, tokens and lengths for all; rows padded
("padded"), packed into one sequence ("packed"), or packed with logits at the label tokens alone
("labels"). Loss, backward, AdamW; the figures are given with and without AdamW. Before any timing
every provider's loss and gradients must equal those of a plain row-by-row computation in float64
on a small model; at full size they must agree with the loop over tasks. Routing is timed.
"""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

if __name__ == "__main__":  # torch reads it when it first allocates
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.floors import step_floor  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    Progress,
    arguments,
    chosen_device,
    device_name,
    environment,
    gate,
    rotated,
    spread,
    why_no_figure,
    words,
)
from benchmarks.memory import forget, free, peak_bytes, saved_bytes  # noqa: E402
from benchmarks.models import (  # noqa: E402
    LAYOUTS,
    SHAPES,
    Batch,
    Row,
    label_tokens,
    make_adapters,
    make_base,
    make_batch,
    make_rows,
    reference_gradients,
)
from benchmarks.peers.models import (  # noqa: E402
    BigCompiledModel,
    BigModel,
    FrozenModel,
    LoopByHandModel,
    LoopModel,
    MasksModel,
    ModelProvider,
    OursGraphsModel,
    OursModel,
    SingleModel,
    ours_with,
    runnable,
)
from benchmarks.records import Outcome, Record  # noqa: E402

TASKS, RANK = 4, 16
# At full size, 16-bit rounding moves gradients by some percent, a wrong route by their own size.
WRONG_ROUTE = 0.25
MODELS = (FrozenModel, SingleModel, LoopModel, LoopByHandModel, MasksModel, BigModel)
# Bytes. 16 rows padded are 7,920 tokens; PEFT keeps 300 KB of each in each of 32 layers: 76 GB, and
# 38 GB for the weights, all contenders' adapters and moments, and 16 GB for logits.
ALL_ROWS = 135e9
# 8,192 tokens: the GPU takes longer than the host. Graphs keep their activations while the others
# run (some 0.2 MB a token and layer, PEFT 0.3): of 32 layers both are 130 GB, of 8 they are 33.
MANY_TOKENS = ("8B, 8 layers", 32, 256, "bfloat16")
BESIDE_GRAPHS = {"contenders": "frozen,peft-big,ckf,ckf-graphs"}
COMPILED = ("frozen", "peft-loop", "peft-big", "peft-big-compiled", "ckf*")


def cases(device: str, quick: bool, memory: float = math.inf, goals: bool = False) -> list[dict]:
    """memory: bytes of the device."""
    many = _case(*MANY_TOKENS, "float32", False, "labels") | BESIDE_GRAPHS
    if goals and device == "cuda":
        return [_case("1B", 16, 256, "bfloat16", "float32", False, "labels") | BESIDE_GRAPHS, many]
    if quick and device == "cuda":
        few = {"contenders": "frozen,peft-loop,peft-big,ckf*"}
        return [_case("1B", 16, 256, "bfloat16", "float32", False, "labels") | few]
    if quick:
        return [_case("tiny", 8, 24, "float32", "float32", compiled=False)]
    if device == "cpu":
        return [_case("135M, 4 layers", 12, 64, "float32", "float32")]
    large = ("8B", 16 if memory >= ALL_ROWS else 8, 256, "bfloat16")
    small = ("1B", 16, 256, "bfloat16")
    padded = _case(*large, "float32", False, "padded")
    return [
        _case(*large, "float32", False, "labels"),
        padded,
        _case(*large, "bfloat16", False, "labels"),
        _case(*large, "float32", False, "packed"),
        many,
        _case(*small, "float32", False, "labels"),
        _case(*small, "float32", False, "padded"),
        padded | {"sigma": 0.0},  # equal lengths: no pads, the same attention for all
        _case(*large, "float32", True, "labels") | {"contenders": ",".join(COMPILED)},
    ]


def _case(model, rows, mean_length, dtype, adapters, compiled=True, *layouts: str) -> dict:
    """On a GPU one layout a case, so that a lack of time or memory costs no other."""
    sizes = {"model": model, "row_count": rows, "mean_length": mean_length}
    kinds = {"dtype": dtype, "adapters": adapters, "tasks": TASKS, "rank": RANK}
    return sizes | kinds | {"compiled": compiled, "layouts": ",".join(layouts or LAYOUTS)}


class Contender:
    """A provider in one layout, with its batches; its layouts share the optimizer."""

    def __init__(self, provider, optimizer, rows: list[Row], layout: str, device) -> None:
        self.provider, self.optimizer, self.layout = provider, optimizer, layout
        self.title = f"{provider.name} {layout}"
        self.tokens = sum(len(row.tokens) for row in rows)
        self.batches = batches_for(provider, rows, layout, device)
        self.ms: list[tuple[float, float]] = []

    def step(self) -> torch.Tensor:
        self.clear()
        return self.provider.backward(self.batches)

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def clear(self) -> None:
        """No gradients: each contender's would stay on the device otherwise."""
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def saved(self) -> int:
        """Of the largest batch: a loop over tasks lets go of each before the next."""
        largest = max(self.batches, key=lambda batch: batch.input_ids.numel())
        frozen = list(self.provider.model.parameters())
        return saved_bytes(lambda: self.provider.loss(largest), frozen)


def batches_for(
    provider: type[ModelProvider] | ModelProvider, rows: list[Row], layout: str, device
) -> list[Batch]:
    total = label_tokens(rows)
    if not provider.loops:
        return [make_batch(rows, layout, total).to(device)]
    tasks = sorted({row.task for row in rows})
    of_task = [[row for row in rows if row.task == task] for task in tasks]
    return [make_batch(own, layout, total).to(device) for own in of_task]


def check_small(kind: type[ModelProvider], layout: str, device: torch.device) -> str | None:
    """What is wrong with a provider's loss or gradients on a small model, or None.

    The model is float64 (float32 for kernels that have no other). Llama's norms and rotary angles
    are float32 in any model, so the band is float32's, times the longest sum of a row.
    """
    shape = SHAPES["tiny"]
    base = make_base(shape, device, kind.checked_in)
    rows = make_rows(TASKS, 2 * TASKS, 12, shape.vocabulary)
    adapters = make_adapters(base, TASKS, 8, kind.checked_in)
    provider = kind(base, adapters, TASKS)
    if issubclass(kind, FrozenModel):
        adapters = {key: torch.zeros_like(t) for key, t in adapters.items()}
    if issubclass(kind, SingleModel):
        rows = [replace(row, task=0) for row in rows]
    loss, exact = reference_gradients(base, rows, adapters)
    got = provider.backward(batches_for(kind, rows, layout, device))
    found = provider.gradients()
    keys = [key for key in exact if key in found]
    wanted = [loss.double().view(1), *(exact[key] for key in keys)]
    outcome = [got.double().view(1), *(found[key] for key in keys)]
    band = torch.finfo(torch.float32).eps * shape.intermediate
    return gate(outcome, wanted, wanted, band).failure


def full_size_failure(contender: Contender, known: dict) -> str | None:
    """Loss and gradients against the loop over tasks, which comes first; fills ``known``."""
    for _ in range(contender.provider.first_steps):
        contender.step()
    loss = contender.step().item()
    if not torch.isfinite(torch.tensor(loss)):
        return f"loss is {loss}"
    if (why := contender.provider.failure()) is not None:
        return why
    gradients = contender.provider.gradients()
    if isinstance(contender.provider, FrozenModel | SingleModel):
        return None
    if not known:
        known |= {"loss": loss, "gradients": {k: g.clone() for k, g in gradients.items()}}
        return None
    wanted = known["gradients"]
    off = sum((gradients[k].double() - g.double()).square().sum() for k, g in wanted.items())
    size = sum(g.double().square().sum() for g in wanted.values())
    contender.difference = (off / size).sqrt().item()
    if not contender.difference <= WRONG_ROUTE:
        return f"gradients differ from the loop's by {contender.difference:.2e} of their norm"
    return None


def measure(
    case: dict, device: torch.device, rounds: int, outcome: Outcome | None = None
) -> tuple[list[dict], dict[str, str]]:
    """(rows, why others have none: provider, with its layout if its check was red, to reason)."""
    outcome = outcome or Outcome()
    kinds, outcome.reasons = contender_kinds(case, device)
    good: dict[type[ModelProvider], list[str]] = {}
    for kind in kinds:  # all before any is built: a check throws compiled code away
        wanted = case["layouts"].split(",")
        layouts = [la for la in wanted if kind.layouts is None or la in kind.layouts]
        good[kind] = [la for la in layouts if _right_when_small(kind, la, device, outcome)]
    forget(device)
    rows = _rows(case)
    contenders = _built(case, good, rows, device, outcome)
    floors = {la: _floor(case, rows, la, device) for la in {c.layout for c in contenders}}

    def after_round() -> None:
        frozen = {c.layout: c for c in contenders if isinstance(c.provider, FrozenModel)}
        timed = [c for c in contenders if c.ms]
        outcome.measured({c.title: _row(c, frozen.get(c.layout)) | floors[c.layout] for c in timed})

    _time(contenders, device, rounds, outcome, after_round)
    for contender in contenders:
        if (why := contender.provider.failure()) is not None:
            outcome.fails(contender.title, f"RED: {why}")
            continue
        if not contender.provider.counts_bytes:
            continue
        try:
            more = outcome.by_title[contender.title] | _bytes(contender, device)
            outcome.measured({contender.title: more})
        except Exception as error:
            outcome.fails(contender.title, why_no_figure(error))
            contender.clear()
    return outcome.rows, outcome.reasons


def _right_when_small(kind: type[ModelProvider], layout: str, device, outcome: Outcome) -> bool:
    title = f"{kind.name} {layout}"
    if kind.checked_in is None:
        return True
    why = _small_failure(kind, layout, device)
    if why is None:
        outcome.right(title, "on a small model")
    else:
        outcome.fails(title, f"RED: {why}")
    return why is None


def contender_kinds(case: dict, device) -> tuple[list[type[ModelProvider]], dict[str, str]]:
    """Those of a case, the loop first, for others are held to it; why others cannot run."""
    kinds = [*MODELS, *([BigCompiledModel] if case["compiled"] else []), OursModel]
    if device.type == "cuda":
        kinds += [ours_with("triton"), ours_with("triton:gemm"), OursGraphsModel]
    if "contenders" in case:
        names = case["contenders"].split(",")
        kinds = [k for k in kinds if any(fnmatchcase(k.name, name) for name in names)]
    kinds, reasons = runnable(kinds)
    return sorted(kinds, key=lambda kind: kind is not LoopModel), reasons


def _rows(case: dict) -> list[Row]:
    vocabulary = SHAPES[case["model"]].vocabulary
    sizes = (case["row_count"], case["mean_length"], vocabulary, case.get("sigma", 0.5))
    return make_rows(TASKS, *sizes)


def _floor(case: dict, rows: list[Row], layout: str, device: torch.device) -> dict:
    lengths = [len(row.tokens) for row in rows]
    logits = label_tokens(rows) if layout == "labels" else sum(lengths)
    return step_floor(SHAPES[case["model"]], case, lengths, logits, device_name(device))


def _built(
    case: dict,
    good: dict[type[ModelProvider], list[str]],
    rows: list[Row],
    device: torch.device,
    outcome: Outcome,
) -> list[Contender]:
    """Contenders whose first step is right."""
    base = make_base(SHAPES[case["model"]], device, getattr(torch, case["dtype"]))
    adapters = make_adapters(base, TASKS, RANK, getattr(torch, case["adapters"]))
    contenders, known = [], {}
    for kind, layouts in good.items():
        provider = optimizer = None
        for layout in layouts:
            contender = None
            try:
                if provider is None:
                    provider = kind(base, adapters, TASKS)
                    optimizer = _optimizer(provider, device)
                contender = Contender(provider, optimizer, rows, layout, device)
                failure = full_size_failure(contender, known)
                failure = failure and f"RED: {failure}"
            except Exception as error:
                failure = why_no_figure(error)
            if contender is not None:
                contender.clear()
            if failure is None:
                contenders.append(contender)
                outcome.right(contender.title, "at full size")
                continue
            outcome.fails(f"{kind.name} {layout}", failure)
            del contender
            free(device)
    return contenders


def _optimizer(provider: ModelProvider | None, device) -> torch.optim.AdamW | None:
    if provider is None or isinstance(provider, FrozenModel):
        return None
    return torch.optim.AdamW(provider.parameters(), lr=1e-5, fused=device.type == "cuda")


def _small_failure(kind: type[ModelProvider], layout: str, device) -> str | None:
    """A provider that breaks costs its own rows alone, and the record says so."""
    try:
        return check_small(kind, layout, device)
    except Exception as error:
        return words(error)
    finally:
        torch._dynamo.reset()


def _time(
    contenders: list[Contender],
    device: torch.device,
    rounds: int,
    outcome: Outcome,
    after_round: Callable[[], None],
) -> None:
    """All in turn, each round; the first round warms up. One that fails leaves the list.

    Those of one layout follow each other, so that a ratio's two times lie close together.
    """

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    contenders.sort(key=lambda contender: LAYOUTS.index(contender.layout))
    for index in range(rounds + 1):
        for contender in rotated(list(contenders), index):
            try:
                start = now()
                contender.step()
                middle = now()
                contender.update()
                end = now()
            except Exception as error:
                outcome.fails(contender.title, why_no_figure(error))
                contenders.remove(contender)
                contender.clear()
                free(device)
                continue
            if index > 0:
                contender.ms.append((middle - start, end - start))
            contender.clear()
        after_round()


def _row(contender: Contender, frozen: Contender | None) -> dict:
    plain, tokens = [ms for ms, _ in contender.ms], contender.tokens
    row = {"provider": contender.provider.name, "peer": contender.provider.peer}
    row |= {"layout": contender.layout, "rounds": len(plain), "tokens": tokens}
    row["computed_tokens"] = sum(batch.input_ids.numel() for batch in contender.batches)
    row |= spread(plain, "ms") | spread([ms for _, ms in contender.ms], "ms_with_adamw")
    row["tokens_per_s"] = round(tokens / statistics.median(plain) * 1e3, 1)
    row["tokens_per_s_with_adamw"] = round(tokens / row["ms_with_adamw"] * 1e3, 1)
    if frozen is not None:
        pairs = zip(contender.ms, frozen.ms, strict=True)
        row |= spread([own[0] / base[0] for own, base in pairs], "ratio")
    row |= {"peak_bytes": None, "saved_bytes": None}
    return row | {"gradient_difference": getattr(contender, "difference", None)}


def _bytes(contender: Contender, device: torch.device) -> dict:
    peak = peak_bytes(contender.step, device)
    contender.clear()
    return {"peak_bytes": peak, "saved_bytes": contender.saved()}


def main(argv: list[str] | None = None) -> int:
    goals = "1B, and 8,192 tokens of 8B, beside PEFT's big LoRA"
    options = arguments(__doc__, "a tiny model, few rounds", goals).parse_args(argv)
    device = chosen_device(options.device)
    about = environment(device)
    rounds = 3 if options.quick else 5 if device.type == "cuda" else 9
    record = Record("bench_step", options.out, about, {"rounds": rounds}, options.fresh)
    red = 0
    memory = math.inf
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    wanted = cases(options.device, options.quick, memory, options.goals)
    open_cases = [case for case in wanted if not record.done(case)]
    progress = Progress(len(open_cases))
    for case in open_cases:
        progress.before(f"{case['model']}, {case['adapters']}, {case['layouts']}")
        outcome = Outcome(record, case)
        try:
            found, reasons = measure(case, device, rounds, outcome)
        except Exception as error:  # costs this case alone
            found, reasons = outcome.rows, outcome.reasons | {"case": f"RED: {words(error)}"}
        record.add(case, found, reasons)
        for name, why in reasons.items():
            print(f"no figure: {name}: {why}")
            red += why.startswith("RED")
        _show(case, found)
        forget(device)
    return 1 if red else 0


def _show(case: dict, rows: list[dict]) -> None:
    tokens = rows[0]["tokens"] if rows else 0
    print(f"\n{case['model']}, {tokens} tokens, {case['adapters']}, {case['layouts']}")
    for row in sorted(rows, key=lambda r: (LAYOUTS.index(r["layout"]), r["ms"])):
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.0f} MiB peak"
        print(
            f"  {row['layout']:7s} {row['provider']:20s} {row['ms']:10.1f} ms  "
            f"{row['ms_with_adamw']:10.1f} with AdamW  {row['tokens_per_s']:10.0f} tokens/s  "
            f"x {row.get('ratio', math.nan):.3f} (floor {row['floor_ratio']:.3f})  {peak}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
