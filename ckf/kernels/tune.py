"""Measure the GPU at hand, so that ``backend="auto"`` takes what is fastest on it: ``ckf tune``.

Every backend, and every way of Triton's to add the base, computes the same call; one whose result
is off is left out. Times are those of calls made one after another, as a training loop makes them:
what takes longer of host and GPU. They are kept in ``dispatch.own_tables()``, beside the tables
that the package brings, which come from CUDA graphs (``benchmarks/make_table.py``).
"""

import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from ckf.kernels import config, dispatch, launch
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.ops import run_group
from ckf.kernels.slots import compact_slots

CANDIDATES = ("torch", *(f"triton:{plan}" for plan in launch.PLANS), "cuda", "cuda:linear")
TRAIN_ROWS = (512, 2048, 8192, 32768)
FORWARD_ROWS = (1, 16, 64, 256, 2048, 8192)
# What a 135M and an 8B decoder layer compute from one input: (k, (n, ...)).
LAYERS = (
    (576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)),
    (4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)),
)  # fmt: skip
SEQUENCE = 128  # rows of one task next to each other
DROPOUT = 0.05
LARGEST_ERROR = 0.02  # of the norm; rounding to bfloat16 makes 0.002 to 0.005
CACHED_BYTES = 2**28  # of the copies that calls take in turn: more than a GPU's L2 cache holds
WARMUP, ROUNDS, ROUND_SECONDS = 3, 7, 0.02
SPARE_MEMORY = 0.9  # of what is free; larger calls are left out

Group = tuple[int, tuple[int, ...]]
Clock = Callable[[Callable[[], object], int], float]  # seconds that so many calls take


@dataclass(frozen=True)
class Timed:
    """A call to measure: linears of widths ``n`` that share x (m, k)."""

    step: str  # "train": forward and backward; "forward"
    m: int
    k: int
    n: tuple[int, ...]
    tasks: int
    rank: int  # of the shared and of every task's LoRA
    dropout: float = 0.0

    @property
    def key(self) -> dict:
        """As a row of a table has it."""
        return {
            "pass": self.step,
            "m": self.m,
            "k": self.k,
            "n": sum(self.n),
            "rank": self.rank * (self.tasks + 1) * len(self.n),
            "tasks": self.tasks,
            "dropout": self.dropout > 0,
        }

    @property
    def bytes(self) -> int:
        """Of 16-bit rows and weights; training keeps the outputs and their gradients too."""
        rows = self.m * (self.k + sum(self.n))
        return 2 * (self.k * sum(self.n) + rows * (3 if self.step == "train" else 1))

    @property
    def peak_bytes(self) -> int:
        """While the results are compared: those in 16 bits, and a copy of everything in 32."""
        return 3 * self.bytes


def calls_of(
    groups: Sequence[Group],
    tasks: int,
    rank: int,
    train_rows: Sequence[int] = TRAIN_ROWS,
    forward_rows: Sequence[int] = FORWARD_ROWS,
) -> list[Timed]:
    """What is measured for a model whose linears are these groups."""
    made = []
    for k, n in dict.fromkeys(groups):
        for m in train_rows:
            made += [Timed("train", m, k, n, tasks, rank, p) for p in (0.0, DROPOUT)]
        made += [Timed("forward", m, k, n, tasks, rank) for m in forward_rows]
    return made


