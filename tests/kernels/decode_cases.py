"""Cases for multi_lora_decode, its float64 reference and the error that arithmetic allows."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from benchmarks import stub_decode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64  # elements before and after every tensor, poisoned


@dataclass
class DecodeCase:
    """The arguments of ``multi_lora_decode``."""

    y: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    column_gates: Tensor
    task_ids: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> "DecodeCase":
        return DecodeCase(**{name: moved(t, device) for name, t in self.tensors().items()})

    def group(self) -> "GroupCase":
        """The same tensors as a group of one."""
        return GroupCase([self.y], self.x, self.a, [self.b], self.column_gates, self.task_ids)


@dataclass
class GroupCase:
    """The arguments of ``multi_lora_decode_group``."""

    ys: list[Tensor]
    x: Tensor
    a: Tensor
    bs: list[Tensor]
    column_gates: Tensor
    task_ids: Tensor

    def tensors(self) -> dict[str, Tensor | list[Tensor]]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> "GroupCase":
        def move(value):
            one = isinstance(value, Tensor)
            return moved(value, device) if one else [moved(t, device) for t in value]

        return GroupCase(**{name: move(value) for name, value in self.tensors().items()})

    def linears(self) -> Iterable[DecodeCase]:
        """Each linear by itself: views of this case's tensors."""
        first = 0
        for y, b in zip(self.ys, self.bs, strict=True):
            columns = slice(first, first + b.shape[0])
            first = columns.stop
            gates = self.column_gates[:, columns]
            yield DecodeCase(y, self.x, self.a[columns], b, gates, self.task_ids)


def moved(t: Tensor, device: str) -> Tensor:
    """The same view into the same poisoned buffer on another device."""
    base = t._base.to(device, copy=True)
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


def guarded(values: Tensor, padding: int = 0, offset: int = 0) -> Tensor:
    """The values inside a longer buffer whose every other element is NaN (or a wild task id):
    ``padding`` elements between rows, the start ``offset`` elements off 16-byte alignment."""
    poison = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max // 2
    width = values.shape[-1] + padding if values.dim() == 2 else 1
    rows = values.shape[0]
    buffer = torch.full((GUARD + offset + rows * width + GUARD,), poison, dtype=values.dtype)
    shape, strides = (values.shape, (width, 1)) if values.dim() == 2 else (values.shape, (1,))
    view = buffer.as_strided(shape, strides, GUARD + offset)
    view.copy_(values)
    return view


def hard_column_gates(ranks: list[int]) -> Tensor:
    """(T, R): expert 0 shared, expert 1 + t for task t, every expert with its own scaling."""
    gates = torch.zeros(len(ranks) - 1, sum(ranks))
    starts = torch.tensor([0, *ranks]).cumsum(0).tolist()
    for t in range(len(ranks) - 1):
        gates[t, : starts[1]] = 0.75
        gates[t, starts[1 + t] : starts[2 + t]] = 1.0 + t / 8
    return gates


def decode_case(
    m=5,
    k=40,
    n=24,
    ranks=(4, 4, 4, 4),
    dtype=torch.float32,
    seed=0,
    ids=None,
    soft=False,
    padding=0,
    offset=0,
) -> DecodeCase:
    """Random numbers in poisoned buffers; ids from -1 to T - 1 unless given."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    rank, tasks = sum(ranks), len(ranks) - 1
    gates = hard_column_gates(list(ranks))
    if soft:
        gates = torch.rand(tasks, rank, generator=g) - 0.25
    if ids is None:
        ids = torch.randint(-1, tasks, (m,), generator=g)
    ids = torch.as_tensor(ids, dtype=torch.int64)
    return DecodeCase(
        y=guarded(normal(m, n), padding, offset),
        x=guarded(normal(m, k) * k**-0.5 if k else normal(m, k), padding, offset),
        a=guarded(normal(rank, k), 0, offset),
        b=guarded(normal(rank, n), 0, offset),
        column_gates=guarded(gates),
        task_ids=guarded(ids),
    )


def group_case(
    m=5, k=40, ns=(24, 8), ranks=((4, 4, 4), (2, 6, 0)), seed=0, padding=0, offset=0, **options
) -> GroupCase:
    """Linears of widths ``ns`` with ``ranks[l]`` (as many experts each); options: decode_case's."""
    linears = [
        decode_case(m, k, n, ranks_l, seed=seed + 100 * i, **options)
        for i, (n, ranks_l) in enumerate(zip(ns, ranks, strict=True))
    ]
    return GroupCase(
        ys=[guarded(case.y, padding, offset) for case in linears],
        x=guarded(linears[0].x, padding, offset),
        a=guarded(torch.cat([case.a for case in linears]), 0, offset),
        bs=[guarded(case.b, 0, offset) for case in linears],
        column_gates=guarded(torch.cat([case.column_gates for case in linears], dim=1)),
        task_ids=linears[0].task_ids,
    )


