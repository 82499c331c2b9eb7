"""Attention of packed rows within themselves, at the cost of rows apart.

``model.set_attn_implementation("ckf_packed")`` selects it, for models that run on "sdpa". Rows of
about the same length form a group, padded on the right: under a causal mask no token sees the
padding, so each group is one ``scaled_dot_product_attention`` with ``is_causal`` and reads no mask.
sdpa by itself works on all pairs of the packed sequence: sixteen rows cost sixteen times as much.
On a GPU in half precision PyTorch's kernel for rows of any lengths (``varlen_attn``) takes all of
them at once, where a trial of it there is right.

Calls without ``packed_rows`` (padded, cached, generating) are sdpa's own.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

PACKED_ATTENTION = "ckf_packed"
_NARROWEST = 0.75  # of a group's widest row: a narrower one starts the next group
_UNKNOWN = ("s_aux", "indices", "block_indices", "position_bias", "softcap")  # change the result
_LAYERS = {"full_attention", "sliding_attention"}
VARLEN_DEVICE, _VARLEN_DTYPES = "cuda", (torch.float16, torch.bfloat16)
_TRIED_LENGTHS, _TRIED_WINDOW = (37, 5, 130), 20


@dataclass(frozen=True, eq=False)  # tensors have no one truth
class PackedRows:
    """Where the rows of a packed sequence of N tokens lie, once alone and once in P padded places.

    Args:
        gather: (P,) int64, the token that each padded place holds.
        scatter: (N,) int64, the padded place of each token.
        groups: rows and their padded width, group by group; P is the sum of their products.
        starts: (rows + 1,) int32, where each row begins, and N.
        longest: tokens of the longest row.
        mask: (1, 1, 1, 1), NaN: stands where transformers would make a mask of all pairs. An
            attention that knows nothing of rows adds it and gives NaN, not rows that see others.
        windows: a list that collects every layer's sliding window or None, for a trial.
    """

    gather: Tensor
    scatter: Tensor
    groups: tuple[tuple[int, int], ...]
    starts: Tensor
    longest: int
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
        ends = torch.from_numpy(np.append(starts, sizes.sum()).astype(np.int32))
        return cls(*indices, tuple(groups), ends, int(sizes.max()), mask)

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
        names = ("gather", "scatter", "starts", "mask")
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
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if causal and not kwargs.get("dropout") and _takes_varlen(query, key, value):
        return _varlen(query, key, value, packed_rows, window, kwargs.get("scaling")), None
    return _by_groups(module, query, key, value, packed_rows, window, **kwargs), None


def _by_groups(module, query, key, value, packed_rows: PackedRows, window, **kwargs) -> Tensor:
    """Rows of about the same length at once, padded: (1, N, H, D)."""
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
    return _Unpad.apply(torch.cat(outputs), *places).unsqueeze(0)


def _varlen(query, key, value, packed_rows: PackedRows, window, scale: float | None) -> Tensor:
    """All rows by one kernel: (1, N, H, D)."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    back = -1 if window is None or window >= packed_rows.longest else window - 1
    starts, longest = packed_rows.starts, packed_rows.longest
    bounds = {"scale": scale, "window_size": (back, 0)}
    return varlen_attn(query, key, value, starts, starts, longest, longest, **bounds).unsqueeze(0)


def _takes_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.dtype == key.dtype == value.dtype or value.shape[-1] != query.shape[-1]:
        return False
    return runs_varlen(query.device, query.dtype, query.shape[-1])


def runs_varlen(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether rows of any lengths, heads of ``width``, go through PyTorch's one kernel there."""
    if device.type != VARLEN_DEVICE or dtype not in _VARLEN_DTYPES:
        return False
    return _varlen_is_right(device, dtype, width)


@torch.compiler.assume_constant_result  # not to be traced
def _varlen_is_right(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    return _tried_varlen(device, dtype, width)


@lru_cache
def _tried_varlen(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether ``varlen_attn`` gives, there, what groups give: outputs and gradients."""
    known = varlen_attn is not None and inspect.signature(varlen_attn).parameters.keys()
    if not known or not {"scale", "window_size"} <= known:
        return False
    try:
        with torch.enable_grad(), torch.inference_mode(False):
            error = max(_varlen_error(device, dtype, width, w) for w in (None, _TRIED_WINDOW))
    except Exception as failure:  # an old GPU, a build without the kernel
        why = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    else:
        if error < 8 * torch.finfo(dtype).eps:  # NaN: False
            return True
        why = f"its results are off by {error:.2g}"
    warnings.warn(
        f"PyTorch's attention over rows of any lengths is not used on {device} ({why}); rows of "
        "about the same length are padded together",
        stacklevel=2,
    )
    return False


def _varlen_error(device: torch.device, dtype: torch.dtype, width: int, window) -> float:
    """The largest difference between the two ways, of the largest value."""

    class Causal(nn.Module):
        num_key_value_groups, is_causal = 2, True

    rows, generator = PackedRows.of(_TRIED_LENGTHS).to(device), torch.Generator().manual_seed(0)
    total = sum(_TRIED_LENGTHS)
    inputs = [
        torch.randn(1, total, heads, width, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(1, total, 4, width, generator=generator).to(device, dtype)
    found = []
    for output in (
        _varlen(*inputs, rows, window, None),
        _by_groups(Causal(), *inputs, rows, window),
    ):
        found.append([output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)])
    return max(
        ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()
        for one, other in zip(*found, strict=True)
    )


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
