"""A whole training step on rows of mixed tasks: tokens a second and peak memory, ckf and peers.

``python benchmarks/bench_step.py [--device cpu|cuda] [--out FOLDER] [--quick] [--fresh]``

Random weights in the shape of a known model; the same rows, tokens and lengths for all; rows padded
("padded"), packed into one sequence ("packed"), or packed with logits at the label tokens alone
("labels"). Loss, backward, AdamW; the figures are given with and without AdamW. Before any timing
every provider's loss and gradients must equal those of a plain row-by-row computation in float64
on a small model; at full size they must agree with the loop over tasks. Routing is timed.
"""

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import (  # noqa: E402
    arguments,
    chosen_device,
    environment,
    gate,
    spread,
)
from benchmarks.memory import peak_bytes, saved_bytes  # noqa: E402
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
    OursModel,
    SingleModel,
    ours_with,
    runnable,
)
from benchmarks.records import Record  # noqa: E402

TASKS, RANK = 4, 16
# At full size, 16-bit rounding moves gradients by some percent, a wrong route by their own size.
WRONG_ROUTE = 0.25
MODELS = (FrozenModel, SingleModel, LoopModel, LoopByHandModel, MasksModel, BigModel)


def cases(device: str, quick: bool) -> list[dict]:
    if quick and device == "cuda":
        return [_case("1B", 8, 128, "bfloat16", "float32", False, ("labels",))]
    if quick:
        return [_case("tiny", 8, 24, "float32", "float32", compiled=False)]
    if device == "cpu":
        return [_case("135M, 4 layers", 12, 64, "float32", "float32")]
    return [
        _case("1B", 32, 256, "bfloat16", "float32"),
        _case("8B", 16, 256, "bfloat16", "float32", layouts=("padded", "labels")),
        _case("8B", 16, 256, "bfloat16", "bfloat16", layouts=("labels",)),
    ]


def _case(
    model, rows, mean_length, dtype, adapters, compiled=True, layouts: tuple[str, ...] = LAYOUTS
) -> dict:
    sizes = {"model": model, "row_count": rows, "mean_length": mean_length}
    kinds = {"dtype": dtype, "adapters": adapters, "tasks": TASKS, "rank": RANK}
    return sizes | kinds | {"compiled": compiled, "layouts": ",".join(layouts)}


class Contender:
    """A provider in one layout, with its batches; its layouts share the optimizer."""

    def __init__(self, provider, optimizer, rows: list[Row], layout: str, device) -> None:
        self.provider, self.optimizer, self.layout = provider, optimizer, layout
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
    loss = contender.step().item()
    if not torch.isfinite(torch.tensor(loss)):
        return f"loss is {loss}"
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


def measure(case: dict, device: torch.device, rounds: int) -> tuple[list[dict], dict[str, str]]:
    """(rows, why others have none: provider, with its layout if its check was red, to reason)."""
    shape = SHAPES[case["model"]]
    kinds = [*MODELS, *([BigCompiledModel] if case["compiled"] else []), OursModel]
    if device.type == "cuda":
        kinds.append(ours_with("triton"))
    kinds, reasons = runnable(kinds)
    contenders: list[Contender] = []
    base = make_base(shape, device, getattr(torch, case["dtype"]))
    adapters = make_adapters(base, TASKS, RANK, getattr(torch, case["adapters"]))
    rows = make_rows(TASKS, case["row_count"], case["mean_length"], shape.vocabulary)
    known: dict = {}
    kinds.sort(key=lambda kind: kind is not LoopModel)  # the loop first: others are held to it
    for kind in kinds:
        wanted = case["layouts"].split(",")
        layouts = [la for la in wanted if kind.layouts is None or la in kind.layouts]
        why = {la: _small_failure(kind, la, device) for la in layouts}
        reasons |= {f"{kind.name} {la}": f"RED: {w}" for la, w in why.items() if w is not None}
        good = [la for la in layouts if why[la] is None]
        provider = kind(base, adapters, TASKS) if good else None
        optimizer = _optimizer(provider, device)
        for layout in good:
            contender = Contender(provider, optimizer, rows, layout, device)
            failure = full_size_failure(contender, known)
            contender.clear()
            if failure is None:
                contenders.append(contender)
            else:
                reasons[f"{kind.name} {layout}"] = f"RED: {failure}"
    known.clear()
    _time(contenders, device, rounds)
    tokens = sum(len(row.tokens) for row in rows)
    frozen = {c.layout: c for c in contenders if isinstance(c.provider, FrozenModel)}
    return [_row(c, frozen.get(c.layout), tokens, device) for c in contenders], reasons


