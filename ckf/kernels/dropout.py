"""The dropout mask of the LoRA input: counter-based, so that backward draws it again.

One Philox-4x32-7 call (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
makes eight 16-bit lanes, one for each of eight neighbouring columns:

    key     = (seed low word, seed high word)
    counter = (column // 8, row low word, row high word, 0)
    lane    = column % 8: word lane // 2, its low half first
    kept    = lane value >= round(p * 65536)

Every backend uses this same layout, so masks agree bit for bit across backends and devices.
"""

import sys

import torch
from torch import Tensor

LANES = 8
ROUNDS = 7
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def dropout_threshold(p: float) -> int:
    """Lane values below this are dropped; p is resolved to 1/65536."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p is {p}; it must be at least 0 and less than 1")
    return min(round(p * 65536), 65535)


def dropout_scale(p: float) -> float:
    """The factor on kept elements: one over the exact probability of keeping."""
    return 65536.0 / (65536 - dropout_threshold(p))


def dropout_mask(
    m: int, k: int, p: float, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """The keep mask of a (m, k) input.

    Args:
        m, k: rows and columns.
        p: probability of dropping, in [0, 1), resolved to 1/65536.
        seed: int, or a one-element int64 tensor on ``device`` (no synchronisation).

    Returns:
        (m, k) bool, True where the element is kept.
    """
    words = _philox_words(m, -(-k // LANES), seed, torch.device(device))
    if sys.byteorder == "big":  # the low half first
        words = (words >> 16) | (words << 16)
    # a flipped top bit, in lane and threshold, gives int16 the order of uint16
    lanes = words.bitwise_xor_(0x80008000).to(torch.int32).view(torch.int16)  # (m, blocks * LANES)
    return (lanes >= dropout_threshold(p) - 2**15)[:, :k]


def _philox_words(m: int, blocks: int, seed: int | Tensor, device: torch.device) -> Tensor:
    """(m, blocks * 4) 32-bit words, as int64."""
    key = [_low_word(seed), _low_word(seed >> 32)]
    rows = torch.arange(m, device=device).unsqueeze(1)
    columns = torch.arange(blocks, device=device).unsqueeze(0)
    c0, c1, c2, c3 = columns, rows & _WORD, rows >> 32, 0
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = _mixed(p1, c1, key[0]), p1
        c2, c3 = _mixed(p0, c3, key[1]), p0
        key = [_low_word(key[0] + _WEYL[0]), _low_word(key[1] + _WEYL[1])]
    words = torch.stack([word.expand(m, blocks) for word in (c0, c1, c2, c3)], dim=-1)
    return words.flatten(1).bitwise_and_(_WORD)


def _mixed(product: Tensor, word: Tensor, key) -> Tensor:
    """Upper word of a product ^ word ^ key; the product may have wrapped into the sign."""
    mixed = (product >> 32) ^ word
    mixed ^= key
    mixed &= _WORD
    return mixed


def _low_word(value):
    return value & _WORD
