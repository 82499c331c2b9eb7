"""The torch backend against float64 on whatever arguments fit, and its refusal of what does not.

Cases are drawn by hypothesis: 2,000 in all, or CKF_FUZZ of them; test_backends.py draws for the
other backends, where every case costs more. The judge is the float64
reference; the error may be twice that of the same products in the case's own dtype, plus four
roundings of the sum of absolute values, which bounds what any order of the same sum can lose.
"""

import math
import os
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ckf.kernels import multi_lora_group, multi_lora_linear, torch_runs
from ckf.kernels.decode_cache import DecodeCache
from ckf.kernels.ops import run_group
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.slots import compact_slots
from tests.hardening.strangers import fuzzed
from tests.kernels.cases import hard_gates, random_case

CASES = int(os.environ.get("CKF_FUZZ", "2000"))
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def share(part: float):
    # the same cases at every run, other ones at night
    again = "CKF_FUZZ" not in os.environ
    return settings(
        fuzzed,
        max_examples=max(20, int(CASES * part)),
        derandomize=again,
        phases=[Phase.generate],  # a shrunk case takes minutes, the seed of any one is printed
    )


@dataclass(repr=False)
class Group:
    """The arguments of ``multi_lora_group``."""

    x: Tensor
    weights: list
    biases: list
    a: list[list[Tensor]]
    b: list[list[Tensor]]
    gates: list[Tensor]
    ids: Tensor
    dropout_p: float
    seed: int

    def _repr_pretty_(self, out, _cycle) -> None:
        out.text(repr(self))

    def __repr__(self) -> str:
        ranks = [[t.shape[0] for t in a] for a in self.a]
        widths = [b[0].shape[0] for b in self.b]
        return (
            f"Group(x={self.x.dtype} {tuple(self.x.shape)}, n={widths}, ranks={ranks}, "
            f"ids={self.ids.flatten().unique_consecutive().tolist()}, gates="
            f"{[g.tolist() for g in self.gates]}, dropout_p={self.dropout_p}, seed={self.seed})"
        )

    def leaves(self) -> list[Tensor]:
        """What may need a gradient, in a fixed order."""
        lists = [*self.a, *self.b]
        tensors = [self.x, *self.weights, *self.biases, *self.gates, *(t for e in lists for t in e)]
        return [t for t in tensors if t is not None and t.requires_grad]

    def to(self, dtype: torch.dtype) -> "Group":
        """A detached copy with the same leaves."""

        def copy(t):
            if t is None:
                return None
            return t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

        return Group(
            copy(self.x),
            [copy(t) for t in self.weights],
            [copy(t) for t in self.biases],
            [[copy(t) for t in experts] for experts in self.a],
            [[copy(t) for t in experts] for experts in self.b],
            [copy(t) for t in self.gates],
            self.ids,
            self.dropout_p,
            self.seed,
        )

    def absolute(self) -> "Group":
        """Every value made positive, in place."""
        lists = [*self.a, *self.b]
        tensors = [self.x, *self.weights, *self.biases, *self.gates, *(t for e in lists for t in e)]
        for t in tensors:
            if t is not None:
                t.data.abs_()
        return self


def strided(t: Tensor, how: str) -> Tensor:
    """The same values behind other strides."""
    if how == "transposed" and t.dim() > 1:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "every other":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype)
        wide[..., ::2] = t
        return wide[..., ::2]
    if how == "inside" and t.dim() > 1:
        wide = torch.full((t.shape[0] + 2, *t.shape[1:]), float("nan"), dtype=t.dtype)
        wide[1:-1] = t
        return wide[1:-1]
    return t.contiguous()


