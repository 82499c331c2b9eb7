"""Amazon reviews of 2014 and 2018 (reviewerID, overall, unixReviewTime) and 2023 (user_id, rating,
timestamp in milliseconds), one JSON object a line; metadata as JSON or, in 2014, Python literals.

Reviewer names, votes and everything else are dropped line by line. 2023 items are `parent_asin`,
which the 2023 metadata is keyed by.
"""

from __future__ import annotations

import ast
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from ckf.data.config import DataConfig
from ckf.data.errors import DataError
from ckf.data.files import find_file, lines
from ckf.data.interactions import Broken, Builder, parse_rating, parse_time
from ckf.data.titles import clean_title

_REVIEWS = ["reviews*.json*", "*_5.json*", "[!m]*.jsonl*", "[!m]*.json*", "*.json*"]
_METADATA = ["meta*.json*"]
# the id of a metadata line, found without parsing it
_META_ID = re.compile(r"""['"](parent_asin|asin)['"]\s*:\s*['"]([^'"]+)['"]""")


def files(config: DataConfig, root: Path) -> list[Path]:
    """The reviews and, where there is one, the metadata."""
    patterns = [config.reviews] if config.reviews else _REVIEWS
    avoid = () if config.reviews else ("meta", "manifest")
    found = [find_file(root, "the Amazon reviews", patterns, avoid)]
    if config.metadata:
        found.append(find_file(root, "the Amazon metadata", [config.metadata]))
    else:
        try:
            found.append(find_file(root, "the Amazon metadata", _METADATA))
        except DataError as error:
            if "not found" not in str(error):  # several: the user must say which
                raise
    return found


def read(config: DataConfig, paths: list[Path], out: Builder) -> None:
    """All reviews with a user, an item, a finite rating and a time; then titles of their items."""
    for number, line in lines(paths[0], out.limits):
        out.bad.lines += 1
        try:
            _add_review(_parse_json(line), out)
        except Broken as error:
            out.bad.add(paths[0], number, str(error))
    if len(paths) > 1:
        _read_metadata(paths[1], out, config.max_bad_share)


def _parse_json(line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Broken("not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Broken(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise Broken("not a JSON object")
    return record


def _add_review(record: dict, out: Builder) -> None:
    if "reviewerID" in record:
        user, item = record["reviewerID"], record.get("asin")
        rating, text = record.get("overall"), record.get("reviewText")
        if "unixReviewTime" in record:
            time = parse_time(record["unixReviewTime"])
        else:
            time = _written_time(record.get("reviewTime"))
    elif "user_id" in record:
        user, item = record["user_id"], record.get("parent_asin") or record.get("asin")
        rating, text = record.get("rating"), record.get("text")
        time = parse_time(record.get("timestamp"), 1000)
    else:
        raise Broken("neither 'reviewerID' (2014, 2018) nor 'user_id' (2023) is there")
    if not isinstance(user, str) or not isinstance(item, str):
        raise Broken("the user id or the item id is missing or no string")
    out.add(user, item, parse_rating(rating), time, text if isinstance(text, str) else "")


def _written_time(value) -> int:
    """Seconds of "09 12, 2006", which 2018 has beside or instead of unixReviewTime."""
    try:
        return int(datetime.strptime(value, "%m %d, %Y").replace(tzinfo=UTC).timestamp())
    except (TypeError, ValueError) as error:
        raise Broken("neither unixReviewTime nor a reviewTime such as '09 12, 2006'") from error


def _read_metadata(path: Path, out: Builder, max_bad_share: float) -> None:
    """Titles of items that occur; other lines are not even parsed. Nothing is ever evaluated."""
    known, broken, matched, first = out.known_items, 0, 0, ""
    for number, line in lines(path, out.limits):
        text = line.decode("utf-8", "replace")
        ids = {match[1] for match in _META_ID.findall(text)}
        if ids and ids.isdisjoint(known):
            continue
        try:
            record = _parse_record(text)
        except Broken as error:
            broken += 1
            first = first or f"{path.name}:{number}: {error}"
            continue
        item = record.get("parent_asin") or record.get("asin")
        title = record.get("title")
        if not isinstance(item, str) or item not in known:
            continue
        matched += 1
        if isinstance(title, str) and clean_title(title):
            out.titles[item] = clean_title(title)
    if broken > max_bad_share * (matched + broken):
        raise DataError(
            f"{broken} of {matched + broken} metadata lines are broken, more than "
            f"data.max_bad_share ({max_bad_share:g}) allows: {first}. Mend the file or raise "
            "data.max_bad_share"
        )


def _parse_record(text: str) -> dict:
    """A metadata line: JSON, or a Python literal (2014)."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        try:
            record = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
            raise Broken("neither JSON nor a Python literal") from error
    if not isinstance(record, dict):
        raise Broken("not a JSON object")
    return record
