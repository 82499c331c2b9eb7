"""Cells do what their names say: one thing differs, the parameters are about equal."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ckf.assembly import ONE_LORA, assemble
from ckf.config_files import load_config
from ckf.controls import shuffled
from ckf.data.prepared import load_prepared
from ckf.experiment.cells import (
    CELLS,
    COMPARISONS,
    MAIN,
    cell_config,
    cf_alone,
    cf_name,
    chosen_cells,
    reduced,
)
from ckf.experiment.parts import counted, limited
from ckf.patch import patched_layers
from ckf.presence import TaskPresence
from tests.ckf_fixtures import TASKS, small_config
from tests.prepared_data import prepared

CPU = torch.device("cpu")
COLLM = Path(__file__).parent.parent / "configs" / "ml-1m-collm.yaml"


@pytest.fixture(scope="module")
def base(small_model):
    return small_config(small_model)


def differing(a, b, prefix=""):
    """Keys of settings that differ, the run's name and seed left out."""
    a, b = (asdict(x) if not isinstance(x, dict) else x for x in (a, b))
    keys = []
    for key in {*a, *b} - (set() if prefix else {"name", "seed"}):
        ours, theirs = a.get(key), b.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            keys += differing(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            keys.append(f"{prefix}{key}")
    return sorted(keys)


@pytest.mark.parametrize(
    "a, b, keys",
    [
        ("linear", "text", ["metanet.kind"]),
        ("multi-linear", "linear", ["lora.lora_alpha", "lora.per_task", "lora.r"]),
        ("ckf", "multi-linear", ["metanet.kind"]),
        ("ckf", "ckf-shuffled", ["metanet.shuffle_users"]),
        ("ckf", "ckf-constant", ["metanet.kind"]),
        ("ckf-match", "ckf", ["metanet.match"]),
        ("gate-meta", "ckf", ["lora.gate"]),
        ("ckf-joint", "ckf", ["train.schedule"]),
    ],
)
def test_neighbours_differ_in_one_thing(base, a, b, keys):
    one, other = (cell_config(base, CELLS[name], 0) for name in (a, b))
    assert differing(one, other) == keys


def assembly_of(base, small_run, name, seed=0):
    torch.manual_seed(0)
    config = cell_config(base, CELLS[name], seed)
    return assemble(config, small_run.assembly.data, small_run.assembly.vectors, CPU)


@pytest.mark.parametrize("name", ["text", "multi-linear", "ckf", "task-meta", "one-meta"])
def test_lora_parameters_and_scaling_are_about_equal(base, small_run, name):
    made = assembly_of(base, small_run, name)
    layers = patched_layers(made.model.backbone)
    count = sum(p.numel() for n, p in made.model.named_parameters() if "lora_" in n)
    plain = assembly_of(base, small_run, "ckf")
    expected = sum(p.numel() for n, p in plain.model.named_parameters() if "lora_" in n)
    slack = 0.5 * len(TASKS) / (2 * (1 + len(TASKS)))  # task-meta rounds its rank
    assert count == pytest.approx(expected, rel=slack if name == "task-meta" else 0)
    for layer in layers.values():
        assert all(float(g) == pytest.approx(4.0) for row in layer.gates(CPU) for g in row if g > 0)


def test_one_lora_serves_all_tasks_and_trains_with_every_one(base, small_run, mixed):
    made = assembly_of(base, small_run, "one-meta")
    layers = patched_layers(made.model.backbone).values()
    assert {layer.experts for layer in layers} == {(ONE_LORA,)}
    assert [made.lora_of(task) for task in TASKS] == [ONE_LORA] * len(TASKS)
    presence = TaskPresence(made.model.backbone)
    optimizer = torch.optim.AdamW([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    presence.attach(optimizer)
    for task in TASKS:
        own = [e for e in mixed if e.task == task]
        prompts = [made.batcher.encode(e, "train", True) for e in own]
        batch = made.batcher.batch(own, prompts)
        assert set(batch["task_ids"].flatten().tolist()) == {0}
        assert set(batch["row_tasks"].tolist()) == {TASKS.index(task)}
        layer = next(iter(patched_layers(made.model.backbone).values()))
        before = layer.lora_B[ONE_LORA].detach().clone()
        made.model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (layer.lora_B[ONE_LORA] - before).abs().max() > 0, task


def test_shuffling_is_a_permutation_that_moves_everyone_within_groups():
    known = np.random.default_rng(0).random(50) < 0.7
    length = np.random.default_rng(1).integers(0, 4, 50)
    donor = shuffled(known, length, 3)
    assert sorted(donor) == list(range(50)) and (donor != np.arange(50)).all()
    assert (known[donor] == known).all()
    for group in (known, ~known):  # but where one length ends and the next begins
        assert (length[donor] != length)[group].sum() <= 4
    assert (shuffled(known, length, 3) == donor).all()
    assert (shuffled(known, length, 4) != donor).any()
    alone = np.array([True, False])
    assert shuffled(alone, np.array([2, 2]), 0).tolist() == [0, 1]  # nobody to trade with


def test_shuffled_users_show_no_more_items_than_the_row_has(base, small_run):
    lookup = assembly_of(base, small_run, "ckf-shuffled").batcher.collator.lookup
    data = small_run.assembly.data
    own = data.history
    shown = lookup.profiles(data.user, own)[1]
    assert ((shown >= 0) <= (own >= 0)).all()
    assert (shown[own < 0] == -1).all() and (shown >= 0).sum() > 0.5 * (own >= 0).sum()
    theirs = lookup.donor_history[data.user]
    assert (shown == theirs)[shown >= 0].all()  # the last of the other's, at the right


def test_shuffled_users_have_vectors_of_others_and_items_their_own(base, small_run):
    plain = assembly_of(base, small_run, "ckf").batcher.collator.lookup
    lookup = assembly_of(base, small_run, "ckf-shuffled").batcher.collator.lookup
    data = small_run.assembly.data
    users = np.arange(data.n_users)
    last = np.zeros(data.n_users, np.int64)
    last[data.user] = np.arange(len(data.user))
    history = data.history[last]
    assert (history >= 0).any(1).all()
    donors, histories = lookup.profiles(users, history)
    ours, theirs = plain.users(users, history), lookup.users(donors, histories)
    assert (ours - theirs).abs().amax(1).min() > 1e-3  # everyone moved
    order = np.lexsort(ours.numpy().T), np.lexsort(theirs.numpy().T)
    torch.testing.assert_close(ours[order[0]], theirs[order[1]])  # and nobody is lost
    items = np.arange(data.n_items)
    assert torch.equal(plain.items(items), lookup.items(items))
    assert (histories >= 0).any()  # W_u too comes from the other user


def test_shuffled_vectors_reach_the_batch_and_leave_the_text(base, small_run, mixed):
    batches = []
    for name in ("ckf", "ckf-shuffled"):
        made = assembly_of(base, small_run, name)
        prompts = [made.batcher.encode(e, "train", True) for e in mixed]
        batches.append(made.batcher.batch(mixed, prompts))
    plain, other = batches
    for key in ("input_ids", "task_ids", "item_vectors", "slots", "label_tokens"):
        assert torch.equal(plain[key], other[key])
    assert (plain["user_vectors"] - other["user_vectors"]).abs().amax(1).min() > 1e-3
    assert not torch.equal(plain["history_vectors"], other["history_vectors"])


def test_a_constant_map_does_not_depend_on_the_user(base, small_run):
    """The Jacobian of user embedding by user vector: one for all users, or one for each."""
    for name, is_same in (("ckf-constant", True), ("ckf", False)):
        metanet = assembly_of(base, small_run, name).model.metanet
        with torch.no_grad():
            for parameter in metanet.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        history = torch.randn(2, 3, metanet.dim)
        mask = torch.ones(2, 3, dtype=torch.bool)

        def embed(users, metanet=metanet, history=history, mask=mask):
            return metanet(users, history, mask)

        jacobian = torch.autograd.functional.jacobian(embed, torch.randn(2, metanet.dim))
        first, second = jacobian[0, :, 0], jacobian[1, :, 1]
        assert torch.allclose(first, second, atol=1e-6) == is_same


def test_cells_without_vectors_show_none(base, small_run, mixed):
    made = assembly_of(base, small_run, "text")
    assert made.model.metanet is None and not made.uses_vectors
    assert "user_vectors" not in made.batcher.batch(
        mixed, [made.batcher.encode(e, "train", False) for e in mixed]
    )


def test_single_runs_cost_together_what_the_mixed_run_costs(base):
    cells = chosen_cells("full", base)
    single = [c for c in cells if c.name.startswith("single-")]
    assert [c.name for c in single] == [f"single-{t}" for t in TASKS]
    configs = [cell_config(base, c, 0) for c in single]
    total = sum(c.train.steps for c in configs)
    assert abs(total - base.train.steps) <= len(TASKS) / 2  # each is rounded
    for config in configs:
        assert len(config.tasks) == 1 and config.lora.r == 4 and not config.lora.per_task


def test_all_rows_are_counted_before_steps_are_shared_out(base, prepared):
    data = load_prepared(Path(prepared))
    everything = replace(base, tasks={t: replace(r, train=None) for t, r in base.tasks.items()})
    config = counted(everything, data)
    assert {t: r.train for t, r in config.tasks.items()} == {
        t: len(data.rows(t, "train")) for t in TASKS
    }
    steps = [cell_config(config, CELLS[f"single-{t}"], 0).train.steps for t in TASKS]
    sizes = [len(data.rows(t, "train")) ** (1 / base.train.temperature) for t in TASKS]
    wanted = [base.train.steps * size / sum(sizes) for size in sizes]
    assert all(abs(a - max(1, b)) <= 0.5 for a, b in zip(steps, wanted, strict=True))


def test_seeds_differ_and_nothing_else(base):
    one, other = (cell_config(base, CELLS["ckf"], k) for k in (0, 2))
    assert (one.seed, other.seed) == (0, 2) and differing(one, other) == []


@pytest.mark.parametrize("schedule", ["curriculum", "joint"])
def test_chosen_cells_are_known_and_not_twice(base, schedule):
    config = replace(base, train=replace(base.train, schedule=schedule))
    plain = [name for name in MAIN if name != "ckf-prior"]  # which needs a blend
    assert [c.name for c in chosen_cells("main", config)] == plain
    assert next(c.name for c in chosen_cells("ckf, main", config)) == "ckf"
    names = [c.name for c in chosen_cells("full", config)]
    assert len(set(names)) == len(names) and f"ckf-{schedule}" not in names
    with pytest.raises(ValueError, match="no cell is named 'ckff'; known: main, full"):
        chosen_cells("ckff", config)
    for a, b, _ in COMPARISONS:
        assert all(side in CELLS or side[0] == "=" for side in (a, b))
    assert max(map(len, CELLS)) <= 20  # the width of a label in a figure


def test_the_prior_takes_part_where_it_can(base):
    able = replace(base, train=replace(base.train, schedule="joint"), cf=replace(base.cf, blend=3))
    assert [c.name for c in chosen_cells("main", able)] == list(MAIN)
    one, other = (cell_config(able, CELLS[name], 0) for name in ("ckf-prior", "ckf-match"))
    assert differing(one, other) == ["metanet.match"]
    for unable in (
        replace(able, cf=replace(able.cf, blend=0)),
        replace(able, train=replace(able.train, schedule="curriculum")),
        replace(able, train=replace(able.train, fold_share=0.5)),
    ):
        assert "ckf-prior" not in [c.name for c in chosen_cells("full", unable)]
        (named,) = chosen_cells(" ckf-prior", unable)
        with pytest.raises(ValueError, match="metanet.match is prior"):
            cell_config(unable, named, 0)


def test_every_cell_of_the_shipped_config_is_valid():
    config = load_config(COLLM)
    small, seeds, cut = reduced(config, 3)
    for one in (config, small):
        for cell in chosen_cells("full", one):
            cell_config(one, cell, 2)
    assert seeds == 1 and len(cut) > 5
    assert (small.data.train_list, small.data.test_lists) == ("uniform9", ["uniform9"])
    assert {"candidate list uniform9 only", "train lists uniform9 instead of uniform19"} <= {*cut}
    assert small.lora.lora_alpha / small.lora.r == config.lora.lora_alpha / config.lora.r


def test_what_is_small_already_is_not_said_to_be_cut(base):
    small, _, cut = reduced(base, 1)
    assert small.train.steps == base.train.steps and small.train.batch_size == 10
    assert not [line for line in cut if "steps" in line or "seed" in line]
    assert "decoder layers 4 instead of all" in cut


def test_limited_data_have_the_rows_asked_for_and_keep_the_rest(small_run, base):
    data = small_run.assembly.data
    tasks = replace(base).tasks | {"ctr": replace(base.tasks["ctr"], train=10, test=5)}
    small = limited(data, tasks, 0)
    assert [len(small.rows("ctr", s)) for s in ("train", "valid", "test")] == [10, 10, 5]
    assert set(small.rows("ctr", "test")) < set(data.rows("ctr", "test"))
    assert len(data.rows("ctr", "train")) == 80
    assert (small.rows("topk", "test") == data.rows("topk", "test")).all()
    assert (limited(data, tasks, 0).rows("ctr", "test") == small.rows("ctr", "test")).all()
    assert small._candidates == data._candidates


def test_train_lists_that_are_lacking_are_cut_from_longer_ones():
    """As in a folder prepared for a config whose train lists the reduced experiment cuts."""
    rng, ones = np.random.default_rng(0), np.ones(2000, int)
    data = prepared(np.arange(2000), rng.integers(0, 99, 2000), ones, 0 * ones, n_items=99)
    items = np.stack([rng.permutation(99)[:20] for _ in ones]).astype(np.int32)
    lists = {"rows": np.arange(2000), "items": items, "positive": rng.integers(0, 20, 2000)}
    data = replace(data, _candidates={f"train.uniform19.{k}": v for k, v in lists.items()})
    small = limited(data, {}, 0)
    assert small.candidates("train", "uniform19").items is items
    made = small.candidates("train", "uniform9")
    assert made.items.shape == (2000, 10) and made.items.dtype == np.int32
    every = np.arange(2000)
    assert (made.items[every, made.positive] == items[every, lists["positive"]]).all()
    for short, whole in zip(made.items, items, strict=True):
        assert [i for i in whole if i in set(short.tolist())] == short.tolist()
    assert np.bincount(made.positive, minlength=10).min() > 150  # every letter about as often
    with pytest.raises(ValueError, match="'uniform99'"):
        small.candidates("train", "uniform99")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lora__per_task": False, "lora__gate": "learned"}, "lora.gate is 'learned'"),
        ({"lora__per_task": False, "lora__shared_r": 4}, "lora.shared_r is 4"),
        ({"lora__per_task": False, "lora__ranks": {"ctr": 2}}, "lora.ranks is"),
        ({"metanet__kind": "none", "metanet__match": "score"}, "metanet.kind is none"),
        ({"metanet__kind": "none", "metanet__shuffle_users": True}, "metanet.kind is none"),
        ({"metanet__match": "scores"}, "metanet.match is 'scores'.*did you mean 'score'"),
        ({"model__name": "m", "model__layers": 0}, "model.layers is 0; expected 1 or more"),
    ],
)
def test_switches_that_do_not_fit_together_are_named(small_model, changes, words):
    with pytest.raises(ValueError, match=words):
        small_config(small_model, **changes)


def test_cf_models_alone_are_plain_and_chosen_on_valid(base):
    cf = replace(base.cf, blend=4, titles=8, history=True, beside=["mf", "lightgcn"])
    mf, lightgcn = cf_alone(replace(base, cf=cf))
    assert [cf_name(c) for c in (replace(base, cf=cf), mf, lightgcn)] == [
        "mf-blend",
        "mf",
        "lightgcn",
    ]
    assert mf.cf == replace(base.cf, blend=0, titles=0, held_out=False, beside=[])
    assert lightgcn.cf.blend == lightgcn.cf.titles == 0 and not lightgcn.cf.history
    assert (min(lightgcn.cf.dim), max(lightgcn.cf.dim)) == (8, 256)
