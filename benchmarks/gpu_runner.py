"""Runs the steps of ``gpu.py``: a time limit each, logs and a summary on disk at all times."""

import contextlib
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 5  # for a step that is late, to write what it has
LEAST_SECONDS = 5  # worth starting a step
PACK_EVERY = 30  # seconds
FINE = ("passed", "partial", "skipped", "not done")


class Runner:
    """Steps into a folder.

    Args:
        folder: for ``<step>.log`` and ``summary.json``. Steps of an earlier call with the same
            sources stay in the summary until they run again.
        seconds: for all steps together.
        sources: digest of the code, kept with every step.
        archive: folder of ``<folder's name>.tar.gz``, all of it in one file, written anew every
            ``PACK_EVERY`` seconds and after every step; None: none.
    """

    def __init__(
        self,
        folder: Path,
        has_gpu: bool,
        seconds: float,
        sources: str | None = None,
        archive: Path | None = None,
    ) -> None:
        self.folder, self.has_gpu, self.sources, self.archive = folder, has_gpu, sources, archive
        self.deadline = time.monotonic() + seconds
        self.steps: list[dict] = []
        self._packing, self._writing = threading.Lock(), threading.RLock()
        self._ends, self._stopped = set(), False  # of the processes that run
        folder.mkdir(parents=True, exist_ok=True)
        self.earlier = self._earlier()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip(self, name: str, why: str, state: str = "skipped") -> None:
        """``state``: "not done" where more time would do it."""
        print(f"-- {name}: {state.upper()}, {why}", flush=True)
        self._add({"step": name, "state": state, "why": why})

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        least: float = LEAST_SECONDS,
        grace: float | None = None,
        partial: Path | None = None,
        **extra_environment: str,
    ) -> bool:
        """True if the command exits with 0 within ``limit`` seconds; its output goes to the screen
        and to <name>.log.

        Args:
            least: seconds below which it is not worth starting.
            grace: seconds between the interrupt at the limit and the end.
            partial: a file that it writes as it goes: no failure if it did when its time is up.
        """
        if limit < least:
            why = f"{max(limit, 0):.0f} s left, it takes {least:.0f} or more"
            self.skip(name, why, "not done")
            return False
        print(f"-- {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
        step = {"step": name, "state": "interrupted", "command": command}
        self._add(step)
        start, clock = time.monotonic(), time.time()
        status, late = self._execute(name, command, limit, grace, extra_environment)
        step |= {"seconds": round(time.monotonic() - start, 1), "exit_status": status}
        if self._stopped:
            pass
        elif late:
            wrote = partial is not None and partial.exists() and partial.stat().st_mtime >= clock
            step["state"] = "partial" if wrote else "TIMED OUT"
        else:
            step["state"] = "passed" if status == 0 else "FAILED"
        self._write()
        self.pack()
        print(f"-- {name}: {step['state']} in {step['seconds']} s", flush=True)
        return step["state"] == "passed"

    def run_beside(
        self, jobs: Sequence[tuple[str, list[str], dict]], limit: float, **options
    ) -> bool:
        """(name, command, environment) all at once, a step each; True if all pass."""
        with ThreadPoolExecutor(len(jobs)) as pool:
            try:
                runs = [
                    pool.submit(self.run, name, command, limit, **options, **environment)
                    for name, command, environment in jobs
                ]
                while wait(runs, timeout=0.5).not_done:  # so that a signal is seen
                    pass
                return all([run.result() for run in runs])
            except BaseException:
                self._stopped = True
                for end in list(self._ends):
                    threading.Thread(target=end).start()
                raise

    def failed(self) -> list[str]:
        return [s["step"] for s in self.steps if s["state"] not in FINE]

    def those(self, state: str) -> list[str]:
        return [s["step"] for s in self.steps if s["state"] == state]

    def pack(self) -> Path | None:
        """All files of the folder in one, for machines that give back few."""
        if self.archive is None:
            return None
        with self._packing:
            self.archive.mkdir(parents=True, exist_ok=True)
            archive = self.archive / f"{self.folder.name}.tar.gz"
            temporary = archive.with_name(f"{archive.name}.tmp")
            with tarfile.open(temporary, "w:gz") as tar:
                tar.add(self.folder, self.folder.name)
            return temporary.replace(archive)

    def _execute(
        self, name: str, command: list[str], limit: float, grace: float | None, extra: dict
    ) -> tuple:
        """Exit status, and whether the time limit ended it."""
        late, over = threading.Event(), threading.Event()
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | extra,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # a sanitizer's or a compiler's children end with it
            )

            def end() -> None:
                """Interrupt, so that Python writes what it has; then kill all that is left."""
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, signal.SIGINT)
                    process.wait(GRACE_SECONDS if grace is None else grace)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            def too_late() -> None:
                late.set()
                end()

            def keep_packing() -> None:
                while not over.wait(PACK_EVERY):
                    with contextlib.suppress(OSError):  # a file that went away meanwhile
                        self.pack()

            timer = threading.Timer(limit, too_late)
            timer.start()
            self._ends.add(end)
            threading.Thread(target=keep_packing, daemon=True).start()
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    log.write(line)
                    log.flush()
                return process.wait(), late.is_set()
            except BaseException:
                end()
                raise
            finally:
                self._ends.discard(end)
                timer.cancel()
                over.set()

    def _earlier(self) -> list[dict]:
        try:
            steps = json.loads((self.folder / "summary.json").read_text())
            return [s for s in steps if self.sources and s.get("sources") == self.sources]
        except (OSError, ValueError):
            return []

    def _add(self, step: dict) -> None:
        if self.sources:
            step["sources"] = self.sources
        with self._writing:
            self.steps.append(step)
            self._write()

    def _write(self) -> None:
        with self._writing:
            self._write_summary()

    def _write_summary(self) -> None:
        again = {step["step"] for step in self.steps}
        steps = [s for s in self.earlier if s["step"] not in again] + self.steps
        temporary = self.folder / "summary.json.tmp"
        temporary.write_text(json.dumps(steps, indent=1) + "\n")
        temporary.replace(self.folder / "summary.json")
