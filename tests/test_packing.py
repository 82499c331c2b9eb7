"""Rows of several tasks packed into one sequence equal rows alone, or a forward pass refuses."""

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DynamicCache,
    PreTrainedTokenizerFast,
    default_data_collator,
)

import ckf
from ckf.packed_attention import PACKED_ATTENTION, _tried_varlen
from ckf.packing import packed, packs_rows_right
from tests.tiny import FAMILIES, randomise_adapters, tiny_model, tokens

TASKS = ["ctr", "topk", "rating"]
LENGTHS = (4, 7, 5)
PACKING = [family for family in FAMILIES if family != "opt"]


def patched(family="llama", implementation=None, **options):
    model = tiny_model(family)
    if implementation:
        model.set_attn_implementation(implementation)
    with torch.no_grad():  # attention that tells tokens apart, so that a leak is large
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    ckf.patch_model(model, TASKS, r=4, lora_alpha=8, **options)
    randomise_adapters(model, scale=0.1)
    return model


def features(key="task", values=("ctr", "topk", -1)):
    rows = tokens(len(LENGTHS), max(LENGTHS)).tolist()
    return [
        {"input_ids": row[:n], "labels": row[:n], key: value}
        for row, n, value in zip(rows, LENGTHS, values, strict=True)
    ]


def flattening(model):
    return ckf.TaskCollator(model, DataCollatorWithFlattening(return_flash_attn_kwargs=True))


def padding(model):
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>")), pad_token="<pad>"
    )
    return ckf.TaskCollator(model, DataCollatorForSeq2Seq(tokenizer))


def packed_batch(**changes):
    """Two rows in one sequence, as a caller without our collator makes them."""
    positions = torch.cat([torch.arange(7), torch.arange(8)]).unsqueeze(0)
    ids = torch.tensor([0] * 7 + [1] * 8).unsqueeze(0)
    batch = {"input_ids": tokens(1, 15), "position_ids": positions, "task_ids": ids}
    return {**batch, "use_cache": False, **changes}


# ---- equality


def assert_packed_rows_equal_padded_rows(model):
    def loss_and_gradients(collate):
        model.zero_grad()
        output = model(**collate(features()))
        output.loss.backward()
        return output, [p.grad.clone() for p in model.parameters() if p.requires_grad]

    together, gradients = loss_and_gradients(flattening(model))
    apart, expected = loss_and_gradients(padding(model))
    rows = [apart.logits[i, :n] for i, n in enumerate(LENGTHS)]
    torch.testing.assert_close(together.logits[0], torch.cat(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.loss, apart.loss)
    for own, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", PACKING)
def test_packed_rows_equal_padded_rows(family, implementation):
    assert_packed_rows_equal_padded_rows(patched(family, implementation))


@pytest.mark.gpu
def test_packed_rows_equal_padded_rows_with_flash_attention():
    pytest.importorskip("flash_attn")
    model = patched("llama", "flash_attention_2").to("cuda", torch.bfloat16)
    with torch.no_grad():
        together = model(**on("cuda", flattening(model)(features()))).logits[0]
        apart = model(**on("cuda", padding(model)(features()))).logits
    rows = torch.cat([apart[i, :n] for i, n in enumerate(LENGTHS)])
    assert (together - rows).abs().max() < 2 * 2**-8 * rows.abs().max()


@pytest.mark.gpu
def test_rows_that_attend_within_themselves_equal_rows_alone_on_a_gpu():
    model = patched("llama", PACKED_ATTENTION).to("cuda", torch.bfloat16)
    assert packs_rows_right(model)
    for own, alone in long_rows_packed_and_alone(model):
        assert (own - alone).abs().max() < 4 * 2**-8 * alone.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128])
def test_pytorch_s_kernel_for_rows_of_any_lengths_is_right_on_a_gpu(dtype, width):
    """Else groups are padded: slower, no fault, but a machine to know of."""
    assert _tried_varlen(torch.device("cuda", 0), dtype, width)


