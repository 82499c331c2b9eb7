"""Wrapped methods of a patched model: forward, generate, saving and the checkpointing switch.

They live on the instance, hold the model rather than a bound method (so that deepcopy and pickle
lead to the copy's own weights) and show signatures that Trainer and ``generate`` accept.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ckf.packing import PackingCheck, given_cache
from ckf.routing import BASE_ONLY, OneTask, RoutedCheckpoint, Router, TaskIds

ADAPTERS_FOLDER = "adapters"  # inside what save_pretrained and Trainer write


class _Wrapped:
    """A method of the model; follows deepcopy and pickle to the copy's own weights."""

    name: str

    def __init__(self, model: nn.Module, router: Router, before) -> None:
        self.model, self.router, self.before = model, router, before

    def original(self, *args, **kwargs):
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def _signature(self) -> inspect.Signature:
        if self.before is not None:
            return inspect.signature(self.before)
        bound = getattr(type(self.model), self.name).__get__(self.model)
        return inspect.signature(bound)


class RoutedForward(_Wrapped):
    """``model.forward`` that takes ``task_ids`` and routes the layers for its duration."""

    name = "forward"

    @property
    def __signature__(self) -> inspect.Signature:
        signature = self._signature()
        extra = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters = [p for p in signature.parameters.values() if p.name != "task_ids"]
        at = len(parameters)
        if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
            at -= 1
        return signature.replace(parameters=[*parameters[:at], extra, *parameters[at:]])

    def __init__(self, model: nn.Module, router: Router, before) -> None:
        super().__init__(model, router, before)
        self.check_packing = PackingCheck()

    def __call__(self, *args, task_ids: TaskIds | None = None, **kwargs):
        named = self._named(args, kwargs)
        self.check_packing(self.model, named, task_ids)
        shape, device, past = self._sizes(named)
        rows = kwargs.get("packed_rows")
        if rows is not None:
            kwargs |= rows.to(device, non_blocking=True).inputs()
        route = self.router.make_route(task_ids, shape, device, self.model.training, past)
        with self.router.following(route):
            return self.original(*args, **kwargs)

    def _named(self, args: tuple, kwargs: dict) -> dict[str, object]:
        named = self._signature().bind_partial(*args, **kwargs).arguments if args else {}
        named = {**named, **named.pop("kwargs", {}), **kwargs}
        if "input_ids" in named or "inputs_embeds" in named:
            return named
        return {**_contents(named), **named}

    def _sizes(self, named) -> tuple[tuple[int, int], torch.device, Callable[[], int]]:
        """(batch, new tokens), device, and a function that counts the tokens in the cache."""
        cache = given_cache(named)

        def past() -> int:
            return _cached(cache)

        for name in ("input_ids", "inputs_embeds"):
            tensor = named.get(name)
            if tensor is not None:
                return (tensor.shape[0], tensor.shape[1]), tensor.device, past
        tensor = next((t for t in named.values() if isinstance(t, Tensor)), None)
        if tensor is None:
            raise ValueError(
                "the patched model found no tensor among its inputs, also in their dicts and "
                "lists; pass input_ids or inputs_embeds"
            )
        lead = tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape
        batch = lead[0] if len(lead) else 1
        return (batch, lead[1:].numel()), tensor.device, past


