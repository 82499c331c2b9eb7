"""Where the rank columns of every task lie in the compact H that backward keeps.

With hard gates a row needs the columns of its task's experts alone: C = r_s + r_t of the R columns
of all experts. Row i keeps those C values, in the order of the columns.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16  # columns: rows of the compact H start where 16-byte loads can


def compact_slots(
    live: Sequence[Sequence[Sequence[bool]]], ranks: Sequence[Sequence[int]]
) -> tuple[Tensor, int]:
    """The slot of every rank column in a task's compact row, and the width of such a row.

    Args:
        live: per linear of a group (T, E): whether the gate of an expert can be other than zero
            for a task.
        ranks: per linear the rank of every expert; the group's R columns lie in this order.

    Returns:
        Slots (T, R) int32 on the CPU: the live columns of a task counted from 0, in their order;
        -1 where the gate is always zero. And the width C: the most live columns of a task, rounded
        up to a multiple of 16.

    Raises:
        ValueError: linears, tasks or experts that do not match.
    """
    if len(live) != len(ranks) or not live:
        raise ValueError(f"live for {len(live)} linears, ranks for {len(ranks)}; expected as many")
    tasks = len(live[0])
    for index, (matrix, ranks_l) in enumerate(zip(live, ranks, strict=True)):
        if len(matrix) != tasks or any(len(row) != len(ranks_l) for row in matrix):
            shape = (len(matrix), len(matrix[0]) if matrix else 0)
            raise ValueError(
                f"linear {index}: live is {shape}; expected {(tasks, len(ranks_l))}: tasks, experts"
            )
    experts = [list(itertools.chain(*(matrix[t] for matrix in live))) for t in range(tasks)]
    repeats = torch.tensor([rank for ranks_l in ranks for rank in ranks_l], device="cpu")
    columns = torch.tensor(experts, dtype=torch.bool, device="cpu")  # whatever the default is
    columns = columns.repeat_interleave(repeats, dim=1)  # (T, R)
    counted = columns.cumsum(1)
    widest = int(columns.sum(1).max())
    width = max(1, -(-widest // ALIGNMENT)) * ALIGNMENT
    return torch.where(columns, counted - 1, -1).int(), width
