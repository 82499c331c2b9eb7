"""``patch_model``: put Multi-LoRA into a causal LM of any family, in place, and take it out."""

import math
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ckf.calls import AdapterSave, RoutedCheckpointSwitch, RoutedForward, RoutedGenerate
from ckf.groups import find_groups
from ckf.kernels.config import check_backend
from ckf.layers import SHARED, MultiLoRALinear, TaskGate, adapter_device
from ckf.routing import RoutedCheckpoint, Router, TaskIds
from ckf.targets import ALL_LINEAR, Targets, features, find_targets, warn_of_skipped

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = ("lora", SHARED)
_WRAPPERS = ("OptimizedModule", "DistributedDataParallel", "DataParallel")


@dataclass(frozen=True)
class PatchSettings:
    """What ``patch_model`` was asked for; saved beside the adapters."""

    tasks: dict[str, int]
    shared_r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    gate: str
    gate_per_layer: bool
    backend: str
    shared_modules: Targets
    task_modules: Targets

    @property
    def experts(self) -> tuple[str, ...]:
        return ((SHARED,) if self.shared_r else ()) + tuple(self.tasks)

    def rank(self, expert: str) -> int:
        return self.shared_r if expert == SHARED else self.tasks[expert]

    def scaling(self, expert: str) -> float:
        rank = self.rank(expert)
        return self.lora_alpha / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass
class PatchState:
    """Kept on a patched model: how it was patched and how to undo it."""

    settings: PatchSettings
    router: Router
    trainable_before: list[str]
    instance_attributes: dict[str, object] = field(default_factory=dict)


def patch_model(
    model: nn.Module,
    tasks: Sequence[str] | Mapping[str, int],
    r: int = 16,
    shared_r: int | None = None,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    target_modules: Targets = "all-linear",
    shared_modules: Targets | None = None,
    task_modules: Targets | None = None,
    gate: str = "hard",
    gate_per_layer: bool = False,
    backend: str = "auto",
) -> nn.Module:
    """Give a model one LoRA shared by all tasks plus one LoRA per task, routed row by row.

    The model is changed in place and returned; its own parameters are frozen. Afterwards
    ``model(..., task_ids=...)`` and ``model.generate(..., task_ids=...)`` take one task per row or
    per token, by name or number, -1 meaning the base alone.

    Args:
        model: any Hugging Face causal LM, or another ``nn.Module`` with linears.
        tasks: task names, or a mapping from name to rank.
        r: rank of each task's LoRA where ``tasks`` gives none.
        shared_r: rank of the shared LoRA; None means ``r``, 0 means none.
        lora_alpha: scaling is lora_alpha / rank (lora_alpha / sqrt(rank) with ``use_rslora``).
        lora_dropout: dropout on the LoRA input while training.
        target_modules: list of name suffixes, a regular expression for the full name, or
            "all-linear" (every linear but the output layer), as in PEFT.
        shared_modules, task_modules: where the shared and the task LoRAs go; None means
            ``target_modules``.
        gate: "hard" (shared + own task) or "learned" (trainable weights per task over all
            experts, starting at the hard gate).
        gate_per_layer: with learned gates, one gate matrix per layer instead of one per model.
        backend: "auto", "torch", "cpu", "triton" or "cuda".

    Raises:
        ValueError: a model that is patched already, bad task names or ranks, a target that matches
            nothing, targeted modules that cannot carry a LoRA.

    Source: Multi-LoRA of Zhao et al., "Collaborative Knowledge Fusion", TKDE 2025.
    """
    _check_model(model)
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "adapters made inside torch.inference_mode() can never train; call ckf.patch_model "
            "outside of it"
        )
    settings = PatchSettings(
        *_ranks(tasks, r, shared_r),
        lora_alpha,
        lora_dropout,
        use_rslora,
        gate,
        gate_per_layer,
        backend,
        _as_targets(target_modules if shared_modules is None else shared_modules),
        _as_targets(target_modules if task_modules is None else task_modules),
    )
    _check_settings(settings)
    shared_at = find_targets(model, settings.shared_modules)
    tasks_at = find_targets(model, settings.task_modules)
    if not settings.shared_r:
        shared_at = set()
    router = Router(tuple(settings.tasks))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    state = PatchState(settings, router, trainable)
    names = [n for n, _ in model.named_modules() if n in shared_at or n in tasks_at]
    model_gate = None
    if gate == "learned" and not gate_per_layer:
        device = adapter_device(model.get_submodule(names[0]))
        model_gate = TaskGate(router.tasks, settings.experts, device)
    if ALL_LINEAR in (settings.shared_modules, settings.task_modules):
        warn_of_skipped(model)
    made = {}  # all of them first: memory may run out, and the model is then as it was
    for index, name in enumerate(names):
        experts = [SHARED] * (name in shared_at) + list(settings.tasks) * (name in tasks_at)
        made[name] = _make_layer(model, name, experts, index, state, model_gate)
    model.requires_grad_(False)
    for name, layer in made.items():
        _replace(model, name, layer)
    if model_gate is not None:
        model.ckf_gate = model_gate
    model._ckf = state
    _route_calls(model, state)
    _show_adapters(model, state)
    for first, *siblings in find_groups(model):
        first.join(siblings)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether ``patch_model`` was applied and not undone."""
    return isinstance(getattr(model, "_ckf", None), PatchState)


def patch_state(model: nn.Module) -> PatchState:
    """The model's patch state; ValueError when it has none."""
    if not is_patched(model):
        raise ValueError("this model is not patched; call ckf.patch_model(model, tasks) first")
    return model._ckf


