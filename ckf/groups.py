"""Which patched layers are fed the same tensor (q, k, v; gate, up): found by watching one pass.

No model family is named: two tokens go through the model, and layers that meet the same tensor
object, unchanged, form a group, in the order of their calls. The first computes all of them with
one shrink and one dropout mask.
"""

import warnings
from contextlib import nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from ckf.layers import MultiLoRALinear

PROBE_TOKENS = 2


@torch.no_grad()
def find_groups(model: nn.Module) -> list[list[MultiLoRALinear]]:
    """Groups of two or more layers of a freshly patched Hugging Face model; else none.

    A model whose probe fails works all the same, layer by layer; one warning says why.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    layers = [m for m in model.modules() if isinstance(m, MultiLoRALinear) and m.fuses()]
    if len(layers) < 2:
        return []
    met: list[tuple[torch.Tensor, int, MultiLoRALinear]] = []
    for layer in layers:
        layer.forward = _Noted(layer, met)
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with _fake_values(model):
            ids = torch.ones(1, PROBE_TOKENS, dtype=torch.int64, device=model.device)
            model(input_ids=ids, task_ids=-1, use_cache=False)
    except Exception as error:  # any model may refuse; that must not undo the patch
        warnings.warn(
            f"{type(model).__name__}: layers fed the same tensor were not found ({error}); each "
            "computes its own shrink",
            stacklevel=3,
        )
        return []
    finally:
        for layer in layers:
            del layer.forward
        for module in training:
            module.training = True
    groups: dict[tuple[int, int], list[MultiLoRALinear]] = {}
    for x, version, layer in met:
        groups.setdefault((id(x), version), []).append(layer)
    calls = [layer for _, _, layer in met]
    return [g for g in groups.values() if len(g) > 1 and all(calls.count(m) == 1 for m in g)]


class _Noted:
    """A layer's forward while it is watched: what it is fed, and zeros instead of a product."""

    def __init__(self, layer: MultiLoRALinear, met: list) -> None:
        self.layer, self.met = layer, met

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.met.append((x, x._version, self.layer))  # x stays alive, and its id its own
        return x.new_zeros(*x.shape[:-1], self.layer.out_features)


def _fake_values(model: nn.Module):
    """Lets a model on the meta device run: fake tensors bear code that looks at values."""
    on_meta = any(p.is_meta for p in model.parameters())
    return FakeTensorMode(allow_non_fake_inputs=True) if on_meta else nullcontext()