def tune(
    calls: Sequence[Timed],
    device: torch.device | str = "cuda",
    say: Callable[[str], None] = print,
    folder: Path | None = None,
) -> Path:
    """Measure the calls and keep the fastest; each is written when it is known.

    Args:
        calls: of :func:`calls_of`.
        device: the GPU; on a CPU (for tests, in Triton's interpreter) wall time is taken.
        say: gets a line a call.
        folder: of tables, by default ``dispatch.own_tables()``. A row of the same call is replaced;
            others stay, unless ckf, torch or Triton were of another version.

    Returns:
        The table's file.

    Raises:
        ValueError: there is no such GPU, or the folder cannot be written.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU to measure: torch sees no CUDA device")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    file = (folder or dispatch.own_tables()) / f"{dispatch.device_slug(name)}.json"
    now = datetime.now(UTC)
    versions = {"ckf": _version("ckf"), "torch": torch.__version__, "triton": _version("triton")}
    about = {"commit": f"ckf tune, {now:%Y-%m-%d}", "time": now.isoformat(timespec="seconds")}
    about |= versions
    there = dispatch.read_table(file)
    known: dict[tuple, dict] = {}
    if there is not None:
        if versions.items() <= there["record"].items():
            known = {_identity(row): row for row in there["rows"]}
        else:
            say(f"{file} was measured with other versions and is begun anew")
    _write(file, name, about, known)  # at once: a folder that cannot be written costs no minutes
    clock = _gpu_seconds if device.type == "cuda" else _wall_seconds
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for index, call in enumerate(calls):
            row, words = _measured(call, device, clock)
            if row is not None:
                known[_identity(row)] = row
                _write(file, name, about, known)
            say(f"{index + 1}/{len(calls)} {describe(call)}: {words}")
    dispatch.load_table.cache_clear()
    config.forget_choices()
    return file


def _measured(call: Timed, device: torch.device, clock: Clock) -> tuple[dict | None, str]:
    """The call's row of a table, if there is one, and its times in words."""
    if call.peak_bytes > SPARE_MEMORY * _free_bytes(device):
        return None, f"left out, it takes {call.peak_bytes / 2**30:.1f} GiB"
    try:
        seconds, refused = measure(call, device, clock)
    except torch.OutOfMemoryError:
        return None, "left out, the memory does not suffice"
    parts = [f"{backend} {1e3 * s:.3g} ms" for backend, s in seconds.items()]
    parts += [f"no {backend}: {why}" for backend, why in refused.items()]
    ms = {backend: float(f"{1e3 * s:.4g}") for backend, s in seconds.items()}
    return dispatch.table_row(call.key, ms), ", ".join(parts)


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()  # of the calls before
    return torch.cuda.mem_get_info(device)[0]


def describe(call: Timed) -> str:
    """ "train 2048 x 576 -> 576+192+192, dropout"."""
    widths = "+".join(map(str, call.n))
    return f"{call.step} {call.m} x {call.k} -> {widths}" + ", dropout" * (call.dropout > 0)