def patched_layers(model: nn.Module) -> dict[str, MultiLoRALinear]:
    """Patched layers by the name their base linear had."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MultiLoRALinear)}


def task_ids(model: nn.Module, names: TaskIds) -> Tensor:
    """Task names or numbers as ids on the model's device, resolved once on the host.

    Args:
        names: one for all rows, one a row, or a list of one a token for each row; -1: base alone.

    Returns:
        int64, (), (batch,) or (batch, seq).

    Raises:
        ValueError: an unpatched model, an unknown name, a number out of range.
    """
    return patch_state(model).router.tensor(names, _device(model))


@contextmanager
def use_task(model: nn.Module, task: str) -> Iterator[nn.Module]:
    """Every forward pass inside that names no task ids takes ``task`` for all rows.

    Args:
        task: a name or number; -1: the base alone. Ids that a call names come first.

    Raises:
        ValueError: an unpatched model, an unknown task.
    """
    with patch_state(model).router.defaulting_to(task):
        yield model


def reset_adapters(model: nn.Module) -> None:
    """Fresh adapters and gates, as just patched; after ``to_empty`` of a meta-device model."""
    patch_state(model)
    for module in model.modules():
        if isinstance(module, MultiLoRALinear | TaskGate):
            module.reset_parameters()


def unpatch_model(model: nn.Module) -> nn.Module:
    """Take Multi-LoRA out: the model has its own modules, attributes and trainable flags again."""
    state = patch_state(model)
    for hook in list(model._forward_pre_hooks.values()):
        watcher = getattr(hook, "__self__", None)
        if getattr(watcher, "router", None) is state.router:  # a TaskPresence
            watcher.detach()
    for name, layer in patched_layers(model).items():
        _replace(model, name, layer.base_layer)
    if hasattr(model, "ckf_gate"):
        del model.ckf_gate
    for name, before in state.instance_attributes.items():
        model.__dict__.pop(name, None)
        if before is not None:
            setattr(model, name, before)
    _unroute_checkpoints(model, state.router)
    del model._ckf
    parameters = dict(model.named_parameters())
    for name in state.trainable_before:
        parameters[name].requires_grad_(True)
    return model


def check_task_name(name: str) -> None:
    """ValueError for a name that could not name a folder and a parameter."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(
            f"task name {name!r} is not allowed; use letters, digits, '_' and '-' "
            f"(and not {' or '.join(_RESERVED)})"
        )


