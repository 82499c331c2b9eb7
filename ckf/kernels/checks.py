"""What the public functions ask of their arguments before anything is computed."""

import torch
from torch import Tensor


def check_task_ids(task_ids: Tensor, x: Tensor, tasks: int) -> Tensor:
    """The ids as int64 on x's device; the range is checked where they lie on the host."""
    if not isinstance(task_ids, Tensor) or task_ids.dtype not in (torch.int64, torch.int32):
        kind = task_ids.dtype if isinstance(task_ids, Tensor) else type(task_ids).__name__
        raise ValueError(f"task_ids are {kind}; expected an int64 or int32 tensor")
    if task_ids.shape != x.shape[:-1]:
        raise ValueError(
            f"task_ids have shape {tuple(task_ids.shape)}; expected x's leading shape "
            f"{tuple(x.shape[:-1])}, one id a row"
        )
    if task_ids.device != x.device:  # else the op looks at them, also under torch.compile
        check_id_range(task_ids, tasks)
    return task_ids.to(device=x.device, dtype=torch.int64, non_blocking=x.is_cuda)


def check_id_range(task_ids: Tensor, tasks: int) -> None:
    """ValueError for an id outside [-1, tasks) on the host; device ids cost no check."""
    if task_ids.device.type != "cpu" or task_ids.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in task_ids.aminmax())
    if low < -1 or high >= tasks:
        wrong = low if low < -1 else high
        raise ValueError(
            f"task id {wrong} is out of range; expected 0 to {tasks - 1}, or -1 for the base alone"
        )


def check_seed(seed: int | Tensor) -> None:
    """ValueError for what is neither an int nor a tensor of one."""
    whole = isinstance(seed, int)
    if isinstance(seed, Tensor):
        whole = seed.numel() == 1 and seed.dtype in (torch.int64, torch.int32)
    if not whole:
        raise ValueError(f"seed is {seed!r}; expected an int or a one-element int64 tensor")


def check_slots(table: Tensor, width: int, a, gates) -> None:
    """ValueError for a table of other sizes, or one that leaves out a gate (looked at on a CPU)."""
    tasks, ranks = gates[0].shape[0], [[t.shape[0] for t in experts] for experts in a]
    columns = sum(map(sum, ranks))
    if tuple(table.shape) != (tasks, columns) or table.device != gates[0].device:
        raise ValueError(
            f"slots are a table of shape {tuple(table.shape)} on {table.device}; expected "
            f"({tasks}, {columns}) on {gates[0].device}: make them with "
            "ckf.kernels.compact_slots(live, ranks) for these experts, and move the table"
        )
    if table.is_cpu and not torch.compiler.is_compiling():
        if table.numel() and table.max() >= width:
            raise ValueError(
                f"slots reach {int(table.max())}; expected less than their width, {width}"
            )
        every = torch.cat(
            [
                gate.detach().repeat_interleave(torch.tensor(own), dim=1)
                for gate, own in zip(gates, ranks, strict=True)
            ],
            dim=1,
        )
        if ((every != 0) & (table < 0)).any():
            raise ValueError("slots leave out a gate that is not zero; make them from these gates")


def check_group(x, weights, biases, a, b, gates) -> None:
    """ValueError naming the first argument whose shape, dtype or device does not fit."""
    if not len(weights) == len(biases) == len(a) == len(b) == len(gates) or not weights:
        raise ValueError(
            "weights, biases, a, b and gates need one entry for each linear; got "
            f"{len(weights)}, {len(biases)}, {len(a)}, {len(b)} and {len(gates)}"
        )
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}; expected a tensor of floats (..., k)")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}; expected floats (..., k)")
    for index, (weight, bias, a_l, b_l, gate) in enumerate(
        zip(weights, biases, a, b, gates, strict=True)
    ):
        _check_linear(f"linear {index}", x, weight, bias, a_l, b_l, gate)
        if gate.shape[0] != gates[0].shape[0]:
            raise ValueError(
                f"linear {index}: gates for {gate.shape[0]} tasks; expected "
                f"{gates[0].shape[0]}, as for linear 0"
            )


def _check_linear(name, x, weight, bias, a, b, gate) -> None:
    k = x.shape[-1]
    for side, given in (("a", a), ("b", b)):
        single = isinstance(given, Tensor)
        if single or not all(isinstance(t, Tensor) and t.dim() == 2 for t in given):
            kinds = "one tensor" if single else [type(t).__name__ for t in given]
            raise ValueError(
                f"{name}: {side} is {kinds}; expected a list with one matrix an expert (unbind a "
                "stack of them)"
            )
    if len(a) != len(b) or not a:
        raise ValueError(f"{name}: {len(a)} A and {len(b)} B; expected as many, one or more")
    n = b[0].shape[0] if weight is None else weight.shape[0]
    if weight is not None:
        _expect(f"{name}: weight", weight, (n, k), x)
    if bias is not None:
        _expect(f"{name}: bias", bias, (n,), x)
    for e, (a_e, b_e) in enumerate(zip(a, b, strict=True)):
        rank = a_e.shape[0]
        _expect(f"{name}: a[{e}]", a_e, (rank, k), x, adapter=True)
        _expect(f"{name}: b[{e}]", b_e, (n, rank), x, adapter=True)
        if a_e.dtype != a[0].dtype or b_e.dtype != a[0].dtype:
            raise ValueError(f"{name}: experts differ in dtype; expected {a[0].dtype} for all")
    if gate.dim() != 2 or gate.shape[1] != len(a) or gate.device != x.device:
        raise ValueError(
            f"{name}: gates of shape {tuple(gate.shape)} on {gate.device}; expected "
            f"(tasks, {len(a)} experts) on {x.device}"
        )


def _expect(name: str, tensor: Tensor, shape: tuple, x: Tensor, adapter: bool = False) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; expected x's device, {x.device}")
    allowed = {x.dtype, torch.float32} if adapter else {x.dtype}
    autocast = torch.is_autocast_enabled(x.device.type)
    if tensor.dtype not in allowed and not autocast:
        expected = " or ".join(sorted(str(d) for d in allowed))
        raise ValueError(f"{name} is {tensor.dtype}; expected {expected}")
