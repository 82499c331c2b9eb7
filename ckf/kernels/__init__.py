"""Multi-LoRA kernels; importing them needs torch alone."""

from ckf.kernels.dropout import dropout_mask
from ckf.kernels.ops import multi_lora_group, multi_lora_linear
from ckf.kernels.reference import multi_lora_reference
from ckf.kernels.slots import compact_slots

__all__ = [
    "compact_slots",
    "dropout_mask",
    "multi_lora_group",
    "multi_lora_linear",
    "multi_lora_reference",
]
