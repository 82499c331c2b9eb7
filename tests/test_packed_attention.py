"""Packed rows that attend within themselves equal rows alone, forward and backward."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import ckf
from ckf.packed_attention import (
    PACKED_ATTENTION,
    PackedRows,
    can_attend_packed,
    packed_attention,
)
from ckf.packing import attend_packed, packs_rows_right
from tests.test_packing import (
    LENGTHS,
    TASKS,
    assert_packed_rows_equal_padded_rows,
    features,
    flattening,
    long_rows_packed_and_alone,
    padding,
    patched,
)
from tests.tiny import FAMILIES, tiny_model, tokens

length_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12)


class Attention(torch.nn.Module):
    """What transformers hands to an attention function, and nothing else."""

    num_key_value_groups, is_causal = 2, True


def random_qkv(count, dtype=torch.float64, heads=4, width=8):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, h, width, generator=generator, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for h in (heads, heads // 2, heads // 2)
    ]


def each_row_alone(query, key, value, lengths, window=None):
    outputs = []
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True):
        place = torch.arange(q.shape[2])
        back = place.unsqueeze(1) - place
        seen = (back >= 0) & (back < (window or len(place)))
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def compare(lengths, window=None):
    inputs = random_qkv(sum(lengths))
    rows = PackedRows.of(lengths)
    got, _ = packed_attention(Attention(), *inputs, None, rows, sliding_window=window)
    wanted = each_row_alone(*inputs, lengths, window)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    own = torch.autograd.grad((got * weights).sum(), inputs)
    expected = torch.autograd.grad((wanted * weights).sum(), inputs)
    for mine, reference in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, reference)


# ---- where rows lie


@settings(deadline=None, max_examples=60)
@given(length_lists)
def test_every_token_has_one_place_and_padding_repeats_the_rows_own_last_token(lengths):
    rows = PackedRows.of(lengths)
    total = sum(lengths)
    assert torch.equal(rows.gather[rows.scatter], torch.arange(total))
    assert sum(count * width for count, width in rows.groups) == len(rows.gather)
    assert sum(count for count, _ in rows.groups) == len(lengths)
    row_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    last = torch.tensor(lengths).cumsum(0) - 1
    done = 0
    for count, width in rows.groups:
        held = rows.gather[done : done + count * width].view(count, width)
        assert (row_of[held] == row_of[held[:, :1]]).all()
        own = torch.tensor(lengths)[row_of[held[:, 0]]]
        assert own.max() == width and own.min() >= 0.75 * width
        pad = torch.arange(width) >= own.unsqueeze(1)
        assert torch.equal(held[pad], last[row_of[held[pad]]])
        done += count * width


@pytest.mark.parametrize("lengths", [[], [3, 0], [[2]], [-1]])
def test_lengths_that_are_none_are_refused(lengths):
    with pytest.raises(ValueError, match="expected one or more, each at least 1"):
        PackedRows.of(lengths)


def test_rows_can_be_pickled_copied_and_moved():
    rows = PackedRows.of([3, 5])
    for same in (pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows), rows.to("cpu")):
        assert same.groups == rows.groups and torch.equal(same.gather, rows.gather)
    elsewhere = rows.to("meta")
    assert {t.device.type for t in (elsewhere.gather, elsewhere.scatter, elsewhere.mask)} == {
        "meta"
    }


# ---- attention alone


@settings(deadline=None, max_examples=30)
@given(length_lists)
def test_rows_and_gradients_equal_each_row_alone(lengths):
    compare(lengths)


@pytest.mark.parametrize("window", [1, 3, 9, 100])
def test_a_sliding_window_is_kept(window):
    compare([9, 7, 30, 1], window)


def test_the_same_bits_every_time_and_from_neighbours_of_any_value():
    """A row of NaN leaves the others alone."""
    lengths = [5, 6, 20]
    inputs = random_qkv(sum(lengths), torch.float32)

    def run(tensors):
        own = [t.detach().clone().requires_grad_() for t in tensors]
        output, _ = packed_attention(Attention(), *own, None, PackedRows.of(lengths))
        output[:, 5:].nan_to_num().sum().backward()
        return [output[:, 5:], *(t.grad[:, :, 5:] for t in own)]

    first = run(inputs)
    poisoned = [t.detach().clone() for t in inputs]
    for tensor in poisoned:
        tensor[:, :, :5] = float("nan")
    for again in (run(inputs), run(poisoned)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_rows_it_is_sdpa():
    query, key, value = random_qkv(6)
    got, _ = packed_attention(Attention(), query, key, value, None)
    torch.testing.assert_close(got, each_row_alone(query, key, value, [6]))


@pytest.mark.parametrize("lengths", [[3, 4], [3, 2]])
def test_rows_of_another_sequence_are_refused(lengths):
    with pytest.raises(ValueError, match="expected one sequence of as many"):
        packed_attention(Attention(), *random_qkv(6), None, PackedRows.of(lengths))


# ---- in models


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_taken_where_the_model_computes_it_right(family):
    """OPT, too, whose own attention mixes packed rows."""
    model = patched(family)
    assert packs_rows_right(model) == (family != "opt")
    for _ in range(2):
        assert attend_packed(model)
        assert model.config._attn_implementation == PACKED_ATTENTION


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": 0, "initializer_range": 0.15,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
INDEXER = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "index_topk": 12, "index_n_heads": 2, "index_head_dim": 16,
    "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phimoe", {"sliding_window": 12} | EXPERTS),  # the window is in the mask alone
        ("qwen2_moe", MIXED | EXPERTS | {"use_sliding_window": True}),  # in one layer
        ("doge", {"sliding_window": 12}),  # makes masks of its own
        ("falcon", {"new_decoder_architecture": False}),  # cannot change its attention
        ("lfm2", {"layer_types": ["conv", "full_attention"], "initializer_range": 0.02}),
        ("deepseek_v32", INDEXER),  # sees the best twelve tokens
    ],
)
def test_families_that_it_would_get_wrong_stay_as_they_are(family, options):
    """Rows of the trial are too short to show most of these."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL | options)
    model = AutoModelForCausalLM.from_config(config).eval()
    named = [name for name, _ in model.named_modules() if name.endswith("o_proj")]
    ckf.patch_model(model, ["ctr"], r=2, target_modules=named or "all-linear")
    before, ids = model.config._attn_implementation, tokens(1, 31)
    wanted = model(ids, task_ids=["ctr"]).logits
    assert before == "sdpa" and not attend_packed(model)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids, task_ids=["ctr"]).logits, wanted)


