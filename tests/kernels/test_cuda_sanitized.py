"""Small calls of every Triton kernel, for compute-sanitizer (benchmarks/gpu.py runs "small").

Values are checked as well: a sanitizer that saw nothing because nothing ran would be no proof.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ckf.kernels import multi_lora_linear
from ckf.kernels.launch import PLANS
from tests.kernels.cases import assert_as_good_as_reference, random_case, slots_on_gpu

pytestmark = pytest.mark.gpu
TWO_BYTES = [torch.float16, torch.bfloat16]


def to_gpu(case, dtype: torch.dtype):
    """In ``dtype`` on the GPU, gates in float32; every tensor an allocation of its own."""
    gates, case = case.gates, case.to(dtype)

    def move(t):
        return None if t is None else t.detach().cuda().requires_grad_(t.requires_grad)

    return replace(
        case,
        x=move(case.x),
        weight=move(case.weight),
        bias=move(case.bias),
        a=[move(t) for t in case.a],
        b=[move(t) for t in case.b],
        gates=gates.detach().float().cuda().requires_grad_(gates.requires_grad),
        task_ids=case.task_ids.cuda(),
    )


DENSE = [
    *((dtype, dict(m=150, k=136, n=264, ranks=[8, 8, 8])) for dtype in TWO_BYTES),
    (torch.bfloat16, dict(m=70, k=64, n=128, ranks=[64, 64, 64, 8])),
    (torch.bfloat16, dict(m=37, k=41, n=29, ranks=[3, 8, 1])),
    (torch.float32, dict(m=33, k=48, n=40, ranks=[4, 0, 9])),
]
GATHERED = [  # past launch.DENSE_RANK columns, a row's own alone are computed
    (torch.bfloat16, dict(m=150, k=136, n=264, ranks=[64, 64, 64, 64])),
    (torch.bfloat16, dict(m=70, k=64, n=128, ranks=[80, 72])),
    (torch.float16, dict(m=70, k=41, n=29, ranks=[64, 3, 40, 0, 128, 17])),
    (torch.float32, dict(m=33, k=48, n=40, ranks=[64, 64, 16])),
]


def small_case(sizes: dict, dtype: torch.dtype, dropout_p: float, soft: bool = False):
    tasks = len(sizes["ranks"]) - 1
    ids = torch.arange(sizes["m"]) // 16 % (tasks + 1) - 1
    case = random_case(**sizes, tasks=tasks, soft=soft, dropout_p=dropout_p, ids=ids)
    return to_gpu(case, dtype)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype, sizes", DENSE, ids=str)
@pytest.mark.parametrize("soft, dropout_p", [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_small_forward_and_backward(plan, dtype, sizes, soft, dropout_p):
    case = small_case(sizes, dtype, dropout_p, soft)
    with torch.device("cuda"):  # the check draws its output gradient on the default device
        function = partial(multi_lora_linear, backend=f"triton:{plan}")
        assert_as_good_as_reference(function, case)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype, sizes", GATHERED, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_small_gathered(plan, dtype, sizes, dropout_p):
    """Data decide where these read and write."""
    case = small_case(sizes, dtype, dropout_p)
    with torch.device("cuda"):
        assert_as_good_as_reference(slots_on_gpu(sizes["ranks"], plan), case)
