"""Titles of items as the frozen language model reads them, for the CF side (ckf.cf.blend).

The state at the end of "The movie "Heat (1995)" is of the genre" says what kind of item it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ckf.prompts import plain_tokens, start_tokens

_LEAD, _TAIL = 'The {word} "', '" is of the genre'
_MOST_TOKENS = 64  # of a title
_TOKENS_AT_ONCE = 4096


@torch.no_grad()
def read_titles(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    titles: Sequence[str],
    word: str = "item",
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """States (I, width) float32 on the CPU: of the last layer, at the end of a text on the title.

    Args:
        backbone: unpatched.
        word: what an item is called, ``prompt.item_word``.
        progress: told how many are read so far, of those that differ.

    Raises:
        ValueError: a state that is not finite.
    """
    unique = list(dict.fromkeys(titles))
    texts = title_tokens(tokenizer, unique, word)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    states = torch.empty(0)
    while order:
        length = len(texts[order[0]])  # texts of one length at once: nothing is padded
        batch = [i for i in order[: max(1, _TOKENS_AT_ONCE // length)] if len(texts[i]) == length]
        tokens = torch.tensor([texts[i] for i in batch], device=backbone.device)
        found = backbone.base_model(input_ids=tokens, use_cache=False)[0][:, -1].float().cpu()
        if len(states) == 0:
            states = torch.empty(len(texts), found.shape[1])
        states[batch] = found
        order = order[len(batch) :]
        progress(len(texts) - len(order))
    if not states.isfinite().all():
        raise ValueError(
            f"{type(backbone).__name__} in {backbone.dtype} reads some titles as NaN or infinite: "
            "set model.dtype to float32 or bfloat16, or cf.titles to 0"
        )
    if len(unique) == len(titles):
        return states
    place = {title: i for i, title in enumerate(unique)}
    return states[[place[title] for title in titles]]


def title_tokens(
    tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], word: str = "item"
) -> list[list[int]]:
    """What the model reads of each title, at most 64 tokens of it."""
    lead = start_tokens(tokenizer) + plain_tokens(tokenizer, _LEAD.format(word=word))
    tail = plain_tokens(tokenizer, _TAIL)
    return [lead + plain_tokens(tokenizer, title)[:_MOST_TOKENS] + tail for title in titles]
