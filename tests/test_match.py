"""The CF model's own score and its placeholder: the right score, in its place in every row."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ckf.assembly import assemble
from ckf.base_model import keep_layers
from ckf.match import MatchScores
from ckf.metanet import MetaNetwork
from ckf.prompts import match_slot, matched_item
from tests.ckf_fixtures import small_config
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(small_run):
    return small_run.assembly.data, small_run.assembly.vectors


@pytest.fixture(scope="module")
def matching(small_model, small_run):
    """The small run's parts with match slots, random weights."""
    torch.manual_seed(0)
    config = small_config(small_model, metanet__match="score")
    made = assemble(config, small_run.assembly.data, small_run.assembly.vectors, CPU)
    with torch.no_grad():
        for parameter in made.model.metanet.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    made.model.eval()
    return made


def test_slots_name_their_item_and_nothing_else():
    assert [matched_item(match_slot(i)) for i in (0, 7)] == [0, 7]
    assert [matched_item(what) for what in (-1, 0, 5)] == [None, None, None]


@pytest.mark.parametrize("form", ["biased_dot", "dot"])
def test_scores_are_the_cf_models_standardised_on_train_rows(parts, form):
    data, vectors = parts
    vectors = replace(vectors, score_form=form)
    matches = MatchScores(vectors, data)
    train = np.flatnonzero(data.split == 0)
    users, items = data.user[train], data.item[train]
    made = matches(users, data.history[train], items, vectors.folds(users, items)).flatten()
    assert float(made.mean()) == pytest.approx(0, abs=1e-4)
    assert float(made.std(correction=0)) == pytest.approx(1, abs=1e-3)
    rows = np.flatnonzero(data.split == 2)
    made = matches(data.user[rows], data.history[rows], data.item[rows]).flatten().double()
    score = vectors.score(data.user[rows], data.item[rows], data.history[rows]).double()
    assert float(torch.corrcoef(torch.stack([made, score]))[0, 1]) == pytest.approx(1, abs=1e-6)


def test_a_stranger_is_folded_in(parts):
    data, vectors = parts
    history = np.array([[-1, 4, 6], [-1, 1, 2]])
    made = MatchScores(vectors, data)(np.array([-1, -1]), history, [3, 3])
    assert made.isfinite().all() and made[0] != made[1]


def test_the_start_blends_the_two_answers():
    metanet = MetaNetwork(3, 8, 0.1, matches=True)
    yes, no = torch.randn(8), torch.randn(8)
    metanet.start_matches_at(yes, no)
    made = metanet.matches(torch.tensor([[1.0], [-1.0], [0.0]]))
    torch.testing.assert_close(made, torch.stack([yes, no, (yes + no) / 2]))


def test_every_match_is_in_its_place(matching, mixed):
    prompts = [matching.batcher.encode(e, "train", True) for e in mixed]
    batch = matching.batcher.batch(mixed, prompts)
    data, start, expected = matching.data, 0, []
    features = matching.batcher.collator.matches
    for prompt, example in zip(prompts, mixed, strict=True):
        for position, what in prompt.slots:
            item = matched_item(what)
            if item is not None:
                row = [example.row]
                folds = matching.vectors.folds(data.user[row], data.item[row])
                score = features(data.user[row], data.history[row], [item], folds)
                expected.append((start + position, score))
        start += prompt.length
    assert batch["match_slots"].tolist() == [place for place, _ in expected]
    torch.testing.assert_close(batch["match_scores"], torch.cat([f for _, f in expected]))
    assert batch["item_vectors"].shape[0] == len(expected)  # one match behind every item
    with torch.no_grad():
        flat = matching.model.embed(batch).flatten(0, 1)
        own = matching.model.metanet.matches(batch["match_scores"])
    torch.testing.assert_close(flat[batch["match_slots"]], own)


def test_a_match_changes_its_own_row_only(matching, mixed):
    prompts = [matching.batcher.encode(e, "train", True) for e in mixed]
    batch = matching.batcher.batch(mixed, prompts)

    def scores():
        with torch.no_grad():
            return matching.model.logits(batch, batch["last_slots"])

    before = scores()
    first = (batch["match_slots"] < prompts[0].length).nonzero().flatten()
    batch["match_scores"] = batch["match_scores"].clone()
    batch["match_scores"][first] += 2.0
    moved = (scores() - before).abs().amax(1)
    assert moved[0] > 1e-4 and moved[1:].max() < moved[0] / 100


def test_keeping_layers_keeps_the_first():
    whole, cut = tiny_model("qwen3"), tiny_model("qwen3")
    keep_layers(cut, 1)
    assert cut.config.num_hidden_layers == 1 and len(cut.model.layers) == 1
    ids = torch.arange(1, 8).unsqueeze(0)
    with torch.no_grad():
        first = whole(ids, output_hidden_states=True).hidden_states[1]
        own = cut(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(own, cut.model.norm(first))
    with pytest.raises(ValueError, match=r"model.layers is 3, but this model has 2 decoder layers"):
        keep_layers(tiny_model("llama"), 3)
