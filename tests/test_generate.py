"""``generate`` with task ids: every row as if alone, whatever transformers does with the rows."""

import inspect

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import ckf
from tests.test_patch import TASKS, logits, patched
from tests.tiny import randomise_adapters, tiny_model, tokens

ROWS = ["ctr", "topk", "rating", -1]
SHORT = {"max_new_tokens": 6, "pad_token_id": 0}
BEAMS = {"num_beams": 3, **SHORT}
PER_TOKEN = torch.tensor([[0, 0, 0, 0, 0, 0, 1], [2, 2, 2, 2, 2, 2, 0]])


@pytest.fixture
def model():
    model = patched()
    randomise_adapters(model)
    return model


def each_alone(model, ids, **options):
    rows = range(len(ids))
    return [model.generate(tokens()[i : i + 1], task_ids=ids[i : i + 1], **options) for i in rows]


@pytest.mark.parametrize(
    "options",
    [
        SHORT,
        BEAMS,
        {**BEAMS, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(**BEAMS, num_return_sequences=2)},
        {**SHORT, "cache_implementation": "static"},
        {**SHORT, "use_cache": False},
        {**SHORT, "prefill_chunk_size": 3},
    ],
    ids=["greedy", "beams", "several", "config", "static", "no-cache", "chunks"],
)
@pytest.mark.parametrize("ids", [ROWS, PER_TOKEN], ids=["a-row", "a-token"])
def test_mixed_rows_equal_each_row_alone(model, ids, options):
    mixed = model.generate(tokens()[: len(ids)], task_ids=ids, **options)
    torch.testing.assert_close(mixed, torch.cat(each_alone(model, ids, **options)), rtol=0, atol=0)
    plain = model.generate(tokens()[: len(ids)], task_ids=-1, **options)
    assert not torch.equal(mixed, plain)  # the tasks matter to these models


def test_beams_of_the_models_own_generation_config(model):
    expected = model.generate(tokens(), task_ids=ROWS, **BEAMS)
    model.generation_config = GenerationConfig(**BEAMS)
    assert torch.equal(model.generate(tokens(), task_ids=ROWS), expected)


def test_sampled_sequences_take_their_rows_task(model):
    sampling = {**SHORT, "do_sample": True}
    torch.manual_seed(0)
    several = model.generate(tokens(2), task_ids=[0, 1], num_return_sequences=3, **sampling)
    torch.manual_seed(0)
    rows = tokens(2).repeat_interleave(3, 0)
    assert torch.equal(several, model.generate(rows, task_ids=[0, 0, 0, 1, 1, 1], **sampling))


