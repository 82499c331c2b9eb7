"""Planted defects of the decode kernels: each must show, or the tests on the host prove nothing."""

from pathlib import Path

import pytest
import torch

from tests.kernels.decode_cases import assert_group_right, decode_case, group_case
from tests.kernels.host_build import LAUNCH_FAILURE, compile_for_host, copy_changed
from tests.kernels.test_cuda_host import Host, call, run_group

KERNEL = "multi_lora_decode.h"
DEFECTS = {
    "tail of k": ("device.h", "out.v[v] = v < left ? p[v]", "out.v[v] = v <= left ? p[v]"),
    "no barrier": (KERNEL, "    __syncthreads();\n", ""),
    "gate by multiplication": (KERNEL, "if (!(mask >> r & 1u)) continue;", ""),
    "id not checked": (KERNEL, 'rows.task[r] == kInvalid ? nanf("") : ', ""),
    "another linear's A": (
        KERNEL,
        "p.a + static_cast<int64_t>(linear.first_column) * p.k",
        "p.a",
    ),
    "another linear's gates": (
        KERNEL,
        "p.rank + linear.first_column +",
        "p.rank +",
    ),
    "a part of k left out": (KERNEL, "from < kParts;", "from < kParts - 1;"),
    "no cluster barrier": (
        KERNEL,
        "cluster_arrive<kCluster>();\n    cluster_wait<kCluster>();\n",
        "",
    ),
    "a block leaves early": (
        KERNEL,
        "    if (kCluster > 1 && pending) cluster_wait<kCluster>();  // nobody leaves",
        "    //",
    ),
}


SHRINK, TILE = "multi_lora_decode_shrink.h", "multi_lora_decode_tile.h"
TILE_DEFECTS = {
    "no barrier": (SHRINK, "        __syncthreads();\n    }\n", "    }\n"),
    "gate by multiplication": (
        SHRINK,
        "gate[i] != 0.0f ? without_sign_of_zero(gate[i] * s) : float_of(kDead)",
        "gate[i] * s",
    ),
    "inf spread": (TILE, "word &= ~(halves * 0xffffu);", ""),
    "id not checked": (TILE, 'task == kInvalid ? nanf("") : ', ""),
    "another linear's A": (
        SHRINK,
        "p.a + static_cast<int64_t>(block.linear.first_column) * p.k",
        "p.a",
    ),
    "another linear's gates": (SHRINK, "p.rank + block.linear.first_column +", "p.rank +"),
    "a part of k left out": (SHRINK, "from = 0; from < kCluster;", "from = 1; from < kCluster;"),
    "tail of k": (SHRINK, "at + kChunk <= p.k", "at <= p.k"),
    "no cluster barrier": (SHRINK, "    cluster_wait<kCluster>();\n    write_h", "    write_h"),
    "no barrier after the exchange": (
        SHRINK,
        "    if (share.for_all)\n        cluster_wait<kCluster>();\n    else\n",
        "",
    ),
    "a block leaves early": (
        TILE,
        "    if (kCluster > 1 && pending) cluster_wait<kCluster>();  // nobody leaves",
        "    //",
    ),
}


def compile_changed(folder: Path, file: str, right: str, wrong: str) -> Host:
    copy_changed(folder, file, right, wrong)
    return Host(compile_for_host(folder / "multi_lora_decode.cu", folder, planted=True))


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_seen(tmp_path, name):
    """A planted defect must show: else the tests above prove nothing."""
    host = compile_changed(tmp_path, *DEFECTS[name])
    case = group_case(
        m=4, k=1037, ns=(300, 24), ranks=((3, 3, 3), (2, 4, 1)), ids=[0, 1, 5, -1], seed=1
    )
    case.bs[0][3:6, ::2] = float("inf")
    with pytest.raises(AssertionError):
        for order in (0, 1):
            assert_group_right(case, run_group(host, case, order))


@pytest.mark.parametrize("name", TILE_DEFECTS)
def test_defects_of_the_tile_kernel_are_seen(tmp_path, name):
    """As above; three rows are summed by every block for itself, five are exchanged."""
    host = compile_changed(tmp_path, *TILE_DEFECTS[name])
    with pytest.raises(AssertionError):
        for m in (3, 5):
            case = group_case(
                m=m, k=1048, ns=(304, 24), ranks=((3, 3, 3), (2, 4, 1)), ids=[0, 1, 5, -1, 1][:m],
                seed=1, dtype=torch.bfloat16,
            )  # fmt: skip
            case.bs[0][3:6, ::2] = float("inf")
            for order in (0, 1):
                assert_group_right(case, run_group(host, case, order))


def test_divergent_barrier_is_reported(tmp_path):
    """A barrier that one warp never reaches is an error of the launch, not a hang."""
    changed = ("    __syncthreads();", "    if (warp != 3) __syncthreads();")
    host = compile_changed(tmp_path, KERNEL, *changed)
    assert call(host, decode_case()) == LAUNCH_FAILURE
