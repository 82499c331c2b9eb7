"""Prompts: what they say in both forms, and what no cut ever takes away."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckf.config import PromptConfig
from ckf.prompts import ANSWERS, TEMPLATES, USER_SLOT, PromptEncoder, Question
from tests.ckf_fixtures import TASKS, make_tokenizer

TITLES = [f"Title {n}" for n in range(8)] + ["A much longer title, in nine words, great"] * 2
BRACKETS = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
TOKENIZER = make_tokenizer()


def encoder(tokenizer=TOKENIZER, titles=TITLES, **config):
    return PromptEncoder(tokenizer, titles, PromptConfig(**config))


def question(task, **changes):
    """A question with all that its task needs."""
    fields = {"history": [1, 2, 3], "item": 4, "answer": "I love this album."}
    if task in ANSWERS:
        fields["answer"] = ANSWERS[task][1]
    if task == "topk":
        fields |= {"item": None, "candidates": [4, 5, 6]}
    if task == "review_rating":
        fields["review"] = "I hate this album, it sounds awful. " * 3
    return Question(task, **(fields | changes))


def without_slots(encoded):
    """The prompt in words, vectors left out."""
    places = {position for position, _ in encoded.slots}
    return TOKENIZER.decode([t for i, t in enumerate(encoded.tokens) if i not in places])


@pytest.mark.parametrize("task", TASKS)
def test_the_text_form_is_the_vector_form_without_vectors_and_brackets(task):
    with_vectors = encoder().encode(question(task), vectors=True)
    text = encoder().encode(question(task), vectors=False)
    assert text.slots == [] and text.answer == with_vectors.answer
    (bracketed,) = BRACKETS.findall(TEMPLATES[task])
    words = bracketed.replace("<user>", "")
    assert words and words in without_slots(with_vectors)
    assert without_slots(with_vectors).replace(words, "", 1) == TOKENIZER.decode(text.tokens)


def test_a_ctr_prompt_word_by_word():
    encoded = encoder(item_word="film").encode(question("ctr"), vectors=True)
    assert without_slots(encoded) == (
        'A user recently liked: "Title 1", "Title 2", "Title 3". The user\'s taste:.\n'
        'Will the user like the film "Title 4"? Answer Yes or No.\nAnswer:'
    )
    assert [TOKENIZER.decode([t]) for t in encoded.answer] == [" No"]
    assert [what for _, what in encoded.slots] == [USER_SLOT, 4]


def test_a_topk_prompt_has_a_letter_and_a_vector_for_every_candidate():
    encoded = encoder().encode(question("topk", candidates=[7, 0, 5], answer="C"), vectors=True)
    assert 'best?\nA. "Title 7"\nB. "Title 0"\nC. "Title 5"\nAnswer:' in without_slots(encoded)
    assert [what for _, what in encoded.slots] == [USER_SLOT, 7, 0, 5]
    assert TOKENIZER.decode(encoded.answer) == " C"


@pytest.mark.parametrize("task", TASKS)
def test_every_vector_stands_on_a_filler_behind_what_it_describes(task):
    prompts = encoder()
    encoded = prompts.encode(question(task), vectors=True)
    positions = [position for position, _ in encoded.slots]
    assert positions == sorted(set(positions))
    assert {encoded.tokens[p] for p in positions} == {prompts.filler}
    for position, item in encoded.slots:
        before = TOKENIZER.decode(encoded.tokens[:position])
        assert before.endswith("taste" if task == "review_rating" else "taste:") or (
            item != USER_SLOT and before.endswith(f'"{TITLES[item]}"')
        )


def test_titling_ranks_by_the_title_as_the_answer():
    asked = question("topk", candidates=[4, 5], answer=TITLES[4])
    encoded = encoder(rank_by="title").encode(asked, vectors=True)
    assert without_slots(encoded).endswith("will next like the item")
    assert TOKENIZER.decode(encoded.answer) == " Title 4<eos>"
    assert [what for _, what in encoded.slots] == [USER_SLOT]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_only_the_last_titles_are_shown_oldest_first(count):
    text = TOKENIZER.decode(
        encoder(history_titles=count).encode(question("ctr", history=[3, 1, 2]), False).tokens
    )
    shown = re.findall(r'"Title (\d)"', text.split("Will")[0])
    assert shown == ["3", "1", "2"][3 - count :]
    assert ("nothing yet" in text) == (count == 0)


def test_no_prompt_tells_how_long_a_history_is():
    prompts = encoder(history_titles=2)
    short = prompts.encode(question("ctr", history=[1, 2]), vectors=True)
    long = prompts.encode(question("ctr", history=[5, 0, 3, 1, 2]), vectors=True)
    assert (short.tokens, short.slots) == (long.tokens, long.slots)


@pytest.mark.parametrize("task", ["ctr", "rating", "review_rating", "topk"])
def test_answers_are_single_tokens_that_differ(task):
    lead, words = encoder().answer_tokens(task)
    assert lead == [] and list(words) == list(ANSWERS[task])
    assert len(set(words.values())) == len(words)
    assert [TOKENIZER.decode([t]) for t in words.values()] == [f" {w}" for w in words]


def test_where_a_blank_and_a_digit_are_two_tokens_the_blank_ends_the_prompt():
    tokenizer = make_tokenizer(split_digits=True)
    prompts = encoder(tokenizer)
    encoded = prompts.encode(question("rating", answer="4"), vectors=False)
    assert tokenizer.decode(encoded.tokens).endswith("Rating: ")
    assert tokenizer.decode(encoded.answer) == "4" and len(encoded.answer) == 1
    assert len(set(prompts.answer_tokens("rating")[1].values())) == 5
    assert tokenizer.decode(prompts.encode(question("ctr"), False).tokens).endswith("Answer:")


def test_a_tokenizer_without_single_tokens_for_the_answers_is_an_error():
    with pytest.raises(ValueError, match="no single tokens for Yes, No.*ctr"):
        encoder(make_tokenizer(merges=False)).encode(question("ctr"), vectors=False)


def spaced_tokenizer(kind):
    """Like Llama-2's (two ways of writing it) or RoBERTa's: a space before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made, alphabet = Tokenizer(models.BPE(unk_token="<unk>")), []
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
    elif kind == "prepend":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        made.normalizer = normalizers.Sequence(steps)
        made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    else:
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    answers = " ".join(word for words in ANSWERS.values() for word in words)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<pad>", "<eos>", "<unk>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    texts = [answers] * 9 + [*TEMPLATES.values(), *TITLES, 'x:"I love this, album."'] * 3
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("kind", ["metaspace", "prepend", "bytes"])
@pytest.mark.parametrize("task", TASKS)
def test_no_space_stands_where_the_tokenizer_puts_one_before_every_text(kind, task):
    tokenizer = spaced_tokenizer(kind)
    prompts = encoder(tokenizer)
    assert prompts.adds_space and not encoder().adds_space
    encoded = prompts.encode(question(task), vectors=False)
    expected = TOKENIZER.decode(encoder().encode(question(task), vectors=False).tokens)
    assert tokenizer.decode(encoded.tokens).lstrip(" ") == expected
    first = tokenizer.encode("A user", add_special_tokens=False)
    assert encoded.tokens[: len(first)] == first  # as the model knows the start of a text
    answer = tokenizer.decode(encoded.answer).removesuffix("<eos>").strip()
    assert answer == question(task).answer and (task == "explain" or len(encoded.answer) == 1)


