"""What a patched model takes in memory, told from its config alone: nothing is loaded.

Weights, adapters, gradients and AdamW's state are counted exactly on the meta device. The bytes
that autograd keeps for a token are counted in one forward pass on fake tensors, which have shapes
but no values; attention there is the fused kind, whose saved bytes grow linearly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from ckf.backbone import KNOWN_DOWNLOADS, READ_ERRORS, locate_model
from ckf.patch import patch_model, patched_layers

# Bytes of one weight of a linear; nf4: half a byte and an fp32 scale for 64 weights.
BASE_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
_ATTENTION = "ckf_causal"  # for the pass on fake tensors
_PROBES = (32, 64)  # tokens: the difference leaves out what does not grow with them


@dataclass(frozen=True)
class ModelSizes:
    """Counts of a patched model, and bytes where the name says so."""

    base_parameters: int
    patched_linears: int
    base_bytes: float
    adapter_parameters: int
    token_bytes: float  # saved for the backward pass, for each token
    checkpointed_token_bytes: float  # the same with gradient checkpointing
    layer_token_bytes: float  # of one decoder layer while it is recomputed
    logits_bytes: float  # for each token that predicts: logits in the base's dtype and fp32, and dy

    @property
    def adapter_bytes(self) -> int:
        return 4 * self.adapter_parameters

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.adapter_parameters

    @property
    def optimizer_bytes(self) -> int:
        """AdamW: two fp32 moments."""
        return 8 * self.adapter_parameters

    @property
    def training_bytes(self) -> float:
        """Everything but activations."""
        return self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes


def read_config(name: str) -> PreTrainedConfig:
    """A config by what ``model.name`` takes, or a config.json; ValueError where there is none."""
    path, options = Path(name).expanduser(), {}
    if path.suffix == ".gguf" or name in KNOWN_DOWNLOADS:
        folder, options = locate_model(name)
        path = Path(folder)
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"there is no {name}; give a folder with config.json, or the file itself")
    try:
        return AutoConfig.from_pretrained(str(path) if path.exists() else name, **options)
    except READ_ERRORS as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read the config of {name!r}: {why}\nGive a Hugging Face name that can be "
            "reached from here, a folder with config.json, that file, or a .gguf file"
        ) from error


def model_sizes(
    config: PreTrainedConfig, tasks: Sequence[str] | dict, base: str = "bf16", **patching
) -> ModelSizes:
    """Sizes of ``patch_model(model, tasks, **patching)`` on a causal LM of this config.

    Args:
        base: the frozen weights: "fp32", "bf16", "int8" or "nf4" (the last two: targeted linears
            quantized, the rest bf16).

    Raises:
        ValueError: an unknown ``base``, or as ``patch_model``.
    """
    if base not in BASE_BYTES:
        raise ValueError(f"base is {base!r}; expected one of {', '.join(BASE_BYTES)}")
    dtype = torch.float32 if base == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = _empty_model(config, dtype)
    own = {id(p): p for p in model.parameters()}
    patch_model(model, tasks, **patching)
    layers = patched_layers(model)
    linears = {id(m.base_layer.weight): m.base_layer.weight.numel() for m in layers.values()}
    rest = sum(p.numel() for i, p in own.items() if i not in linears)
    text = config.get_text_config()
    whole = _saved_bytes(model, dtype)
    depth = text.num_hidden_layers
    hidden = text.hidden_size * dtype.itemsize
    return ModelSizes(
        base_parameters=sum(p.numel() for p in own.values()),
        patched_linears=len(layers),
        base_bytes=sum(linears.values()) * BASE_BYTES[base] + rest * dtype.itemsize,
        adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        token_bytes=whole,
        checkpointed_token_bytes=depth * hidden,
        layer_token_bytes=whole / depth,
        logits_bytes=text.vocab_size * (dtype.itemsize + 8),
    )


def linear_groups(config: PreTrainedConfig, **patching) -> list[tuple[int, tuple[int, ...]]]:
    """The distinct (k, (n, ...)) of a causal LM of this config; linears fed one tensor together.

    ``patching``: of ``patch_model``.
    """
    with torch.device("meta"):
        model = _empty_model(config, torch.bfloat16)
    patch_model(model, ["task"], **patching)
    layers = patched_layers(model).values()
    followers = {id(sibling) for layer in layers for sibling in layer._siblings}
    return list(
        dict.fromkeys(
            (layer.in_features, (layer.out_features, *(s.out_features for s in layer._siblings)))
            for layer in layers
            if id(layer) not in followers
        )
    )


def _empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model with plain causal attention; on fake tensors the usual one would make a mask."""
    AttentionInterface.register(_ATTENTION, _causal_attention)
    AttentionMaskInterface.register(_ATTENTION, lambda *_args, **_kwargs: None)
    options = {"dtype": dtype, "attn_implementation": _ATTENTION}
    return AutoModelForCausalLM.from_config(config, **options).eval()


def _causal_attention(module, query, key, value, _mask, scaling=None, **_kwargs):
    heads = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return heads.transpose(1, 2).contiguous(), None


def _saved_bytes(model: nn.Module, dtype: torch.dtype) -> float:
    """Bytes for each further token that one forward pass keeps for the backward, weights aside.

    The model's parameters become fake ones: it is of no other use afterwards.
    """
    width = model.get_input_embeddings().weight.shape[1]
    totals = []
    for layer in patched_layers(model).values():
        layer._prepare(torch.device("cpu"))  # its constants keep their values
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(model)
        weights = {_storage(p) for p in model.parameters()}
        for length in _PROBES:
            saved: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor, saved=saved) -> torch.Tensor:
                saved[_storage(tensor)] = tensor
                return tensor

            embeds = torch.empty(1, length, width, dtype=dtype, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                output = model(
                    inputs_embeds=embeds, task_ids=[0], logits_to_keep=1, use_cache=False
                )
            totals.append(
                sum(t.untyped_storage().nbytes() for k, t in saved.items() if k not in weights)
            )
            del output
    return (totals[1] - totals[0]) / (_PROBES[1] - _PROBES[0])


def _fake_weights(model: nn.Module) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cpu")
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def describe(sizes: ModelSizes, tokens: int) -> list[tuple[str, str]]:
    """Rows of (what, how much) for people; ``tokens`` of a step on one device."""
    full, light = sizes.token_bytes, sizes.checkpointed_token_bytes
    recomputed = tokens * (light + sizes.layer_token_bytes)
    return [
        ("base parameters", f"{sizes.base_parameters:,} in all"),
        ("patched linears", f"{sizes.patched_linears}"),
        ("adapter parameters", f"{sizes.adapter_parameters:,}"),
        ("base weights", _gib(sizes.base_bytes)),
        ("adapters, fp32", _gib(sizes.adapter_bytes)),
        ("gradients, fp32", _gib(sizes.gradient_bytes)),
        ("AdamW, fp32", _gib(sizes.optimizer_bytes)),
        ("kept for each token", f"{full / 2**10:,.0f} KiB"),
        ("  with checkpointing", f"{light / 2**10:,.0f} KiB, and {_layer(sizes)} of one layer"),
        ("logits of a label", f"{sizes.logits_bytes / 2**10:,.0f} KiB"),
        (f"step of {tokens:,} tokens", _gib(sizes.training_bytes + tokens * full)),
        ("  with checkpointing", _gib(sizes.training_bytes + recomputed)),
    ]


def _layer(sizes: ModelSizes) -> str:
    return f"{sizes.layer_token_bytes / 2**10:,.0f} KiB"


def _gib(count: float) -> str:
    return f"{count / 2**30:,.2f} GiB"
