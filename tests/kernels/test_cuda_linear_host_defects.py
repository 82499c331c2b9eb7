"""Planted defects of the decode kernels that own the base: each must show, or the tests on the host
prove nothing."""

from pathlib import Path

import pytest

from tests.kernels.frozen_cases import assert_frozen_right, frozen_case
from tests.kernels.host_build import compile_for_host, copy_changed
from tests.kernels.test_cuda_linear_host import Form, run

HEADER, PLAN, LAUNCHER = "decode_linear.h", "decode_linear_plan.h", "decode_linear.cu"
TILES, TILES_LAUNCHER = "decode_wgmma.h", "decode_wgmma.cu"
COPIES, LAYOUT = "decode_wgmma_copy.h", "decode_wgmma_plan.h"
DEFECTS = {
    "tail of k": (
        PLAN, "min(min(each, all - first) * kChunk, p.k - first * kChunk)",
        "min(each, all - first) * kChunk",
    ),
    "a share's end": (
        PLAN, "min(min(each, all - first) * kChunk, p.k - first * kChunk)", "p.k - first * kChunk",
    ),
    "another linear's A": (
        HEADER, "p.a + static_cast<int64_t>(linear.first_column) * p.k", "p.a",
    ),
    "another block's columns of A": (
        HEADER, "p.k, first, block.end_column", "p.k, 0, block.linear.rank",
    ),
    "another linear's gates": (HEADER, "block.linear.first_column + column)", "column)"),
    "gate by multiplication": (
        HEADER, "gate != 0.0f ? without_sign_of_zero(gate * s) : float_of(kDead)", "gate * s",
    ),
    "id not checked": (HEADER, "shared.task[row] == kInvalid ? nanf(\"\") : ", ""),
    "a part left out": (HEADER, "int warp = 1; warp < P::kWarps", "int warp = 2; warp < P::kWarps"),
    "no bias": (HEADER, "block.linear.bias != nullptr", "false"),
    "a copy not waited for": (
        HEADER, "        wait_for_copies();\n        __syncthreads();\n        if (",
        "        if (",
    ),
    "S added too early": (
        HEADER, "        wait_for_copies();\n        __syncthreads();\n        share_h",
        "        wait_for_copies();\n        share_h",
    ),
    "h read too early": (
        HEADER, "        if (span == 0) wait_for_arrivals(&shared.arrivals);\n", "",
    ),
    "sums read too early": (HEADER, "        __syncthreads();\n        copy_b", "        copy_b"),
    "parts written while they are read": (
        HEADER, "        wait_for_copies();\n        __syncthreads();\n        if (",
        "        wait_for_copies();\n        if (",
    ),
    "next span's loads": (HEADER, "find_w(block, span + 1)", "find_w(block, span)"),
    "left while it is sent to": (
        HEADER, "    if (block.spans == 0) wait_for_arrivals(&shared.arrivals);", "    ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_seen(tmp_path: Path, name):
    """A planted defect must show, or the tests above prove nothing."""
    copy_changed(tmp_path, *DEFECTS[name])
    changed = Form(compile_for_host(tmp_path / LAUNCHER, tmp_path, planted=True), "loads")
    ids, ranks = [0, 1, 5, -1, 1], ((3, 3, 3), (2, 4, 1))
    with pytest.raises(AssertionError):
        for k in (1048, 40):  # some blocks have nothing of 40 to multiply and run ahead
            case = frozen_case(m=5, k=k, ns=(1100, 24), ranks=ranks, ids=ids, seed=1)
            case.group.bs[0][3:6, ::2] = float("inf")
            for order in (0, 1, 2, 3):
                assert_frozen_right(case, run(changed, case, order, 2))


SYNC = "sync_threads<kConsumers>();\n"
TILE_DEFECTS = {
    "the next stage too early": (
        COPIES, "wait_barrier(memory.empty(step.stage), step.parity);", "",
    ),
    "a tile not waited for": (TILES, "wait_barrier(memory.full(step.stage), step.parity);", ""),
    "given back while it is read": (TILES, "wait_products<1, T>(acc);", ""),
    "never given back": (TILES, "if (held >= 0) release(held);\n            held", "held"),
    "given back by every lane": (TILES, "if (lane == 0) arrive_at", "arrive_at"),
    "fewer bytes expected": (COPIES, "memory.x_bytes + kTile", "kTile"),
    "columns of A in later spans": (
        COPIES, "to.span == 0 ? p.share * kRowBytes : 0", "p.share * kRowBytes",
    ),
    "another place for A": (LAYOUT, "w(stage) + kWBytes", "w(stage) + kWBytes - kAtomBytes"),
    "a role goes on where others began": (
        COPIES, "ahead / chunks, ahead % chunks * kRowElements", "0, 0",
    ),
    "another block's columns of A": (COPIES, "a_row = linear.first_column +", "a_row ="),
    "no second span": (COPIES, "n + to.span * kTile", "n"),
    "another linear's gates": (TILES, "p.rank + linear.first_column +", "p.rank +"),
    "gate by multiplication": (
        TILES, "gate[i] != 0.0f ? without_sign_of_zero(gate[i] * s) : float_of(kDead)",
        "gate[i] * s",
    ),
    "columns past a share": (TILES, "task >= 0 && column < block.columns", "task >= 0"),
    "id not checked": (TILES, "tail.task[at_row] == kInvalid ? nanf(\"\") : ", ""),
    "a team left out": (TILES, "int i = 1; i < kTeams", "int i = 2; i < kTeams"),
    "no bias": (COPIES, "linear.bias != nullptr", "false"),
    "b of the next span too early": (
        COPIES, "if (span > 0) wait_barrier(memory.b_read(), (span - 1) & 1);", "",
    ),
    "what is not finite left out": (
        TILES, "if (__ballot_sync(kFull, !tame) != 0) add_wild", "if (false) add_wild",
    ),
    "what is not finite in b unseen": (TILES, "&& tail.wild == 0", ""),
    "a low part left out": (
        TILES, "product_tf32(sums[j], low,", "if (false) product_tf32(sums[j], low,",
    ),
    "S added too early": (TILES, SYNC + "                make_h", "make_h"),
    "sent before it is made": (TILES, SYNC + "                send_h", "send_h"),
    "h not waited for": (TILES, "wait_barrier(memory.arrivals(), 0);", ""),
    "h not sent": (TILES, "send_h();\n                wait", "wait"),
    "sums read too early": (TILES, SYNC + "            write_y", "write_y"),
    "left while its h is copied": (
        TILES, "    cluster_wait<kCluster>();  // nobody leaves", "    // nobody leaves",
    ),
    "a tile of k too few": (
        LAYOUT, "(p.k + kRowElements - 1) / kRowElements", "p.k / kRowElements",
    ),
    "spans for more clusters": (TILES_LAUNCHER, "p.spans = spans;", "p.spans = 1;"),
    "no multiple of eight rows": (
        TILES_LAUNCHER, "(p.m + kAtomRows - 1) / kAtomRows * kAtomRows", "p.m / 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TILE_DEFECTS)
def test_defects_of_tiles_are_seen(tmp_path: Path, name):
    copy_changed(tmp_path, *TILE_DEFECTS[name])
    library = compile_for_host(tmp_path / TILES_LAUNCHER, tmp_path, planted=True)
    changed, ranks = Form(library, "wgmma"), ((3, 3, 3), (2, 30, 1))
    with pytest.raises(AssertionError):
        for m, k in ((5, 840), (29, 40)):
            ids = [0, 1, 5, -1, 1] * (m // 5) + [0] * (m % 5)
            case = frozen_case(m=m, k=k, ns=(600, 24), ranks=ranks, ids=ids, seed=1)
            case.group.bs[0][3:6, ::2] = float("inf")
            for order in (0, 1, 3):
                assert_frozen_right(case, run(changed, case, order, 2))


def test_a_stage_that_changes_hands_is_seen(tmp_path: Path):
    """An odd number of stages, where copies are long on their way."""
    right, wrong = "fit / kTeams * kTeams : kMostStages", "fit - 1 + fit % 2 : kMostStages - 1"
    copy_changed(tmp_path, LAYOUT, right, wrong)
    library = compile_for_host(tmp_path / TILES_LAUNCHER, tmp_path, planted=True)
    changed = Form(library, "wgmma")
    with pytest.raises(AssertionError):
        for m, n in ((52, 250), (40, 250), (13, 500)):
            case = frozen_case(m=m, k=1032, ns=(n,), ranks=((3, 3, 3),), seed=1)
            for _ in range(3):
                assert_frozen_right(case, run(changed, case, 3))
