"""Attention of packed rows within themselves, at the cost of rows apart.

``model.set_attn_implementation("ckf_packed")`` selects it, for models that run on "sdpa". Rows of
about the same length form a group, padded on the right: under a causal mask no token sees the
padding, so each group is one ``scaled_dot_product_attention`` with ``is_causal`` and reads no mask.
sdpa by itself works on all pairs of the packed sequence: sixteen rows cost sixteen times as much.

Calls without ``packed_rows`` (padded, cached, generating) are sdpa's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_ATTENTION = "ckf_packed"
_NARROWEST = 0.75  # of a group's widest row: a narrower one starts the next group
_UNKNOWN = ("s_aux", "indices", "block_indices", "position_bias", "softcap")  # change the result
_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, eq=False)  # tensors have no one truth
class PackedRows:
    """Where the rows of a packed sequence of N tokens lie, once alone and once in P padded places.

    Args:
        gather: (P,) int64, the token that each padded place holds.
        scatter: (N,) int64, the padded place of each token.
        groups: rows and their padded width, group by group; P is the sum of their products.
        mask: (1, 1, 1, 1), NaN: stands where transformers would make a mask of all pairs. An
            attention that knows nothing of rows adds it and gives NaN, not rows that see others.
        windows: a list that collects every layer's sliding window or None, for a trial.
    """

    gather: Tensor
    scatter: Tensor
    groups: tuple[tuple[int, int], ...]
    mask: Tensor
    windows: list[int | None] | None = None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedRows:
        """Of rows one after the other, of ``lengths`` (rows,) tokens, each at least 1."""
        sizes = np.asarray(lengths, dtype=np.int64)
        if sizes.ndim != 1 or sizes.size == 0 or sizes.min() < 1:
            raise ValueError(f"lengths is {lengths!r}; expected one or more, each at least 1")
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(-sizes, kind="stable")
        gather, scatter = [], np.empty(sizes.sum(), dtype=np.int64)
        groups, done, first = [], 0, 0
        while first < len(order):
            width = int(sizes[order[first]])
            count = int(np.sum(sizes[order[first:]] >= _NARROWEST * width))
            rows = order[first : first + count]
            column = np.arange(width)
            held = starts[rows, None] + np.minimum(column, sizes[rows, None] - 1)  # (count, width)
            own = column < sizes[rows, None]
            scatter[held[own]] = done + np.flatnonzero(own)
            gather.append(held.ravel())
            groups.append((count, width))
            done, first = done + held.size, first + count
        mask = torch.full((1, 1, 1, 1), float("nan"))
        indices = torch.from_numpy(np.concatenate(gather)), torch.from_numpy(scatter)
        return cls(*indices, tuple(groups), mask)

    def inputs(self) -> dict[str, object]:
        """What a model's forward takes, beside the tokens and their positions.

        A patched model needs ``packed_rows`` alone, on any device.
        """
        return {"packed_rows": self, "attention_mask": self.mask}

    def to(self, *args, **kwargs) -> PackedRows:
        """The same on another device, as ``Tensor.to`` takes it."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> PackedRows:
        """The same in pinned memory, as a DataLoader asks for it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change) -> PackedRows:
        names = ("gather", "scatter", "mask")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def attends_packed(model: nn.Module) -> bool:
    """Whether the model's attention is "ckf_packed"."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == PACKED_ATTENTION


def can_attend_packed(model: PreTrainedModel) -> bool:
    """Whether all of the model runs on sdpa, its masks causal or sliding windows, as it says."""
    config = model.config.get_text_config()
    parts = [getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {})]
    attention = {part._attn_implementation for part in (model.config, *parts) if part is not None}
    return (
        len(attention) == 1
        and attention <= {"sdpa", PACKED_ATTENTION}
        and bool(getattr(model, "_supports_sdpa", False))
        and set(getattr(config, "layer_types", None) or ()) <= _LAYERS
        and getattr(config, "attention_chunk_size", None) is None
        and bool(getattr(config, "is_causal", True))
    )


def missing_windows(model: PreTrainedModel, windows: Sequence[int | None]) -> bool:
    """Whether layers that are to have a sliding window did not hand it on to attention.

    Some put it into the mask alone, which packed rows do without.
    """
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    expected = 0
    if types:
        expected = list(types).count("sliding_attention")
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        expected = config.num_hidden_layers
    return sum(window is not None for window in windows) < expected


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_rows: PackedRows | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """As transformers' ``sdpa_attention_forward``: query (B, H, N, D), key and value (B, G, N, D)
    to (B, N, H, D); with ``packed_rows``, B is 1 and every row sees itself alone.
    """
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise ValueError(
            f"{type(module).__name__} hands {unknown[0]} to attention, which {PACKED_ATTENTION} "
            "does not know; leave this model's attention as it was"
        )
    if packed_rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None and attention_mask.numel() != 1:
        raise ValueError(
            f"{type(module).__name__} makes masks of its own, which {PACKED_ATTENTION} does not "
            "read; pad the rows instead, one a sequence"
        )
    expected = 1, packed_rows.scatter.shape[0]
    for x in (query, key):
        if (x.shape[0], x.shape[2]) != expected:
            raise ValueError(
                f"packed_rows has {expected[1]} tokens; expected one sequence of as many, got "
                f"queries {tuple(query.shape)} and keys {tuple(key.shape)} (batch, heads, tokens, "
                "width); a key-value cache must be off"
            )
    window = kwargs.pop("sliding_window", None)
    if packed_rows.windows is not None:
        packed_rows.windows.append(window)
    places = packed_rows.gather, packed_rows.scatter
    padded = [_Pad.apply(x[0].transpose(0, 1), *places) for x in (query, key, value)]  # (P, H, D)
    done, outputs = 0, []
    for count, width in packed_rows.groups:
        rows = slice(done, done + count * width)
        group = [x[rows].unflatten(0, (count, width)).transpose(1, 2) for x in padded]
        mask = _window_mask(width, window, query.device)
        output, _ = sdpa_attention_forward(module, *group, mask, **kwargs)
        outputs.append(output.flatten(0, 1))
        done += count * width
    return _Unpad.apply(torch.cat(outputs), *places).unsqueeze(0), None


def _window_mask(width: int, window: int | None, device: torch.device) -> Tensor | None:
    """None where causal says it all, else (width, width): causal, ``window`` tokens back."""
    if window is None or width <= window:
        return None
    place = torch.arange(width, device=device)
    back = place.unsqueeze(1) - place
    return ((back >= 0) & (back < window)).view(1, 1, width, width)


class _Pad(torch.autograd.Function):
    """(N, ...) to (P, ...). Padding gets no gradient: nobody saw it."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        return x.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    """(P, ...) to (N, ...)."""

    @staticmethod
    def forward(ctx, x: Tensor, gather: Tensor, scatter: Tensor) -> Tensor:
        ctx.save_for_backward(scatter)
        ctx.places = gather.shape[0]
        return x.index_select(0, scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (scatter,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.places, *grad.shape[1:])
        return padded.index_copy_(0, scatter, grad), None, None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