def measure(
    call: Timed, device: torch.device, clock: Clock
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds a call by backend, and why the others have none."""
    copies = max(1, min(8, CACHED_BYTES // call.bytes))
    tensors = [_Tensors.random(call, device, seed) for seed in range(copies)]
    exact = tensors[0].exact()
    steps, loops, refused = {}, {}, {}
    for backend in CANDIDATES:
        step = _in_turn(tensors, backend)
        try:
            error = _error(tensors[0].results(backend), exact)
            once = clock(step, WARMUP) / WARMUP  # waits for the GPU, so failures are its own
        except torch.OutOfMemoryError:
            refused[backend] = "memory"
        except Exception as failure:  # a GPU never seen may refuse any kernel
            _still_works(device, backend, call, failure)
            refused[backend] = _words(failure)
        else:
            if error <= LARGEST_ERROR:
                steps[backend], loops[backend] = step, max(1, round(ROUND_SECONDS / once))
            else:
                refused[backend] = f"its result is off by {error:.2g} of the norm"
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):  # in turn, so that drift meets all
        for name in list(steps):
            try:
                found[name].append(clock(steps[name], loops[name]) / loops[name])
            except Exception as failure:
                _still_works(device, name, call, failure)
                refused[name] = _words(failure)
                del steps[name], found[name]
    return {name: statistics.median(times) for name, times in found.items()}, refused


@dataclass
class _Tensors:
    """Random tensors of a call, B not zero; bfloat16 and float32 adapters (float32 on a CPU)."""

    call: Timed
    x: Tensor
    weights: list[Tensor]
    a: list[list[Tensor]]
    b: list[list[Tensor]]
    gates: list[Tensor]
    ids: Tensor
    dys: list[Tensor]
    slots: tuple[Tensor, int]

    @classmethod
    def random(cls, call: Timed, device: torch.device, seed: int) -> "_Tensors":
        generator = torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        experts, train = call.tasks + 1, call.step == "train"

        def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=generator, device=device).to(kind)

        def adapters(*size: int) -> list[Tensor]:
            made = [normal(*size, kind=torch.float32) / 8 for _ in range(experts)]
            return [tensor.requires_grad_(train) for tensor in made]

        gate = torch.eye(call.tasks, experts).roll(1, 1)
        gate[:, 0] = 1
        live, ranks = [(gate != 0).tolist()] * len(call.n), [[call.rank] * experts] * len(call.n)
        table, width = compact_slots(live, ranks)
        return cls(
            call,
            normal(call.m, call.k).requires_grad_(train),
            [normal(n, call.k) / math.sqrt(call.k) for n in call.n],
            [adapters(call.rank, call.k) for _ in call.n],
            [adapters(n, call.rank) for n in call.n],
            [gate.to(device)] * len(call.n),
            (torch.arange(call.m) // SEQUENCE % call.tasks).to(device),
            [normal(call.m, n) for n in call.n] if train else [],
            (table.to(device), width),
        )

    def leaves(self) -> list[Tensor]:
        return [self.x, *(t for own in (*self.a, *self.b) for t in own)]

    def step(self, backend: str, cache: DecodeCache | None = None) -> tuple[Tensor, ...]:
        """The outputs; in training the gradients are left on the leaves."""
        outputs = run_group(
            self.x, self.weights, [None] * len(self.weights), self.a, self.b, self.gates, self.ids,
            self.call.dropout, 1, backend, *self.slots, cache,
        )  # fmt: skip
        if self.dys:
            torch.autograd.backward(outputs, self.dys)
        return outputs

    def results(self, backend: str) -> list[Tensor]:
        """Outputs and, in training, the gradients of the leaves, which are taken off."""
        outputs = self.step(backend)
        gradients = [leaf.grad for leaf in self.leaves()] if self.dys else []
        for leaf in self.leaves():
            leaf.grad = None
        return [*(y.detach() for y in outputs), *gradients]

    def exact(self) -> list[Tensor]:
        """As ``results``, of PyTorch's own products in float32."""

        def wide(tensor: Tensor) -> Tensor:
            return tensor.detach().float().requires_grad_(tensor.requires_grad)

        copy = _Tensors(
            self.call,
            wide(self.x),
            [wide(weight) for weight in self.weights],
            [[wide(t) for t in own] for own in self.a],
            [[wide(t) for t in own] for own in self.b],
            self.gates,
            self.ids,
            [dy.float() for dy in self.dys],
            self.slots,
        )
        return copy.results("torch")


def _in_turn(tensors: list[_Tensors], backend: str) -> Callable[[], None]:
    """A function that computes the next copy at every call."""
    caches = [DecodeCache() if not one.dys else None for one in tensors]
    at = 0

    def step() -> None:
        nonlocal at
        at = (at + 1) % len(tensors)
        tensors[at].step(backend, caches[at])
        for leaf in tensors[at].leaves():
            leaf.grad = None

    return step


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, of the norm of what is exact; infinite for NaN."""
    worst = 0.0
    for one, other in zip(found, exact, strict=True):
        norm = other.norm().item()
        error = (one.float() - other).norm().item() / max(norm, 1e-30)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _still_works(device: torch.device, backend: str, call: Timed, failure: Exception) -> None:
    """After a kernel's failure: a GPU whose context is broken answers nothing any more."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise ValueError(
            f"{backend} broke the GPU's context at {describe(call)} ({_words(failure)}); what was "
            "measured before is kept, and auto takes torch elsewhere. Please report it"
        ) from error


def _words(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _gpu_seconds(step: Callable[[], object], calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def _wall_seconds(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def _identity(row: dict) -> tuple:
    return tuple(row[name] for name in dispatch.ROW_KEY)


def _write(file: Path, gpu: str, about: dict, rows: dict[tuple, dict]) -> None:
    """Whole or not at all."""
    table = json.dumps({"gpu": gpu, "record": about, "rows": list(rows.values())}, indent=1)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(table + "\n", encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise ValueError(
            f"cannot write {file} ({error.strerror}); set CKF_CACHE to a folder that can be written"
        ) from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
