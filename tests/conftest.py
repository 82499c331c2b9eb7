"""Tests marked ``gpu`` are skipped, with the reason, where torch sees no CUDA device."""

import pytest
import torch

pytest_plugins = ["tests.ckf_fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="torch sees no CUDA device")
        for item in marked:
            item.add_marker(skip)