def test_reviews_are_read_once_and_not_kept(monkeypatch):
    read = []
    plain = TOKENIZER.encode
    monkeypatch.setattr(
        TOKENIZER, "encode", lambda text, **k: read.append(text) or plain(text, **k)
    )
    prompts = encoder(max_tokens=80)
    reviews = [f"I hate album number {n}, it sounds awful. " * (1 + n % 9) for n in range(50)]
    for review in reviews:
        prompts.encode(question("review_rating", review=review), vectors=True)
    assert [text for text in read if text in reviews] == reviews
    assert len(prompts._cache) < 20


def test_a_long_history_is_shortened_in_one_go(monkeypatch):
    drawn = []
    plain = PromptEncoder._render
    monkeypatch.setattr(PromptEncoder, "_render", lambda *a: drawn.append(a[2]) or plain(*a))
    asked = question("ctr", history=[n % 10 for n in range(200)])
    whole = encoder(history_titles=200).encode(asked, vectors=True)
    for room in (60, 100, 400, whole.length - 1):
        drawn.clear()
        tight = encoder(history_titles=200, max_tokens=room).encode(asked, vectors=True)
        kept = drawn[-1]
        assert len(drawn) == 2 and kept == asked.history[200 - len(kept) :]
        longer = asked.history[200 - len(kept) - 1 :]
        more = encoder(history_titles=200).encode(question("ctr", history=longer), vectors=True)
        assert tight.length <= room < more.length


def test_free_answers_end_and_are_cut_to_length():
    prompts = encoder(max_answer_tokens=5)
    whole = encoder().encode(question("explain"), vectors=False).answer
    cut = prompts.encode(question("explain"), vectors=False).answer
    assert whole[-1] == TOKENIZER.eos_token_id
    assert cut == [*whole[:4], TOKENIZER.eos_token_id]


def test_token_ids_of_zero_are_ids():
    tokenizer = make_tokenizer(special=("<eos>", "<pad>"))
    assert tokenizer.eos_token_id == 0
    prompts = encoder(tokenizer)
    assert prompts.encode(question("explain"), vectors=False).answer[-1] == 0
    assert encoder().filler == TOKENIZER.pad_token_id == 0


