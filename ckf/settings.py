"""Every setting of a run with its default and what it means, read off the dataclasses.

``ckf settings`` prints it; docs/settings.md is what it prints.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from ckf.config import RunConfig
from ckf.data.config import TASKS, TaskRows

_HEAD = (
    "What a config may say. Any key can be set from the command line too: "
    "`--set train.steps=2000`; a misspelt one is an error that names the nearest. Keys without a "
    "default are needed. `ckf settings` prints this page."
)


def settings_page() -> str:
    """Markdown: a section for each part of a config, its text and a table of its keys."""
    lines = ["# Settings", "", *textwrap.wrap(_HEAD, 100, break_on_hyphens=False), ""]
    for name, kind in _parts(RunConfig, ""):
        lines += [f"## {name.rstrip('.') or 'The run itself'}", "", *_text(kind), ""]
        lines += ["| key | kind | default |", "| --- | --- | --- |"]
        lines += [f"| `{name}{key}` | {what} | {default} |" for key, what, default in _keys(kind)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _parts(kind: type, prefix: str) -> Iterator[tuple[str, type]]:
    """(prefix of its keys, dataclass) of a config and of all that it holds."""
    yield prefix, kind
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            yield from _parts(inner, f"{prefix}{field.name}.")
        elif _by_task(inner):
            yield from _parts(TaskRows, f"{prefix}{field.name}.TASK.")


def _keys(kind: type) -> Iterator[tuple[str, str, str]]:
    """Key, kind and default of the plain fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            continue
        if _by_task(inner):
            yield field.name, f"any of {', '.join(TASKS)}", ""
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield field.name, _words(inner), "" if default is dataclasses.MISSING else _yaml(default)


def _by_task(kind: Any) -> bool:
    """Whether it holds ``TaskRows`` by the name of a task."""
    return typing.get_args(kind)[1:] == (TaskRows,)


def _words(kind: Any) -> str:
    """A type as a reader of YAML would call it."""
    names = {int: "int", float: "number", str: "text", bool: "true, false", types.NoneType: "null"}
    if kind in names:
        return names[kind]
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if typing.get_origin(kind) is list:
        return f"list of {_words(parts[0])}"
    return f"{_words(parts[1])} by name"


def _yaml(value: Any) -> str:
    """A default as one would write it."""
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def _text(kind: type) -> list[str]:
    """The docstring as paragraphs, code in single backticks."""
    paragraphs = textwrap.dedent(f"{' ' * 4}{kind.__doc__}").strip().split("\n\n")
    lines: list[str] = []
    for paragraph in paragraphs:
        words = " ".join(paragraph.split()).replace("``", "`")
        lines += [*textwrap.wrap(words, 100, break_on_hyphens=False), ""]
    return lines[:-1]
