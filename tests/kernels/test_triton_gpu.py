"""The Triton backend on a real GPU: values, bits, graphs, no synchronisation."""

import json
from functools import partial
from unittest.mock import patch

import pytest
import torch

from ckf.kernels import group, multi_lora_linear, ops, replay, tune
from ckf.kernels.group import GroupShape
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.slots import compact_slots
from ckf.kernels.stacks import Stacks
from tests.kernels.cases import (
    assert_as_good_as_reference,
    on_gpu,
    random_case,
    run_with_gradients,
    slots_on_gpu,
)

pytestmark = pytest.mark.gpu
triton_backend = partial(multi_lora_linear, backend="triton")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_right(case, function=triton_backend):
    """``assert_as_good_as_reference`` draws its output gradient on the CPU."""
    with torch.device("cuda"):
        assert_as_good_as_reference(function, case)


NARROW, WIDE, UNEVEN = [16] * 5, [16] * 65, [64, 3, 40, 0, 128, 17]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("plan", ["expand", "addmm", "gemm"])
@pytest.mark.parametrize("slotted", [True, False], ids=["gather", "dense"])
def test_linears_that_share_x_in_one_call(slotted, plan, dropout_p):
    """q, k and v, as every patched model calls them: B, slots and H of each at an offset."""
    m, k, widths, rank, tasks = 1500, 512, (768, 256, 256), 16, 4
    case = random_case(m=m, k=k, n=sum(widths), tasks=tasks, ranks=[rank] * (tasks + 1))
    case.dropout_p = dropout_p
    case = on_gpu(case, torch.bfloat16)
    case.b = [torch.randn(n, rank, device="cuda") for n in widths for _ in range(tasks + 1)]
    case.a = [torch.randn(rank, k, device="cuda") / k**0.5 for _ in case.b]
    case.a, case.b = (
        [t.to(torch.bfloat16).requires_grad_() for t in own] for own in (case.a, case.b)
    )
    live = (case.gates != 0).tolist()
    slots = (None, 0)
    if slotted:
        slots = compact_slots([live] * 3, [[rank] * (tasks + 1)] * 3)
        slots = (slots[0].cuda(), slots[1])

    def split(tensors):
        return [tensors[i : i + tasks + 1] for i in range(0, len(tensors), tasks + 1)]

    def ours(x, weight, bias, a, b, gates, ids, p, seed):
        base = list(weight.split(widths)), list(bias.split(widths))
        group = (x, *base, split(a), split(b), [gates] * 3, ids, p, seed)
        return torch.cat(ops.run_group(*group, f"triton:{plan}", *slots), dim=1)

    def reference(x, weight, bias, a, b, gates, ids, p, seed):
        parts = zip(weight.split(widths), bias.split(widths), split(a), split(b), strict=True)
        return torch.cat(
            [multi_lora_reference(x, *part, gates, ids, p, seed) for part in parts], dim=1
        )

    dy = torch.randn(m, sum(widths), device="cuda")
    found = run_with_gradients(ours, case, dy)
    exact = run_with_gradients(reference, case.to(torch.float64), dy.double())
    plain = run_with_gradients(reference, case, dy)
    assert len(found) == 2 + len(case.a) + len(case.b)
    for one, e, p in zip(found, exact, plain, strict=True):
        allowed = 2 * (p.double() - e).norm() + 4 * torch.finfo(one.dtype).eps * e.norm()
        assert (one.double() - e).norm() <= allowed


