"""Drawn cases for the Triton backend in Triton's interpreter; test_backends.py runs it.

Its own process, because TRITON_INTERPRET must be set before any kernel is imported. float32 and
float16 only: bfloat16 products are wrong in the interpreter of Triton 3.9.
"""

import functools

import pytest
import torch
from hypothesis import given

from tests.hardening.test_kernels import assert_right, groups, ours, ours_compact, share

pytestmark = pytest.mark.timeout(1800)
PLAIN = functools.partial(ours, backend="triton")
COMPACT = functools.partial(ours_compact, backend="triton")
triton_groups = functools.partial(groups, dtypes=[torch.float32, torch.float16])


@share(0.02)
@given(triton_groups())
def test_any_group(group):
    assert_right(PLAIN, group)


@share(0.01)
@given(triton_groups())
def test_any_group_saved_compact(group):
    for gate in group.gates:
        gate.requires_grad_(False)
    assert_right(COMPACT, group)
