"""How long, and in how much memory, are N Amazon reviews prepared?

Writes a file of N made-up reviews (2014 format, about 400 bytes of text each), prepares it in a
child process with every task, and keeps seconds and the child's peak resident memory in
benchmarks/results/cpu/readers.json.

    python benchmarks/bench_readers.py [--rows 5000000] [--plain] [--folder TMP] [--no-save]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "cpu" / "readers.json"
POOL = 20_000  # different texts
CHUNK = 100_000
CHILD = """
import json, sys, time
from ckf.data.config import TASKS, DataConfig, TaskRows
from ckf.data.prepare import prepare
start = time.perf_counter()
config = DataConfig("bench", "amazon", min_user=5, min_item=5, test_lists=["uniform9", "uniform99"])
tasks = {task: TaskRows() for task in TASKS}
data = prepare(config, tasks, sys.argv[1], sys.argv[2], 0, log=lambda line: print(
    f"{time.perf_counter() - start:6.1f} s  {line}", file=sys.stderr))
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": round(seconds, 1), "peak_rss_gib": round(peak / 2**20, 2),
                  "counts": data.manifest["counts"]}))
"""


def texts(rng: np.random.Generator) -> list[str]:
    """JSON strings of about 400 characters each, in sentences."""
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(5000)]
    words += ["great", "love", "terrible", "well", "poor"]
    out = []
    for length in rng.poisson(72, size=POOL):
        chosen = [words[i] for i in rng.integers(0, len(words), size=length)]
        for place in range(9, length, 12):
            chosen[place] += "."
        out.append(json.dumps(" ".join(chosen) + "."))
    return out


def write_reviews(path: Path, rows: int, plain: bool) -> None:
    """N reviews: 8 a user on average, items by a power law, some users and items rare."""
    rng = np.random.default_rng(0)
    pool = texts(rng)
    users, items = max(rows // 8, 10), max(rows // 40, 200)
    with open(path, "wb") if plain else gzip.open(path, "wb", compresslevel=1) as file:
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            columns = zip(
                (users * rng.random(n) ** 1.5).astype(int).tolist(),
                (items * rng.random(n) ** 2.5).astype(int).tolist(),
                rng.integers(0, POOL, n).tolist(),
                rng.choice([1, 2, 3, 4, 5], n, p=[0.07, 0.06, 0.12, 0.25, 0.5]).tolist(),
                (rng.integers(10_000, 16_000, n) * 86_400).tolist(),
                strict=True,
            )
            lines = [
                f'{{"reviewerID": "A{user:013d}", "asin": "B{item:09d}", "reviewerName": "J. Doe", '
                f'"helpful": [0, 0], "reviewText": {pool[text]}, "overall": {stars}.0, '
                f'"summary": "Good", "unixReviewTime": {when}, "reviewTime": "03 16, 2013"}}\n'
                for user, item, text, stars, when in columns
            ]
            file.write("".join(lines).encode())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def main() -> None:
    """Generate, prepare in a child, print the figures as JSON and save them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--plain", action="store_true", help="no gzip")
    parser.add_argument("--folder", help="where the temporary files go")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / ("reviews_Bench.json" + ("" if arguments.plain else ".gz"))
        start = time.perf_counter()
        write_reviews(path, arguments.rows, arguments.plain)
        print(f"wrote {path} in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        size = path.stat().st_size
        root = Path(__file__).resolve().parents[1]
        found = os.environ.get("PYTHONPATH")
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(path), str(Path(folder) / "out")],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [found, str(root)]))},
        )
    result = {
        "rows": arguments.rows,
        "file_bytes": size,
        "gzip": not arguments.plain,
        **json.loads(child.stdout),
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "cpu": platform.machine(),
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result, indent=1))
    if not arguments.no_save:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
