"""The base model of a run: loaded once, cut where settings say so, read for items' titles."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ckf.backbone import load_backbone
from ckf.config import RunConfig
from ckf.data.prepared import PreparedData
from ckf.targets import decoder_layers
from ckf.titles import read_titles, title_tokens

_SECONDS_BETWEEN_LINES = 15
Log = Callable[[str], None]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_base(config: RunConfig, device: torch.device) -> Loaded:
    """The frozen, unpatched backbone, cut to ``model.layers``, and its tokenizer."""
    backbone, tokenizer = load_backbone(config.model, device)
    if config.model.layers is not None:
        keep_layers(backbone, config.model.layers)
    return backbone, tokenizer


def keep_layers(backbone: PreTrainedModel, count: int) -> None:
    """Keep the first ``count`` decoder layers. Raises ValueError where there are fewer."""
    config = backbone.config.get_text_config()
    depth = config.num_hidden_layers
    try:
        parent, name, layers = decoder_layers(backbone)
    except ValueError as error:
        raise ValueError(f"model.layers is {count}, but {error}; leave it out") from error
    if count > depth:
        raise ValueError(
            f"model.layers is {count}, but this model has {depth} decoder layers; give 1 to {depth}"
        )
    setattr(parent, name, layers[:count])
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]


class Base:
    """The base model, unpatched, in memory once.

    Args:
        log: told of every loading and of how far titles are read.
    """

    def __init__(self, device: torch.device, log: Log) -> None:
        self.device, self.log = device, log
        self._config = self._loaded = None
        self._fingerprints: dict[str, str] = {}

    def loaded(self, config: RunConfig) -> Loaded:
        """The backbone, cut to ``model.layers``, and its tokenizer: the same at every call."""
        if self._loaded is None or self._config != config.model:
            self.log(f"loading {config.model.name}")
            self._loaded = None  # never two of them in memory
            self._loaded, self._config = load_base(config, self.device), config.model
        return self._loaded

    def release(self) -> None:
        """Give its memory back; the next call loads it again."""
        self._config = self._loaded = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def fresh(self, config: RunConfig) -> Loaded:
        """A copy of the backbone, with nothing left in it, and its tokenizer."""
        backbone, tokenizer = self.loaded(config)
        return copy.deepcopy(backbone), tokenizer

    def titles(self, config: RunConfig, data: PreparedData) -> Tensor:
        """All items' titles (I, width) as the model reads them, with all of its layers."""
        titles = [data.title(i) for i in range(data.n_items)]
        backbone, tokenizer = self.loaded(_whole(config))
        self.log(f"reading {len(titles):,} titles with {config.model.name}")
        said = time.monotonic()

        def progress(done: int) -> None:
            nonlocal said
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                self.log(f"{done:,} titles read")

        return read_titles(backbone, tokenizer, titles, config.prompt.item_word, progress)

    def fingerprint(self, config: RunConfig) -> str:
        """Of what reads a title: the same at any path and in float32 or bfloat16.

        A few values of every parameter, and the tokens of a text.
        """
        if config.model.name in self._fingerprints:
            return self._fingerprints[config.model.name]
        backbone, tokenizer = self.loaded(_whole(config))
        found = hashlib.sha256(str(title_tokens(tokenizer, ["Heat (1995)"])[0]).encode())
        for parameter in backbone.base_model.parameters():
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // 64)].to("cpu", torch.bfloat16)
            found.update(some.view(torch.int16).numpy().tobytes())
        return self._fingerprints.setdefault(config.model.name, found.hexdigest())


def _whole(config: RunConfig) -> RunConfig:
    """The config with a model that is not cut."""
    return replace(config, model=replace(config.model, layers=None))