def update_of(case: DecodeCase) -> tuple[Tensor, Tensor, Tensor]:
    """What is added to y in float64 (m, n), the sum of its products' magnitudes, and which rows
    (m,) have a known task: the others have zero."""
    x, a, b = (t.double() for t in (case.x, case.a, case.b))
    tasks = case.column_gates.shape[0]
    known = (case.task_ids >= 0) & (case.task_ids < tasks)
    if tasks == 0:
        gates = torch.zeros(len(case.task_ids), a.shape[0], dtype=torch.float64)
    else:
        gates = case.column_gates.double()[case.task_ids.clamp(0, tasks - 1)]
    live = (gates != 0) & known[:, None]  # (m, R)

    def update(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
        result = torch.zeros(len(x), b.shape[1], dtype=torch.float64)
        for i in range(len(x)):  # by selection, as the kernel: dead columns may hold inf and NaN
            c = live[i].nonzero().flatten()
            result[i] = ((a[c] @ x[i]) * gates[i, c]) @ b[c]
        return result

    return update(x, a, b, gates), update(x.abs(), a.abs(), b.abs(), gates.abs()), known


def allowed_error(dtype: torch.dtype, result: Tensor, magnitude: Tensor, products: int) -> Tensor:
    """How far a float32 sum rounded once to dtype may be from the float64 result.

    A sum of p products in float32, in any order, errs by at most p * 2^-24 times the sum of their
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), to first
    order; twice that covers the rest.
    """
    error = 2 * products * 2.0**-24 * magnitude
    numbers = torch.finfo(dtype)
    return error + numbers.eps / 2 * (result.abs() + error) + numbers.smallest_normal


def exact(case: DecodeCase) -> tuple[Tensor, Tensor]:
    """The float64 result, and how far a float32 sum rounded once may be from it."""
    update, magnitude, known = update_of(case)
    y = case.y.double()
    result = y + update
    products = case.a.shape[0] + case.a.shape[1] + 8
    error = allowed_error(case.y.dtype, result, y.abs() + magnitude, products)
    wrong = ~known & (case.task_ids != -1)
    result = torch.where(wrong[:, None], torch.full_like(result, float("nan")), result)
    zero = torch.zeros((), dtype=torch.float64)
    return torch.where((case.task_ids == -1)[:, None], y, result), torch.where(
        known[:, None], error, zero
    )


def assert_poison_around(y: Tensor) -> None:
    """Nothing but y itself was written in y's buffer."""
    outside = torch.ones_like(y._base, dtype=torch.bool)
    outside.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
    assert y._base[outside].isnan().all(), "wrote outside y"


def assert_group_right(case: GroupCase, results: list[Tensor]) -> None:
    for linear, result in zip(case.linears(), results, strict=True):
        assert_right(linear, result)


def assert_right(case: DecodeCase, result: Tensor) -> None:
    """Every element within the allowed error; untouched and NaN rows exactly so."""
    assert_within(result, *exact(case))


def assert_within(result: Tensor, wanted: Tensor, allowed: Tensor) -> None:
    got = result.double().cpu()
    assert torch.equal(got.isnan(), wanted.isnan()), "NaN in other places than expected"
    excess = ((got - wanted).abs() - allowed).nan_to_num(nan=0.0)
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 0, f"error exceeds the allowed one by {worst:.3e}"


def stub_cuda(monkeypatch, kernel: type) -> None:
    """Let the bridge take CPU tensors and launch ``kernel`` instead of the extension's."""
    stub_decode.stub_cuda(kernel, monkeypatch.setattr, stream=77)
