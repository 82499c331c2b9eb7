"""One process of several, as torchrun starts them: who prepares and writes, who waits and reads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch

# The others wait while one prepares data and fits CF vectors; torch gives up after 10 to 30 minutes
WAIT = timedelta(hours=24)


def process_count() -> int:
    """Processes that train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def main_process_first(device: torch.device) -> Iterator[None]:
    """What stands inside runs in the main process first, then in the others.

    Joins the processes, and gives each its own GPU where ``device`` is one.
    """
    if process_count() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=device.type == "cpu", timeout=WAIT).main_process_first():
        yield
