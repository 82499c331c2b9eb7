"""Tests marked ``gpu`` are skipped, with the reason, where torch sees no CUDA device."""

import signal

import pytest
import torch

pytest_plugins = ["tests.ckf_fixtures"]


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would what tests begin and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch sees no CUDA device")
        for item in marked:
            item.add_marker(skip)
