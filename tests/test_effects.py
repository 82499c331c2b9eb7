"""Effects of users, items and tastes: the optimum itself, shrinkage, and the same at every call."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

import ckf.cf.effects as effects
from ckf.cf.effects import ItemSide, Observations, fit_effects
from ckf.metrics import auc

USERS, ITEMS = 30, 20


def drawn(count=600, seed=0):
    """Rows whose logits are made of every term; the last user and item have none."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    side = ItemSide(normal(ITEMS, 3), normal(ITEMS, 2) * 0.7)
    users = torch.randint(0, USERS - 1, (count,), generator=gen)
    items = torch.randint(0, ITEMS - 1, (count,), generator=gen)
    dots = normal(count)
    of_items = normal(ITEMS) + side.features @ normal(3)
    taste = (normal(USERS, 2)[users] * side.axes[items]).sum(1)
    logits = 0.3 + 0.8 * dots + normal(USERS)[users] + of_items[items] + taste
    labels = (torch.rand(count, generator=gen, dtype=torch.float64) < logits.sigmoid()).double()
    return Observations(users, items, dots, labels), side


def penalised(rows, side, scalars, users, own, beta, tastes):
    """The loss as the module's text has it, from its parameters."""
    logits = scalars[1] + scalars[0] * rows.dots + users[rows.users]
    logits = logits + own[rows.items] + (side.features @ beta)[rows.items]
    logits = logits + (tastes[rows.users] * side.axes[rows.items]).sum(1)
    loss = binary_cross_entropy_with_logits(logits, rows.labels, reduction="sum")
    deviations = [(users, 0.5), (own, 1.0), (beta, 0.6), (tastes, 0.2)]
    deviations += [(scalars[:1], 1.0), (scalars[1:], 10.0)]
    return loss + sum((part / sd).square().sum() / 2 for part, sd in deviations)


def newton(rows, side):
    """The optimum by dense Newton steps with autograd's Hessian."""
    shapes = [(2,), (USERS,), (ITEMS,), (3,), (USERS, 2)]
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def loss(flat):
        parts = [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
        return penalised(rows, side, *parts)

    flat = torch.zeros(sum(sizes), dtype=torch.float64)
    for _ in range(20):
        slope = torch.func.grad(loss)(flat)
        flat = flat - torch.linalg.solve(torch.func.hessian(loss)(flat), slope)
    return [p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]


def test_it_is_the_optimum():
    rows, side = drawn()
    scalars, users, own, beta, tastes = newton(rows, side)
    found = fit_effects(rows, side, USERS)
    for ours, exact in (
        (found.scalars, scalars),
        (found.users, users),
        (found.items, own + side.features @ beta),
        (found.tastes, tastes),
    ):
        assert torch.allclose(ours, exact, atol=2e-4)


def test_who_has_no_rows_has_what_is_known_of_the_item():
    rows, side = drawn()
    found = fit_effects(rows, side, USERS)
    assert found.users[-1] == 0 and (found.tastes[-1] == 0).all()
    alike = replace(side, features=side.features.clone())
    alike.features[-1] = 0
    assert found.items[-1] != 0
    assert fit_effects(rows, alike, USERS).items[-1] == 0


def test_few_rows_move_little():
    """The same rows four times over: nearer to the data, further from the prior."""
    rows, side = drawn(200)
    often = Observations(*(value.repeat(4) for value in vars(rows).values()))
    few, many = (fit_effects(seen, side, USERS).users.norm() for seen in (rows, often))
    assert many > 1.2 * few


@pytest.mark.parametrize("at_once", [1, 97, 600])
def test_rows_come_in_parts(monkeypatch, at_once):
    rows, side = drawn()
    whole = fit_effects(rows, side, USERS)
    monkeypatch.setattr(effects, "_ROWS_AT_ONCE", at_once)
    parts = fit_effects(rows, side, USERS)
    for name, value in vars(whole).items():
        assert torch.allclose(getattr(parts, name), value, atol=1e-6)


def test_same_bits_at_every_call_and_almost_with_other_threads():
    rows, side = drawn(50_000)  # enough for torch to share sums among threads
    one, again = (fit_effects(rows, side, USERS) for _ in range(2))
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(one).items())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        two = fit_effects(rows, side, USERS)
    finally:
        torch.set_num_threads(threads)
    for name, value in vars(one).items():
        assert torch.allclose(getattr(two, name), value, atol=1e-7)


def test_new_rows_are_told_apart_better_with_each_term():
    rows, side = drawn(6000)
    seen = Observations(*(value[:4000] for value in vars(rows).values()))
    new = Observations(*(value[4000:] for value in vars(rows).values()))

    def quality(rows, new, side):
        return auc(fit_effects(rows, side, USERS).logits(new, side).numpy(), new.labels.numpy())

    whole = quality(seen, new, side)
    without_dots = quality(
        replace(seen, dots=torch.zeros(4000, dtype=torch.float64)),
        replace(new, dots=torch.zeros(2000, dtype=torch.float64)),
        side,
    )
    without_taste = quality(seen, new, replace(side, axes=side.axes[:, :0]))
    assert whole > without_dots + 0.01 and whole > without_taste + 0.001


def test_stopping_short_of_the_optimum_is_told(monkeypatch):
    rows, side = drawn()
    monkeypatch.setattr(effects, "_STEPS", 2)
    with pytest.warns(UserWarning, match="stopped after 2 steps with a slope of"):
        fit_effects(rows, side, USERS)


def test_all_labels_alike_stay_finite():
    rows, side = drawn(50)
    found = fit_effects(replace(rows, labels=torch.ones_like(rows.labels)), side, USERS)
    assert all(value.isfinite().all() for value in vars(found).values())
