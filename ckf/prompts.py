"""Structured prompts: one template per task, with places for user and item vectors.

A template is text with fields: ``<history>`` (last liked titles), ``<item>``, ``<candidates>``,
``<review>``, and ``<user>`` for the user's vector. What stands in ``[[ ]]`` is left out of the
text form (no vectors). In the vector form every ``<item>`` and candidate is followed by the item's
vector and, where matches are shown, by the place that says how user and item fit. Where a prompt
is too long, the oldest history titles go first, then the review and titles are cut; a placeholder,
the candidate and the answer never are.

No prompt shows the position in the user's stream: it shows a fixed number of last liked titles,
fewer only where there are fewer.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ckf.config import PromptConfig

TEMPLATES = {
    "ctr": (
        "A user recently liked:<history>.[[ The user's taste:<user>.]]\n"
        "Will the user like the {item}<item>? Answer Yes or No.\nAnswer:"
    ),
    "topk": (
        "A user recently liked:<history>.[[ The user's taste:<user>.]]\n"
        "Which of these {item}s will the user like best?<candidates>\nAnswer:"
    ),
    "topk_title": (
        "A user recently liked:<history>.[[ The user's taste:<user>.]]\n"
        "The user will next like the {item}"
    ),
    "rating": (
        "A user recently liked:<history>.[[ The user's taste:<user>.]]\n"
        "How will the user rate the {item}<item>, from 1 (bad) to 5 (great)?\nRating:"
    ),
    "explain": (
        "A user recently liked:<history>.[[ The user's taste:<user>.]]\n"
        "Write what the user says about the {item}<item>.\nReview:"
    ),
    "review_rating": (
        "A user[[ with the taste<user>]] reviewed the {item}<item>:\n<review>\n"
        "How did the user rate it, from 1 (bad) to 5 (great)?\nRating:"
    ),
}
ANSWERS = {
    "ctr": ("Yes", "No"),
    "rating": ("1", "2", "3", "4", "5"),
    "review_rating": ("1", "2", "3", "4", "5"),
    "topk": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
USER_SLOT = -1
_FIRST_MATCH = -2
_FIELD = re.compile(r"(<\w+>)")
_VECTOR_ONLY = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_MIN_TITLE, _MIN_REVIEW = 4, 16  # tokens that a cut leaves
_BEFORE = ("x\n", "x", ":")  # one of them does not merge with what follows


@dataclass
class Question:
    """One row to put to the model; items are indices, histories oldest first."""

    task: str
    history: Sequence[int]
    item: int | None = None
    candidates: Sequence[int] = ()
    review: str = ""
    answer: str | None = None  # a word of ANSWERS, or free text; None when only asking


@dataclass
class Encoded:
    """A prompt in tokens. slots: (position, item index, USER_SLOT or match_slot(item))."""

    task: str
    tokens: list[int]
    slots: list[tuple[int, int]]
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.tokens) + len(self.answer)


def match_slot(item: int) -> int:
    """What stands in ``Encoded.slots`` for the match of the user and an item."""
    return _FIRST_MATCH - item


def matched_item(what: int) -> int | None:
    """The item of a match slot; None for any other slot."""
    return _FIRST_MATCH - what if what <= _FIRST_MATCH else None


class PromptEncoder:
    """Turns questions into tokens and vector slots.

    Args:
        tokenizer: the language model's.
        titles: title per item index, never empty.
        config: prompt settings.
        matches: a match slot behind every item's vector.

    Raises:
        ValueError: the tokenizer has no single tokens for a task's answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        titles: Sequence[str],
        config: PromptConfig,
        matches: bool = False,
    ) -> None:
        self.tokenizer, self.titles, self.config = tokenizer, titles, config
        self.matches = matches
        self._cache: dict[tuple[str, bool], list[int]] = {}
        self._titles: dict[int, list[int]] = {}
        self._answers: dict[str, tuple[list[int], dict[str, int]]] = {}
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)  # an id of 0 is as good as any
        self.filler = next(token for token in known if token is not None)
        self.end = self.filler if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.start = start_tokens(tokenizer)
        # Llama-2's kind puts a space before every text; only the first of a prompt shall have it
        self.adds_space = self._tokens("\nx") != self._tokens("\n") + self._tokens("x")

    def answer_tokens(self, task: str) -> tuple[list[int], dict[str, int]]:
        """Tokens that lead to the answer, and the answer words' tokens, one each.

        " 1" is two tokens in some vocabularies: then the space goes to the prompt's end.
        """
        if task not in self._answers:
            self._answers[task] = self._single_tokens(task)
        return self._answers[task]

    def encode(self, question: Question, vectors: bool) -> Encoded:
        """Tokens and slots of a question, in the vector form or the text form."""
        shown = self.config.history_titles
        history = list(question.history)[-shown:] if shown else []
        limits = _Limits(title=10**9, review=10**9)
        answer = self._answer(question)
        review = self._text(question.review, keep=False) if question.review else []
        while True:
            tokens, slots = self._render(question, history, review, vectors, limits)
            excess = len(tokens) + len(answer) - self.config.max_tokens
            if excess <= 0:
                return Encoded(question.task, tokens, slots, answer)
            if history:
                history = history[self._titles_in_excess(history, excess) :]
            elif limits.review > _MIN_REVIEW and question.review:
                length = min(limits.review, len(review))
                limits.review = max(_MIN_REVIEW, length - excess)
            elif limits.title > _MIN_TITLE:
                limits.title = max(_MIN_TITLE, min(limits.title, 64) // 2)
            else:
                raise ValueError(
                    f"a {question.task} prompt needs {len(tokens) + len(answer)} tokens even when "
                    f"cut; prompt.max_tokens is {self.config.max_tokens}: raise it, or give fewer "
                    "candidates"
                )

    def _titles_in_excess(self, history: list[int], excess: int) -> int:
        """How many of the oldest titles hold ``excess`` tokens; all where they do not suffice."""
        comma, held = len(self._text(",")), 0
        for count, item in enumerate(history[:-1], 1):
            held += len(self._title(item)) + comma
            if held >= excess:
                return count
        return len(history)

    def _render(
        self, question, history, review: list[int], vectors: bool, limits
    ) -> tuple[list[int], list]:
        name = question.task
        if name == "topk" and self.config.rank_by == "title":
            name = "topk_title"
        template = TEMPLATES[name].replace("{item}", self.config.item_word)
        template = _VECTOR_ONLY.sub(r"\1" if vectors else "", template)
        out = _Writer(self.filler, list(self.start))
        for number, piece in enumerate(_FIELD.split(template)):
            if piece == "<user>":
                out.slot(USER_SLOT)
            elif piece == "<item>":
                self._write_item(out, question.item, vectors, limits)
            elif piece == "<history>":
                self._write_history(out, history, limits)
            elif piece == "<review>":
                out.add(review[: limits.review])
            elif piece == "<candidates>":
                for letter, item in zip(ANSWERS["topk"], question.candidates, strict=False):
                    out.add(self._text(f"\n{letter}."))
                    self._write_item(out, item, vectors, limits)
            else:
                out.add(self._text(piece, first=number == 0))
        if name != "explain" and name != "topk_title":
            out.add(self.answer_tokens(question.task)[0])
        return out.tokens, out.slots

    def _write_item(self, out: "_Writer", item: int, vectors: bool, limits: "_Limits") -> None:
        out.add(self._title(item)[: limits.title])
        if vectors:
            out.slot(item)
            if self.matches:
                out.slot(match_slot(item))

    def _write_history(self, out: "_Writer", history: list[int], limits: "_Limits") -> None:
        if not history:
            out.add(self._text(" nothing yet"))
        for place, item in enumerate(history):
            if place:
                out.add(self._text(","))
            out.add(self._title(item)[: limits.title])

    def _answer(self, question: Question) -> list[int]:
        if question.answer is None:
            return []
        if question.task == "explain" or (
            question.task == "topk" and self.config.rank_by == "title"
        ):
            words = self._text(" " + question.answer, keep=False)
            words = words[: self.config.max_answer_tokens - 1]
            return [*words, self.end]
        return [self.answer_tokens(question.task)[1][question.answer]]

    def _single_tokens(self, task: str) -> tuple[list[int], dict[str, int]]:
        words = ANSWERS[task]
        for prefix in (" ", ""):
            encoded = [self._text(prefix + word) for word in words]
            lead = encoded[0][:-1]
            same_lead = all(e[:-1] == lead for e in encoded)
            if same_lead and len({e[-1] for e in encoded}) == len(words):
                return lead, {w: e[-1] for w, e in zip(words, encoded, strict=True)}
        raise ValueError(
            f"this model's tokenizer has no single tokens for {', '.join(words)}, which the "
            f"{task} task answers with; use another model or leave the task out"
        )

    def _title(self, item: int) -> list[int]:
        if item not in self._titles:
            self._titles[item] = self._text(f' "{self.titles[item]}"', keep=False)
        return self._titles[item]

    def _text(self, text: str, keep: bool = True, first: bool = False) -> list[int]:
        """Tokens of a piece of a prompt. keep: for the next prompt; first: nothing is before it."""
        if (text, first) in self._cache:
            return self._cache[text, first]
        inside = self.adds_space and not first
        tokens = self._tokens_inside(text) if inside else self._tokens(text)
        if keep:
            self._cache[text, first] = tokens
        return tokens

    def _tokens_inside(self, text: str) -> list[int]:
        """Tokens of a text that stands behind another: encoded with it, which is then taken off."""
        for before in _BEFORE:
            lead = self._tokens(before)
            tokens = self._tokens(before + text)
            if tokens[: len(lead)] == lead:
                return tokens[len(lead) :]
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return plain_tokens(self.tokenizer, text)


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text alone; one that spells out a control token gets its letters."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: a BOS token, several, or none."""
    whole, bare = tokenizer("x").input_ids, plain_tokens(tokenizer, "x")
    places = range(len(whole) - len(bare) + 1)
    return next((whole[:i] for i in places if whole[i : i + len(bare)] == bare), [])


@dataclass
class _Limits:
    """How many tokens of each title and of the review are kept."""

    title: int
    review: int


class _Writer:
    """Collects tokens and the places of vectors."""

    def __init__(self, filler: int, tokens: list[int]) -> None:
        self.filler, self.tokens = filler, tokens
        self.slots: list[tuple[int, int]] = []

    def add(self, tokens: Sequence[int]) -> None:
        self.tokens.extend(tokens)

    def slot(self, what: int) -> None:
        self.slots.append((len(self.tokens), what))
        self.tokens.append(self.filler)