@pytest.mark.parametrize("family", ["mistral", "phi3", "starcoder2", "qwen3", "gemma3_text"])
def test_windows_that_reach_attention_are_kept(family):
    """The trial has 15 tokens; here rows pass the window by far."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    mixed = MIXED | {"use_sliding_window": True} if family in ("qwen3", "gemma3_text") else {}
    options = SMALL | {"head_dim": 8} | mixed | {"sliding_window": 6}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options)).eval()
    ckf.patch_model(model, TASKS, r=4)
    assert attend_packed(model)
    for own, alone in long_rows_packed_and_alone(model):
        torch.testing.assert_close(own, alone, rtol=1e-4, atol=1e-5)


def test_parts_of_a_model_with_attention_of_their_own_are_left_alone(monkeypatch):
    model = patched("llama")
    monkeypatch.setattr(type(model.config), "sub_configs", {"vision_config": None})
    model.config.vision_config = copy.deepcopy(model.config)
    model.config.vision_config._attn_implementation = "eager"
    assert not can_attend_packed(model) and not attend_packed(model)


@pytest.mark.parametrize("name", ["s_aux", "indices", "position_bias", "softcap"])
@pytest.mark.parametrize("rows", [None, PackedRows.of([6])])
def test_what_changes_attention_and_is_not_known_is_refused(name, rows):
    with pytest.raises(ValueError, match=f"hands {name} to attention"):
        packed_attention(Attention(), *random_qkv(6), None, rows, **{name: torch.ones(1)})
    with pytest.raises(ValueError, match="makes masks of its own"):
        packed_attention(Attention(), *random_qkv(6), torch.ones(1, 1, 6, 6), PackedRows.of([6]))


def test_a_model_that_reads_both_ways_or_in_chunks_is_left_alone():
    model = patched("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    assert not attend_packed(model) and model.config._attn_implementation == "sdpa"
    for name, value in (("is_causal", False), ("attention_chunk_size", 4)):
        model = patched("llama")
        setattr(model.config, name, value)
        assert not can_attend_packed(model)
    assert not can_attend_packed(patched("llama", "eager"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_padded_rows(family, checkpointing):
    model = patched(family, PACKED_ATTENTION)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = flattening(model)(features())
    assert batch["packed_rows"].scatter.shape == (sum(LENGTHS),)
    assert "attention_mask" not in batch
    assert_packed_rows_equal_padded_rows(model)


def test_generation_and_padding_are_as_before():
    model = patched("llama")
    before = model.generate(tokens(2, 5), task_ids=["ctr", "topk"], max_new_tokens=4)
    padded = padding(model)(features())
    wanted = model(**padded).logits
    assert attend_packed(model)
    after = model.generate(tokens(2, 5), task_ids=["ctr", "topk"], max_new_tokens=4)
    assert torch.equal(before, after)
    assert torch.equal(model(**padded).logits, wanted)


def test_rows_go_where_the_tokens_are():
    """Trainer moves them; a loop that moves tensors alone need not care."""
    model = patched("llama", PACKED_ATTENTION)
    batch = flattening(model)(features())
    tensors = {k: v.to("meta") for k, v in batch.items() if isinstance(v, torch.Tensor)}
    met = {}

    def stop(module, args, kwargs):
        met.update(kwargs)
        raise InterruptedError

    model.to("meta").model.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(InterruptedError):
        model(**batch | tensors | {"task_ids": batch["task_ids"]})
    assert batch["packed_rows"].gather.device.type == "cpu"
    assert met["packed_rows"].gather.device.type == met["attention_mask"].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_cache": True}, "keeps a key-value cache; pass use_cache=False"),
        ({"attention_mask": torch.ones(1, 16)}, "attention_mask is given beside.*leave it out"),
        ({"token_type_ids": torch.zeros(1, 16)}, "token_type_ids are given.*leave them out"),
        ({"implementation": "sdpa"}, "does not know it; call model.set_attn_implementation"),
    ],
)
def test_a_wrong_call_is_refused(change, message):
    model = patched("llama", PACKED_ATTENTION)
    batch = flattening(model)(features()) | change
    model.set_attn_implementation(batch.pop("implementation", PACKED_ATTENTION))
    with pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_that_ignores_the_rows_gives_nan_and_no_leak(implementation):
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    batch = PackedRows.of([3, 4]).inputs()
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    logits = model(tokens(1, 7), position_ids=positions, use_cache=False, **batch).logits
    assert logits.isnan().all()


def test_compiled_in_one_graph_for_each_set_of_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    model = patched("llama", PACKED_ATTENTION).train()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batch = flattening(model)(features())
    turned = flattening(model)(features()[::-1])
    other = flattening(model)(features()[:2])
    for rows, graphs in ((batch, 1), (turned, 1), (batch, 1), (other, 2)):
        torch.testing.assert_close(compiled(**rows).loss, model(**rows).loss)
        assert counter.frame_count == graphs


def test_a_model_that_was_set_to_it_by_hand_is_tried_before_it_is_believed():
    model = patched("llama", PACKED_ATTENTION)
    batch = flattening(model)(features())
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="ckf_packed attention does not keep them apart"):
        model(**batch)
