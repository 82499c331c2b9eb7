"""Encoded prompts on disk, shared by all cells whose prompts are the same.

<folder>/<key>/<task>.<split>.<list>.<form>.safetensors, its sha256 in a .json beside it. The key
says what the prompts depend on: tokenizer, templates, prompt settings, the prepared data. A file
that is missing or damaged is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ckf.batches import Example, QuestionMaker
from ckf.data.prepared import PreparedData, file_sha256
from ckf.prompts import TEMPLATES, Encoded, PromptEncoder

Log = Callable[[str], None]
_PARTS = ("tokens", "answer", "slots")


class PromptCache:
    """Prompts by example, encoded a whole set (task, split, list, form) at a time.

    Args:
        folder: where the sets lie; other keys may lie beside this one.
        encoder: with its matches and settings; ``maker``: of the rows that are shown.
    """

    def __init__(
        self, folder: Path, maker: QuestionMaker, encoder: PromptEncoder, log: Log = print
    ) -> None:
        self.key = cache_key(maker.data, maker, encoder)
        self.folder, self.log = folder / self.key[:16], log
        self._sets: dict[str, _Set] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "log": print}  # whom it tells stays with the process that trains

    def prompt(
        self,
        maker: QuestionMaker,
        encoder: PromptEncoder,
        example: Example,
        split: str,
        vectors: bool,
        list_name: str | None,
    ) -> Encoded:
        """The prompt with its answer, as ``encoder.encode(maker.question(...))`` gives it."""
        name = f"{example.task}.{split}.{list_name or 'default'}.{'vectors' if vectors else 'text'}"
        if name not in self._sets:
            self._sets[name] = self._open(name, maker, encoder, example.task, split, vectors,
                                          list_name)  # fmt: skip
        return self._sets[name].prompt(example)

    def _open(self, name, maker, encoder, task, split, vectors, list_name) -> _Set:
        file = self.folder / f"{name}.safetensors"
        arrays = _read(file)
        if arrays is None:
            examples = maker.examples(task, split, list_name)
            self.log(f"encoding {len(examples):,} prompts: {name}")
            questions = (maker.question(e, split, list_name) for e in examples)
            arrays = _arrays(examples, [encoder.encode(q, vectors) for q in questions])
            _write(arrays, file)
        return _Set(task, arrays)


class _Set:
    """The prompts of one set, back from flat arrays."""

    def __init__(self, task: str, arrays: dict[str, np.ndarray]) -> None:
        self.task, self.arrays = task, arrays
        self.places = {int(row): place for place, row in enumerate(arrays["rows"])}

    def prompt(self, example: Example) -> Encoded:
        place = self.places[example.row]
        tokens, answer, slots = (self._part(name, place) for name in _PARTS)
        return Encoded(self.task, tokens, [tuple(s) for s in slots], answer)

    def _part(self, name: str, place: int) -> list:
        low, high = self.arrays[f"{name}_ends"][place : place + 2]
        return self.arrays[name][low:high].tolist()


def cache_key(data: PreparedData, maker: QuestionMaker, encoder: PromptEncoder) -> str:
    """A sha256 over everything that the prompts depend on."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    rows = {
        f"{task}.{split}": hashlib.sha256(data.rows(task, split).tobytes()).hexdigest()
        for task in maker.config.tasks
        for split in ("train", "valid", "test")
    }
    about = {
        "tokenizer": hashlib.sha256(words.encode()).hexdigest(),
        "special": [encoder.filler, encoder.end, encoder.start],
        "templates": TEMPLATES,
        "prompt": asdict(maker.config.prompt),
        "matches": encoder.matches,
        "lists": [maker.config.data.train_list, *maker.config.data.test_lists],
        "data": data.manifest["files"],
        "rows": rows,
    }
    if encoder.adds_space:  # not said of the others, whose prompts lie in older folders too
        about["pieces"] = "encoded behind another"
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _arrays(examples: list[Example], prompts: list[Encoded]) -> dict[str, np.ndarray]:
    arrays = {"rows": np.array([e.row for e in examples], np.int64)}
    parts = {
        "tokens": [np.array(p.tokens, np.int32) for p in prompts],
        "answer": [np.array(p.answer, np.int32) for p in prompts],
        "slots": [np.array(p.slots, np.int64).reshape(-1, 2) for p in prompts],
    }
    for name, values in parts.items():
        ends = np.cumsum([0, *(len(v) for v in values)])
        arrays[name], arrays[f"{name}_ends"] = np.concatenate(values), ends.astype(np.int64)
    return arrays


def _write(arrays: dict[str, np.ndarray], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".part")
    save_file(arrays, temporary)
    temporary.replace(file)
    file.with_suffix(".json").write_text(json.dumps({"sha256": file_sha256(file)}) + "\n")


def _read(file: Path) -> dict[str, np.ndarray] | None:
    try:
        expected = json.loads(file.with_suffix(".json").read_text())["sha256"]
        return load_file(file) if file_sha256(file) == expected else None
    except (OSError, ValueError, KeyError):
        return None