@pytest.mark.parametrize("mixed", [False, True], ids=["runs", "mixed"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("plan", ["expand", "addmm", "gemm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [NARROW, WIDE, UNEVEN], ids=["narrow", "wide", "uneven"])
@pytest.mark.parametrize("m, k, n", [(5000, 512, 384), (300, 264, 129)])
def test_compact_matches_reference(m, k, n, ranks, dtype, plan, dropout_p, mixed):
    tasks = len(ranks) - 1
    ids = torch.arange(m) // 200 % (tasks + 1) - 1
    if mixed:
        ids = ids[torch.randperm(m, generator=torch.Generator().manual_seed(0))]
    case = random_case(m=m, k=k, n=n, tasks=tasks, ranks=ranks, dropout_p=dropout_p, ids=ids)
    assert_right(on_gpu(case, dtype), slots_on_gpu(ranks, plan))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ranks", [NARROW, WIDE, UNEVEN], ids=["narrow", "wide", "uneven"])
@pytest.mark.parametrize("plan", ["expand", "gemm"])
def test_compact_gives_the_same_bits_100_times(plan, ranks, dtype):
    tasks = len(ranks) - 1
    case = random_case(m=6000, k=512, n=768, tasks=tasks, ranks=ranks, dropout_p=0.1)
    case = on_gpu(case, dtype)
    dy = torch.randn(6000, 768, device="cuda")
    function = slots_on_gpu(ranks, plan)
    first = run_with_gradients(function, case, dy)
    assert all(t.isfinite().all() for t in first)
    for _ in range(99):
        again = run_with_gradients(function, case, dy)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


@pytest.mark.parametrize("ranks", [NARROW, WIDE], ids=["narrow", "wide"])
def test_compact_invalid_ids_become_nan_rows(ranks):
    ids = torch.randint(-1, len(ranks) - 1, (200,))
    ids[[3, 70, 199]] = torch.tensor([len(ranks) - 1, -2, 2**40])
    case = random_case(m=200, k=64, n=64, tasks=len(ranks) - 1, ranks=ranks, ids=ids)
    function = slots_on_gpu(ranks)
    y, dx, *_ = run_with_gradients(
        function, on_gpu(case, torch.bfloat16), torch.ones(200, 64, device="cuda")
    )
    for rows in (y, dx):
        assert rows.isnan().all(1).nonzero().squeeze(1).tolist() == [3, 70, 199]
        assert rows.isnan().sum() == 3 * 64


@pytest.mark.parametrize("ranks", [NARROW, WIDE], ids=["narrow", "wide"])
def test_compact_in_a_cuda_graph_follows_ids_and_seed_without_sync(ranks):
    tasks = len(ranks) - 1
    case = random_case(m=1024, k=256, n=384, tasks=tasks, ranks=ranks, dropout_p=0.2)
    case = on_gpu(case, torch.bfloat16)
    case.seed = torch.tensor([5], device="cuda")
    dy = torch.randn(1024, 384, device="cuda")
    function = slots_on_gpu(ranks)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_with_gradients(function, case, dy)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_with_gradients(function, case, dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_gradients(function, case, dy)
    ids = [torch.randint(-1, tasks, (1024,), device="cuda"), torch.arange(1024).cuda() // 16 % 3]
    for seed, fresh in zip((5, 6), ids, strict=True):
        case.seed.fill_(seed)
        case.task_ids.copy_(fresh)
        graph.replay()
        eager = run_with_gradients(function, case, dy)
        assert all(torch.equal(p, q) for p, q in zip(captured, eager, strict=True))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "m, k, n, ranks",
    [
        (37, 41, 29, [3, 8, 1, 5]),
        (1, 64, 48, [16, 16, 16, 16]),
        (600, 512, 256, [16, 16, 16, 16]),
        (4500, 256, 384, [32, 32, 32, 32]),
        (9000, 320, 128, [8, 8, 8, 8]),
        (3000, 256, 320, [64] * 9),
    ],
)
def test_matches_reference(m, k, n, ranks, dtype, dropout_p, soft):
    tasks = len(ranks) - 1
    ids = torch.arange(m) // 64 % (tasks + 1) - 1
    case = random_case(
        m=m, k=k, n=n, tasks=tasks, ranks=ranks, soft=soft, dropout_p=dropout_p, ids=ids
    )
    assert_right(on_gpu(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_ids_become_nan_rows(dtype):
    ids = torch.randint(-1, 3, (200,))
    ids[[3, 70, 199]] = torch.tensor([3, -2, 2**40])
    y = triton_backend(*on_gpu(random_case(m=200, k=64, n=64, ids=ids), dtype).arguments())
    nan_rows = y.isnan().all(1).nonzero().squeeze(1).tolist()
    assert nan_rows == [3, 70, 199] and y.isnan().sum() == 3 * 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_stress(seed, dtype):
    """Right, finite, same bits twenty times: a register overwritten in flight would show."""
    g = torch.Generator().manual_seed(seed)
    tasks = int(torch.randint(1, 9, (1,), generator=g))
    ranks = (8 * torch.randint(1, 9, (tasks + 1,), generator=g)).tolist()
    m, k, n = (
        int(torch.randint(low, high, (1,), generator=g))
        for low, high in ((4097, 9000), (4, 40), (4, 40))
    )
    case = random_case(
        m=m, k=16 * k, n=16 * n, tasks=tasks, ranks=ranks, dropout_p=0.1 * (seed % 2), seed=seed
    )
    case = on_gpu(case, dtype)
    assert_right(case)
    dy = torch.randn(m, 16 * n, generator=g).cuda()
    first = run_with_gradients(triton_backend, case, dy)
    assert all(t.isfinite().all() for t in first)
    for _ in range(19):
        again = run_with_gradients(triton_backend, case, dy)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_products_draw_their_mask_by_a_kernel(dtype):
    """The same bits as with the mask of torch, and no warning that the kernel is missing."""
    case = on_gpu(random_case(m=300, k=264, n=129, dropout_p=0.3), dtype)
    dy = torch.randn(300, 129, device="cuda")
    dense = partial(multi_lora_linear, backend="torch")
    assert group.kernel_draws(case.x.device)
    ours = run_with_gradients(dense, case, dy)
    with patch.object(group, "drops_by_kernel", lambda rows: False):
        plain = run_with_gradients(dense, case, dy)
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [[[16] * 5] * 3, [[3, 8, 1], [0, 5, 17, 128]], [[16] * 65] * 2])
def test_launches_stack_what_torch_stacks(ranks, adapters):
    from ckf.kernels.triton_stack import stack

    shape = GroupShape(tuple(map(tuple, ranks)), 0.0)
    k, n, last = 520, 777, {"dtype": adapters, "device": "cuda"}
    a = [torch.randn(r, k, **last) for own in ranks for r in own]
    b = [torch.randn(n, r, **last) for own in ranks for r in own]
    gates = [torch.randn(4, len(own), device="cuda") for own in ranks]
    ours, plain = (f(shape, gates, a, b, torch.bfloat16) for f in (stack, Stacks.of))
    for one, other in zip(
        [ours.a, ours.gates, *ours.b], [plain.a, plain.gates, *plain.b], strict=True
    ):
        assert torch.equal(one, other)


def test_a_decoding_call_that_keeps_nothing_is_stacked_so_too():
    from ckf.kernels import cuda, decode

    if not cuda.available()[0]:
        pytest.skip("needs ckf._C")
    case = on_gpu(random_case(m=4, k=264, n=136, ranks=[16] * 4), torch.bfloat16)
    shape = GroupShape((tuple(t.shape[0] for t in case.a),), 0.0)
    experts = [case.gates.detach()], [t.detach() for t in case.a], [t.detach() for t in case.b]
    base = case.x.detach(), [case.weight], [case.bias]
    (ours,) = decode.forward_pass(shape, *base, *experts, case.task_ids)
    assert group.why_no_triton(case.x.device) is None
    kept = decode.prepare(shape, *experts, torch.bfloat16)
    assert torch.equal(ours, decode.decode_pass(kept, *base, case.task_ids)[0])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("plan", ["expand", "addmm", "gemm"])
@pytest.mark.parametrize("ranks", [NARROW, WIDE], ids=["dense", "gather"])
def test_repeated_passes_give_the_bits_of_run_ones(ranks, plan, dropout_p, monkeypatch):
    """Run, written down, repeated: each in memory of its own, turns on streams of their own."""
    tasks, function = len(ranks) - 1, slots_on_gpu(ranks, plan)

    def call(seed: int) -> list[torch.Tensor]:
        case = random_case(m=700, k=512, n=384, tasks=tasks, ranks=ranks, seed=seed)
        case.dropout_p, case.seed = dropout_p, torch.tensor([seed], device="cuda")
        case = on_gpu(case, torch.bfloat16)
        return run_with_gradients(function, case, torch.full((700, 384), 0.5 + seed, device="cuda"))

    def calls() -> list[torch.Tensor]:
        return [tensor for seed in range(6) for tensor in call(seed)]

    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(replay, "REPLAY", False)
    wanted = calls()
    monkeypatch.setattr(replay, "REPLAY", True)
    kept = []
    for _ in range(3):
        with torch.cuda.stream(torch.cuda.Stream()):
            kept.append(calls())
            torch.cuda.current_stream().synchronize()
    kinds = list(replay._known.values())
    assert len(kinds) == 2 and all(isinstance(known, replay.Recording) for known in kinds)
    for found in kept:
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("earlier", [0, 1, 2], ids=["run", "written down", "repeated"])
def test_a_graph_captures_any_call_of_a_kind(earlier, monkeypatch):
    """It reads memory of its own pool, whatever runs between its replays."""
    case = on_gpu(random_case(m=900, k=256, n=384, tasks=4, ranks=NARROW), torch.bfloat16)
    dy, function = torch.randn(900, 384, device="cuda"), slots_on_gpu(NARROW)
    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(replay, "REPLAY", False)
    wanted = run_with_gradients(function, case, dy)  # compiles
    monkeypatch.setattr(replay, "REPLAY", True)
    for _ in range(earlier):
        run_with_gradients(function, case, dy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_gradients(function, case, dy)
    for m in (900, 40, 900):
        other = on_gpu(random_case(m=m, k=256, n=384, tasks=4, ranks=NARROW), torch.bfloat16)
        run_with_gradients(function, other, torch.ones(m, 384, device="cuda"))
        for one in captured:
            one.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(p, q) for p, q in zip(captured, wanted, strict=True))


@pytest.mark.parametrize("plan", ["expand", "gemm"])
def test_repeated_passes_take_no_more_memory(plan, monkeypatch):
    case = on_gpu(random_case(m=4096, k=1024, n=2048, tasks=4, ranks=NARROW), torch.bfloat16)
    dy, function = torch.randn(4096, 2048, device="cuda"), slots_on_gpu(NARROW, plan)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_with_gradients(function, case, dy)
        return torch.cuda.max_memory_allocated() - before

    monkeypatch.setattr(replay, "_known", {})
    monkeypatch.setattr(replay, "REPLAY", False)
    peak()  # compiles
    run = peak()
    monkeypatch.setattr(replay, "REPLAY", True)
    assert max(peak() for _ in range(4)) <= 1.02 * run + 2**20


def test_no_synchronisation():
    case = on_gpu(random_case(m=300, k=64, n=64, soft=True, dropout_p=0.1), torch.bfloat16)
    dy = torch.randn(300, 64, device="cuda")
    run_with_gradients(triton_backend, case, dy)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_with_gradients(triton_backend, case, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_draws_afresh_from_a_seed_tensor():
    case = on_gpu(random_case(m=512, k=128, n=96, dropout_p=0.2), torch.bfloat16)
    case.seed = torch.tensor([5], device="cuda")
    dy = torch.randn(512, 96, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_with_gradients(triton_backend, case, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_with_gradients(triton_backend, case, dy)
    for seed in (5, 6):
        case.seed.fill_(seed)
        graph.replay()
        eager = run_with_gradients(triton_backend, case, dy)
        assert all(torch.equal(p, q) for p, q in zip(captured, eager, strict=True))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [(1000, 4096, 1032, 80), (8192, 1024, 4096, 24), (130, 72, 264, 8)]
)
def test_gemm_with_the_update_inside(sizes, dtype, bias):
    from ckf.kernels.triton_gemm import gemm, why_not_gemm

    m, k, n, r = sizes
    x, w, h, b = (torch.randn(s, device="cuda").to(dtype) for s in ((m, k), (n, k), (m, r), (r, n)))
    v = torch.randn(n, device="cuda").to(dtype) if bias else None
    reason = why_not_gemm(x, w, h, b)
    if reason is not None:
        pytest.skip(reason)
    exact = x.double() @ w.double().t() + h.double() @ b.double() + (0 if v is None else v.double())
    plain = torch.nn.functional.linear(x, w, v) + h @ b
    allowed = 2 * (plain.double() - exact).abs().max()
    allowed += 4 * torch.finfo(dtype).eps * exact.abs().max()
    y = gemm(x, w, v, h, b)
    assert (y.double() - exact).abs().max() <= allowed
    assert all(torch.equal(gemm(x, w, v, h, b), y) for _ in range(20))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1000, 1032, 4096, 80), (8192, 4096, 1024, 24)])
def test_gemm_of_dx(sizes, dtype, p):
    from ckf.kernels import dropout_mask
    from ckf.kernels.dropout import dropout_scale, dropout_threshold
    from ckf.kernels.triton_gemm import gemm_dx, why_not_gemm

    m, k, n, r = sizes
    dy, w, ds, a = (
        torch.randn(s, device="cuda").to(dtype) for s in ((m, n), (n, k), (m, r), (r, k))
    )
    reason = why_not_gemm(dy, w, ds, a)
    if reason is not None:
        pytest.skip(reason)
    dropout = (torch.tensor([9], device="cuda"), dropout_threshold(p), dropout_scale(p))
    keep = dropout_mask(m, k, p, 9, "cuda")

    def formula(dy, w, ds, a):
        return torch.where(keep, (ds @ a) * dropout_scale(p), 0) + dy @ w

    exact = formula(*(t.double() for t in (dy, w, ds, a)))
    allowed = 2 * (formula(dy, w, ds, a).double() - exact).abs().max()
    allowed += 4 * torch.finfo(dtype).eps * exact.abs().max()
    dx = gemm_dx(dy, w, ds, a, dropout if p else None)
    assert (dx.double() - exact).abs().max() <= allowed


def test_tuning_measures_every_plan(tmp_path):
    """``ckf tune``: no plan is refused for its values; the fastest is what the table has."""
    said: list[str] = []
    calls = [tune.Timed("train", 2048, 576, (576, 192, 192), 4, 16, p) for p in (0.0, 0.05)]
    calls.append(tune.Timed("forward", 16, 576, (1536,), 4, 16))
    tune.tune(calls, "cuda", said.append, tmp_path)
    assert not [line for line in said if "no triton" in line]
    (file,) = tmp_path.iterdir()
    assert [row["triton"] > 0 for row in json.loads(file.read_text())["rows"]] == [True] * 3
