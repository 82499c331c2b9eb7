"""Titles as people write them."""

from __future__ import annotations

import html
import re

# The articles that MovieLens moves behind a comma; "L'" takes no space when it moves back.
_ARTICLES = "The|A|An|La|Le|Les|L'|Il|Lo|Gli|El|Los|Las|Der|Die|Das|Den|Det|De|Een|En|Un|Une|Una"
_MOVED = re.compile(
    r"(?P<open>^|\((?:a\.k\.a\. |aka )?)(?P<body>[^()]+?), "
    rf"(?P<article>{_ARTICLES})(?=\s*(?:\(|\)|:|$))"
)


def clean_title(title: str) -> str:
    """HTML entities undone (twice: some sources escape twice), white space collapsed.

    Half a character (a lone surrogate, as JSON may hold) becomes a question mark.
    """
    if "&" in title:
        title = html.unescape(html.unescape(title))
    return " ".join(title.split()).encode("utf-8", "replace").decode()


def movie_title(title: str) -> str:
    """A MovieLens title with its article in front: "Matrix, The (1999)" -> "The Matrix (1999)"."""
    return _MOVED.sub(_put_in_front, clean_title(title))


def _put_in_front(match: re.Match) -> str:
    article = match["article"]
    space = "" if article.endswith("'") else " "
    return f"{match['open']}{article}{space}{match['body']}"
