"""Passes that are repeated: what is written down, when, and what is not.

That the kernels' own passes give the same bits, repeated, is for interpreter_replay.py and
test_triton_gpu.py.
"""

import ctypes
import gc
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ckf.kernels import replay

ROOT = Path(__file__).resolve().parents[2]


class Scaling:
    """A pass: y = 2 (x + b) by a "launch" that knows addresses alone, into an allocation."""

    def __init__(self) -> None:
        self.runs = 0
        self.sent: list[tuple] = []

    def __call__(self, static, tensors) -> list[Tensor]:
        self.runs += 1
        x, b = tensors
        y = torch.empty(x.shape, dtype=x.dtype)
        self.launch(y, x)
        return [(y + b).mul_(2)]

    def launch(self, y: Tensor, x: Tensor) -> None:
        """y = x, for contiguous tensors."""

        def send(y, x, size: int) -> None:
            self.sent.append((y, x))
            addresses = [t.data_ptr() if isinstance(t, Tensor) else t for t in (y, x)]
            ctypes.memmove(*addresses, size)

        values = y, x, x.numel() * x.itemsize
        replay.note(send, values)
        send(*values)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(replay, "_known", {})


def test_run_then_written_down_then_repeated():
    scaling, outputs = Scaling(), []
    for _ in range(5):
        x, b = torch.randn(3, 4), torch.randn(3, 4)
        (y,) = replay.replayed(scaling, "static", [x, b])
        assert torch.equal(y, (x + b) * 2)
        outputs.append((y, y.clone()))
    assert scaling.runs == 2 and len(scaling.sent) == 5
    assert all(isinstance(t, Tensor) for t in scaling.sent[1])
    assert all(isinstance(t, int) for sent in scaling.sent[2:] for t in sent)
    assert len({y.data_ptr() for y, _ in outputs}) == 5  # nobody's memory is written again
    assert all(torch.equal(y, kept) for y, kept in outputs)


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 3),
        torch.randn(3, 8)[:, ::2],
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(13)[1:].view(3, 4),  # not at a multiple of 16 bytes
        torch.randn(3, 4).t().contiguous().t(),
        torch.randn(1, 4).expand(3, 4),
    ],
    ids=["shape", "stride", "dtype", "alignment", "columns", "expanded"],
)
def test_another_kind_is_run(other):
    def passes(static, tensors):
        runs.append(static)
        return [tensors[0] * 2]

    runs, x = [], torch.randn(3, 4)
    for _ in range(4):
        replay.replayed(passes, 1, [x])
    assert len(runs) == 2
    assert torch.equal(replay.replayed(passes, 1, [other])[0], other * 2)
    replay.replayed(passes, 2, [x])
    replay.replayed(passes, 1, [x, None])
    assert len(runs) == 5


def test_one_tensor_given_twice_is_two_inputs():
    """As the gradients of two outputs that were added up: later they may differ."""
    scaling, x = Scaling(), torch.randn(2, 2)
    for _ in range(2):
        replay.replayed(scaling, 0, [x, x])
    y, b = torch.randn(2, 2), torch.randn(2, 2)
    (found,) = replay.replayed(scaling, 0, [y, b])
    assert scaling.runs == 2 and torch.equal(found, (y + b) * 2)


def test_inputs_in_one_storage_are_told_apart():
    scaling, flat = Scaling(), torch.randn(8)
    for _ in range(2):
        replay.replayed(scaling, 0, [flat[4:], flat[:4]])
    x, b = torch.randn(4), torch.randn(4)
    (found,) = replay.replayed(scaling, 0, [x, b])
    assert scaling.runs == 2 and torch.equal(found, (x + b) * 2)


def test_torch_ops_are_repeated():
    """Views of views, lists of tensors, several outputs, in place, another dtype."""

    def passes(static, tensors):
        x, y = tensors
        both = torch.cat([x[1:].t(), y.view(2, 2, 3).flatten(0, 1).t()], 1)
        values, indices = both.max(1)
        both[:, :2].mul_(3).add_(values[:, None])
        left, right = both.split([2, both.shape[1] - 2], 1)
        empty = torch.zeros(0, 3)
        return [left, right.contiguous(), indices.float(), both.to(torch.float64), empty]

    for _ in range(4):
        x, y = torch.randn(3, 3), torch.randn(4, 3)
        found = replay.replayed(passes, 0, [x, y])
        for one, wanted in zip(found, passes(0, [x, y]), strict=True):
            assert torch.equal(one, wanted) and one.stride() == wanted.stride()
    (recording,) = replay._known.values()
    assert isinstance(recording, replay.Recording)


