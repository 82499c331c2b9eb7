"""Planted defects of decode_linear and decode_wgmma: each must show, or the tests on the host prove nothing."""

from pathlib import Path

import pytest

from tests.kernels.frozen_cases import assert_frozen_right, frozen_case
from tests.kernels.host_build import compile_for_host, copy_changed
from tests.kernels.test_cuda_linear_host import Form, run

HEADER, PLAN, LAUNCHER = "decode_linear.h", "decode_linear_plan.h", "decode_linear.cu"
TILES, TILES_LAUNCHER = "decode_wgmma.h", "decode_wgmma.cu"
DEFECTS = {
    "tail of k": (
        PLAN, "min(min(each, all - first) * kChunk, p.k - first * kChunk)",
        "min(each, all - first) * kChunk",
    ),
    "a share's end": (
        PLAN, "min(min(each, all - first) * kChunk, p.k - first * kChunk)", "p.k - first * kChunk",
    ),
    "another linear's A": (
        HEADER, "p.a + static_cast<int64_t>(block.linear.first_column) * p.k", "p.a",
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
        HEADER, "        wait_for_copies();\n        __syncthreads();\n        if constexpr",
        "        wait_for_copies();\n        if constexpr",
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
    changed = Form(compile_for_host(tmp_path / LAUNCHER, tmp_path, planted=True), "linear")
    ids, ranks = [0, 1, 5, -1, 1], ((3, 3, 3), (2, 4, 1))
    with pytest.raises(AssertionError):
        for k in (1048, 40):  # some blocks have nothing of 40 to multiply and run ahead
            case = frozen_case(m=5, k=k, ns=(1100, 24), ranks=ranks, ids=ids, seed=1)
            case.group.bs[0][3:6, ::2] = float("inf")
            for order in (0, 1, 2, 3):
                assert_frozen_right(case, run(changed, case, order, 2))


BRING = "        if constexpr (P::kBulk) bring_a<P>(p, block, first + P::kShare, shared);\n"
WAIT = "        wait_for_copies();\n        __syncthreads();\n"
BULK_DEFECTS = {
    "no beginning": (HEADER, "if constexpr (P::kBulk) init_bulk(&shared.a);", ""),
    "A not waited for": (HEADER, "if constexpr (P::kBulk) wait_for_bulk(&shared.a, parity);", ""),
    "one warp waits": (
        HEADER, "(P::kBulk) wait_for_bulk", "(P::kBulk) if (block.warp == 0) wait_for_bulk",
    ),
    "the next A not waited for": (HEADER, "parity ^= 1;", ""),
    "fewer bytes expected": (HEADER, "columns * bytes", "columns * bytes - bytes"),
    "more bytes expected": (HEADER, "columns * bytes", "P::kShare * bytes"),
    "elements for bytes": (HEADER, "p.k * static_cast<int>(sizeof(T))", "p.k"),
    "asked for by all": (HEADER, "threadIdx.x != 0 || columns", "columns"),
    "another linear's A": (HEADER, "(block.linear.first_column + first)", "(first)"),
    "the same round again": (HEADER, BRING, BRING.replace(" + P::kShare", "")),
    "no second round": (HEADER, BRING, ""),
    "brought while A is read": (HEADER, WAIT + BRING, BRING + WAIT),
    "another pitch": (HEADER, "to += pitch_of_a(p.k)", "to += p.k"),
    "past the end of k": (HEADER, "load_shared(wanted, from)", "load_shared(true, from)"),
    "a chunk ahead": (HEADER, "next - P::kADepth + d", "next + d"),
    "no memory for A": (LAUNCHER, "columns * pitch_of_a(p.k)", "0"),
    "memory without the padding": (LAUNCHER, "columns * pitch_of_a(p.k)", "columns * p.k"),
    "memory for half a round": (
        LAUNCHER, "P::kShare);\n    if (P::kBulk)", "kTile);\n    if (P::kBulk)",
    ),
    "columns off 16 bytes": (PLAN, "/ 64 * 64 + 32", "/ 64 * 64 + 36"),
    "taken where it does not fit": (LAUNCHER, "bytes > allowed", "false"),
}  # fmt: skip


@pytest.mark.parametrize("name", BULK_DEFECTS)
def test_defects_of_bulk_copies_are_seen(tmp_path: Path, name):
    copy_changed(tmp_path, *BULK_DEFECTS[name])
    changed = Form(compile_for_host(tmp_path / LAUNCHER, tmp_path, planted=True), "bulk")
    with pytest.raises(AssertionError):
        for k, order in ((1048, 0), (1048, 1), (1048, 2), (40, 0), (40, 3), (4840, 0)):
            case = frozen_case(m=3, k=k, ns=(24, 24), ranks=((60, 70, 60), (2, 4, 1)), seed=1)
            assert_frozen_right(case, run(changed, case, order, 2))


SYNC = "            sync_threads<kConsumers>();\n"
TILE_DEFECTS = {
    "the next stage too early": (
        TILES, "            wait_barrier(memory.empty(step.stage), step.parity);\n            bring",
        "            bring",
    ),
    "a tile not waited for": (TILES, "wait_barrier(memory.full(stage), i / M::kStages & 1);", ""),
    "the other parity": (TILES, "i / M::kStages & 1", "i / M::kStages + 1 & 1"),
    "given back while it is read": (TILES, "wait_products<1, T>(acc);", ""),
    "never given back": (TILES, "if (held >= 0) release(held);\n            held", "held"),
    "given back to this block alone": (
        TILES, "if (lane < (block.shared_x ? kCluster : 1))", "if (lane == block.rank)",
    ),
    "fewer arrivals": (TILES, "(block.shared_x ? kCluster : 1) * kTeamWarps", "kTeamWarps"),
    "fewer bytes expected": (TILES, "(x_rows + kTile + a_rows)", "(kTile + a_rows)"),
    "one block's rows of x": (TILES, "to.depth, block.rank * kAtomRows)", "to.depth, 0)"),
    "its rows in one place": (TILES, " + block.rank * kAtomBytes", ""),
    "x before its barriers are there": (
        TILES, "    cluster_wait<kCluster>();  // all barriers are there\n", "",
    ),
    "another block's columns of A": (TILES, "linear.first_column + block.first_column);", "0);"),
    "no second span": (TILES, "block.first_n + to.span * kTile", "block.first_n"),
    "another linear's gates": (TILES, "p.rank + linear.first_column +", "p.rank +"),
    "gate by multiplication": (
        TILES, "gate[i] != 0.0f ? without_sign_of_zero(gate[i] * s) : float_of(kDead)",
        "gate[i] * s",
    ),
    "id not checked": (TILES, "tail.task[at_row] == kInvalid ? nanf(\"\") : ", ""),
    "a team left out": (TILES, "int i = 1; i < kTeams", "int i = 2; i < kTeams"),
    "no bias": (TILES, "linear.bias != nullptr", "false"),
    "b not waited for": (TILES, "            wait_for_copies();\n", ""),
    "S added too early": (
        TILES, "            wait_for_copies();\n" + SYNC, "            wait_for_copies();\n",
    ),
    "sent before it is made": (TILES, "        sync_threads<kConsumers>();\n                send", "        send"),
    "h not waited for": (TILES, "wait_barrier(memory.arrivals(), 0);", ""),
    "h not sent": (TILES, "                send_h();\n", ""),
    "sums read too early": (TILES, SYNC + "            write_y", "            write_y"),
    "bias written while it is read": (
        TILES, "                sync_threads<kConsumers>();  // what write_y reads of the bias\n", "",
    ),
    "columns past a share": (TILES, "task >= 0 && column < block.columns", "task >= 0"),
    "left while it is sent to": (
        TILES, "    cluster_wait<kCluster>();  // nobody leaves", "    // nobody leaves",
    ),
    "a tile of k too few": (TILES, "(p.k + kRowElements - 1) / kRowElements", "p.k / kRowElements"),
    "spans for more clusters": (TILES_LAUNCHER, "p.spans = spans;", "p.spans = 1;"),
    "no multiple of eight rows": (TILES_LAUNCHER, "(p.m + kAtomRows - 1) / kAtomRows * kAtomRows", "p.m / 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", TILE_DEFECTS)
def test_defects_of_tiles_are_seen(tmp_path: Path, name):
    copy_changed(tmp_path, *TILE_DEFECTS[name])
    library = compile_for_host(tmp_path / TILES_LAUNCHER, tmp_path, planted=True)
    changed, ranks = Form(library, "wgmma"), ((3, 3, 3), (2, 30, 1))
    with pytest.raises(AssertionError):
        for m, k in ((5, 840), (29, 40), (29, 840)):
            ids = [0, 1, 5, -1, 1] * (m // 5) + [0] * (m % 5)
            case = frozen_case(m=m, k=k, ns=(328, 24), ranks=ranks, ids=ids, seed=1)
            case.group.bs[0][3:6, ::2] = float("inf")
            for order in (0, 1, 2, 3):
                assert_frozen_right(case, run(changed, case, order, 2))
