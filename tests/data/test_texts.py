"""Titles, review texts, and the sentence that task explain learns to write."""

import pytest

from ckf.data.explain import explanation_of, has_explanation, sentences
from ckf.data.interactions import clean_text
from ckf.data.titles import clean_title, movie_title


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("Matrix, The (1999)", "The Matrix (1999)"),
        ("Bug's Life, A (1998)", "A Bug's Life (1998)"),
        ("American in Paris, An (1951)", "An American in Paris (1951)"),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly (1966)"),
        ("Misérables, Les (1995)", "Les Misérables (1995)"),
        ("Atalante, L' (1934)", "L'Atalante (1934)"),
        (
            "City of Lost Children, The (Cité des enfants perdus, La) (1995)",
            "The City of Lost Children (La Cité des enfants perdus) (1995)",
        ),
        ("Librarian, The: The Curse (2008)", "The Librarian: The Curse (2008)"),
        ("Toy Story (1995)", "Toy Story (1995)"),
        ("Yes, The", "The Yes"),
        ("Yours, Mine and Ours (1968)", "Yours, Mine and Ours (1968)"),
        ("", ""),
    ],
)
def test_movie_titles(raw, read):
    assert movie_title(raw) == read


def test_entities_in_titles():
    assert clean_title("Tom &amp;amp; Jerry &#39;s\u00a0 day\n") == "Tom & Jerry 's day"


def test_review_texts():
    assert clean_text("a &#34;b&#34;<br />c\n\n <i>d</i> 1 < 2", 100) == 'a "b" c d 1 < 2'
    assert clean_text("one two three", 9) == "one two"
    assert clean_text("one two three", 7) == "one two"
    assert clean_text("abcdefgh", 3) == "abc"


def test_sentences():
    text = 'Mr. T. Bone plays. "So good!" she said.Then  it ended... Or did it?'
    assert list(sentences(text)) == [
        "Mr. T. Bone plays.",
        '"So good!"',
        "she said.",
        "Then it ended...",
        "Or did it?",
    ]
    assert list(sentences("")) == [] and list(sentences("  \n")) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # the first fitting sentence with an opinion, not the first sentence
        ("I bought this in May. It is a great little amp.", "It is a great little amp."),
        # without any opinion, the first fitting one
        ("I bought this in May. It came on Monday by mail.", "I bought this in May."),
        # too short by itself: joined with the next
        ("Love it. Every song of it counts.", "Love it. Every song of it counts."),
        # nothing long enough
        ("Great album.", ""),
        ("", ""),
        # too long: left out
        ("word " * 60 + "great.", ""),
        ("word " * 60 + "great. And the rest is fine too.", "And the rest is fine too."),
    ],
)
def test_explanations(text, expected):
    assert explanation_of(text) == expected
    assert has_explanation(text) == bool(expected)


def test_explanation_lengths_are_settings():
    text = "Fine. It is a great little amp for the money."
    assert explanation_of(text, 1, 3) == "Fine."
    assert explanation_of(text, 1, 40) == "Fine."
    assert explanation_of(text, 4, 9) == "It is a great little amp for the money."
