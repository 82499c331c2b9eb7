"""What processes of tests/test_experiment_jobs.py do: functions of a module, as they travel."""

import os
import time
from pathlib import Path


def make(folder: Path, log):
    """Notes who did what, in one file a run."""
    log(f"made with {folder.name}")

    def work(name: str) -> None:
        print(f"printed by {name}", flush=True)
        os.system("echo printed by a child")
        if name == "wrong":
            raise ValueError("three is not four")
        if name == "dies":
            os._exit(7)
        if name == "breaks":
            raise RuntimeError("nobody expected this")
        if name == "slow":
            time.sleep(60)
        deadline = time.monotonic() + 60
        while name.startswith("together") and len(list(folder.glob("together*"))) < 2:
            (folder / name).write_text("")  # two of these end only side by side
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (folder / name).write_text(str(os.getpid()))

    return work


def make_nothing(folder: Path, log):
    raise ValueError("the data are gone")


if __name__ == "__main__":  # for the test that interrupts a command
    import sys

    import polars  # noqa: F401  (every experiment on raw data has it; it takes over SIGINT)

    from ckf.experiment.jobs import Run, run_side_by_side

    out = Path(sys.argv[1])
    runs = [Run("slow", f"slow {k}", out / f"run{k}", 5) for k in range(3)]
    run_side_by_side(runs, 2, make, (out,), lambda line: print(line, flush=True))
