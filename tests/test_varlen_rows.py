"""Packed rows by PyTorch's one kernel for rows of any lengths, where it stands behind them.

The kernel needs a GPU: here a stand-in of its signature shows what it is handed, and what happens
where it is not right. tests/test_packing.py has the real one, on a GPU.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ckf import packed_attention as attention
from ckf.packed_attention import PackedRows, packed_attention
from ckf.packing import attend_packed
from tests.test_packed_attention import Attention, compare, each_row_alone, random_qkv
from tests.test_packing import long_rows_packed_and_alone, patched


def varlen_of_pytorch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    """What torch.nn.attention.varlen.varlen_attn documents, row by row."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert query.shape == key.shape == value.shape and query.stride(-1) == 1
    starts = cu_seq_q.tolist()
    assert max_q == max_k == max(b - a for a, b in itertools.pairwise(starts))
    left, right = window_size
    outputs = []
    for first, stop in itertools.pairwise(starts):
        q, k, v = (x[first:stop].transpose(0, 1) for x in (query, key, value))
        place = torch.arange(stop - first)
        back = place.unsqueeze(1) - place
        seen = (back >= -right if right >= 0 else back == back) & (
            back <= left if left >= 0 else back == back
        )
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _varlen_op(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, longest_q: int, longest_k: int,
    scale: float | None, window: list[int],
) -> Tensor:  # fmt: skip
    bounds = {"scale": scale, "window_size": tuple(window)}
    return varlen_of_pytorch(q, k, v, starts, ends, longest_q, longest_k, **bounds).contiguous()


@pytest.fixture
def one_kernel(monkeypatch):
    """As on a GPU: calls of the kernel are counted."""
    calls = []

    def varlen_attn(query, key, value, starts, *rest, scale=None, window_size=(-1, -1)):
        calls.append(window_size)
        return varlen_of_pytorch(
            query, key, value, starts, *rest, scale=scale, window_size=window_size
        )

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "VARLEN_DEVICE", "cpu")
    monkeypatch.setattr(attention, "_VARLEN_DTYPES", (torch.float32, torch.float64))
    attention._tried_varlen.cache_clear()
    yield calls
    attention._tried_varlen.cache_clear()


@pytest.mark.parametrize("window", [None, 1, 3, 9, 29, 30, 100])
def test_one_kernel_computes_rows_and_gradients(one_kernel, window):
    compare([9, 7, 30, 1], window)
    tried = [(-1, 0), (19, 0)]  # the trial, with a window of 20 and without
    assert one_kernel == [*tried, (-1 if window in (None, 30, 100) else window - 1, 0)]
    compare([4], window)
    assert len(one_kernel) == 4  # it is tried once


@pytest.mark.parametrize("family", ["llama", "gemma", "mistral"])
def test_one_kernel_in_models(one_kernel, family):
    model = patched(family)
    assert attend_packed(model)
    for own, alone in long_rows_packed_and_alone(model):
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)
    assert len(one_kernel) > 2


@pytest.mark.parametrize("fault", ["wrong", "nan", "error", "missing", "old"])
def test_a_kernel_that_is_not_right_there_is_not_used(one_kernel, monkeypatch, fault, recwarn):
    def broken(*tensors, scale=None, window_size=(-1, -1)):
        if fault == "error":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")
        output = varlen_of_pytorch(*tensors, scale=scale, window_size=window_size)
        return output * (float("nan") if fault == "nan" else 1.1)

    replaced = {"missing": None, "old": lambda q, k, v, starts, ends, longest, most: q}
    monkeypatch.setattr(attention, "varlen_attn", replaced.get(fault, broken))
    for _ in range(2):
        compare([9, 7, 30, 1], 5)
    said = [str(w.message) for w in recwarn if "any lengths is not used" in str(w.message)]
    assert len(said) == (fault in ("wrong", "nan", "error"))
    assert all("more" not in words for words in said)


def test_dropout_or_attention_both_ways_take_the_groups(one_kernel):
    inputs = random_qkv(12)
    rows = PackedRows.of([5, 7])
    packed_attention(Attention(), *inputs, None, rows, dropout=0.5)
    both_ways, _ = packed_attention(
        Attention(), *inputs, None, PackedRows.of([12]), is_causal=False
    )
    assert one_kernel == []
    q, k, v = inputs
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    torch.testing.assert_close(both_ways, scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_one_kernel_is_traced(one_kernel, monkeypatch):
    """The trial is none of the graph's."""
    kernel = torch.library.custom_op("ckf_test::varlen", _varlen_op, mutates_args=())
    kernel.register_fake(lambda q, *_: torch.empty_like(q))
    real = attention.varlen_attn

    def varlen_attn(*tensors, scale=None, window_size=(-1, -1)):
        if tensors[0].requires_grad:  # the trial, which is run, not traced
            return real(*tensors, scale=scale, window_size=window_size)
        return kernel(*tensors, scale, list(window_size))

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    lengths = [9, 7, 30, 1]
    inputs, rows = [t.detach() for t in random_qkv(sum(lengths))], PackedRows.of(lengths)
    graphs = []

    def backend(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    compiled = torch.compile(packed_attention, fullgraph=True, backend=backend)
    got, _ = compiled(Attention(), *inputs, None, rows)
    torch.testing.assert_close(got, each_row_alone(*inputs, lengths))
    assert len(one_kernel) == 2 and len(graphs) == 1 and "ckf_test.varlen" in graphs[0]
