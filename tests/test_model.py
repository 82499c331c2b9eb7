"""The whole model: packed, padded and single rows agree; losses; where vectors and logits go."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GemmaConfig

import ckf
from ckf.assembly import _choose_packing, assemble
from ckf.batches import Collator
from ckf.model import embedding_scale
from ckf.packing import packs_rows_right
from tests.ckf_fixtures import TASKS, small_config
from tests.tiny import tiny_model

NEAR = {"rtol": 2e-4, "atol": 2e-5}


def collator(assembly, packed):
    training = assembly.batcher.collator
    told = {"tells_rows": packed == "told"}
    return Collator(training.tasks, training.lookup, training.filler, bool(packed), **told)


def make_batch(assembly, examples, packed, vectors=True):
    """vectors: for all rows, for none, or one flag per row."""
    flags = [vectors] * len(examples) if isinstance(vectors, bool) else vectors
    encode = assembly.batcher.encode
    prompts = [encode(e, "train", v) for e, v in zip(examples, flags, strict=True)]
    rows, data = [e.row for e in examples], assembly.data
    return collator(assembly, packed)(prompts, data.user[rows], data.history[rows])


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses_and_gradients(model, batches):
    """Row losses of all batches, and the gradient of their mean."""
    model.zero_grad()
    rows = [model(**batch) for batch in batches]
    total = sum(out["loss"] * len(out["row_losses"]) for out in rows)
    count = sum(len(out["row_losses"]) for out in rows)
    (total / count).backward()
    found = gradients(model)
    model.zero_grad()
    return torch.cat([out["row_losses"] for out in rows]), found


@pytest.mark.parametrize("vectors", [True, False, "some"])
def test_packed_equals_padded_equals_every_row_alone(assembly, mixed, vectors):
    if vectors == "some":
        vectors = [k % 3 != 0 for k in range(len(mixed))]
    flags = [vectors] * len(mixed) if isinstance(vectors, bool) else vectors
    packed, packed_grads = losses_and_gradients(
        assembly.model, [make_batch(assembly, mixed, True, flags)]
    )
    told, told_grads = losses_and_gradients(
        assembly.model, [make_batch(assembly, mixed, "told", flags)]
    )
    padded, padded_grads = losses_and_gradients(
        assembly.model, [make_batch(assembly, mixed, False, flags)]
    )
    singles = [make_batch(assembly, [e], True, [v]) for e, v in zip(mixed, flags, strict=True)]
    alone, alone_grads = losses_and_gradients(assembly.model, singles)
    assert packed.std() > 0.1
    for rows in (packed, told, padded):
        assert_close(rows, alone, **NEAR)
    assert set(packed_grads) == set(told_grads) == set(padded_grads) == set(alone_grads)
    learns = any("metanet" in name for name in alone_grads)
    assert learns == any(flags)
    for name, own in alone_grads.items():
        for grads in (packed_grads, told_grads, padded_grads):
            assert_close(grads[name], own, **NEAR, msg=name)


@pytest.mark.parametrize("packed", [True, "told", False])
def test_answer_logits_equal_those_of_the_row_alone(assembly, mixed, packed):
    batch = make_batch(assembly, mixed, packed)
    with torch.no_grad():
        together = assembly.model.logits(batch, batch["last_slots"])
        for row, example in enumerate(mixed):
            single = make_batch(assembly, [example], packed=True)
            alone = assembly.model.logits(single, single["last_slots"])
            assert_close(together[row : row + 1], alone, **NEAR)


def test_logits_are_those_of_the_backbone_at_the_position(assembly, mixed):
    batch = make_batch(assembly, mixed, packed=False)
    with torch.no_grad():
        whole = assembly.model.backbone(
            inputs_embeds=assembly.model.embed(batch),
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
            task_ids=batch["task_ids"],
        ).logits.flatten(0, 1)
        own = assembly.model.logits(batch, batch["label_slots"])
    assert_close(own, whole[batch["label_slots"]], **NEAR)


@pytest.mark.parametrize("packed", [True, "told", False])
def test_a_row_weighs_the_same_however_long_its_answer(assembly, mixed, packed):
    batch = make_batch(assembly, mixed, packed)
    counts = torch.bincount(batch["label_rows"])
    assert counts.min() == 1 and counts.max() > 4
    with torch.no_grad():
        out = assembly.model(**batch)
        logits = assembly.model.logits(batch, batch["label_slots"])
    by_hand = []
    for row in range(len(mixed)):
        own = (batch["label_rows"] == row).nonzero().flatten()
        total = 0.0
        for token in own.tolist():
            chances = torch.softmax(logits[token].double(), 0)
            total -= float(chances[batch["label_tokens"][token]].log())
        by_hand.append(total / len(own))
    assert_close(out["row_losses"], torch.tensor(by_hand), rtol=1e-4, atol=1e-5)
    assert_close(out["loss"], torch.tensor(sum(by_hand) / len(by_hand)), rtol=1e-4, atol=1e-5)
    assert out["row_tasks"].tolist() == [TASKS.index(e.task) for e in mixed]


def test_logits_are_computed_only_where_labels_are(assembly, mixed):
    head, rows = assembly.model.backbone.get_output_embeddings(), []
    hook = head.register_forward_pre_hook(lambda _m, args: rows.append(args[0].shape[:-1].numel()))
    try:
        packed, padded = (make_batch(assembly, mixed, p) for p in (True, False))
        with torch.no_grad():
            assembly.model(**packed)
            assembly.model(**padded)
    finally:
        hook.remove()
    labels = packed["label_tokens"].numel()
    longest = int(torch.bincount(packed["label_rows"]).max())
    assert labels < packed["input_ids"].numel() / 10
    assert rows == [labels, len(mixed) * (longest + 1)]


@pytest.mark.parametrize("packed", [True, "told", False])
def test_every_vector_of_every_row_is_in_its_place(assembly, mixed, packed):
    model, data = assembly.model, assembly.data
    batch = make_batch(assembly, mixed, packed)
    with torch.no_grad():
        flat = model.embed(batch).flatten(0, 1)
        tokens = model.backbone.get_input_embeddings()(batch["input_ids"]).flatten(0, 1)
        users = model.metanet(
            batch["user_vectors"], batch["history_vectors"], batch["history_mask"]
        )
        expected = tokens.clone()
        starts = [0]
        prompts = [assembly.batcher.encode(e, "train", True) for e in mixed]
        width = batch["input_ids"].shape[1]
        for row, prompt in enumerate(prompts):
            start = starts[-1] if packed else (row + 1) * width - prompt.length
            starts.append(start + prompt.length)
            for position, what in prompt.slots:
                vector = users[row]
                if what >= 0:
                    known = assembly.batcher.collator.lookup.vectors.items[what]
                    vector = model.metanet.items(known)
                expected[start + position] = vector
    assert_close(flat, expected)
    moved = (flat != tokens).any(1).sum()
    assert moved == sum(len(p.slots) for p in prompts) > 2 * len(mixed)
    assert len({int(data.user[e.row]) for e in mixed}) > 5  # rows of different users


def test_a_batch_of_text_rows_leaves_the_meta_network_alone(assembly, mixed):
    batch = make_batch(assembly, mixed, True, vectors=False)
    assert torch.equal(
        assembly.model.embed(batch),
        assembly.model.backbone.get_input_embeddings()(batch["input_ids"]),
    )


def test_the_model_needs_a_patched_backbone(assembly):
    with pytest.raises(ValueError, match="not patched"):
        type(assembly.model)(tiny_model(), None)


def test_the_scale_of_embeddings(assembly):
    weight = assembly.model.backbone.get_input_embeddings().weight
    assert embedding_scale(assembly.model.backbone) == pytest.approx(float(weight.std()))


def test_vectors_start_at_what_the_embedding_module_gives(small_run):
    """Gemma's multiplies its table by sqrt(width)."""
    parts = small_run.assembly
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = GemmaConfig(vocab_size=len(parts.tokenizer), **sizes, **heads)
    backbone = AutoModelForCausalLM.from_config(config)
    given = backbone.get_input_embeddings()(torch.arange(len(parts.tokenizer))).detach()
    assert given.std() > 7 * backbone.get_input_embeddings().weight.std()
    assert embedding_scale(backbone) == pytest.approx(float(given.std()), rel=1e-3)
    settings = small_config(parts.config.model.name, metanet__match="score")
    loaded = (backbone, parts.tokenizer)
    made = assemble(settings, parts.data, parts.vectors, torch.device("cpu"), loaded)
    words = made.batcher.encoder.answer_tokens("ctr")[1]
    yes, no = given[words["Yes"]], given[words["No"]]
    matches = made.model.metanet.matches(torch.tensor([[1.0], [-1.0]]))
    assert_close(matches.detach(), torch.stack([yes, no]))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_vectors_that_are_unknown_leave_the_gradient_its_size(small_run, family):
    """A zero embedding would not: norms of queries and keys multiply its gradient by 1e5."""
    parts = small_run.assembly
    backbone = tiny_model(family)
    backbone.resize_token_embeddings(len(parts.tokenizer))
    backbone.config.max_position_embeddings = parts.config.prompt.max_tokens
    settings = small_config(parts.config.model.name)
    made = assemble(
        settings, parts.data, parts.vectors, torch.device("cpu"), (backbone, parts.tokenizer)
    )
    rows = [e for task in TASKS for e in made.maker.examples(task, "train")[:4]]
    batch = make_batch(made, rows, packed=False)
    _, known = losses_and_gradients(made.model, [batch])
    for vectors in ("user_vectors", "item_vectors"):
        batch[vectors] = torch.zeros_like(batch[vectors])
    _, unknown = losses_and_gradients(made.model, [batch])
    for name in ("no_user", "no_item"):
        assert unknown[f"metanet.{name}"].abs().max() > 0
    sizes = [sum(g.square().sum() for g in found.values()).sqrt() for found in (known, unknown)]
    assert sizes[1] < 10 * sizes[0]


