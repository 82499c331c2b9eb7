"""Which rows and tokens reach which layer: where inputs lie, what order they may be in."""

from collections import UserDict

import pytest
import torch

import ckf
from tests.tiny import randomise_adapters, tokens

TASKS = ["ctr", "topk", "rating"]


class Wrapper(torch.nn.Module):
    """Passes on whatever it gets."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 3)

    def run(self, input_ids=None, mask=None):
        return self.linear(self.embed(input_ids))


class Passes(Wrapper):
    def forward(self, *inputs, **options):
        return self.run(*inputs, **options)


class TakesDict(Wrapper):
    def forward(self, batch):
        return self.run(**batch)


class TakesList(Wrapper):
    def forward(self, batches):
        return self.run(*batches[0])


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (Passes, lambda ids: ids),
        (TakesDict, lambda ids: {"mask": torch.ones(1, 2, 3), "input_ids": ids}),
        (TakesDict, lambda ids: UserDict(input_ids=ids)),
        (TakesList, lambda ids: [(ids, None)]),
    ],
)
def test_inputs_are_found_where_they_lie(kind, form):
    model = ckf.patch_model(kind(), TASKS, r=4)
    randomise_adapters(model)
    ids, names = tokens(3), ["ctr", "rating", "topk"]
    mixed = model(form(ids), task_ids=names)
    for row, name in enumerate(names):
        alone = model(form(ids[row : row + 1]), task_ids=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    with pytest.raises(ValueError, match="found no tensor among its inputs"):
        model(form(None) if kind is not TakesDict else {}, task_ids=names)


class Reorders(torch.nn.Module):
    """The second linear sees the tokens in another shape."""

    def __init__(self, change):
        super().__init__()
        self.embed, self.first = torch.nn.Embedding(64, 8), torch.nn.Linear(8, 8)
        self.inner = torch.nn.Sequential(torch.nn.Linear(8, 3))
        self.change = change

    def forward(self, input_ids):
        return self.inner(self.change(self.first(self.embed(input_ids))))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h[:, :3].transpose(0, 1),  # sequence first
        lambda h: h.transpose(0, 1),
        lambda h: h.reshape(2, 14, 8),  # so many rows an expert
        lambda h: h[:, :2].reshape(2, 4, 8)[:, :2],
    ],
)
def test_a_layer_that_sees_other_rows_is_named(change):
    model = ckf.patch_model(Reorders(change), TASKS, r=4)
    with pytest.raises(ValueError, match=r"^inner\.0 got .* leave this layer out of target_mod"):
        model(tokens(), task_ids=[0, 1, 2, 0])


@pytest.mark.parametrize(
    "change", [lambda h: h[:, :3], lambda h: torch.cat([h, h], 1), lambda h: h[:, None, :2]]
)
def test_a_row_of_one_task_may_have_any_length(change):
    model = ckf.patch_model(Reorders(change), TASKS, r=4)
    randomise_adapters(model)
    ids, tasks = tokens(), torch.tensor([0, 1, 2, 0])
    found = model(ids, task_ids=tasks)
    for row in range(len(ids)):
        alone = model(ids[row : row + 1], task_ids=tasks[row])
        torch.testing.assert_close(found[row : row + 1], alone)
    with pytest.raises(ValueError, match="leave this layer out"):
        model(ids, task_ids=tasks[:, None].expand(ids.shape))


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.flatten(0, 1),
        lambda h: h.flatten(0, 1)[None],
        lambda h: h[:, :, None],
        lambda h: h[:, -1],
        lambda h: h[:, -1:],
        lambda h: h[None, :, -1],
    ],
)
def test_rows_in_their_order_may_have_any_shape(change):
    model = ckf.patch_model(Reorders(change), TASKS, r=4)
    randomise_adapters(model)
    ids, tasks = tokens(), torch.tensor([0, 1, 2, 0])
    found = model(ids, task_ids=tasks)
    model.change = lambda h: h
    torch.testing.assert_close(found, change(model(ids, task_ids=tasks)))


def test_a_layer_called_by_itself_takes_the_default_task():
    model = ckf.patch_model(Reorders(lambda h: h), TASKS, r=4)
    randomise_adapters(model)
    x = torch.randn(3, 5, 8)
    with ckf.use_task(model, "rating"):
        y = model.first(x)
        torch.testing.assert_close(y[1, 2:3], model.first(x[1, 2:3]))


@pytest.mark.parametrize("change", [lambda h: h.transpose(0, 1), lambda h: h[:, :3].flatten(0, 1)])
def test_one_task_for_all_takes_rows_in_any_order(change):
    model = ckf.patch_model(Reorders(change), TASKS, r=4)
    randomise_adapters(model)
    ids = tokens()
    with ckf.use_task(model, "topk"):
        found = model(ids)
    torch.testing.assert_close(found, model(ids, task_ids="topk"))
    model.change = lambda h: h
    torch.testing.assert_close(found, change(model(ids, task_ids=["topk"] * len(ids))))
