"""The counter-based dropout mask."""

import numpy as np
import pytest
import torch

from ckf.kernels import dropout_mask
from ckf.kernels.dropout import dropout_scale


def philox_lane(seed: int, row: int, column: int) -> int:
    """Philox-4x32-7 for one element, in Python's own integers."""
    c = [column // 8, row & 0xFFFFFFFF, row >> 32, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(7):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (p1 >> 32) ^ c[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    word = c[(column % 8) // 2]
    return (word >> 16) if column % 2 else (word & 0xFFFF)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 12345, 2**63 - 1])
def test_every_element_follows_the_counter(seed):
    mask = dropout_mask(5, 21, 0.37, seed)
    expected = [
        [philox_lane(seed, r, c) >= round(0.37 * 65536) for c in range(21)] for r in range(5)
    ]
    assert mask.tolist() == expected


def test_tensor_seed_draws_the_same_mask():
    seed = 987654321987
    assert torch.equal(dropout_mask(7, 16, 0.5, seed), dropout_mask(7, 16, 0.5, torch.tensor(seed)))


def test_rate_and_independence():
    p = 0.1
    mask = dropout_mask(2048, 512, p, 3)
    count = mask.numel()
    kept = mask.double().mean().item()
    assert abs(kept - (1 - p)) < 5 * np.sqrt(p * (1 - p) / count)
    assert abs(kept * dropout_scale(p) - 1) < 1e-3
    centred = mask.double() - kept
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert abs((centred * other).mean().item()) < 5 * p * (1 - p) / np.sqrt(count)


def test_seeds_differ():
    masks = [dropout_mask(64, 64, 0.5, s) for s in (0, 1, 2**32, 2**32 + 1)]
    for i in range(4):
        for j in range(i):
            assert 0.4 < (masks[i] == masks[j]).double().mean() < 0.6


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0])
def test_probability_is_checked(p):
    with pytest.raises(ValueError, match="dropout_p"):
        dropout_mask(2, 2, p, 0)
