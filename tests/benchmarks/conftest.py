"""The steps of the command for a GPU machine, without one."""

import pytest

from benchmarks import gpu


@pytest.fixture
def runner(tmp_path) -> gpu.Runner:
    return gpu.Runner(tmp_path / "out", has_gpu=True, seconds=100, archive=tmp_path)
