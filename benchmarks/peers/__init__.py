"""What a user could run instead of ckf, and ckf itself: providers of one interface.

Each provider is written from the public interface of what it uses, computes the case exactly and
passes ``harness.gate`` before it is timed. ``NOT_RUN`` names what is left out, and why.
"""

import torch

from benchmarks.peers.base import Provider
from benchmarks.peers.dense import BatchedGather, Dense, Frozen, Grouped, Single
from benchmarks.peers.ours import our_providers
from benchmarks.peers.servers import VLLM, SGLang, Unsloth
from benchmarks.peers.with_peft import (
    PeftBig,
    PeftBigCompiled,
    PeftLoop,
    PeftLoopByHand,
    PeftLoopCompiled,
    PeftMasks,
    PeftMasksCompiled,
    PeftMixed,
)
from benchmarks.problems import Case

PEERS: tuple[type[Provider], ...] = (
    Frozen,
    Single,
    Dense,
    Grouped,
    BatchedGather,
    PeftLoop,
    PeftLoopByHand,
    PeftMasks,
    PeftBig,
    PeftLoopCompiled,
    PeftMasksCompiled,
    PeftBigCompiled,
    PeftMixed,
    VLLM,
    SGLang,
    Unsloth,
)
NOT_RUN = {
    "lorafusion": "has no licence: install and measure it yourself; its rows must be grouped and "
    "padded to 128 and its ranks powers of two",
}
_COMPILES = "compiles for each shape; measured on a few cases, or with --peers"
BY_NAME_ONLY = {
    "peft-loop-compiled": _COMPILES,
    "peft-masks-compiled": _COMPILES,
    "peft-big-compiled": _COMPILES,
    "unsloth": "importing it patches transformers and peft for all others; give --peers unsloth",
}
COMPETITORS_EXCLUDED = ("frozen", "single")  # a floor and a ceiling, not rivals


def providers_for(
    case: Case, device: torch.device, names: list[str] | None = None
) -> tuple[dict[str, type[Provider]], dict[str, str]]:
    """Provider classes that run a case here, frozen first, and the reasons of the others.

    names: only these (and "frozen"); a name ending in "*" takes all that begin so.
    """
    chosen, skipped = {}, dict(NOT_RUN)

    def wanted(name: str) -> bool:
        if names is None:
            return name not in BY_NAME_ONLY
        return name == "frozen" or any(
            name.startswith(n[:-1]) if n.endswith("*") else name == n for n in names
        )

    for provider in (*PEERS, *our_providers()):
        if not wanted(provider.name):
            if names is None:
                skipped[provider.name] = BY_NAME_ONLY[provider.name]
            continue
        reason = provider.refusal(case, device)
        if reason is None:
            chosen[provider.name] = provider
        else:
            skipped[provider.name] = reason
    return chosen, skipped
