"""Runs the steps of ``gpu.py``: a time limit each, logs and a summary on disk at all times."""

import contextlib
import json
import os
import signal
import subprocess
import tarfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 5  # for a step that is late, to write what it has
LEAST_SECONDS = 5  # worth starting a step
PACK_EVERY = 30  # seconds
FINE = ("passed", "partial", "skipped")


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
        self._packing = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        self.earlier = self._earlier()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip(self, name: str, why: str) -> None:
        print(f"-- {name}: SKIPPED, {why}", flush=True)
        self._add({"step": name, "state": "skipped", "why": why})

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
            self.skip(name, f"{max(limit, 0):.0f} s left, it takes {least:.0f} or more")
            return False
        print(f"-- {name} (at most {limit:.0f} s): {' '.join(command)}", flush=True)
        step = {"step": name, "state": "interrupted", "command": command}
        self._add(step)
        start, clock = time.monotonic(), time.time()
        status, late = self._execute(name, command, limit, grace, extra_environment)
        step |= {"seconds": round(time.monotonic() - start, 1), "exit_status": status}
        if late:
            wrote = partial is not None and partial.exists() and partial.stat().st_mtime >= clock
            step["state"] = "partial" if wrote else "TIMED OUT"
        else:
            step["state"] = "passed" if status == 0 else "FAILED"
        self._write()
        self.pack()
        print(f"-- {name}: {step['state']} in {step['seconds']} s", flush=True)
        return step["state"] == "passed"

    def failed(self) -> list[str]:
        return [s["step"] for s in self.steps if s["state"] not in FINE]

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
        self.steps.append(step)
        self._write()

    def _write(self) -> None:
        again = {step["step"] for step in self.steps}
        steps = [s for s in self.earlier if s["step"] not in again] + self.steps
        temporary = self.folder / "summary.json.tmp"
        temporary.write_text(json.dumps(steps, indent=1) + "\n")
        temporary.replace(self.folder / "summary.json")