def long_rows_packed_and_alone(model):
    """Logits (tokens, vocabulary) of each of three rows, of up to 31 tokens."""
    lengths = (31, 17, 4)
    rows = [{"input_ids": tokens(1, n, seed=n)[0].tolist(), "task": "ctr"} for n in lengths]
    batch = on(model.device, flattening(model)(rows))
    with torch.no_grad():
        together = model(**batch).logits[0].split(lengths)
        ids = [torch.tensor([row["input_ids"]], device=model.device) for row in rows]
        alone = [model(row, task_ids=["ctr"]).logits[0] for row in ids]
    return list(zip(together, alone, strict=True))


def on(device, batch):
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_tells_which_models_pack(family):
    model = patched(family).train()
    assert packs_rows_right(model) == (family != "opt")
    assert model.training and all(m.training for m in model.modules())


# ---- what would let rows see each other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.ones(1, 15)}, "an attention_mask is given; leave it out"),
        ({"use_cache": True}, "keeps a key-value cache; pass use_cache=False"),
        ({"use_cache": None}, "keeps a key-value cache"),  # the default is to keep one
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_packed_rows_that_would_see_each_other_raise(changes, message, training):
    model = patched().train(training)
    with pytest.raises(ValueError, match=f"rows packed .* would see each other: .*{message}"):
        model(**packed_batch(**changes))
    model(**packed_batch())
    model.config.use_cache = False
    model(**packed_batch(use_cache=None))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # transformers from 5.24, before
def test_packed_rows_with_a_given_cache_raise(name):
    model = patched()
    with pytest.raises(ValueError, match="keeps a key-value cache; pass use_cache=False"):
        model.forward.check_packing(model, packed_batch(**{name: DynamicCache()}), None)


def test_a_model_that_mixes_packed_rows_raises():
    with pytest.raises(ValueError, match="OPTForCausalLM with .* does not keep them apart; pad"):
        patched("opt")(**packed_batch())


def test_several_packed_sequences_raise_where_flash_attention_would_mix_them():
    model = patched()
    batch = {k: v.expand(2, -1) for k, v in packed_batch().items() if k != "use_cache"}
    model(**batch, use_cache=False)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 was given 2 packed sequences; pack"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_packing_arguments_show_packing_without_positions(name):
    borders = {name: torch.tensor([0, 7, 15], dtype=torch.int32)}
    assert packed(borders) and not packed({name: None})
    with pytest.raises(ValueError, match="an attention_mask is given"):
        patched()(**packed_batch(attention_mask=torch.ones(1, 15), position_ids=None, **borders))


class OnDevice(torch.Tensor):
    """A tensor that cannot be read on the host."""

    device = torch.device("cuda")


def test_positions_on_a_device_are_not_read():
    positions = packed_batch()["position_ids"]
    assert packed({"position_ids": positions})
    assert not packed({"position_ids": positions.as_subclass(OnDevice)})


def test_training_with_unread_positions_and_a_cache_raises():
    model, ids = patched().train(), packed_batch()["task_ids"]
    check = model.forward.check_packing
    unread = {"position_ids": torch.empty(1, 15, device="meta"), "use_cache": True}
    with pytest.raises(ValueError, match="position_ids on a device, a task a token.*use_cache=Fa"):
        check(model, unread, ids)
    check(model, unread, ids[:, 0])  # a task a row
    check(model, unread | {"use_cache": False}, ids)
    check(model, unread | {"attention_mask": torch.ones(1, 15)}, ids)  # an ordinary padded batch
    check(model.eval(), unread, ids)


# ---- what must go on working