@st.composite
def groups(draw, by_runs: bool = False, dtypes=DTYPES):
    """A group of one to three linears that share x, with everything that may differ differing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(dtypes))
    adapters = draw(st.sampled_from([dtype, torch.float32])) if dtype != torch.float64 else dtype
    tasks, k = draw(st.integers(1, 4)), draw(st.integers(1, 33))
    strides = st.sampled_from(["plain", "transposed", "every other", "inside"])
    learned = not by_runs and draw(st.booleans())

    def normal(*shape, scale=1.0, kind=dtype, grad=True):
        t = strided((torch.randn(*shape, generator=generator) * scale).to(kind), draw(strides))
        return t.requires_grad_(grad and draw(st.integers(0, 5)) > 0)

    weights, biases, a, b, gates = [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        n, experts = draw(st.integers(1, 29)), draw(st.integers(1, 5))
        kind = draw(st.sampled_from(["hard", "soft", "zero"]))
        if kind == "hard":
            experts = tasks + 1
            gate = hard_gates(tasks, [0.5 + e for e in range(experts)])
        else:
            gate = torch.rand(tasks, experts, generator=generator) - 0.3
            gate[torch.rand(tasks, experts, generator=generator) < 0.3] = 0
        gate = gate * (0 if kind == "zero" else 1)
        equal = draw(st.booleans())
        rank = draw(st.sampled_from([0, 1, 2, 3, 8, 16, 64]))
        ranks = [rank if equal else draw(st.integers(0, 9)) for _ in range(experts)]
        bare = draw(st.integers(0, 5)) == 0  # the update alone
        weights.append(None if bare else normal(n, k, scale=k**-0.5))
        biases.append(None if bare or draw(st.booleans()) else normal(n))
        a.append([normal(r, k, scale=k**-0.5, kind=adapters) for r in ranks])
        b.append([normal(n, r, scale=max(r, 1) ** -0.5, kind=adapters) for r in ranks])
        gate_kind = torch.float64 if dtype == torch.float64 else torch.float32
        gates.append(gate.to(gate_kind).requires_grad_(learned))
    if by_runs:
        runs = draw(
            st.lists(
                st.tuples(st.integers(-1, tasks - 1), st.integers(128, 200)), min_size=1, max_size=3
            )
        )
        ids = torch.cat([torch.full((count,), task) for task, count in runs])
        shape = (len(ids),)
    else:
        shape = draw(st.sampled_from([(0,), (1,), (7,), (13,), (2, 5), (0, 3), (2, 3, 2)]))
        ids = torch.randint(-1, tasks, shape, generator=generator)
    return Group(
        normal(*shape, k),
        weights,
        biases,
        a,
        b,
        gates,
        ids.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 0.99])),
        draw(st.integers(-(2**63), 2**63 - 1)),
    )


def reference(group: Group) -> list[Tensor]:
    """Linear by linear; an absent weight is one of zeros."""
    outputs = []
    for w, v, a, b, gate in zip(
        group.weights, group.biases, group.a, group.b, group.gates, strict=True
    ):
        w = group.x.new_zeros(b[0].shape[0], group.x.shape[-1]) if w is None else w
        a, b = [t.to(group.x.dtype) for t in a], [t.to(group.x.dtype) for t in b]
        outputs.append(
            multi_lora_reference(group.x, w, v, a, b, gate, group.ids, group.dropout_p, group.seed)
        )
    return outputs


def ours(group: Group, backend: str = "torch") -> list[Tensor]:
    arguments = (group.x, group.weights, group.biases, group.a, group.b, group.gates, group.ids)
    return list(multi_lora_group(*arguments, group.dropout_p, group.seed, backend=backend))


def ours_compact(group: Group, backend: str = "torch") -> list[Tensor]:
    """As the layers call it: gates are constants, H is saved compact."""
    live = [(gate != 0).tolist() for gate in group.gates]
    slots, width = compact_slots(live, [[t.shape[0] for t in a] for a in group.a])
    return list(
        run_group(
            group.x, group.weights, group.biases, group.a, group.b, group.gates, group.ids.long(),
            group.dropout_p, group.seed, backend, slots, width,
        )
    )  # fmt: skip


def with_gradients(function, group: Group, dys: list[Tensor]) -> list[Tensor]:
    outputs, leaves = function(group), group.leaves()
    found = []
    if leaves and any(y.requires_grad for y in outputs):
        pairs = [(y, d.to(y.dtype)) for y, d in zip(outputs, dys, strict=True) if y.requires_grad]
        ys, ds = zip(*pairs, strict=True)
        found = torch.autograd.grad(ys, leaves, ds, allow_unused=True)
    zeros = [torch.zeros_like(t) for t in leaves]
    found = [z if g is None else g for g, z in zip(found or zeros, zeros, strict=True)]
    return [*(y.detach() for y in outputs), *found]


def assert_right(function, group: Group) -> None:
    dys = [torch.randn(*group.x.shape[:-1], b[0].shape[0], dtype=torch.float64) for b in group.b]
    exact = with_gradients(reference, group.to(torch.float64), dys)
    plain = with_gradients(reference, group.to(group.x.dtype), dys)
    found = with_gradients(function, group, dys)
    sizes = with_gradients(reference, group.to(torch.float64).absolute(), [d.abs() for d in dys])
    eps = torch.finfo(group.x.dtype).eps
    for index, (e, p, o) in enumerate(zip(exact, plain, found, strict=True)):
        assert o.shape == e.shape, f"tensor {index}: {tuple(o.shape)}, not {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        error, scale = (o.double() - e).abs().max().item(), sizes[index].max().item()
        allowed = 2 * (p.double() - e).abs().max().item() + 4 * eps * scale
        assert error <= allowed, f"tensor {index}: error {error:.3e}, allowed {allowed:.3e}"


@share(0.35)
@given(groups())
def test_any_group_is_as_good_as_its_dtype_allows(group):
    assert_right(ours, group)


@share(0.25)
@given(groups())
def test_any_group_saved_compact(group):
    for gate in group.gates:
        gate.requires_grad_(False)
    assert_right(ours_compact, group)


@share(0.2)
@given(groups(by_runs=True), st.booleans(), st.booleans())
def test_any_group_by_runs(group, compact, gathered):
    real = torch_runs.forward_pass
    if gathered:
        order = torch.randperm(len(group.ids), generator=torch.Generator().manual_seed(0))
        group.ids = group.ids[order]
    with (
        patch.object(torch_runs, "PRODUCT_COST", -1.0),  # whether they pay or not
        patch.object(torch_runs, "GATHER_COST", -1e12 if gathered else math.inf),
        patch.object(torch_runs, "forward_pass", wraps=real) as taken,
    ):
        assert_right(ours_compact if compact else ours, group)
    assert taken.called


def decoding(group: Group) -> list[Tensor]:
    """As the layers decode: from stacks that are kept, here of the second of two calls."""
    cache = DecodeCache()
    arguments = (group.x, group.weights, group.biases, group.a, group.b, group.gates)
    for _ in range(2):
        with torch.no_grad():
            outputs = run_group(*arguments, group.ids.long(), 0.0, 0, "torch", decode_cache=cache)
    return list(outputs)


@share(0.1)
@given(groups())
def test_any_group_while_decoding(group):
    group.dropout_p = 0.0
    for tensor in group.leaves():
        tensor.requires_grad_(False)
    assert_right(decoding, group)


@share(0.1)
@given(
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 2**32),
)
def test_a_row_that_is_not_finite_stays_alone(value, by_runs, soft, dropout_p, seed):
    """Forward and dx, bit for bit (the gradients of A and B are sums over rows)."""
    ids = torch.tensor([0] * 130 + [2] * 140) if by_runs else None
    m = len(ids) if by_runs else 13
    case = random_case(m=m, soft=soft, dropout_p=dropout_p, seed=seed, ids=ids)
    case.gates = case.gates.detach()
    row = seed % m
    dy = torch.randn(m, 17, generator=torch.Generator().manual_seed(seed))
    results = []
    for harm in (False, True):
        x = case.x.detach().clone()
        if harm:
            x[row, seed % 24] = value
        case.x = x.requires_grad_()
        harmed = dy.clone()
        if harm:
            harmed[row] = value
        with patch.object(torch_runs, "PRODUCT_COST", -1.0 if by_runs else math.inf):
            y = multi_lora_linear(*case.arguments(), backend="torch")
            results.append((y.detach(), torch.autograd.grad(y, case.x, harmed)[0]))
    others = torch.arange(m) != row
    for clean, harmed in zip(*results, strict=True):
        assert torch.equal(clean[others], harmed[others])
        assert clean.isfinite().all() and not harmed[row].isfinite().all()


# ---- what does not fit is refused before anything is computed


def wrong(change: str) -> dict:
    """The arguments of a right call with one of them wrong."""
    case = random_case(m=5, seed=3)
    names = ("x", "weight", "bias", "a", "b", "gates", "task_ids")
    right = {name: getattr(case, name) for name in names}
    meta = {
        f"{name} on meta": {name: right[name].to("meta")}
        for name in ("weight", "bias", "gates", "x")
    }
    changes = meta | {
        "id too high": {"task_ids": torch.tensor([0, 1, 3, 0, 0])},
        "id too low": {"task_ids": torch.tensor([0, -2, 0, 0, 0])},
        "id far away": {"task_ids": torch.tensor([0, 2**62, 0, 0, 0])},
        "ids as floats": {"task_ids": torch.zeros(5)},
        "ids as bools": {"task_ids": torch.zeros(5, dtype=torch.bool)},
        "ids of another shape": {"task_ids": torch.zeros(4, dtype=torch.int64)},
        "ids as a list": {"task_ids": [0, 0, 0, 0, 0]},
        "x of ints": {"x": right["x"].detach().long()},
        "x without rows' width": {"x": torch.tensor(1.0)},
        "weight in bf16": {"weight": right["weight"].bfloat16()},
        "weight transposed": {"weight": right["weight"].t()},
        "weight in 3-D": {"weight": right["weight"][None]},
        "bias in fp64": {"bias": right["bias"].double()},
        "bias too long": {"bias": torch.zeros(18)},
        "a on meta": {"a": [right["a"][0].to("meta"), *right["a"][1:]]},
        "a in bf16": {"a": [t.bfloat16() for t in right["a"]]},
        "a of unlike dtypes": {"a": [right["a"][0].double(), *right["a"][1:]]},
        "one a less": {"a": right["a"][1:]},
        "ranks that differ": {"b": [t[:, :-1] for t in right["b"]]},
        "no experts": {"a": [], "b": []},
        "gates of a vector": {"gates": torch.ones(4)},
        "gates for other experts": {"gates": torch.ones(3, 3)},
        "p of one": {"dropout_p": 1.0},
        "p below zero": {"dropout_p": -0.1},
        "p of NaN": {"dropout_p": float("nan")},
        "backend": {"backend": "fast"},
    }
    return right | changes[change] if change else list(changes)


@pytest.mark.parametrize("change", wrong(""))
def test_wrong_arguments_are_refused_before_anything_is_computed(change, monkeypatch):
    def computed(*_arguments, **_options):
        raise AssertionError("a product was computed")

    monkeypatch.setattr(torch.nn.functional, "linear", computed)
    monkeypatch.setattr(Tensor, "__matmul__", computed)
    with pytest.raises(ValueError) as error:
        multi_lora_linear(**wrong(change))
    assert len(str(error.value)) > 20
