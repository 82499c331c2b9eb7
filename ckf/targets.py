"""Which linears of a model carry a LoRA: found by module type and name, never by model family."""

import re
from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

Targets = str | Sequence[str]


def features(module: nn.Module) -> tuple[int, int] | None:
    """(k, n) of a linear, also a quantized one; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def find_targets(model: nn.Module, targets: Targets) -> set[str]:
    modules = dict(model.named_modules())
    output = _output_layer(model)
    linears = {n for n, m in modules.items() if n and features(m) and m is not output}
    if targets == "all-linear":
        _refuse_experts(model, lambda name: True)
        return linears
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"target_modules {targets!r} is no valid regular expression ({error}); give one, "
                'a list of suffixes, or "all-linear"'
            ) from error

        def matches(name: str) -> bool:
            return pattern.fullmatch(name) is not None
    else:
        suffixes = list(targets)

        def matches(name: str) -> bool:
            return any(name == s or name.endswith("." + s) for s in suffixes)

    _refuse_experts(model, matches)
    found = {name for name in modules if name and matches(name)}
    wrong = sorted(n for n in found if not features(modules[n]))
    if wrong:
        kind = type(modules[wrong[0]]).__name__
        raise ValueError(f"target {wrong[0]} is a {kind}; Multi-LoRA goes on linears only")
    if not found:
        known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
        raise ValueError(
            f"target_modules {targets!r} match no linear; this model has {known} (a list names "
            "suffixes, a string is a regular expression for the whole name)"
        )
    return found


def _refuse_experts(model: nn.Module, matches) -> None:
    """Mixture-of-experts weights in one 3-D parameter cannot carry a LoRA: say so, skip nothing."""
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}"
            if parameter.dim() == 3 and not features(module) and (matches(full) or matches(name)):
                if "conv" in type(module).__name__.lower():
                    continue
                raise ValueError(
                    f"{full} has shape {tuple(parameter.shape)}: expert weights in one 3-D "
                    "parameter cannot carry a LoRA; name the linears to patch, for example "
                    'target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]'
                )


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter else None
    except (AttributeError, NotImplementedError):
        return None
