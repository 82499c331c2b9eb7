"""Mixed-task training and inference at small size for minutes; fails where something grows.

    python scripts/soak.py --seconds 600 [--device cuda]

Every cycle patches a model, trains it some steps on a new mix of tasks, saves and loads its
adapters, generates, and unpatches it. Watched: resident memory, live tensors, GPU memory, compiled
kernels, open files, threads. The first third warms up; after it the medians of the second and of
the last third are compared, and growth beyond the margins is an error.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ckf
from tests.tiny import tiny_model

TASKS = ["ctr", "topk", "rating"]
# what each may grow between the second and the last third; memory has an allocator's noise
MARGINS = {"rss_mb": 24, "tensors": 0, "gpu_mb": 1, "kernels": 0, "files": 0, "threads": 0}


def cycle(number: int, device: str) -> None:
    """One life of a patched model; sizes and mixes differ from cycle to cycle."""
    torch.manual_seed(number)
    model = tiny_model().to(device)
    gate = ("hard", "learned")[number % 2]
    ckf.patch_model(model, TASKS, r=2 + number % 3, lora_dropout=0.1, gate=gate).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ckf.TaskPresence(model).attach(optimizer)
    for step in range(6):
        rows = 1 + (number + step) % 5
        ids = torch.randint(1, 64, (rows, 5 + step), device=device)
        tasks = torch.randint(-1, len(TASKS), (rows,))
        model(input_ids=ids, labels=ids, task_ids=tasks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        ckf.save_adapters(model, Path(folder) / "saved")
        ckf.load_adapters(model, Path(folder) / "saved")
    model.eval().generate(ids, max_new_tokens=3, do_sample=False, task_ids=["ctr"] * rows)
    ckf.unpatch_model(model)


def figures(device: str) -> dict[str, float]:
    """What is held now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
        "gpu_mb": torch.cuda.memory_allocated() / 2**20 if device != "cpu" else 0,
        "kernels": compiled_kernels(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
    }


def compiled_kernels() -> int:
    """Variants that Triton holds for the kernels of ckf; 0 where none was loaded."""
    count = 0
    for name, module in list(sys.modules.items()):
        if not name.startswith("ckf.kernels.triton_"):
            continue
        for thing in vars(module).values():
            count += len(getattr(thing, "_binaries", ()))  # remembered launches
            caches = getattr(getattr(thing, "kernel", thing), "device_caches", None)
            if isinstance(caches, dict):
                count += sum(len(held[0]) for held in caches.values())
    return count


def grown(history: list[dict[str, float]], margins: dict[str, float]) -> dict[str, float]:
    """What grew beyond its margin from the second third to the last, and by how much."""
    third = len(history) // 3
    before, after = history[third : 2 * third], history[2 * third :]
    found = {}
    for name, margin in margins.items():
        growth = statistics.median(f[name] for f in after) - statistics.median(
            f[name] for f in before
        )
        if growth > margin:
            found[name] = round(growth, 1)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Soak; prints one JSON line; 1 where something grew."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    history, end = [], time.monotonic() + options.seconds
    while time.monotonic() < end or len(history) < 9:
        cycle(len(history), options.device)
        history.append(figures(options.device))
    growth = grown(history, MARGINS)
    report = {
        "cycles": len(history),
        "first": history[0],
        "warm": history[len(history) // 3],
        "last": history[-1],
        "grown": growth,
    }
    print(json.dumps(report))
    return 1 if growth else 0


if __name__ == "__main__":
    sys.exit(main())
