"""Runs of an experiment side by side, each in a process of its own.

One run of a small model leaves a GPU waiting for Python (LOG.md: 0.2 s of work in a step of 0.55 s
on an H100). What runs share is made before; a process that dies costs its run alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

Log = Callable[[str], None]
OUTPUT = "output.log"  # in a run's folder: what its process has printed
SECONDS_BETWEEN_LINES = 60.0
SECONDS_TO_END = 10.0
SECONDS_TO_WAKE = 0.5  # polars has a handler of SIGINT that ends no wait without a limit


class Run(NamedTuple):
    """What a process is asked for: an argument of its own, the run's name and folder, its steps."""

    work: Any
    name: str
    folder: Path
    steps: int


def run_side_by_side(
    runs: Sequence[Run],
    jobs: int,
    make: Callable[..., Callable[[Any], None]],
    arguments: tuple,
    log: Log,
) -> dict[str, str]:
    """All runs, ``jobs`` at a time; why those that failed did, by name.

    Args:
        make: in every process called once, as ``make(*arguments, log=...)``; gives the function
            that is then called with the ``work`` of run after run. Both travel by pickle, so a
            function of a module. ValueError, ImportError and a lack of memory fail a run, anything
            else ends its process as well.
        log: gets the processes' lines, the name of their run before them, and once a minute where
            training is.
    """
    todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        todo.put(run)
    jobs = min(jobs, len(runs))
    threads = max(1, torch.get_num_threads() // max(jobs, 1))
    teams = [_Team(make, arguments, threads, log) for _ in range(jobs)]
    failed: dict[str, str] = {}

    def work_off(team: _Team) -> None:
        while True:
            try:
                run = todo.get_nowait()
            except queue.Empty:
                return team.end()
            why = team.run(run)
            if why is not None and not team.stopped:
                failed[run.name] = why
                log(f"{run.name} failed: {why}")

    pool = ThreadPoolExecutor(max(jobs, 1))
    try:
        for future in [pool.submit(work_off, team) for team in teams]:
            while not wait([future], SECONDS_TO_WAKE).done:
                pass
            future.result()
    finally:  # also when interrupted
        while not todo.empty():
            todo.get()
        for team in teams:
            team.stop()
        pool.shutdown()
    return failed


class _Team:
    """A process, begun when it is first needed and again after it died, and who listens to it."""

    def __init__(self, make, arguments: tuple, threads: int, log: Log) -> None:
        self.target = (make, arguments, threads)
        self.log = log
        self.process: multiprocessing.Process | None = None
        self.connection: Connection | None = None
        self.stopped = False

    def run(self, run: Run) -> str | None:
        """Why the run failed, or None."""
        if self.process is None:
            self._begin()
        try:
            self.connection.send((run.work, run.folder))
            return self._listen(run)
        except (EOFError, OSError):
            self.process.join(SECONDS_TO_END)
            self.process.kill()  # where it has not ended by itself
            code, self.process = self.process.exitcode, None
            return f"its process ended with code {code}; {run.folder / OUTPUT} has its last words"

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA survives no fork
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid(), *self.target))
        self.process.start()
        theirs.close()

    def _listen(self, run: Run) -> str | None:
        said = time.monotonic()
        while True:
            left = said + SECONDS_BETWEEN_LINES - time.monotonic()
            if not self.connection.poll(max(left, 0.0)):
                self.log(f"{run.name}: {progress(run)}")
                said = time.monotonic()
                continue
            kind, words = self.connection.recv()
            if kind == "log":
                self.log(f"{run.name}: {words}")
                said = time.monotonic()
            else:
                return None if kind == "done" else words

    def end(self) -> None:
        """After its last run."""
        if self.process is not None:
            self.connection.send(None)
            self.process.join()

    def stop(self) -> None:
        self.stopped = True
        process = self.process
        if process is not None and process.is_alive():
            process.terminate()
            process.join(SECONDS_TO_END)
            process.kill()


def progress(run: Run) -> str:
    """Where training is, by its log."""
    try:
        last = (run.folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return f"step {json.loads(last)['step']:.0f} of {run.steps}"
    except (OSError, IndexError, KeyError, ValueError, TypeError):
        return "at work"


def _serve(connection: Connection, parent: int, make, arguments: tuple, threads: int) -> None:
    """The process: makes what works, then does run after run until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the parent says when to end
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    # loaders of batches begin as in any other process; as this one did, each would import torch
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)

    def log(line: str) -> None:
        connection.send(("log", line))

    work = None
    while (asked := connection.recv()) is not None:
        own, folder = asked
        with _printing_to(folder / OUTPUT):
            try:
                work = work or make(*arguments, log=log)
                work(own)
            except (ValueError, ImportError, torch.OutOfMemoryError) as error:
                connection.send(("failed", str(error)))
            except Exception:  # a defect: nothing here is to be trusted any more
                traceback.print_exc()
                sys.exit(1)
            else:
                connection.send(("done", ""))


def _end_with(parent: int) -> None:
    """Nobody trains on for a command that is gone, in folders that the next one will use."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextmanager
def _printing_to(file: Path) -> Iterator[None]:
    """What this process, its libraries and its children print goes to the end of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with open(file, "ab") as opened:
        for number in (1, 2):
            os.dup2(opened.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for number, own in zip((1, 2), kept, strict=True):
            os.dup2(own, number)
            os.close(own)
