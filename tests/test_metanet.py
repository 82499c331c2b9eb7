"""The meta-network: a map for each user, whole batches at once, at the scale of embeddings."""

import pytest
import torch

from ckf.metanet import UNIT, MetaNetwork

DIM, WIDTH, SCALE = 5, 24, 0.2
KINDS = ("meta", "constant", "mlp", "linear")


def network(kind="meta", seed=0, dim=DIM):
    torch.manual_seed(seed)
    return MetaNetwork(dim, WIDTH, SCALE, kind, hidden=7)


def trained(kind="meta"):
    """A network whose every parameter has moved."""
    made = network(kind)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape))
    return made


def batch(rows=4, length=6, seed=1):
    """users (b, d), history (b, h, d), mask (b, h): padded on the left, row 0 without history."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(rows, DIM, generator=generator)
    history = torch.randn(rows, length, DIM, generator=generator)
    mask = torch.arange(length) >= length - torch.arange(rows).unsqueeze(1)
    return users, history * mask.unsqueeze(2), mask


def test_maps_follow_the_formula():
    made = trained()
    _, history, mask = batch()
    maps = made.user_maps(history, mask)
    for row in range(len(mask)):
        own = history[row, mask[row]]
        if len(own):
            weights = torch.softmax(own @ made.query / DIM**0.5, 0)
            pooled = weights @ own
        else:
            pooled = made.no_history
        expected = torch.eye(DIM) + made.make_map(pooled).view(DIM, DIM)
        torch.testing.assert_close(maps[row], expected)


def test_vectors_follow_the_formula():
    made = trained()
    users, history, mask = batch()
    maps = made.user_maps(history, mask)
    expected = torch.stack([made.user_out(u @ w) for u, w in zip(users, maps, strict=True)])
    expected = made.gain * expected
    torch.testing.assert_close(made(users, history, mask), expected)
    torch.testing.assert_close(made.items(users), made.gain * made.item_out(users))


def test_every_user_has_a_map_of_their_own():
    _, history, mask = batch()
    maps = trained().user_maps(history, mask)
    for a in range(len(maps)):
        for b in range(a):
            assert (maps[a] - maps[b]).abs().max() > 1e-2


def test_a_history_changes_the_map_of_its_row_only():
    made = trained()
    users, history, mask = batch()
    before = made(users, history, mask)
    for row in range(1, len(users)):
        other = history.clone()
        other[row, -1] += 1
        changed = (made(users, other, mask) - before).abs().amax(1) > 1e-4
        assert changed.tolist() == [r == row for r in range(len(users))]


def test_a_batch_equals_its_rows_alone_and_padding_is_nothing():
    made = trained()
    users, history, mask = batch()
    together = made(users, history, mask)
    for row in range(len(users)):
        own = history[row : row + 1, mask[row]]
        if not own.shape[1]:
            continue
        alone = made(users[row : row + 1], own, torch.ones(own.shape[:2], dtype=torch.bool))
        torch.testing.assert_close(together[row : row + 1], alone)
    garbage = torch.where(mask.unsqueeze(2), history, torch.tensor(1e3))
    torch.testing.assert_close(made(users, garbage, mask), together)


def test_the_default_map_is_for_empty_histories_only():
    made = trained()
    users, history, mask = batch()
    before = made(users, history, mask)
    with torch.no_grad():
        made.no_history.add_(1.0)
    changed = (made(users, history, mask) - before).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_no_gradient_is_nan(kind):
    made = trained(kind)
    users, history, mask = batch()
    users[1] = 0  # known to no CF model
    loss = made(users, history, mask).square().sum() + made.items(users).square().sum()
    loss.backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_mapped_vectors_start_at_the_scale_of_embeddings(kind):
    made = network(kind, dim=32)
    users = torch.randn(200, 32)  # standardised CF vectors
    history = torch.randn(200, 4, 32)
    mask = torch.ones(200, 4, dtype=torch.bool)
    for vectors in (made(users, history, mask), made.items(users)):
        assert 0.7 * SCALE < vectors.std().item() < 1.4 * SCALE
    unknown = made.gain * torch.cat([made.no_user, made.no_item])
    assert 0.7 * SCALE < unknown.std().item() < 1.4 * SCALE


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_no_vector_gets_an_embedding_learned_for_it(kind):
    made = trained(kind)
    users, history, mask = batch()
    before = made(users, history, mask), made.items(users)
    users[1] = 0
    after = made(users, history, mask), made.items(users)
    for old, new, own in zip(before, after, (made.no_user, made.no_item), strict=True):
        assert torch.equal(new[1], made.gain * own)
        rest = [0, 2, 3]
        assert torch.equal(new[rest], old[rest])
    assert torch.equal(
        made.items(torch.zeros(2, 3, DIM)), (made.gain * made.no_item).expand(2, 3, WIDTH)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_any_scale_learn_at_the_same_relative_rate(kind):
    """Gemma's embeddings are eight times larger than SmolLM2's, others ten times smaller."""

    def first_step(scale):
        torch.manual_seed(0)
        made = MetaNetwork(DIM, WIDTH, scale, kind, hidden=7, matches=True)
        yes, no = torch.randn(2, WIDTH) * scale
        made.start_matches_at(yes, no)
        optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
        users, history, mask = batch()
        users[1] = 0

        def vectors():
            mapped = [made(users, history, mask), made.items(users), made.matches(users[:, :1])]
            return torch.cat(mapped) / scale

        before = vectors()
        before.sin().sum().backward()
        size = torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        return before.detach(), size, vectors().detach()

    usual = first_step(UNIT)
    assert (usual[2] - usual[0]).abs().amax(1).min() > 1e-3  # every vector moved
    for scale in (8 * UNIT, UNIT / 10):
        for found, expected in zip(first_step(scale), usual, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_no_step_has_touched_settles_on_the_bias():
    made = trained("linear")
    made.start_user.copy_(made.no_user.detach())  # as a user embedding that never had a gradient
    item = made.no_item.detach().clone()
    made.settle()
    assert torch.equal(made.no_user, made.user_out.bias)
    assert torch.equal(made.no_item, item)


def test_a_fresh_map_is_near_the_identity():
    _, history, mask = batch()
    maps = network().user_maps(history, mask)
    assert (maps - torch.eye(DIM)).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["none", "deep"])
def test_an_unknown_kind_is_an_error(kind):
    with pytest.raises(ValueError, match=f"kind is '{kind}'; expected meta"):
        network(kind)