def test_padding_is_not_packing():
    left = torch.tensor([[1, 1, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    right = torch.tensor([[0, 1, 2, 3, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6]])
    assert not packed({"position_ids": left, "attention_mask": mask})
    assert not packed({"position_ids": right, "attention_mask": mask.flip(1)})
    assert packed({"position_ids": left, "attention_mask": torch.ones(2, 7)})
    model = patched()
    ids = torch.tensor([[0] * 5 + [1] * 2] * 2)
    model(input_ids=tokens(2), position_ids=left, attention_mask=mask, task_ids=ids)
    model(input_ids=tokens(2), task_ids=ids)


def test_generation_from_padded_rows_goes_on():
    model = patched()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    options = {"max_new_tokens": 4, "pad_token_id": 0, "task_ids": ["ctr", "topk"]}
    both = model.generate(tokens(2), attention_mask=mask, **options)
    alone = model.generate(tokens(2)[:1, 3:], **{**options, "task_ids": ["ctr"]})
    assert torch.equal(both[0, 7:], alone[0, 4:])
    model.generate(tokens(2), attention_mask=mask, cache_implementation="static", **options)


def test_a_mask_of_every_pair_is_the_callers_own_packing():
    model, batch = patched(), packed_batch(use_cache=True)
    row = torch.tensor([0] * 7 + [1] * 8)
    mask = (row.unsqueeze(0) == row.unsqueeze(1)) & torch.ones(15, 15).tril().bool()
    with torch.no_grad():
        own = model(**batch, attention_mask=mask[None, None]).logits
        expected = model(**packed_batch()).logits
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


# ---- the collator


@pytest.mark.parametrize("key", ["task", "task_id", "task_ids"])
def test_the_collator_keeps_names_and_numbers(key):
    batch = padding(patched())(features(key, ("topk", 2, -1)))
    assert batch["task_ids"].tolist() == [1, 2, -1]
    assert (batch["input_ids"].shape == (3, 7) and key == "task_ids") or key not in batch


def test_the_collator_packs_with_an_id_a_token_and_masked_borders():
    model = patched()
    rows = features()
    batch = flattening(model)(rows)
    assert batch["task_ids"].tolist() == [[0] * 4 + [1] * 7 + [-1] * 5]
    assert batch["position_ids"].tolist() == [[*range(4), *range(7), *range(5)]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 11, 16]
    assert [i for i, label in enumerate(batch["labels"][0].tolist()) if label == -100] == [0, 4, 11]
    assert batch["use_cache"] is False and "attention_mask" not in batch
    one = flattening(model)(rows[:1])
    assert one["task_ids"].tolist() == [[0] * 4] and one["use_cache"] is False
    model(**one)


def test_the_collator_masks_borders_that_a_foreign_one_leaves_open():
    class Open(DataCollatorWithFlattening):
        def __call__(self, rows, **_):
            return super().__call__(rows, separator_id=7)

    model = patched()
    labels = ckf.TaskCollator(model, Open())(features())["labels"]
    assert labels[0, [0, 4, 11]].tolist() == [-100] * 3


def test_one_padded_row_with_positions_of_its_own_is_not_packed():
    row = features()[0]
    row |= {"position_ids": list(range(len(row["input_ids"]))), "labels": row["input_ids"]}
    batch = ckf.TaskCollator(patched(), default_data_collator)([row])
    assert batch["task_ids"].tolist() == [0] and "use_cache" not in batch
    assert batch["labels"].tolist() == [row["input_ids"]]


def test_the_collator_does_not_change_the_features():
    rows = features()
    padding(patched())(rows)
    assert all("task" in row and "input_ids" in row for row in rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (features("other"), "feature 0 has no task among its keys .*other; expected one of"),
        ([{**f, "task_id": 0} for f in features()], "has task_id, task among its keys"),
        (features(values=("ctr", "news", -1)), "unknown task 'news'; this model knows ctr"),
        (features(values=(0, 1, 3)), "task id 3 is out of range"),
        (features(values=([0], 1, 2)), r"feature 0 has task \[0\]; expected a task's name"),
        (features(values=(1.7, 1, 2)), "feature 0 has task 1.7; expected a task's name or whole"),
        (features(values=(0, True, 2)), "feature 1 has task True; expected a task's name or"),
    ],
)
def test_features_without_a_right_task_raise(rows, message):
    with pytest.raises(ValueError, match=message):
        padding(patched())(rows)


def test_collators_that_would_mix_rows_raise():
    with pytest.raises(ValueError, match="OPTForCausalLM does not keep packed rows apart; give"):
        flattening(patched("opt"))
    blind = DataCollatorWithFlattening(return_position_ids=False)
    with pytest.raises(ValueError, match="flattens rows without position_ids"):
        ckf.TaskCollator(patched(), blind)(features())
    with pytest.raises(ValueError, match="expected one row a feature, or all rows flattened"):
        ckf.TaskCollator(patched(), lambda rows: default_data_collator(rows[:1]))(features())
