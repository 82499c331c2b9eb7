"""What a record of a GPU machine says of it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")]))


def output_of(command: list[str], folder: Path = ROOT) -> str:
    """The last line of output of a command in a folder, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unavailable: {error}"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1] if lines else ""


def environment(torch) -> dict:
    """What a reader needs to repeat or to doubt the numbers."""
    from benchmarks.harness import commit, sources_digest  # imports torch

    in_git = (ROOT / ".git").exists() and not os.environ.get("CKF_COMMIT")
    versions = {}
    for name in ("torch", "triton", "transformers", "numpy", "peft", "pytest"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "uncommitted": output_of(["git", "status", "--porcelain"]) != "" if in_git else None,
        "sources": sources_digest(),
        "cuda": torch.version.cuda,
        "nvcc": output_of([find_nvcc() or "nvcc", "--version"]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "gpu": None,
    }
    if not torch.cuda.is_available():
        return found
    properties = torch.cuda.get_device_properties(0)
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return found | {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": output_of(driver),
    }