def _optimizer(provider: ModelProvider | None, device) -> torch.optim.AdamW | None:
    if provider is None or isinstance(provider, FrozenModel):
        return None
    return torch.optim.AdamW(provider.parameters(), lr=1e-5, fused=device.type == "cuda")


def _small_failure(kind: type[ModelProvider], layout: str, device) -> str | None:
    """A provider that breaks costs its own rows alone, and the record says so."""
    try:
        return check_small(kind, layout, device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        torch._dynamo.reset()


def _time(contenders: list[Contender], device: torch.device, rounds: int) -> None:
    """All in turn, each round; the first round warms up."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    for index in range(rounds + 1):
        for contender in contenders:
            start = now()
            contender.step()
            middle = now()
            contender.update()
            end = now()
            if index > 0:
                contender.ms.append((middle - start, end - start))
            contender.clear()


def _row(contender: Contender, frozen: Contender | None, tokens: int, device) -> dict:
    plain = [ms for ms, _ in contender.ms]
    row = {"provider": contender.provider.name, "peer": contender.provider.peer}
    row |= {"layout": contender.layout, "rounds": len(plain), "tokens": tokens}
    row["computed_tokens"] = sum(batch.input_ids.numel() for batch in contender.batches)
    row |= spread(plain, "ms") | spread([ms for _, ms in contender.ms], "ms_with_adamw")
    row["tokens_per_s"] = round(tokens / statistics.median(plain) * 1e3, 1)
    row["tokens_per_s_with_adamw"] = round(tokens / row["ms_with_adamw"] * 1e3, 1)
    if frozen is not None:
        pairs = zip(contender.ms, frozen.ms, strict=True)
        row |= spread([own[0] / base[0] for own, base in pairs], "ratio")
    row["peak_bytes"] = peak_bytes(contender.step, device)
    contender.clear()
    row["saved_bytes"] = contender.saved()
    row["gradient_difference"] = getattr(contender, "difference", None)
    return row


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, "a tiny model, few rounds").parse_args(argv)
    device = chosen_device(options.device)
    about = environment(device)
    rounds = 3 if options.quick else 5
    record = Record("bench_step", options.out, about, {"rounds": rounds}, options.fresh)
    red = 0
    for case in cases(options.device, options.quick):
        if record.done(case):
            continue
        found, reasons = measure(case, device, rounds)
        record.add(case, found, reasons)
        for name, why in reasons.items():
            print(f"no figure: {name}: {why}")
            red += why.startswith("RED")
        _show(case, found)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 1 if red else 0


def _show(case: dict, rows: list[dict]) -> None:
    print(f"\n{case['model']}, {rows[0]['tokens'] if rows else 0} tokens, {case['adapters']}")
    for row in sorted(rows, key=lambda r: (LAYOUTS.index(r["layout"]), r["ms"])):
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:9.0f} MiB peak"
        print(
            f"  {row['layout']:7s} {row['provider']:20s} {row['ms']:10.1f} ms  "
            f"{row['ms_with_adamw']:10.1f} with AdamW  {row['tokens_per_s']:10.0f} tokens/s  "
            f"x {row.get('ratio', float('nan')):.3f}  {peak}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