@pytest.mark.parametrize("born", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("later", [torch.inference_mode, torch.no_grad])
def test_written_down_in_one_mode_repeated_in_another(first, later, born):
    def passes(static, tensors):
        x, weight = tensors
        return [torch.nn.functional.linear(x.reshape(-1, 4), weight).view(2, 3, 5)]

    with born():
        weight = torch.nn.Parameter(torch.randn(5, 4))
    for mode in (first, first, later):
        with mode():
            x = torch.randn(2, 3, 4)
            (y,) = replay.replayed(passes, 0, [x, weight])
            assert torch.equal(y, torch.nn.functional.linear(x, weight))
            assert not y.requires_grad and y.is_inference() == (mode is torch.inference_mode)
    assert isinstance(*replay._known.values(), replay.Recording)


CONSTANT = torch.ones(2)


@pytest.mark.parametrize(
    "passes",
    [
        lambda static, tensors: [tensors[0] * tensors[0].sum().item()],
        lambda static, tensors: [tensors[0] + CONSTANT],
        lambda static, tensors: [tensors[0].view(2)],
        lambda static, tensors: [tensors[0].add_(1)],
        lambda static, tensors: [tensors[0].view(torch.int32).clone()],
        lambda static, tensors: [replay.note(print, [object()]) or tensors[0] * 1],
        lambda static, tensors: [replay.not_repeatable("so") or tensors[0] * 1],
    ],
    ids=["value", "foreign", "input", "in place", "dtype", "argument", "said so"],
)
def test_what_cannot_be_written_down_is_run(passes):
    for _ in range(4):
        x = torch.randn(2)
        wanted = passes(0, [x.clone()])
        (found,) = replay.replayed(passes, 0, [x])
        assert torch.equal(found, wanted[0])
    assert list(replay._known.values()) == [replay._NEVER]


def test_allocations_that_are_never_in_use_together_share_memory():
    """Of four in a chain never more than two; what torch ops read is a tensor of its own."""
    scaling = Scaling()

    def chain(static, tensors):
        (x,) = tensors
        for _ in range(4):
            scaling.launch(y := torch.empty(100), x)
            x = y
        return [x + 1]

    x = torch.randn(100)
    for _ in range(3):
        (found,) = replay.replayed(chain, 0, [x])
        assert torch.equal(found, x + 1)
    (recording,) = replay._known.values()
    assert len(recording._arena) == 3 and recording._arena_bytes == 2 * 512


def test_what_nobody_needs_is_let_go():
    def passes(static, tensors):
        first = tensors[0] + 1
        second = first * 2
        return [second - 1]

    for _ in range(2):
        replay.replayed(passes, 0, [torch.randn(3)])
    (recording,) = replay._known.values()
    assert [len(done) for _, done in recording._steps] == [0, 1, 1]


def test_what_is_written_down_holds_no_tensor():
    """Nor the memory of one: of arguments, of tuples, of a descriptor's base, of ops."""

    class Descriptor:
        def __init__(self, base: Tensor) -> None:
            self.base = base

    def passes(static, tensors):
        x, y, z = tensors
        made = torch.empty(4)
        replay.note(sent.append, [Descriptor(x), (y, z), made, 3])
        return [torch.cat([x, y]) + made[0]]

    sent = []
    for _ in range(2):
        replay.replayed(passes, 0, [torch.randn(4) for _ in range(3)])
    (recording,) = replay._known.values()
    seen, left = set(), [recording]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.BuiltinMethodType):
            continue
        seen.add(id(one))
        assert not isinstance(one, Tensor)
        if not isinstance(one, types.FunctionType):
            left += gc.get_referents(one)
        else:
            left += [cell.cell_contents for cell in one.__closure__ or ()]
    assert len(seen) > 50


def test_writing_down_holds_nothing_that_the_pass_lets_go():
    """Else the sum of all that a pass makes would have to fit into memory."""

    def passes(static, tensors):
        (x,) = tensors
        for _ in range(10):
            x = x.view(-1) + 1
            made.append(weakref.ref(x))
            most.append(sum(one() is not None for one in made))
        return [x]

    x, made, most = torch.randn(3), [], []
    for _ in range(3):
        assert torch.equal(replay.replayed(passes, 0, [x])[0], passes(0, [x])[0])
    assert max(most) <= 3
    assert isinstance(*replay._known.values(), replay.Recording)


