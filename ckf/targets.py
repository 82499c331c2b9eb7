"""Which linears of a model carry a LoRA: found by module type and name, never by model family."""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Targets = str | Sequence[str]
ALL_LINEAR = "all-linear"
_HEADS = ("score", "classifier")  # of sequence classification: output layers, by PEFT's names


def features(module: nn.Module) -> tuple[int, int] | None:
    """(k, n) of a linear, also a quantized one; None for any other module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def find_targets(model: nn.Module, targets: Targets) -> set[str]:
    """Names of the linears to patch; ValueError for what matches nothing or cannot be patched."""
    places = _places(model)
    linears = {n for n, m in places.items() if features(m)}
    if targets == ALL_LINEAR:
        _refuse_experts(model, lambda name: True)
        found = linears - _left_out(model, places)
        if not found:
            raise ValueError(_nothing(model))
    else:
        matches = _matcher(targets)
        _refuse_experts(model, matches)
        found = {name for name in places if matches(name)}
        _check_named(targets, found, places, linears)
    _refuse_second_names(found, places)
    return found


def warn_of_skipped(model: nn.Module) -> None:
    """One warning that names what looks like a linear and gets no LoRA by "all-linear"."""
    reasons = []
    read = _read_by_others(_places(model))
    if read:
        reasons.append(
            f"no LoRA for {', '.join(sorted(read))}: nn.MultiheadAttention reads the weight itself"
        )
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if all(isinstance(getattr(module, s, None), int) for s in ("in_features", "out_features"))
        and not any(features(inner) for inner in module.modules())
    }
    if kinds:
        names = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        reasons.append(
            f"no LoRA for {names}: linears of a kind that cannot be patched; it has to derive from "
            "nn.Linear or Conv1D"
        )
    if reasons:
        warnings.warn("\n".join(reasons), stacklevel=3)


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the model, by the attribute that holds it: one held twice is there twice."""
    return {
        f"{name}.{leaf}" if name else leaf: child
        for name, parent in model.named_modules()
        for leaf, child in parent._modules.items()
        if child is not None
    }


def _matcher(targets: Targets) -> Callable[[str], bool]:
    if not isinstance(targets, str):
        return lambda name: any(_ends(name, s) for s in targets)
    try:
        pattern = re.compile(targets)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"target_modules {targets!r} is no valid regular expression ({error}); give one, "
            'a list of suffixes, or "all-linear"'
        ) from error
    return lambda name: pattern.fullmatch(name) is not None


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def _check_named(targets: Targets, found: set[str], places, linears: set[str]) -> None:
    """ValueError for targets that are no linears, and for entries that match nothing."""
    wrong = sorted(n for n in found if not features(places[n]))
    if wrong:
        kind = type(places[wrong[0]]).__name__
        raise ValueError(f"target {wrong[0]} is a {kind}; Multi-LoRA goes on linears only")
    read = sorted(found & _read_by_others(places).keys())
    if read:
        raise ValueError(
            f"target {read[0]} belongs to nn.MultiheadAttention, which reads the weight itself, "
            "so that a LoRA would be skipped; leave it out of target_modules"
        )
    known = sorted({n.rsplit(".", 1)[-1] for n in linears})
    if not found:
        raise ValueError(
            f"target_modules {targets!r} match no linear; this model has {', '.join(known)} (a "
            "list names suffixes, a string is a regular expression for the whole name)"
        )
    entries = [] if isinstance(targets, str) else targets
    for entry in entries:
        if not any(_ends(name, entry) for name in found):
            near = difflib.get_close_matches(entry, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ValueError(
                f"target_modules names {entry!r}, which matches no linear of this model; {hint}"
            )


def _nothing(model: nn.Module) -> str:
    if features(model):
        return (
            f"the model is itself a {type(model).__name__}, and a layer is patched inside the "
            "module that holds it; give that module, or nn.Sequential(model)"
        )
    return (
        f"{type(model).__name__} has no linear to patch: no nn.Linear or Conv1D beside its output "
        'layer, which "all-linear" leaves out; name it in target_modules to patch it'
    )


def _refuse_second_names(found: set[str], places: dict[str, nn.Module]) -> None:
    """A linear that two attributes hold: replaced in one, it would run unpatched by the other."""
    by_module: dict[nn.Module, list[str]] = {}
    for name, module in places.items():
        by_module.setdefault(module, []).append(name)
    for name in sorted(found):
        names = by_module[places[name]]
        if len(names) > 1:
            raise ValueError(
                f"{' and '.join(names)} are one linear under {len(names)} names; give each its own "
                "copy, or leave it out of target_modules"
            )


def _refuse_experts(model: nn.Module, matches: Callable[[str], bool]) -> None:
    """Mixture-of-experts weights in one 3-D parameter cannot carry a LoRA: say so, skip nothing."""
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            stacked = parameter.dim() == 3 and parameter.shape[0] > 1 and not features(module)
            if stacked and (matches(full) or matches(name)) and _holds_experts(full, module):
                raise ValueError(
                    f"{full} has shape {tuple(parameter.shape)}: expert weights in one 3-D "
                    "parameter cannot carry a LoRA; name the linears to patch, for example "
                    'target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]'
                )


def _holds_experts(name: str, module: nn.Module) -> bool:
    """By the parameter's name or the module's kind; a 3-D parameter may be much else."""
    words = f"{name} {type(module).__name__}".lower()
    return "expert" in words or "moe" in words or hasattr(module, "num_experts")


def _left_out(model: nn.Module, places: dict[str, nn.Module]) -> set[str]:
    """What "all-linear" leaves out: the output layer's, as in PEFT, and what is never called."""
    outputs = {_output_layer(model), *_read_by_others(places).values()}
    if isinstance(model, PreTrainedModel):
        for head in (getattr(model, name, None) for name in _HEADS):
            outputs.update(head.modules() if isinstance(head, nn.Module) else ())
    return {name for name, module in places.items() if module in outputs}


def _read_by_others(places: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Linears that torch never calls: attention takes their weight, and a LoRA would be skipped."""
    holders = [m for m in places.values() if isinstance(m, nn.MultiheadAttention)]
    read = {holder.out_proj for holder in holders}
    return {name: module for name, module in places.items() if module in read}


def _output_layer(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if getter else None
    except (AttributeError, NotImplementedError):
        return None


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of a model's decoder layers: its parent, its name there, the list.

    Raises ValueError where no list, or more than one, is as long as the model is deep.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    if len(lists) != 1:
        raise ValueError(f"this model has {depth} decoder layers in {len(lists)} list(s)")
    return lists[0]