def test_a_start_token_comes_once_and_first_where_the_tokenizer_adds_one():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(special=("<pad>", "<eos>", "<s>"))
    start = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    tokens = encoder(tokenizer).encode(question("ctr"), vectors=True).tokens
    assert tokens[0] == start and tokens.count(start) == 1
    assert encoder().start == []


@pytest.mark.parametrize(
    "template, start", [("<a> <b> $A", ["<a>", "<b>"]), ("$A <b>", []), ("<a> $A <b>", ["<a>"])]
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(template, start):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(special=("<pad>", "<eos>", "<a>", "<b>"))
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<a>", "<b>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=known
    )
    found = encoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(found.start) == start
    tokens = found.encode(question("ctr"), vectors=True).tokens
    assert tokens[: len(start)] == found.start
    assert not set(dict(known).values()) & set(tokens[len(start) :])


def test_control_tokens_in_titles_and_reviews_are_plain_text():
    titles = ["A <eos> title<pad>", *TITLES[1:]]
    asked = question("review_rating", item=0, review="So <eos> bad <pad>.")
    encoded = encoder(titles=titles).encode(asked, vectors=False)
    assert not {TOKENIZER.eos_token_id, TOKENIZER.pad_token_id} & {*encoded.tokens}
    text = TOKENIZER.decode(encoded.tokens)
    assert "A <eos> title<pad>" in text and "So <eos> bad <pad>." in text
    answer = encoder().encode(question("explain", answer="Great <eos> stuff."), False).answer
    assert answer.count(TOKENIZER.eos_token_id) == 1


def test_a_question_without_answer_has_none():
    assert encoder().encode(question("explain", answer=None), vectors=True).answer == []


def test_histories_are_shortened_before_titles_are_cut():
    whole = encoder().encode(question("ctr"), vectors=True)
    tight = encoder(max_tokens=whole.length - 1).encode(question("ctr"), vectors=True)
    text = without_slots(tight)
    assert '"Title 2", "Title 3"' in text and "Title 1" not in text and '"Title 4"' in text


def test_too_many_candidates_are_an_error_that_names_the_setting():
    with pytest.raises(ValueError, match="topk prompt needs .*prompt.max_tokens is 60"):
        encoder(max_tokens=60).encode(question("topk", candidates=[4] * 20), vectors=True)


@settings(max_examples=250, deadline=None)
@given(
    task=st.sampled_from(TASKS),
    rank_by=st.sampled_from(["letters", "title"]),
    vectors=st.booleans(),
    max_tokens=st.integers(5, 220),
    history=st.lists(st.integers(0, 9), max_size=6),
    candidates=st.lists(st.integers(0, 9), min_size=2, max_size=26),
    item=st.integers(0, 9),
    review=st.integers(0, 12),
)
def test_no_cut_takes_a_vector_a_candidate_or_the_answer(
    task, rank_by, vectors, max_tokens, history, candidates, item, review
):
    prompts = encoder(history_titles=6, max_tokens=max_tokens, rank_by=rank_by)
    titled = task == "topk" and rank_by == "title"
    asked = question(
        task,
        history=history,
        item=None if task == "topk" else item,
        candidates=candidates if task == "topk" else (),
        review="It sounds great. " * review,
        answer=TITLES[item] if titled else question(task).answer,
    )
    full = encoder(history_titles=6, max_tokens=10**6, rank_by=rank_by).encode(asked, vectors)
    try:
        encoded = prompts.encode(asked, vectors)
    except ValueError as error:
        assert f"prompt.max_tokens is {max_tokens}" in str(error) and task in str(error)
        assert full.length > max_tokens
        return
    assert encoded.length == len(encoded.tokens) + len(encoded.answer) <= max_tokens
    assert encoded.answer == full.answer
    shown = [] if titled else candidates if task == "topk" else [item]
    assert [what for _, what in encoded.slots] == [USER_SLOT, *shown] * vectors
    for position, what in encoded.slots:
        assert encoded.tokens[position] == prompts.filler
        assert what == USER_SLOT or ends_with_title(encoded.tokens[:position], what)
    for i in shown:
        assert contains(encoded.tokens, title_tokens(i)[:4])
    if full.length <= max_tokens:
        assert encoded == full


def title_tokens(item):
    return TOKENIZER.encode(f' "{TITLES[item]}"', add_special_tokens=False)


def ends_with_title(tokens, item):
    """Whether at least four tokens of the title stand at the end."""
    title = title_tokens(item)
    return any(tokens[-k:] == title[:k] for k in range(min(4, len(title)), len(title) + 1))


def contains(tokens, part):
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))
