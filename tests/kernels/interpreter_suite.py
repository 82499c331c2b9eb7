"""The Triton backend in Triton's interpreter, on CPU tensors; test_triton_interpreter.py runs it.

Its own process, because TRITON_INTERPRET must be set before any kernel is imported. float32 and
float16 only: bfloat16 products are wrong in the interpreter of Triton 3.9.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.kernels import dropout_mask, multi_lora_group, multi_lora_linear
from ckf.kernels.dropout import dropout_scale, dropout_threshold
from ckf.kernels.launch import ExpandLaunch, OuterLaunch, ShrinkLaunch
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.triton_expand import expand
from ckf.kernels.triton_gemm import gemm, why_not_gemm
from ckf.kernels.triton_outer import outer
from ckf.kernels.triton_shrink import shrink
from tests.kernels.cases import assert_as_good_as_reference, random_case, run_with_gradients
from tests.kernels.test_direct_calls import DYS, gradients

triton_backend = partial(multi_lora_linear, backend="triton")
DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh tensors hold NaN, so that an element no kernel wrote shows; one seed for all tests."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_close(ours, plain, exact):
    """The rule of ``assert_as_good_as_reference`` for one tensor."""
    assert ours.shape == exact.shape
    if ours.numel() == 0:
        return
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


def cast(case, dtype):
    """The case in ``dtype``, its gates in float32."""
    gates = case.gates.detach().float().requires_grad_(case.gates.requires_grad)
    case = case.to(dtype)
    case.gates = gates
    return case


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, dropout_p, soft):
    case = random_case(m=37, k=41, n=29, ranks=[3, 8, 1, 5], soft=soft, dropout_p=dropout_p)
    assert_as_good_as_reference(triton_backend, cast(case, dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("ranks", [[1, 128, 7, 33], [128, 1, 1, 2], [16] * 10, [40] * 8])
def test_many_rank_columns(ranks, soft, dropout_p):
    tasks = len(ranks) - 1
    ids = torch.arange(70) // 16 % (tasks + 1) - 1  # tiles of one task, so dead blocks
    case = random_case(
        m=70, k=72, n=65, tasks=tasks, ranks=ranks, soft=soft, dropout_p=dropout_p, ids=ids
    )
    assert_as_good_as_reference(triton_backend, cast(case, torch.float16))


@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_task_counts(tasks):
    assert_as_good_as_reference(triton_backend, random_case(m=23, tasks=tasks))


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_empty_and_single_rows(m, soft):
    assert_as_good_as_reference(triton_backend, random_case(m=m, dropout_p=0.2, soft=soft))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 1, 3), (3, 8, 1)])
def test_smallest_sizes(sizes):
    m, k, n = sizes
    assert_as_good_as_reference(triton_backend, random_case(m=m, k=k, n=n, ranks=[1, 1, 1, 1]))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_mixes(data):
    tasks = data.draw(st.integers(1, 9), "tasks")
    rank = st.integers(0, 40)
    case = random_case(
        m=data.draw(st.integers(0, 40), "m"),
        k=data.draw(st.integers(1, 80), "k"),
        n=data.draw(st.integers(1, 70), "n"),
        tasks=tasks,
        ranks=data.draw(st.lists(rank, min_size=tasks + 1, max_size=tasks + 1), "ranks"),
        soft=data.draw(st.booleans(), "soft"),
        bias=data.draw(st.booleans(), "bias"),
        dropout_p=data.draw(st.sampled_from([0.0, 0.25]), "dropout_p"),
        seed=data.draw(st.integers(0, 1000), "seed"),
    )
    case = cast(case, data.draw(st.sampled_from(DTYPES), "dtype"))
    assert_as_good_as_reference(triton_backend, case)


def test_base_only_rows_and_zero_b_keep_the_bits_of_the_base():
    base_only = random_case(ids=torch.full((13,), -1))
    zero_b = random_case(m=70, k=48, n=32)
    for b in zero_b.b:
        b.data.zero_()
    for case in (base_only, zero_b):
        expected = torch.nn.functional.linear(case.x, case.weight, case.bias)
        assert torch.equal(triton_backend(*case.arguments()), expected)


def test_gate_of_zero_selects_even_over_infinities():
    case = random_case(m=8, ids=torch.tensor([0, 0, 1, 1, 2, 2, -1, -1]))
    case.a[2].data.fill_(float("inf"))  # the expert of task 1
    y = triton_backend(*case.arguments())
    assert y[[0, 1, 4, 5, 6, 7]].isfinite().all()
    assert not y[[2, 3]].isfinite().any()


def test_bad_row_never_reaches_another_row():
    case = random_case(m=8)
    clean = triton_backend(*case.arguments())
    case.x.data[3] = float("nan")
    dirty = triton_backend(*case.arguments())
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(clean[others], dirty[others])


def test_dead_rank_blocks_are_not_read():
    case = random_case(m=32, ranks=[64, 64, 64, 64], ids=torch.full((32,), 1))
    case.b[3].data.fill_(float("nan"))  # the expert of task 2: no row has it
    assert triton_backend(*case.arguments()).isfinite().all()


def test_tasks_without_rows_get_zero_gradients():
    case = random_case(m=9, ids=torch.full((9,), 1))
    _, _, *gradients = run_with_gradients(triton_backend, case, torch.ones(9, 17))
    for expert in (3, 1):  # tasks 2 and 0
        assert not gradients[expert].any() and not gradients[4 + expert].any()
    for expert in (0, 2):  # the shared expert and task 1
        assert gradients[expert].any() and gradients[4 + expert].any()


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_same_bits_on_every_run(soft):
    case = random_case(m=64, dropout_p=0.1, soft=soft)
    dy = torch.randn(64, 17)
    first = run_with_gradients(triton_backend, case, dy)
    again = run_with_gradients(triton_backend, case, dy)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_same_values_without_gradients():
    case = random_case(m=20, soft=True)
    with torch.no_grad():
        y = triton_backend(*case.arguments())
    assert not y.requires_grad
    assert torch.equal(y, triton_backend(*case.arguments()).detach())


def test_gate_gradient_is_exact_at_zero():
    case = random_case(m=16, soft=True)
    with torch.no_grad():
        case.gates[:, 1:] = 0
    assert_as_good_as_reference(triton_backend, case)
    assert (run_with_gradients(triton_backend, case, torch.ones(16, 17))[-1][:, 1:] != 0).any()


@pytest.mark.parametrize("layout", ["columns", "rows", "leading"])
def test_strided_inputs(layout):
    case = random_case(m=24, k=13)
    if layout == "columns":
        case.x = torch.randn(24, 26)[:, ::2]
    elif layout == "rows":
        case.x = torch.randn(24, 40)[:, 3:16]
    else:
        case.x = torch.randn(4, 6, 13).transpose(0, 1)
        case.task_ids = case.task_ids.view(6, 4)
    case.x = case.x.detach().requires_grad_()
    assert_as_good_as_reference(triton_backend, case)


@pytest.mark.parametrize("n", [1, 17])
@pytest.mark.parametrize("kind", DYS)
def test_every_kind_of_output_gradient(kind, n):
    case, dy = random_case(n=n), torch.randn(13, n)
    ours = gradients(triton_backend, case, DYS[kind](dy))
    for one, wanted in zip(ours, gradients(triton_backend, case, dy), strict=True):
        assert torch.equal(one, wanted)


def test_expanded_output_gradient():
    case = random_case(m=12)
    expanded = run_with_gradients(triton_backend, case, torch.ones(1, 1).expand(12, 17))
    plain = run_with_gradients(triton_backend, case, torch.ones(12, 17))
    assert all(torch.equal(p, q) for p, q in zip(expanded, plain, strict=True))


def test_float32_adapters_on_a_16_bit_base():
    case = random_case(m=33, k=40, n=24).to(torch.float16)
    case.gates = case.gates.detach().float()
    case.a = [t.detach().float().requires_grad_() for t in case.a]
    case.b = [t.detach().float().requires_grad_() for t in case.b]
    dy = torch.randn(33, 24)
    results = run_with_gradients(triton_backend, case, dy)
    assert results[0].dtype == torch.float16
    assert all(g.dtype == torch.float32 for g in results[2:])
    exact = run_with_gradients(multi_lora_reference, case.to(torch.float64), dy)
    for ours, wide in zip(results, exact, strict=True):
        assert (ours.double() - wide).abs().max() <= 4e-3 * wide.abs().max()


def test_base_gradients():
    case = random_case(m=21, dropout_p=0.2)
    case.weight.requires_grad_()
    case.bias.requires_grad_()
    ours = torch.autograd.grad(triton_backend(*case.arguments()).sum(), [case.weight, case.bias])
    wide = case.to(torch.float64)
    y = multi_lora_reference(*wide.arguments())
    for got, exact in zip(
        ours, torch.autograd.grad(y.sum(), [wide.weight, wide.bias]), strict=True
    ):
        torch.testing.assert_close(got, exact.float())


def test_seed_tensor_equals_seed_int():
    case = random_case(m=16, dropout_p=0.5)
    dy = torch.randn(16, 17)
    for seed in (3, -1, 2**63 + 5, 2**33 + 1):
        case.seed = seed
        plain = run_with_gradients(triton_backend, case, dy)
        signed = (seed + 2**63) % 2**64 - 2**63
        for tensor in (torch.tensor([signed]), torch.tensor(signed)):
            case.seed = tensor
            again = run_with_gradients(triton_backend, case, dy)
            assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_group_of_unlike_linears(soft):
    """Other widths, ranks of zero, no base, no bias: as good as the reference, linear by linear."""
    first = random_case(seed=1, n=17, soft=soft)
    second = random_case(seed=2, n=9, ranks=[2, 6, 0, 3], soft=soft)
    third = random_case(seed=3, n=11, ranks=[0, 0, 0, 0], soft=soft)
    update = random_case(seed=4, n=5, bias=False, soft=soft)
    cases = [first, second, third, update]
    update.weight = torch.zeros(5, 24)  # the reference needs one
    for case in cases:
        case.task_ids, case.dropout_p, case.seed = first.task_ids, 0.25, first.seed

    def together(members):
        x = members[0].x
        weights = [case.weight for case in members[:3]] + [None]
        columns = [
            [getattr(case, name) for case in members] for name in ("bias", "a", "b", "gates")
        ]
        return multi_lora_group(
            x, weights, *columns, first.task_ids, 0.25, first.seed, backend="triton"
        )

    def alone(members):
        for case in members:
            case.x = members[0].x
        return [multi_lora_reference(*case.arguments()) for case in members]

    def results(function, members):
        outputs = function(members)
        leaves = [members[0].x] + [t for case in members for t in case.leaves()[1:]]
        total = sum(y.double().square().sum() for y in outputs)
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        zeros = [torch.zeros_like(t) for t in leaves]
        filled = [z if g is None else g for g, z in zip(gradients, zeros, strict=True)]
        return [y.detach() for y in outputs] + filled

    plain = results(alone, cases)
    exact = results(alone, [case.to(torch.float64) for case in cases])
    for ours, p, e in zip(results(together, cases), plain, exact, strict=True):
        assert_as_close(ours, p, e)


@pytest.mark.parametrize("seed", [0, 12345678901, -7])
def test_every_kernel_draws_the_same_mask(seed):
    m, k, p = 35, 43, 0.3
    keep = dropout_mask(m, k, p, seed).float()
    dropout = (torch.tensor([seed]), dropout_threshold(p), 1.0)
    ones = torch.ones(m, k)
    ids = torch.zeros(m, dtype=torch.int64)
    s = torch.empty(m, k)
    shrink(ones, torch.eye(k), torch.ones(1, k), ids, s, None, dropout)
    y = torch.empty(m, k)
    expand(ones[:, :1], torch.ones(1, k), y, False, dropout)
    x = outer(torch.eye(m), ones, [m], torch.float32, False, dropout)
    for drawn in (s, y, x):
        assert torch.equal(drawn, keep)


def test_scale_of_kept_elements():
    case = random_case(m=40, k=64, dropout_p=0.4)
    assert dropout_scale(0.4) == pytest.approx(1 / 0.6, rel=1e-4)
    assert_as_good_as_reference(triton_backend, case)


@pytest.mark.parametrize("block_m, block_r", [(16, 16), (64, 64), (64, 128), (32, 32)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_every_block_size(block_m, block_r, p):
    """The tiles that the rules give to large inputs, on small ones."""
    m, k, r, n = 133, 77, 2 * block_r + 5, 139
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(m, k, generator=g), torch.randn(r, k, generator=g)
    b, ids = torch.randn(r, n, generator=g), torch.randint(-1, 3, (m,), generator=g)
    gates = torch.randn(3, r, generator=g)
    keep, scale = dropout_mask(m, k, p, 11), dropout_scale(p)
    dropout = (torch.tensor([11]), dropout_threshold(p), scale) if p else None

    def gated(s):
        return torch.where((ids >= 0)[:, None], s * gates[ids].to(s.dtype), 0)

    def close(ours, function, *tensors):
        assert_as_close(ours, function(*tensors), function(*(t.double() for t in tensors)))

    def s_of(x, a):
        return torch.where(keep, x * scale, 0) @ a.t()

    launch = ShrinkLaunch(block_m, block_r, 32, 4, 1)
    s, h, h_alone = torch.empty(m, r), torch.empty(m, r), torch.empty(m, r)
    shrink(x, a, gates, ids, h, s, dropout, launch=launch)
    shrink(x, a, gates, ids, h_alone, None, dropout, launch=launch)
    close(s, s_of, x, a)
    close(h, lambda x, a: gated(s_of(x, a)), x, a)
    assert torch.equal(h, h_alone)
    y = torch.randn(m, n, generator=g)
    before = y.clone()
    expand(h, b, y, True, launch=ExpandLaunch(block_m, 64, block_r, True, 4, 1))
    close(y, lambda y, h, b: y + h @ b, before, h, b)
    launch = OuterLaunch(32, block_r, 128, 64, 4, 1)
    gradient = outer(h, x, [r], torch.float32, False, dropout, launch)
    close(gradient, lambda h, x: h.t() @ torch.where(keep, x * scale, 0), h, x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(16, 32, 16, 8), (150, 200, 328, 24), (300, 72, 520, 136)])
def test_gemm_with_the_update_inside(sizes, bias):
    m, k, n, r = sizes
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).half()

    x, w, h, b = normal(m, k), normal(n, k), normal(m, r), normal(r, n)
    v = normal(n) if bias else torch.zeros(n).half()
    assert why_not_gemm(x, w, h, b) is None
    y = gemm(x, w, v if bias else None, h, b)
    exact = sum(p.double() @ q.double() for p, q in ((x, w.t()), (h, b))) + v.double()
    assert_as_close(y, torch.nn.functional.linear(x, w, v) + h @ b, exact)


def test_gemm_says_what_it_cannot_compute():
    x, w, h, b = (torch.zeros(s).half() for s in [(4, 16), (8, 16), (4, 8), (8, 8)])
    assert why_not_gemm(x, w, h, b) is None
    assert "float32" in why_not_gemm(x.float(), w, h, b)
    assert "x has strides" in why_not_gemm(torch.zeros(4, 20).half()[:, :16], w, h, b)
    assert "H has strides" in why_not_gemm(x, w, torch.zeros(4, 16).half()[:, 1:9], b)
    assert "n is 9" in why_not_gemm(x, torch.zeros(9, 16).half(), h, torch.zeros(8, 9).half())
    assert "empty" in why_not_gemm(x[:0], w, h[:0], b)
