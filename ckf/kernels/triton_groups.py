"""Rows grouped by task on the device: the index that the gather kernels walk over.

Group t < T holds the rows of task t, group T those of the base alone (id -1), group T + 1 those
with an invalid id. One launch, a program a group: it counts the rows of the groups before its own,
then writes its rows in their order; a task's also turns its slots round. No sort, no atomics, no
shape that depends on the ids.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ckf.kernels.launch import next_power
from ckf.kernels.triton_launcher import remembered


@dataclass(frozen=True)
class RowGroups:
    rows: Tensor  # (m,) int32, grouped
    starts: Tensor  # (T + 3,) int32: group g is rows[starts[g]:starts[g + 1]]
    columns: Tensor  # (T, C) int32: the rank column of every slot, -1 past a task's last
    tasks: int


@remembered
@triton.jit(do_not_specialize=["m", "tasks"])
def group_kernel(
    p_ids,
    p_slots,
    p_rows,
    p_starts,
    p_columns,
    m,
    r,
    width,
    tasks,
    stride_slots,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    group = tl.program_id(0)
    at = tl.zeros([], tl.int32)
    for start in range(0, m, BLOCK):
        at += tl.sum((row_groups(p_ids, start, m, tasks, BLOCK) < group).to(tl.int32))
    tl.store(p_starts + group, at)
    for start in range(0, m, BLOCK):
        mine = row_groups(p_ids, start, m, tasks, BLOCK) == group
        place = at + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(p_rows + place, start + tl.arange(0, BLOCK), mask=mine)
        at += tl.sum(mine.to(tl.int32))
    tl.store(p_starts + tasks + 2, m, mask=group == tasks + 1)

    if group < tasks:  # the columns of the task's slots
        p_column = p_columns + group.to(tl.int64) * width
        live = tl.zeros([], tl.int32)
        for start in range(0, r, BLOCK_R):
            o_r = start + tl.arange(0, BLOCK_R)
            p_slot = p_slots + group.to(tl.int64) * stride_slots + o_r
            slot = tl.load(p_slot, mask=o_r < r, other=-1)
            tl.store(p_column + slot, o_r, mask=slot >= 0)
            live += tl.sum((slot >= 0).to(tl.int32))
        for start in range(0, width, BLOCK_R):
            o_s = start + tl.arange(0, BLOCK_R)
            tl.store(
                p_column + o_s, tl.full([BLOCK_R], -1, tl.int32), mask=(o_s >= live) & (o_s < width)
            )


@triton.jit
def row_groups(p_ids, start, m, tasks, BLOCK: tl.constexpr):
    """Groups of BLOCK rows from ``start`` on; past the last row a group that no program has."""
    o_m = start + tl.arange(0, BLOCK)
    b_id = tl.load(p_ids + o_m, mask=o_m < m, other=0)
    group = tl.where((b_id >= 0) & (b_id < tasks), b_id, tasks + 1)
    group = tl.where(b_id == -1, tasks, group)
    return tl.where(o_m < m, group, tasks + 2).to(tl.int32)


@triton.jit
def group_tile(p_starts, tile, groups, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """Group of a row tile, its first position in the grouped rows and the end of its group.

    Tiles number the groups one after another, none spans two. Past the last: an empty one.
    """
    o_g = tl.arange(0, GROUPS)
    begin = tl.load(p_starts + o_g, mask=o_g < groups, other=0)
    end = tl.load(p_starts + o_g + 1, mask=o_g < groups, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(tiles, 0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    group = tl.sum(tl.where(mine, o_g, 0))
    first = tl.sum(tl.where(mine, begin + (tile - before) * BLOCK_M, 0))
    return group, first, tl.sum(tl.where(mine, end, 0))


@triton.jit
def slot_range(p_columns, task, low, r, width, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """The compact slots of a task that hold the columns [low, low + r): one linear's."""
    o_s = tl.arange(0, WIDTH)
    p_column = p_columns + task.to(tl.int64) * width + o_s
    column = tl.load(p_column, mask=o_s < width, other=-1)
    first = tl.sum(((column >= 0) & (column < low)).to(tl.int32))
    stop = tl.sum(((column >= 0) & (column < low + r)).to(tl.int32))
    if ALIGNED:  # every rank is a multiple of 8: 16-byte loads (a hint on a sum is dropped)
        first, stop = first // 8 * 8, stop // 8 * 8
    return first, stop


def group_rows(task_ids: Tensor, slots: Tensor, width: int) -> RowGroups:
    """Rows by task: ``task_ids`` (m,) int64, any values; ``slots`` (T, R), rows strided."""
    m, (tasks, r) = task_ids.shape[0], slots.shape
    new = {"dtype": torch.int32, "device": task_ids.device}
    rows, starts = torch.empty(m, **new), torch.empty(tasks + 3, **new)
    columns = torch.empty(tasks, width, **new)
    block = min(max(next_power(m), 16), 4096)
    group_kernel[(tasks + 2,)](
        p_ids=task_ids,
        p_slots=slots,
        p_rows=rows,
        p_starts=starts,
        p_columns=columns,
        m=m,
        r=r,
        width=width,
        tasks=tasks,
        stride_slots=slots.stride(0),
        BLOCK=block,
        BLOCK_R=1024,
        num_warps=8 if block == 4096 else 4,
    )
    return RowGroups(rows, starts, columns, tasks)


def most_tiles(m: int, tasks: int, block_m: int) -> int:
    """Row tiles that any mix of ids can need: every group may end with a tile that is not full."""
    return m // block_m + min(tasks + 2, m)