@pytest.mark.parametrize("options", [SHORT, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("per_token", [False, True])
def test_left_padded_rows_equal_rows_alone(model, options, per_token):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])
    ids = PER_TOKEN if per_token else torch.tensor([0, 2])
    both = model.generate(tokens(2), attention_mask=mask, task_ids=ids, **options)
    own = PER_TOKEN[:1, 3:] if per_token else ids[:1]
    alone = model.generate(tokens(2)[:1, 3:], task_ids=own, **options)
    assert torch.equal(both[0, 7:], alone[0, 4:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_per_token_ids_go_on_with_their_last_column(model, use_cache):
    once = model.generate(tokens(2), task_ids=PER_TOKEN, use_cache=use_cache, **SHORT)
    sequence = tokens(2)
    while sequence.shape[1] < once.shape[1]:
        new = sequence.shape[1] - PER_TOKEN.shape[1]
        grown = torch.cat([PER_TOKEN, PER_TOKEN[:, -1:].expand(2, new)], dim=1)
        step = logits(model, sequence, task_ids=grown)[:, -1].argmax(-1, keepdim=True)
        sequence = torch.cat([sequence, step], dim=1)
    assert torch.equal(once, sequence)


@pytest.mark.parametrize("options", [SHORT, BEAMS], ids=["greedy", "beams"])
def test_use_task_around_generate(model, options):
    expected = model.generate(tokens(), task_ids=["topk"] * 4, **options)
    with ckf.use_task(model, "topk"):
        assert torch.equal(model.generate(tokens(), **options), expected)
    with pytest.raises(ValueError, match="got no task_ids"):
        model.generate(tokens(), **options)


def draft(kind):
    if kind == "unpatched":
        return tiny_model()
    tasks = {"same": TASKS, "renumbered": TASKS[::-1], "foreign": ["other"]}[kind]
    assistant = ckf.patch_model(tiny_model(), tasks, r=4, lora_alpha=8)
    randomise_adapters(assistant, seed=7)
    return assistant


@pytest.mark.parametrize("kind", ["unpatched", "same", "renumbered", "foreign"])
@pytest.mark.parametrize("ids", [["topk"], PER_TOKEN[1:]], ids=["a-row", "a-token"])
def test_assisted_generation_equals_plain(model, kind, ids):
    assistant = draft(kind)
    met = []
    if kind != "unpatched":
        make = assistant._ckf.router.make_route
        assistant._ckf.router.make_route = lambda *a: met.append(make(*a)) or met[-1]
    expected = model.generate(tokens(1), task_ids=ids, **SHORT)
    found = model.generate(tokens(1), task_ids=ids, assistant_model=assistant, **SHORT)
    assert torch.equal(found, expected)
    with ckf.use_task(model, "topk"):
        model.generate(tokens(1), assistant_model=assistant, **SHORT)
    task = "topk" if ids == ["topk"] else "ctr"
    tasks = assistant._ckf.router.tasks if met else ()
    known = {tasks.index(t) if t in tasks else -1 for t in (task, "topk")}
    assert {i for route in met for i in route.ids.tolist()} == (known if met else set())


@pytest.mark.parametrize("options", [SHORT, {**SHORT, "use_cache": False}, BEAMS])
@pytest.mark.parametrize("ids", [["topk", "ctr"], PER_TOKEN, "topk"], ids=["row", "token", "one"])
def test_guidance_takes_the_task_of_the_tokens_to_come(model, ids, options):
    options = {**options, "guidance_scale": 1.5}
    mixed = model.generate(tokens(2), task_ids=ids, **options)
    assert not torch.equal(mixed, model.generate(tokens(2), task_ids=-1, **options))
    for i in range(2):
        own = ids if isinstance(ids, str) else ids[i : i + 1]
        alone = model.generate(tokens(2)[i : i + 1], task_ids=own, **options)
        assert torch.equal(mixed[i : i + 1], alone)
    make, met = model._ckf.router.make_route, []
    model._ckf.router.make_route = lambda *a: met.append((a[0], make(*a))) or met[-1][1]
    model.generate(tokens(2), task_ids=ids, **options)
    own = [route for given, route in met if given is None]
    rows = 2 * options.get("num_beams", 1)
    last = {"row": [1, 0], "token": [1, 0], "one": [1, 1]}
    kind = "one" if ids == "topk" else "row"
    for route in own:
        assert route.ids.view(rows, -1)[:: rows // 2, -1].tolist() == last[kind]
    assert own


def test_prompt_lookup_equals_plain(model):
    expected = model.generate(tokens(1), task_ids=[1], **SHORT)
    found = model.generate(tokens(1), task_ids=[1], prompt_lookup_num_tokens=2, **SHORT)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [SHORT, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("given", ["all", "new", "new-alone"])
def test_a_conversation_goes_on_from_its_cache(model, given, options):
    """With ids of all its tokens or of the new ones; the inputs are all or the new ones."""
    first = model.generate(tokens(2), task_ids=PER_TOKEN, return_dict_in_generate=True, **SHORT)
    cache = {"cache" if "cache" in first.keys() else "past_key_values": first["past_key_values"]}
    longer = torch.cat([first.sequences, tokens(2, 3, seed=5)], dim=1)
    mask = torch.ones_like(longer)
    new = torch.tensor([[1, 0, 0, 2], [0, 2, 2, 1]])  # the first generated last, not yet cached
    grown = torch.cat([PER_TOKEN, PER_TOKEN[:, -1:].expand(2, 5), new], dim=1)
    expected = model.generate(longer, task_ids=grown, attention_mask=mask, **options)
    rows = options.get("num_beams", 1)
    next(iter(cache.values())).batch_repeat_interleave(rows)
    inputs = longer[:, -4:] if given == "new-alone" else longer
    ids = grown if given == "all" else new
    found = model.generate(inputs, task_ids=ids, attention_mask=mask, **cache, **options)
    assert torch.equal(found[:, -6:], expected[:, -6:])


def test_ids_of_some_tokens_of_a_cache_are_refused(model):
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits(model, tokens(2), task_ids=PER_TOKEN, **{name: cache})
    longer = torch.cat([tokens(2), tokens(2, 3, seed=5)], dim=1)
    with pytest.raises(
        ValueError, match=r"\(2, 3\) for one a token, or \(2, 10\) with .* 7 in the"
    ):
        model.generate(longer, task_ids=PER_TOKEN, **{name: cache}, **SHORT)


@pytest.mark.parametrize("options", [SHORT, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize(
    ("ids", "shape"), [([0, 1], r"\(2,\)"), ([0] * 12, r"\(12,\)"), ([[0] * 3] * 4, r"\(4, 3\)")]
)
def test_wrong_shapes_are_told_by_prompts_not_beams(model, ids, shape, options):
    with pytest.raises(ValueError, match=rf"shape {shape} for prompts of 4 rows and 7 tokens"):
        model.generate(tokens(), task_ids=ids, **options)


class ProjectsItsCache(torch.nn.Module):
    """In place of v_proj: projects the tokens seen so far anew at every step (MiniCPM3, Doge)."""

    def __init__(self, linear, flat):
        super().__init__()
        self.linear, self.flat, self.seen = linear, flat, None

    def forward(self, x):
        new = x.shape[1]
        self.seen = x if self.seen is None else torch.cat([self.seen, x], dim=1)
        h = self.linear(self.seen.flatten(0, 1) if self.flat else self.seen)
        return h.view(*self.seen.shape[:2], -1)[:, -new:]


@pytest.mark.parametrize("options", [SHORT, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize(("ids", "flat"), [(ROWS, False), ("topk", False), ("topk", True)])
def test_models_that_project_their_cache(model, ids, flat, options):
    attention = model.model.layers[0].self_attn
    attention.v_proj = ProjectsItsCache(attention.v_proj, flat)
    found = model.generate(tokens(), task_ids=ids, **options)
    attention.v_proj = attention.v_proj.linear
    assert torch.equal(found, model.generate(tokens(), task_ids=ids, **options))
