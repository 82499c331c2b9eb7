"""The sentence of a review that task `explain` is trained to write.

The rule, deterministic and without a model. The text is cut into sentences after . ! or ? (also
where a line break was lost, "great.The"). From each sentence on, following sentences are joined
until there are `min_words` words. Of these passages with `min_words` to `max_words` words, the
first that holds a word of opinion is taken, else the first one, else there is none ("").
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A sentence ends at .!? plus closing quotes; what follows is white space, or a capital directly
# behind a lower-case word (old review files lost their line breaks).
_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[a-z)][.!?])(?=[A-Z])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:mr|mrs|ms|dr|st|vs|vol|feat|jr|sr)|\b[b-hj-z])\.$", re.IGNORECASE
)
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")

_OPINION_WORDS = """
amazing annoying awesome awful bad beautiful beautifully best better boring brilliant broken
catchy cheap classic comfortable cool crap decent defective delicious disappointed
disappointing disappointment dislike disliked dull durable easy enjoy enjoyable enjoyed
entertaining excellent exceptional expensive fails fantastic fast favorite favourite fine flaw
flawed flimsy forgettable fresh fun funny garbage good gorgeous great happy hate hated helpful
horrible ideal impressed impressive incredible interesting junk lame like liked love loved
lovely loves magnificent masterpiece mediocre memorable nice outstanding overrated perfect
perfectly pleasant pleased poor poorly powerful recommend recommended reliable returned rich
sad satisfied simple slow smooth solid sturdy stunning stupid sucks super superb terrible
terrific touching ugly underrated unfortunately useful useless warm waste weak well wonderful
works worse worst worth worthless
"""
_OPINION = frozenset(_OPINION_WORDS.split())


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, in order, white space collapsed."""
    before = ""
    start = 0
    for end in _END.finditer(text):
        # closing quotes belong to the sentence they close
        piece = " ".join(text[start : end.start()].split()) + end.group().rstrip()
        start = end.end()
        before = f"{before} {piece}".strip()
        if before and not _ABBREVIATION.search(before[-8:]):  # "Mr.": the sentence goes on
            yield before
            before = ""
    last = f"{before} {' '.join(text[start:].split())}".strip()
    if last:
        yield last


def passages(text: str, min_words: int, max_words: int) -> Iterator[tuple[str, list[str]]]:
    """(passage, its words in lower case) for every sentence from which one of fitting length
    begins; lazy, so that asking whether there is one reads no further than that."""
    more = sentences(text)
    parts: list[str] = []
    start = 0
    while True:
        words: list[str] = []
        end = start
        while len(words) < min_words:
            if end == len(parts):
                part = next(more, None)
                if part is None:
                    return  # nothing long enough begins here or later
                parts.append(part)
            words += _WORD.findall(parts[end].lower())
            end += 1
        if len(words) <= max_words:
            yield " ".join(parts[start:end]), words
        start += 1


def has_explanation(text: str, min_words: int = 4, max_words: int = 40) -> bool:
    """Whether `explanation_of` finds something."""
    return next(passages(text, min_words, max_words), None) is not None


def explanation_of(text: str, min_words: int = 4, max_words: int = 40) -> str:
    """The passage of `text` that says what its writer thought, "" if none has a fitting length."""
    first = ""
    for passage, words in passages(text, min_words, max_words):
        if not _OPINION.isdisjoint(words):
            return passage
        first = first or passage
    return first
