"""What "auto" takes on a GPU: the fastest backend of the nearest shape that was measured there.

A table, ``<gpu>.json``, holds milliseconds by backend: measured on this very machine by
``ckf tune`` (``own_tables()``), or brought along in ``tables/`` (``benchmarks/make_table.py`` makes
it from the records of ``make gpu``), of this GPU or of one of the same chip. Nearest: the least sum
of doublings between m, k, n and R, one's own rows first; farther than FARTHEST says nothing, and
then torch's own products are taken, as on a GPU without a table.
"""

import json
import logging
import math
import re
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ckf.cache import cache_folder
from ckf.kernels.launch import CUDA_PLANS, PLANS

logger = logging.getLogger("ckf.kernels")

TABLES = Path(__file__).parent / "tables"
# doublings. The linears of a 1B model in four rows are up to 6 off those measured of an 8B one in
# 1 and 16; what was fastest there took 1.14 times the frozen decoder, auto with torch 1.59 (H100).
FARTHEST = 6.0
LEAST_GAIN = 0.03  # of torch's time, below which its well-worn products are kept
# Of one chip but for memory and clocks: a GPU without a table goes by its relative's.
RELATIVES = dict.fromkeys(
    ("h200", "h200-nvl", "h100-nvl", "h100-pcie", "gh200-480gb", "gh200-120gb"), "h100-80gb-hbm3"
)
_SIZES = ("m", "k", "n", "rank")
ROW_KEY = ("pass", *_SIZES, "tasks", "dropout")  # of what a row of a table is


class Choice(NamedTuple):
    """A backend, the way in which it adds the base (its plan), and the reason in words."""

    backend: str
    why: str
    plan: str = "expand"


class Call(NamedTuple):
    """What a choice depends on: sizes (n summed over a group, R likewise) and the pass.

    linear_rank: rank columns of the linear that has most. learned: gates need a gradient.
    """

    m: int
    k: int
    n: int
    rank: int
    train: bool
    dropout: bool
    linear_rank: int = 0
    learned: bool = False


def device_slug(name: str) -> str:
    """NVIDIA H200 -> h200: the name of a GPU's table and of its results."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return words.removeprefix("nvidia-")


def own_tables() -> Path:
    """Where ``ckf tune`` keeps its tables."""
    return cache_folder() / "tables"


@lru_cache
def load_table(device: str, folder: Path | None = None) -> dict | None:
    """The table of a GPU by its name, or None.

    The rows of one's own table come before the package's, and that of a relative (its ``gpu`` says
    so) comes last. ``folder``: tables of there alone.
    """
    slug = device_slug(device)
    places = [(own_tables(), slug), (TABLES, slug)] if folder is None else [(folder, slug)]
    found = [table for table in (read_table(at / f"{name}.json") for at, name in places) if table]
    if not found and folder is None and slug in RELATIVES:
        found = [read_table(TABLES / f"{RELATIVES[slug]}.json")]
    if not any(found):
        return None
    return found[0] | {"rows": [row for table in found for row in table["rows"]]}


def read_table(file: Path) -> dict | None:
    """A table; None where there is none, or, with a warning, where the file is no table."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        for row in table["rows"]:
            _check_row(row)
        record = {name: str(value) for name, value in table["record"].items()}
        return {"gpu": str(table["gpu"]), "record": {"commit": "?"} | record, "rows": table["rows"]}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{file} is no table of measurements ({type(error).__name__}: {error}) and is not "
            "used; remove it, or make it again with ckf tune",
            stacklevel=2,
        )
        return None


def _check_row(row: dict) -> None:
    """ValueError, KeyError or TypeError for a row that no choice can be made by."""
    times = [row[name] for name in ("torch", "triton", "cuda")] + [row.get("cuda:linear")]
    numbers = [row[name] for name in _SIZES] + [t for t in times if t is not None]
    for number in numbers:
        if type(number) not in (int, float) or not 0 <= number < math.inf:
            raise ValueError(f"{number!r} in a row; expected a number")
    if row["pass"] not in ("train", "forward") or type(row["dropout"]) is not bool:
        raise ValueError(f"pass {row['pass']!r} and dropout {row['dropout']!r} in a row")
    if row["triton"] is not None and row["triton_plan"] not in PLANS:
        raise ValueError(f"no plan is named {row['triton_plan']!r}")


def table_row(key: dict, times: dict[str, float]) -> dict | None:
    """A row of a table, with the best of Triton's plans; None where torch has no time.

    Args:
        key: what ROW_KEY names.
        times: milliseconds of "torch", "triton:PLAN", "cuda" and "cuda:linear", where they were
            measured; "cuda" is its first plan.
    """
    if "torch" not in times:
        return None
    plans = {name: t for name, t in times.items() if name.startswith("triton:")}
    best = min(plans, key=plans.__getitem__, default=None)
    return {name: key[name] for name in ROW_KEY} | {
        "torch": times["torch"],
        "triton": None if best is None else plans[best],
        "triton_plan": best.partition(":")[2] if best else "",
        "cuda": times.get("cuda"),
        "cuda:linear": times.get("cuda:linear"),
    }


def measured_choice(
    device: str, call: Call, usable: tuple[str, ...], folder: Path | None = None
) -> Choice:
    """The fastest of the ``usable`` backends for a call on a GPU; writes one log line.

    usable: names of BACKENDS, and "cuda:linear" where that plan can compute the call.
    """
    choice = _choose(load_table(device, folder), device, call, usable)
    logger.info("auto on %s, %s: %s (%s)", device, _words(call), choice.backend, choice.why)
    return choice


def _choose(table: dict | None, device: str, call: Call, usable: tuple[str, ...]) -> Choice:
    if table is None:
        return Choice("torch", f"nothing was measured on {device} yet: ckf tune measures")
    wanted = "train" if call.train else "forward"
    rows = [r for r in table["rows"] if r["pass"] == wanted and r["dropout"] == call.dropout]
    near = min(rows, key=lambda row: _doublings(row, call), default=None)
    if near is None or _doublings(near, call) > FARTHEST:
        return Choice("torch", "no measured shape is near")
    times = {name: near[name] for name in usable if near.get(name) is not None}
    best = min(times, key=times.__getitem__, default="torch")
    if best != "torch" and times[best] > (1 - LEAST_GAIN) * times.get("torch", math.inf):
        best = "torch"
    sizes = ", ".join(f"{size} {near[size]}" for size in _SIZES)
    why = f"at {sizes} it took " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items())
    name, _, plan = best.partition(":")
    plans = {"triton": near["triton_plan"], "cuda": plan or CUDA_PLANS[0]}
    return Choice(name, why, plans.get(name) or PLANS[0])


def _doublings(row: dict, call: Call) -> float:
    return sum(
        abs(math.log2(max(row[size], 1)) - math.log2(max(getattr(call, size), 1)))
        for size in _SIZES
    )


def _words(call: Call) -> str:
    sizes = ", ".join(f"{size} {getattr(call, size)}" for size in _SIZES)
    kind = "forward and backward" if call.train else "forward"
    return f"{sizes}, {kind}{' with dropout' if call.dropout else ''}"
