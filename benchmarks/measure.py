"""One case through all its providers: build, check, time, count bytes; red ones get no figure."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.floors import floor_columns
from benchmarks.harness import (
    Progress,
    chosen_device,
    copies_wanted,
    environment,
    figures,
    time_in_turn,
    words,
)
from benchmarks.memory import forget, peak_bytes, saved_bytes
from benchmarks.peers import COMPETITORS_EXCLUDED, providers_for
from benchmarks.peers.base import Provider, check, references
from benchmarks.problems import Case, make_problem
from benchmarks.records import Record

ROUNDS = {"cpu": 15, "cuda": 15}
QUICK_ROUNDS = 5


def run_cases(name: str, cases: Sequence[Case | tuple[Case, list[str]]], options) -> int:
    """Measure the cases that the record lacks; exit status 1 if a check was red.

    options: parsed ``harness.arguments``; ``options.peers`` may name providers. A case may come
    with names of its own.
    """
    device = chosen_device(options.device)
    about = environment(device)
    settings = {"rounds": QUICK_ROUNDS if options.quick else ROUNDS[device.type]}
    settings["seconds"] = 1.0 if options.quick else 15.0 if device.type == "cpu" else 2.0
    record = Record(name, options.out, about, settings, options.fresh)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}", flush=True)
    if record.resumed:
        print(f"{record.resumed} finished cases of the same settings and sources are kept")
    red = 0
    asked = getattr(options, "peers", None)
    wanted = [entry if isinstance(entry, tuple) else (entry, None) for entry in cases]
    keys = [
        (case, asked or names, case.columns() | {"providers": ",".join(asked or names or ["all"])})
        for case, names in wanted
    ]
    keys = [entry for entry in keys if not record.done(entry[2])]
    progress = Progress(len(keys))
    for case, names, key in keys:
        progress.before(title(case))
        try:
            rows, skipped, failures = measure(case, device, names, **settings)
        except Exception as error:  # costs this case alone
            rows, skipped, failures = [], {}, {"case": words(error)}
        forget(device)
        for provider, why in failures.items():
            print(f"RED {provider}: {why}; no figure")
        record.add(key, rows, skipped | {p: f"RED: {why}" for p, why in failures.items()})
        show(case, rows)
        red += len(failures)
    print(f"{len(record.rows)} rows" + (f" in {options.out}" if options.out else ""))
    return 1 if red else 0


def measure(
    case: Case, device: torch.device, names: list[str] | None, rounds: int, seconds: float
) -> tuple[list[dict], dict[str, str], dict[str, str]]:
    """(rows, skipped provider to reason, red provider to reason)."""
    copies = copies_wanted(device, case.bytes())
    problems = [make_problem(case, device, seed) for seed in range(copies)]
    classes, skipped = providers_for(case, device, names)
    exact_by_kind: dict[str, tuple] = {}
    built, errors, failures = {}, {}, {}
    for name, kind in classes.items():
        error, why = _checked(kind, problems[0], exact_by_kind)
        if why is not None:
            failures[name] = why
            continue
        try:
            built[name] = [kind(problem) for problem in problems]
            errors[name] = error
        except Exception as error:
            failures[name] = words(error)
    exact_by_kind.clear()
    if "frozen" not in built:
        return [], skipped, failures
    timings = time_in_turn(
        {name: [one.step for one in copies] for name, copies in built.items()},
        device,
        rounds,
        seconds,
        {name: kind.captures for name, kind in classes.items()},
    )
    floors = floor_columns(case, environment(device)["device"])
    rows = []
    for name, (first, *_) in built.items():
        row = {"provider": name, "peer": first.peer, "error": float(f"{errors[name]:.3g}")}
        row |= figures(timings[name], timings["frozen"])
        if case.step == "train":
            row["saved_bytes"] = saved_bytes(first.saved_forward, first.parameters())
        row["routing_ms"] = routing_ms(first, device)
        if device.type == "cuda":
            row["peak_bytes"] = peak_bytes(first.step, device)
        rows.append(row | {"copies": copies} | floors)
    return rows, skipped, failures


def routing_ms(provider: Provider, device: torch.device) -> float | None:
    """What a step does once for all layers, wall time; None for those that need nothing."""
    if type(provider).route is Provider.route:
        return None
    samples = []
    for _ in range(7):
        start = time.perf_counter()
        provider.route()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return float(f"{statistics.median(samples):.4g}")


def _checked(kind: type[Provider], problem, known: dict) -> tuple[float, str | None]:
    """(error, None), or the reason why this provider gets no figure."""
    case = problem.case
    if case.dropout and not kind.draws_like_reference:
        case = replace(case, dropout=0.0)
    try:
        provider = kind(replace(problem, case=case))
        own = provider.problem
        key = f"{own.gates.shape}{case.dropout}"  # routed, unrouted, frozen
        if key not in known:
            known[key] = references(own, case.dropout)
        verdict = check(provider, *known[key])
    except Exception as error:  # a peer that breaks costs its own rows alone, and says so
        return float("inf"), words(error)
    return verdict.error, verdict.failure


def title(case: Case) -> str:
    return (
        f"{case.step} {case.shape}  m {case.m}  T {case.tasks}  r {case.rank}  {case.mix}  "
        f"dropout {case.dropout}  adapters {case.adapters}"
    )


def show(case: Case, rows: list[dict]) -> None:
    """A block on the screen: one line a provider, fastest rival marked."""
    if not rows:
        return
    rivals = [r for r in rows if r["peer"] and r["provider"] not in COMPETITORS_EXCLUDED]
    best = min(rivals, key=lambda r: r["ms"], default=None)
    print(f"\n{title(case)}  floor {rows[0]['floor_ratio']:.3f}")
    for row in rows:
        mark = "  <- best peer" if row is best else ""
        kept = row.get("saved_bytes")
        kept = "" if kept is None else f"  saved {kept / 2**20:8.1f} MiB"
        eager = row["eager_ms"]
        eager = "" if eager is None else f"  eager {eager:.4f}  host {row['host_ms']:.4f}"
        print(
            f"  {row['provider']:20s} {row['ms']:10.4f} ms  x {row['ratio']:6.3f} "
            f"[{row['ratio_q1']:.3f}, {row['ratio_q3']:.3f}]{kept}{eager}{mark}",
            flush=True,
        )
