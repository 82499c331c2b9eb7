"""Norms, rotary angles and gated activations of the backbone by the kernels of ``liger-kernel``.

In transformers these run element by element; for a small model they are most of a step on a GPU.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

_OWN = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # answers are scored by ckf


@contextmanager
def using_liger(model: PreTrainedModel) -> Iterator[None]:
    """The model, on a GPU, with Liger's kernels where they know its family; as before afterwards.

    Other models of the family in this process share its rotary embedding meanwhile.

    Raises:
        ValueError: liger-kernel is missing, or does not know the family, or the model is elsewhere.
    """
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ValueError(
            f"train.liger needs liger-kernel ({error}); pip install liger-kernel, or leave it out"
        ) from error
    if model.device.type != "cuda":
        raise ValueError(
            f"train.liger is for models on a GPU, this one is on {model.device}; leave it out"
        )
    family = model.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"train.liger: Liger's kernels do not know {family} models; leave it out")
    source = sys.modules[type(model).__module__]
    functions = dict(vars(source))
    before = [(module, set(vars(module))) for module in model.modules()]
    added = []
    try:
        try:
            monkey_patch._apply_liger_kernel_to_instance(model=model, **_OWN)
        finally:
            added = [(module, set(vars(module)) - names) for module, names in before]
        yield
    finally:
        for module, names in added:
            for name in names:
                module.__dict__.pop(name, None)
        vars(source).update(functions)
