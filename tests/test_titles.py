"""Titles as a language model reads them: each alone, in their order, and what the blend gains."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ckf.base_model import Base
from ckf.cf import CFConfig, CFVectors, blend, fit_cf
from ckf.cf.blend import principal_components
from ckf.data.prepared import load_prepared
from ckf.experiment.parts import shared_vectors
from ckf.metrics import auc
from ckf.prompts import plain_tokens, start_tokens
from ckf.run import train_run
from ckf.titles import read_titles
from tests.ckf_fixtures import quiet, small_config
from tests.prepared_data import prepared as prepared_arrays
from tests.tiny import tiny_model


def tiny(family, tokenizer):
    if family == "opt, projected":
        config = tiny_model("opt").config
        config.word_embed_proj_dim = 16
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = tiny_model(family)
    model.resize_token_embeddings(len(tokenizer))
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt", "opt, projected"])
def test_every_title_is_read_as_if_alone(family, tokenizer):
    model = tiny(family, tokenizer)
    titles = ["Heat", "The Long Good Friday", "", "Heat", "It"]
    counts = []
    found = read_titles(model, tokenizer, titles, "movie", counts.append)
    assert found.shape == (5, 16 if "projected" in family else 32) and found.dtype == torch.float32
    assert counts == sorted(counts) and counts[-1] == 4  # "Heat" is read once
    for title, state in zip(titles, found, strict=True):
        tokens = start_tokens(tokenizer)
        for part in ('The movie "', title, '" is of the genre'):
            tokens = tokens + plain_tokens(tokenizer, part)
        logits = model(torch.tensor([tokens])).logits[0, -1]  # of the state behind the last token
        assert torch.allclose(model.lm_head(state), logits, atol=1e-5)
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_a_long_title_is_cut(tokenizer):
    long = "x" * 500
    found = read_titles(tiny("llama", tokenizer), tokenizer, [long, long + " other end"])
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("at_once", [7, 100])
def test_components_are_the_principal_ones(monkeypatch, at_once):
    monkeypatch.setattr(blend, "_STATES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 8, generator=generator) @ torch.randn(8, 8, generator=generator) + 3
    found = principal_components(states, 3)
    centred = states.double() - states.double().mean(0)
    left, size, _ = torch.linalg.svd(centred, full_matrices=False)
    exact = left[:, :3] * size[:3]
    exact = exact / exact.square().sum(1).mean().sqrt()
    signs = (found.double() * exact).sum(0).sign()
    assert torch.allclose(found.double(), exact * signs, atol=1e-5)
    assert torch.allclose(found, principal_components(states.flip(1) * 3, 3), atol=1e-5)


def test_equal_titles_have_components_of_zero():
    assert torch.equal(principal_components(torch.ones(4, 3), 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="cf.titles is 4, but 9 titles of width 3 have 3"):
        principal_components(torch.ones(9, 3), 4)


def test_states_that_are_not_finite_are_named(tokenizer):
    model = tiny("llama", tokenizer).half()
    torch.nn.init.constant_(model.model.norm.weight, 65_000)
    with pytest.raises(ValueError, match="in torch.float16 reads some titles as NaN or infinite"):
        read_titles(model, tokenizer, ["Heat", "It"])


def by_kind(seed=0, n_users=120, n_items=80):
    """Items of two kinds, one of them good; half the items are not in train."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n_items)
    user = np.repeat(np.arange(n_users), n_items)
    item = np.tile(np.arange(n_items), n_users)
    logit = 3.0 * kind[item] - 1.5 + rng.normal(size=n_users)[user]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-logit))).astype(int)
    split = np.where(item < n_items // 2, np.where(rng.random(len(user)) < 0.5, 0, 1), 2)
    states = torch.from_numpy(np.eye(2)[kind] + rng.normal(size=(n_items, 2)) * 0.1).float()
    return prepared_arrays(user, item, label, split), states


SMALL = {"dim": 4, "epochs": 10, "batch_size": 512, "blend": 3}


@pytest.fixture(scope="module")
def kinds():
    return by_kind()


def test_titles_place_items_that_nobody_rated(kinds, tmp_path):
    data, states = kinds
    vectors = fit_cf(CFConfig(**SMALL, titles=2), data, quiet, states)
    vectors.save(tmp_path / "cf.safetensors")
    vectors = CFVectors.load(tmp_path / "cf.safetensors")
    rows = np.flatnonzero(data.split == 2)
    scores = vectors.score(data.user[rows], data.item[rows]).numpy()
    assert auc(scores, data.label[rows]) > 0.8  # .5 + what users differ by without titles
    plain = fit_cf(CFConfig(**SMALL), data, quiet)
    assert torch.equal(plain.users, vectors.users)  # the vectors in prompts stay the CF model's
    blind = plain.score(data.user[rows], data.item[rows]).numpy()
    assert auc(blind, data.label[rows]) < 0.7


def test_a_file_from_before_tastes_is_read(kinds, tmp_path):
    data, _ = kinds
    vectors = fit_cf(CFConfig(**SMALL), data, quiet)
    bare = replace(
        vectors.blend, tastes=vectors.blend.tastes[:, :0], axes=vectors.blend.axes[:, :0]
    )
    replace(vectors, blend=bare).save(tmp_path / "cf.safetensors")
    with safe_open(str(tmp_path / "cf.safetensors"), "pt") as file:
        about = file.metadata()
    tensors = load_file(tmp_path / "cf.safetensors")
    del tensors["blend.tastes"], tensors["blend.axes"]
    save_file(tensors, tmp_path / "before.safetensors", about)
    again = CFVectors.load(tmp_path / "before.safetensors")
    rows = np.arange(len(data))
    expected = replace(vectors, blend=bare).score(data.user[rows], data.item[rows])
    assert torch.equal(again.score(data.user[rows], data.item[rows]), expected)


def test_mistakes_are_named(kinds):
    data, states = kinds
    with pytest.raises(ValueError, match="cf.titles is 4, which only a blend reads: set cf.blend"):
        CFConfig(titles=4)
    with pytest.raises(ValueError, match="cf.titles is -1"):
        CFConfig(titles=-1, blend=5)
    with pytest.raises(ValueError, match="cf.titles is 1.5, expected a whole number"):
        CFConfig(titles=1.5, blend=5)
    for wrong in (None, states[:-1], states[:, 0]):
        with pytest.raises(ValueError, match=r"needs titles \(80, width\).*read_titles"):
            fit_cf(CFConfig(**SMALL, titles=2), data, quiet, wrong)


@pytest.mark.parametrize("layers", [None, 1])
def test_a_run_reads_titles_by_itself(small_model, raw_data, tmp_path, layers):
    config = small_config(
        small_model, train__steps=2, train__save_every=1, train__schedule="joint",
        tasks={"ctr": {"train": 40, "valid": 10, "test": 20}}, metanet__match="prior",
        cf={"dim": 4, "epochs": 3, "blend": 2, "titles": 3}, model__layers=layers,
    )  # fmt: skip
    lines: list[str] = []
    run = train_run(config, tmp_path / "run", str(raw_data), device="cpu", log=lines.append)
    data = run.assembly.data
    assert f"reading {data.n_items} titles with {small_model}" in lines
    assert lines.count(f"loading {small_model}") == (1 if layers is None else 2)
    model = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    titles = [data.title(i) for i in range(data.n_items)]
    axes = principal_components(read_titles(model, run.assembly.tokenizer, titles), 3)
    assert torch.allclose(run.assembly.vectors.blend.axes[:, :3], axes, atol=1e-4)
    again: list[str] = []
    train_run(config, tmp_path / "run", device="cpu", log=again.append)
    assert not [line for line in again if line.startswith("reading")]


def test_an_experiments_vectors_belong_to_the_model_that_read_the_titles(
    small_model, prepared, tmp_path
):
    """At any path and dtype the same model; another model reads anew."""
    cf = {"dim": 4, "epochs": 2, "blend": 2, "titles": 3}
    data = load_prepared(prepared)
    read: list[str] = []

    def vectors(model, **changes):
        config = small_config(model, cf=cf, **changes)
        return shared_vectors(config, tmp_path, data, Base(torch.device("cpu"), read.append), quiet)

    def count():
        return len([line for line in read if line.startswith("reading")])

    own = vectors(small_model)
    elsewhere = shutil.copytree(small_model, tmp_path / "elsewhere")
    assert vectors(elsewhere, model__dtype="bfloat16") == own and count() == 1
    assert vectors(small_model, model__layers=1) == own and count() == 1  # all layers read
    assert vectors(small_model, prompt__item_word="album") != own and count() == 2
    other = AutoModelForCausalLM.from_pretrained(elsewhere)
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    other.save_pretrained(elsewhere)
    assert vectors(elsewhere) != own and count() == 3
