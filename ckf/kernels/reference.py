"""The specification of Multi-LoRA in plain PyTorch; every backend is tested against it.

    y_i = W x_i + bias + sum_e G[t_i, e] * B_e A_e drop(x_i)

Row i of x has task t_i; expert e has A_e (r_e, k) and B_e (n, r_e); G (T, E) holds the weight of
expert e for rows of task t and includes the LoRA scaling. Task id -1 means base only. A gate of
zero selects: its expert adds nothing to the row, even where A_e x is inf or NaN.
Written for reading, in any dtype; autograd differentiates it. Needs neither Triton nor nvcc.

Source: Zhao et al., "Collaborative Knowledge Fusion", TKDE 2025, doi 10.1109/TKDE.2025.3581706.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ckf.kernels.dropout import dropout_mask, dropout_scale


def multi_lora_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    gates: Tensor,
    task_ids: Tensor,
    dropout_p: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """Multi-LoRA linear, one (task, expert) pair at a time.

    Args:
        x: (..., k) input rows.
        weight: (n, k) frozen weight; ``bias``: (n,) or None.
        a: E tensors (r_e, k); ``b``: E tensors (n, r_e); ranks may differ.
        gates: (T, E), the LoRA scaling included.
        task_ids: ints of x's leading shape, each in [-1, T).
        dropout_p: probability of dropping an element of the LoRA input; ``seed`` draws the mask.

    Returns:
        (..., n).
    """
    k, n = x.shape[-1], weight.shape[0]
    rows = x.reshape(-1, k)  # (m, k)
    ids = task_ids.reshape(-1)  # (m,)
    dropped = rows
    if dropout_p > 0:
        keep = dropout_mask(rows.shape[0], k, dropout_p, seed, rows.device)
        dropped = torch.where(keep, rows * dropout_scale(dropout_p), 0)
    y = F.linear(rows, weight, bias)  # (m, n)
    for task in range(gates.shape[0]):
        index = (ids == task).nonzero().squeeze(1)  # (m_t,)
        for expert in range(gates.shape[1]):
            gate = gates[task, expert]
            if gate == 0 and not gates.requires_grad:
                continue
            update = dropped[index] @ a[expert].t() @ b[expert].t()  # (m_t, n)
            if gate == 0:
                update = torch.where(torch.isfinite(update), update, 0)
            y = y.index_add(0, index, gate.to(update.dtype) * update)
    return y.reshape(*x.shape[:-1], n)