@pytest.mark.parametrize("family, right", [("llama", True), ("qwen3", True), ("opt", False)])
def test_families_that_mix_packed_rows_are_found_out(family, right):
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    ckf.patch_model(model, ["ctr"], r=2)
    assert packs_rows_right(model) is right
    assert _choose_packing("auto", model) is False  # attention over all pairs
    assert _choose_packing(False, model) is False
    if right:
        assert _choose_packing(True, model) is True
    else:
        with pytest.raises(ValueError, match="train.packing is true.*auto or false"):
            _choose_packing(True, model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("wanted", ["auto", True])
def test_rows_are_packed_where_they_attend_within_themselves(assembly, wanted):
    model = ckf.patch_model(tiny_model("llama"), ["ctr"], r=2)
    assert _choose_packing(wanted, model) is True
    assert model.config._attn_implementation == "ckf_packed"
    assert assembly.packed and assembly.batcher.collator.tells_rows
    assert not assembly.batcher.collator.padded().tells_rows


def test_loss_of_a_single_token_answer_is_plain_cross_entropy(assembly, mixed):
    ctr = [e for e in mixed if e.task == "ctr"]
    batch = make_batch(assembly, ctr, packed=True)
    with torch.no_grad():
        logits = assembly.model.logits(batch, batch["last_slots"])
        out = assembly.model(**batch)
    assert_close(out["loss"], F.cross_entropy(logits, batch["label_tokens"]))