def _check_model(model: nn.Module) -> None:
    """ValueError for what cannot be patched: no module, patched or PEFT's already, two streams."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; expected a loaded torch module")
    if is_patched(model) or patched_layers(model):
        raise ValueError(
            "this model is patched already, or a part of it or around it is; call "
            "ckf.unpatch_model on what was patched first"
        )
    wrappers = {c.__name__ for c in type(model).__mro__}.intersection(_WRAPPERS)
    if wrappers:
        raise ValueError(
            f"model is a {wrappers.pop()} around the model; patch the model itself first, then "
            "compile or wrap what patch_model returns"
        )
    if any(type(m).__module__.partition(".")[0] == "peft" for m in model.modules()):
        raise ValueError(
            "this model carries PEFT adapters; fold them in with model.merge_and_unload(), or save "
            "them, patch the base and read them with ckf.import_peft"
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, whose tokens differ; task ids "
            "go with one sequence of tokens: patch a causal LM"
        )


def _ranks(tasks, r: int, shared_r: int | None) -> tuple[dict[str, int], int]:
    """Rank by task, and the shared rank."""
    if not isinstance(tasks, Sequence | Mapping) or isinstance(tasks, str) or not tasks:
        raise ValueError(
            f'tasks is {tasks!r}; expected a list of names, like ["ctr", "topk"], or a mapping '
            "from name to rank: their order numbers the tasks"
        )
    ranks = dict(tasks) if isinstance(tasks, Mapping) else {t: r for t in tasks}
    if not isinstance(tasks, Mapping) and len(ranks) != len(tasks):
        raise ValueError(f"tasks {list(tasks)} name a task twice; every name must be its own")
    for name in ranks:
        check_task_name(name)
    shared_r = r if shared_r is None else shared_r
    for what, rank in [("shared_r", shared_r), *ranks.items()]:
        lowest = 0 if what == "shared_r" else 1
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < lowest:
            raise ValueError(f"rank of {what} is {rank!r}; expected an integer from {lowest} up")
    return ranks, shared_r


def _as_targets(targets: Targets) -> Targets:
    if not isinstance(targets, Collection) or not all(isinstance(t, str) for t in targets):
        raise ValueError(
            f"target_modules is {targets!r}; expected a list of name suffixes, a regular "
            'expression as a string, or "all-linear"'
        )
    return targets if isinstance(targets, str) else list(targets)


def _check_settings(settings: PatchSettings) -> None:
    alpha = settings.lora_alpha
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not 0 < alpha <= sys.float_info.max:
        raise ValueError(f"lora_alpha is {alpha!r}; expected a finite number above 0")
    dropout = settings.lora_dropout
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout!r}; expected a number from 0 up, below 1")
    for flag in ("use_rslora", "gate_per_layer"):
        if not isinstance(getattr(settings, flag), bool):
            raise ValueError(f"{flag} is {getattr(settings, flag)!r}; expected True or False")
    if settings.gate not in ("hard", "learned"):
        raise ValueError(f"gate is {settings.gate!r}; expected 'hard' or 'learned'")
    check_backend(settings.backend)


def _make_layer(model, name, experts, index, state: PatchState, gate) -> MultiLoRALinear:
    settings = state.settings
    base = model.get_submodule(name)
    k, n = features(base)
    layer = MultiLoRALinear(
        base,
        state.router,
        k,
        n,
        ranks={e: settings.rank(e) for e in experts},
        scaling={e: settings.scaling(e) for e in experts},
        index=index,
        dropout=settings.lora_dropout,
        backend=settings.backend,
        gate=gate,
        name=name,
    )
    if settings.gate == "learned" and settings.gate_per_layer:
        device = adapter_device(base)
        layer.own_gate(TaskGate(state.router.tasks, layer.experts, device))
    layer.train(base.training)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _device(model: nn.Module) -> torch.device:
    """Of the first parameter that is not offloaded."""
    parameter = next((p for p in model.parameters() if not p.is_meta), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _route_calls(model: nn.Module, state: PatchState) -> None:
    """Wrap forward, generate, saving and the checkpointing switch on this instance."""
    wrappers = {"forward": RoutedForward, "generate": RoutedGenerate}
    wrappers["save_pretrained"] = AdapterSave
    wrappers["_set_gradient_checkpointing"] = RoutedCheckpointSwitch
    for name, wrapper in wrappers.items():
        if hasattr(type(model), name):
            before = model.__dict__.get(name)
            state.instance_attributes[name] = before
            setattr(model, name, wrapper(model, state.router, before))
    for module in model.modules():  # where checkpointing was enabled before the patch
        if "_gradient_checkpointing_func" in module.__dict__:
            checkpoint = module._gradient_checkpointing_func
            module._gradient_checkpointing_func = RoutedCheckpoint(state.router, checkpoint)


def _unroute_checkpoints(model: nn.Module, router: Router) -> None:
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, RoutedCheckpoint) and checkpoint.router is router:
            module._gradient_checkpointing_func = checkpoint.checkpoint


def _show_adapters(model: nn.Module, state: PatchState) -> None:
    """Let Trainer accept a quantized base whose gradients pass: it refuses those without adapters.

    Its check reads ``is_quantized``, or PEFT's flag, which would turn ``save_pretrained`` and the
    like to PEFT's layers.
    """
    trainable = getattr(getattr(model, "hf_quantizer", None), "is_trainable", False)
    if getattr(model, "is_quantized", False) and trainable:
        state.instance_attributes["is_quantized"] = model.__dict__.get("is_quantized")
        model.is_quantized = False
