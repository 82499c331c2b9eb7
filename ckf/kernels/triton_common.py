"""What the Triton kernels share: the dropout keep mask, the gates of a tile's rows.

Prefixes inside kernels: ``p_`` pointer, ``o_`` offsets, ``m_`` mask, ``b_`` block of values.
"""

import triton
import triton.language as tl

PHILOX_A = tl.constexpr(0xD2511F53)
PHILOX_B = tl.constexpr(0xCD9E8D57)
WEYL_A = tl.constexpr(0x9E3779B9)
WEYL_B = tl.constexpr(0xBB67AE85)


@triton.jit
def keep_mask(o_row, column, p_seed, threshold, COLUMNS: tl.constexpr):
    """Keep mask of rows ``o_row`` (int64) and COLUMNS columns from ``column`` on (multiples of 8).

    The bits of ``dropout.dropout_mask``: one Philox-4x32-7 call gives eight 16-bit lanes.
    """
    seed = tl.load(p_seed)
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0 = (column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :]
    c1 = (o_row & 0xFFFFFFFF).to(tl.uint32)[:, None]
    c2 = (o_row >> 32).to(tl.uint32)[:, None]
    c3 = tl.zeros_like(c0)
    a = tl.full([1, 1], PHILOX_A, tl.uint32)
    b = tl.full([1, 1], PHILOX_B, tl.uint32)
    for _ in tl.static_range(7):  # the first rounds work on a row and a column, not on the tile
        high0, low0 = tl.umulhi(c0, a + tl.zeros_like(c0)), c0 * a
        high2, low2 = tl.umulhi(c2, b + tl.zeros_like(c2)), c2 * b
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0 += WEYL_A
        key1 += WEYL_B
    c0, c1 = tl.broadcast(c0, c1)
    c2, c3 = tl.broadcast(c2, c3)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))  # word 2 i + j at [..., i, j]
    lanes = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    return tl.reshape(lanes, [o_row.shape[0], COLUMNS]) >= threshold


@triton.jit
def tile_gates(p_gates, p_ids, o_row, o_column, m, columns, tasks, stride_gates):
    """Gates (rows, columns) of a tile: 0 for id -1, NaN for any other id outside [0, tasks)."""
    b_id = tl.load(p_ids + o_row, mask=o_row < m, other=-1)
    valid = (b_id >= 0) & (b_id < tasks)
    p_gate = p_gates + tl.where(valid, b_id, 0)[:, None] * stride_gates + o_column[None, :]
    b_gate = tl.load(p_gate, mask=valid[:, None] & (o_column < columns)[None, :], other=0.0)
    invalid = (b_id != -1) & (valid == 0)
    return tl.where(invalid[:, None], float("nan"), b_gate)


@triton.jit
def tile_slots(p_slots, p_ids, o_row, o_column, m, columns, tasks, stride_slots):
    """Compact slots (rows, columns) of a tile, -1 for a column that the row has no gate in."""
    b_id = tl.load(p_ids + o_row, mask=o_row < m, other=-1)
    valid = (b_id >= 0) & (b_id < tasks)
    p_slot = p_slots + tl.where(valid, b_id, 0)[:, None] * stride_slots + o_column[None, :]
    return tl.load(p_slot, mask=valid[:, None] & (o_column < columns)[None, :], other=-1)
