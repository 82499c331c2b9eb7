"""Encoded prompts on disk: the same as encoded anew, checked when read, one set per kind."""

import json
from dataclasses import replace

import pytest

from ckf.batches import QuestionMaker
from ckf.experiment.prompt_cache import PromptCache, cache_key
from ckf.prompts import PromptEncoder
from tests.ckf_fixtures import TASKS, quiet


@pytest.fixture
def make(small_run, tmp_path):
    """A function that opens the cache of the small run, with prompt settings changed."""

    def cache(matches=False, log=quiet, **changes):
        parts = small_run.assembly
        config = replace(parts.config, prompt=replace(parts.config.prompt, **changes))
        maker = QuestionMaker(parts.data, config)
        titles = [parts.data.title(i) for i in range(parts.data.n_items)]
        encoder = PromptEncoder(parts.tokenizer, titles, config.prompt, matches)
        return PromptCache(tmp_path, maker, encoder, log), maker, encoder

    return cache


@pytest.mark.parametrize("matches", [True, False])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cached_prompts_equal_those_encoded_anew(make, split, matches):
    for again in (False, True):  # made, then read
        cache, maker, encoder = make(matches)
        for task in TASKS:
            for vectors in (True, False):
                for example in maker.examples(task, split):
                    found = cache.prompt(maker, encoder, example, split, vectors, None)
                    own = encoder.encode(maker.question(example, split), vectors)
                    assert found == own and isinstance(found.slots, list)
        assert again or all(f.with_suffix(".json").exists() for f in files(cache))


def files(cache):
    return sorted(cache.folder.glob("*.safetensors"))


def test_a_set_is_made_once(make):
    lines: list[str] = []
    for _ in range(2):
        cache, maker, encoder = make(log=lines.append)
        for example in maker.examples("ctr", "train"):
            cache.prompt(maker, encoder, example, "train", True, None)
    assert lines == ["encoding 80 prompts: ctr.train.default.vectors"]
    assert [f.name for f in files(cache)] == ["ctr.train.default.vectors.safetensors"]


@pytest.mark.parametrize("harm", ["cut", "changed", "no checksum", "broken checksum"])
def test_a_damaged_set_is_made_again(make, harm):
    cache, maker, encoder = make()
    example = maker.examples("ctr", "train")[0]
    expected = cache.prompt(maker, encoder, example, "train", True, None)
    (file,) = files(cache)
    whole = file.read_bytes()
    if harm == "cut":
        file.write_bytes(whole[:-8])
    elif harm == "changed":
        file.write_bytes(whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:])
    elif harm == "no checksum":
        file.with_suffix(".json").unlink()
    else:
        file.with_suffix(".json").write_text('{"sha')
    lines: list[str] = []
    cache, maker, encoder = make(log=lines.append)
    assert cache.prompt(maker, encoder, example, "train", True, None) == expected
    assert len(lines) == 1 and file.read_bytes() == whole
    assert json.loads(file.with_suffix(".json").read_text())["sha256"]


def test_other_prompts_have_another_key(make, small_run):
    keys = {make()[0].key, make(matches=True)[0].key}
    keys |= {make(history_titles=1)[0].key, make(item_word="record")[0].key}
    assert len(keys) == 4 and make()[0].key in keys
    _, maker, encoder = make()
    fewer = replace(maker.data, _rows={k: v[:5] for k, v in maker.data._rows.items()})
    assert cache_key(fewer, maker, encoder) not in keys