def test_tensors_of_several_devices_are_run():
    """An address says nothing of its device; launchers do."""

    class Elsewhere(Tensor):  # as on a GPU
        def get_device(self) -> int:
            return 0

    scaling = Scaling()
    for _ in range(3):
        replay.replayed(scaling, 0, [torch.randn(2), torch.randn(2)])
    x, own = torch.randn(2), pytest.MonkeyPatch()
    with own.context() as patch:
        patch.setattr(replay, "PLAIN", {Tensor, Elsewhere})
        replay.replayed(scaling, 0, [x, torch.randn(2).as_subclass(Elsewhere)])
    assert scaling.runs == 3


def test_products_are_chosen_for_a_weight_that_trains():
    """at::matmul folds three dimensions for it, and for a frozen one does not."""

    def passes(static, tensors):
        x, weight = tensors
        with torch.profiler.profile() as profiler:
            y = torch.nn.functional.linear(x, weight)
        found.append({event.key for event in profiler.key_averages()} & {"aten::mm", "aten::bmm"})
        return [y]

    kinds = []
    for trains in (True, False):
        found = []
        weight = torch.randn(5, 4).requires_grad_(trains)
        x = torch.randn(3, 2, 4).transpose(0, 1)
        with torch.no_grad():
            for _ in range(2):
                replay.replayed(passes, trains, [x, weight])
        assert found[0] and found[0] == found[1]
        kinds.append(found[0])
    if kinds[0] == kinds[1]:
        pytest.skip("this torch chooses one product for both")


def test_the_kind_longest_unused_goes(monkeypatch):
    monkeypatch.setattr(replay, "MOST_KINDS", 3)
    scaling = Scaling()
    for size in [1, 1, 2, 2, 3, 3, 4, 4]:
        replay.replayed(lambda static, tensors: [tensors[0] * 2], 0, [torch.randn(size)])
        replay.replayed(scaling, 0, [torch.randn(2), torch.randn(2)])
        assert len(replay._known) <= 3
    assert scaling.runs == 2
    replay.forget()
    scaling = Scaling()
    for _ in range(3):
        replay.replayed(scaling, 0, [torch.randn(2), torch.randn(2)])
    assert scaling.runs == 2
    replay.forget()
    assert not replay._known


def test_subclasses_are_run():
    class Own(Tensor):
        pass

    scaling = Scaling()
    for _ in range(4):
        x = torch.randn(2).as_subclass(Own)
        replay.replayed(scaling, 0, [x, torch.randn(2)])
    assert scaling.runs == 4 and not replay._known


def test_switched_off(monkeypatch):
    monkeypatch.setattr(replay, "REPLAY", False)
    scaling = Scaling()
    for _ in range(4):
        replay.replayed(scaling, 0, [torch.randn(2), torch.randn(2)])
    assert scaling.runs == 4 and not replay._known


def test_a_pass_that_raises_is_asked_again():
    def passes(static, tensors):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return [tensors[0] * 2]

    calls, x = [], torch.randn(2)
    replay.replayed(passes, 0, [x])
    with pytest.raises(RuntimeError, match="out of memory"):
        replay.replayed(passes, 0, [x])
    assert replay._local.recorder is None
    for _ in range(3):
        assert torch.equal(replay.replayed(passes, 0, [x])[0], x * 2)
    assert isinstance(*replay._known.values(), replay.Recording)


def test_threads_write_down_their_own():
    def passes(static, tensors):
        (x,) = tensors
        for _ in range(static):
            x = x + 1
        return [x]

    wrong = []

    def work(static: int) -> None:
        for _ in range(50):
            x = torch.randn(3)
            for size in (3, 2):
                (y,) = replay.replayed(passes, static, [x[:size].clone()])
                wanted = x[:size].clone()
                for _ in range(static):
                    wanted = wanted + 1
                if not torch.equal(y, wanted):
                    wrong.append(static)

    threads = [threading.Thread(target=work, args=(1 + i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(replay._known) == 6
    assert all(isinstance(known, replay.Recording) for known in replay._known.values())


def test_a_repeated_pass_of_the_kernels_hands_over_what_a_run_one_does():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernels.replayed_launches"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("launches") == 16
