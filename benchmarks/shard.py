"""A pytest plugin: one part of the tests. ``CKF_SHARD=2/4`` runs each fourth from the second on.

For several processes without xdist (``-p benchmarks.shard``), under a sanitizer for one.
"""

import os

import pytest


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    part, parts = map(int, os.environ["CKF_SHARD"].split("/"))
    items[:] = items[part - 1 :: parts]