def _cached(cache: object) -> int:
    """The number of tokens in a key-value cache."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def _contents(named: Mapping[str, object]) -> dict[str, object]:
    """What dicts and sequences among the arguments hold: a batch as one dict, or ``*args``."""
    found = {}
    for name, value in named.items():
        if isinstance(value, list | tuple):
            value = {f"{name}.{i}": v for i, v in enumerate(value)}
        if isinstance(value, Mapping):
            found |= {**_contents(value), **value}
    return found


class RoutedGenerate(_Wrapped):
    """``model.generate`` that keeps task ids for every step, also under beams."""

    name = "generate"

    @property
    def __signature__(self) -> inspect.Signature:
        return self._signature()

    def __call__(self, *args, task_ids: TaskIds | None = None, **kwargs):
        if task_ids is None:
            task_ids = self.router.default_task
        if task_ids is None:
            return self.original(*args, **kwargs)
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        ids = self.router.tensor(task_ids, None if inputs is None else inputs.device)
        if inputs is not None:
            ids = _ids_of_prompts(ids, inputs, kwargs)
        draft = kwargs.get("assistant_model")
        with self.router.generating():
            if draft is None:
                # for calls that transformers makes beside, as under guidance_scale
                with self.router.defaulting_to(_last(ids)):
                    ids = OneTask(ids) if ids.dim() == 0 else ids
                    return self.original(*args, **kwargs, task_ids=ids)
            # transformers hands all arguments on to the draft, which may know no task_ids
            with self.router.defaulting_to(ids), _draft_follows(draft, self.router.tasks, ids):
                return self.original(*args, **kwargs)


def _ids_of_prompts(ids: Tensor, inputs: Tensor, options: Mapping[str, object]) -> Tensor:
    """Ids that fit the prompts, those of the tokens in a cache included; ValueError before beams
    multiply the rows."""
    batch, length = inputs.shape[:2]
    if ids.dim() == 0:
        return ids
    past = _cached(given_cache(options)) if ids.dim() == 2 else 0
    mask = options.get("attention_mask")
    whole = mask is None or mask.shape[-1] == length  # else the new tokens alone, as transformers
    new = length - past if past < length and whole else length
    if ids.dim() == 2 and ids.shape == (batch, new):
        return torch.cat([ids[:, :1].expand(batch, past), ids], dim=1)  # of the cache: not read
    if ids.shape not in ((batch,), (batch, past + new)):
        expected = f"({batch},) for one task a row or ({batch}, {new}) for one a token"
        if past:
            expected += f", or ({batch}, {past + new}) with those of the {past} in the cache"
        raise ValueError(
            f"task_ids have shape {tuple(ids.shape)} for prompts of {batch} rows and {new} "
            f"tokens; expected {expected}"
        )
    return ids


def _last(ids: Tensor) -> Tensor:
    """The task of the tokens to come, one a row or one for all."""
    return ids[:, -1] if ids.dim() == 2 else ids


def _draft_follows(draft: nn.Module, tasks: tuple[str, ...], ids: Tensor):
    """A patched draft takes the new tokens' task, by name; the base alone where it lacks it."""
    router = getattr(getattr(draft, "_ckf", None), "router", None)
    if router is None:
        return nullcontext()
    known = [router.tasks.index(t) if t in router.tasks else BASE_ONLY for t in tasks]
    by_name = torch.tensor([*known, BASE_ONLY], device=ids.device)
    return router.defaulting_to(by_name[_last(ids)])


class AdapterSave(_Wrapped):
    """``model.save_pretrained`` that writes ``<folder>/adapters`` and never the base."""

    name = "save_pretrained"

    def __call__(
        self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **_
    ) -> None:
        from ckf.adapters import save_adapters  # builds on the patcher, which builds on this

        sharded = any(isinstance(p, DTensor) for p in self.model.parameters())
        if push_to_hub or (sharded and state_dict is not None):
            what = "push_to_hub" if push_to_hub else "a gathered state_dict of a sharded model"
            raise ValueError(
                f"a patched model saves its adapters alone, and cannot take {what}; call "
                "ckf.save_adapters(model, path), on every rank where parameters are sharded"
            )
        if is_main_process or sharded:  # every rank holds a part of a sharded model
            save_adapters(self.model, Path(save_directory) / ADAPTERS_FOLDER)

    @property
    def __signature__(self) -> inspect.Signature:
        return self._signature()


class RoutedCheckpointSwitch(_Wrapped):
    """``_set_gradient_checkpointing`` whose checkpoint function carries the route along."""

    name = "_set_gradient_checkpointing"

    def __call__(self, enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        if gradient_checkpointing_func is None:
            gradient_checkpointing_func = torch.utils.checkpoint.checkpoint
        routed = RoutedCheckpoint(self.router, gradient_checkpointing_func)
        return self.original(enable=enable, gradient_checkpointing_func=routed, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return self._signature()
