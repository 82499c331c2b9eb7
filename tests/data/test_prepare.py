"""The prepared folder as a whole: no leakage, checksums, reuse, nothing half-written."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from ckf.data import prepare as module
from ckf.data.config import SPLITS, TASKS, DataConfig, TaskRows
from ckf.data.errors import DataError
from ckf.data.prepared import load_prepared
from tests.data import samples

EVENTS = samples.events(users=30, items=60, rows=20)
LISTS = ["uniform9", "uniform19"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return samples.amazon(tmp_path_factory.mktemp("raw"), EVENTS)


@pytest.fixture(scope="module")
def data(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    return samples.prepared(raw, out, TASKS, format="amazon", test_lists=LISTS, history=4)


def same_bytes(one, two) -> bool:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_types_are_as_promised(data):
    n = len(data)
    kinds = {"user": "int32", "item": "int32", "rating": "float32", "label": "int8"}
    kinds |= {"time": "int64", "split": "int8", "not_cold": "int8", "has_text": "bool"}
    for name, kind in kinds.items():
        assert getattr(data, name).dtype == kind and getattr(data, name).shape == (n,)
    assert data.history.dtype == "int32" and data.history.shape == (n, 4)
    assert len(data.user_ids) == data.n_users and len(data.titles) == data.n_items
    assert (data.not_cold == -1).all()


def test_nothing_leaks(data):
    pairs = list(zip(data.user, data.item, strict=True))
    liked = {pairs[row] for row in np.flatnonzero(data.label == 1)}
    known = {pairs[row] for row in np.flatnonzero((data.label == 1) & (data.split == 0))}
    for task in TASKS:
        for value, name in enumerate(SPLITS):
            rows = data.rows(task, name)
            assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
            assert (data.split[rows] == value).all()
    drawn = {name: set() for name in SPLITS}
    for name in SPLITS:
        for list_name in LISTS if name != "train" else ["uniform9"]:
            made = data.candidates(name, list_name)
            assert (made.rows == data.rows("topk", name)).all()
            for row, items, place in zip(made.rows, made.items, made.positive, strict=True):
                assert data.label[row] == 1 and items[place] == data.item[row]
                negatives = np.delete(items, place)
                negative_pairs = {(data.user[row], item) for item in negatives}
                assert not negative_pairs & (known if name == "train" else liked)
                drawn[name] |= negative_pairs
    assert drawn["train"] & (liked - known)  # which later splits like tells train nothing
    for row in range(len(data)):
        earlier = (data.user == data.user[row]) & (data.time < data.time[row])
        past = data.history[row][data.history[row] >= 0]
        assert set(past) <= set(data.item[earlier & (data.label == 1)])


def test_a_given_split_in_no_order_of_time_leaks_no_test_rows(tmp_path):
    split = np.random.default_rng(0).choice(SPLITS, len(EVENTS))
    lines = [
        json.dumps(dict(zip(("u", "i", "r", "t", "s"), (*event, name), strict=True)))
        for event, name in zip(EVENTS, split, strict=True)
    ]
    samples.write(tmp_path / "raw" / "mine.jsonl", "\n".join(lines))
    columns = {"user": "u", "item": "i", "rating": "r", "time": "t", "split": "s"}
    given = {"format": "table", "columns": columns, "split": "given"}
    data = samples.prepared(tmp_path / "raw", tmp_path / "out", **given)
    of = {(u, i): s for u, i, s in zip(data.user, data.item, data.split, strict=True)}
    row, place = np.nonzero(data.history >= 0)
    pairs = zip(data.user[row], data.history[row, place], strict=True)
    shown = np.array([of[pair] for pair in pairs])
    assert set(shown) == {0, 1, 2} and (shown <= data.split[row]).all()


def on_scale(folder, scale):
    """EVENTS with other ratings, as a table; its settings."""
    lines = [
        json.dumps({"u": u, "i": i, "r": scale(r, n), "t": t})
        for n, (u, i, r, t) in enumerate(EVENTS)
    ]
    samples.write(folder / "mine.jsonl", "\n".join(lines))
    return {"format": "table", "columns": {"user": "u", "item": "i", "rating": "r", "time": "t"}}


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (lambda r, n: 2 * r, r"go from 2 to 10, and \d+ of 600 do not round to 1..5.*halve them"),
        (lambda r, n: r - 1, r"go from 0 to 4, and \d+ of 600 "),
        (lambda r, n: 6 if n < 7 else r, r"go from 1 to 6, and 7 of 600 "),
    ],
)
def test_ratings_on_another_scale_are_no_stars(scale, said, tmp_path):
    raw = tmp_path / "raw"
    settings = on_scale(raw, scale)
    with pytest.raises(DataError, match=said):
        samples.prepared(raw, tmp_path / "out", ["ctr", "rating"], **settings)
    clicks = samples.prepared(raw, tmp_path / "out", ["ctr"], like_threshold=3, **settings)
    assert len(clicks) == len(EVENTS)


def test_one_rating_in_a_hundred_may_be_odd(tmp_path):
    settings = on_scale(tmp_path / "raw", lambda r, n: 6 if n < 6 else r)
    data = samples.prepared(tmp_path / "raw", tmp_path / "out", ["rating"], **settings)
    assert sum(len(data.rows("rating", name)) for name in SPLITS) == len(EVENTS) - 6


@pytest.mark.parametrize("threshold", [0.5, 6])
def test_clicks_of_one_label_are_no_ctr(threshold, raw, tmp_path):
    alike = {"format": "amazon", "like_threshold": threshold}
    label = int(threshold < 1)
    said = rf"both labels, but all \d+ rows of split 'train' .* label {label}: use topk for clicks"
    with pytest.raises(DataError, match=said):
        samples.prepared(raw, tmp_path / "out", ["ctr"], **alike)
    with pytest.raises(DataError, match="rows of split 'test' of sample have label"):
        samples.prepared(raw, tmp_path / "out", {"ctr": TaskRows(0, 0, None)}, **alike)
    other = {"ctr": TaskRows(0, 0, 0), ("topk" if label else "rating"): TaskRows()}
    samples.prepared(raw, tmp_path / "out", other, **alike)


def test_the_scale_and_the_share_liked_are_said(raw, tmp_path):
    said = []
    config = DataConfig("sample", "amazon", like_threshold=3)
    module.prepare(config, {"ctr": TaskRows()}, raw, tmp_path / "out", 0, said.append)
    liked = np.mean([stars >= 3 for _, _, stars, _ in EVENTS])
    assert f"ratings from 1 to 5; {liked:.0%} of the rows are liked (data.like_threshold 3)" in said


def test_eligible_rows(data):
    for task in ("ctr", "rating", "review_rating"):
        assert sum(len(data.rows(task, name)) for name in SPLITS) == len(data)
    assert sum(len(data.rows("topk", name)) for name in SPLITS) == (data.label == 1).sum()
    assert all(data.explanation(row) for row in data.rows("explain", "test"))


def test_texts_are_ordinary_safetensors_and_pickle(data):
    arrays = load_file(data.folder / "texts.safetensors")
    blob, offsets = arrays["blob"], arrays["offsets"]
    assert len(offsets) == len(data) + 1
    assert bytes(blob[offsets[5] : offsets[6]]).decode() == data.text(5)
    again = pickle.loads(pickle.dumps(data))
    assert again.text(5) == data.text(5)
    with pytest.raises(IndexError):
        data.text(-1)


def test_texts_stay_with_their_rows(tmp_path):
    rows = [
        samples.review(2014, u, i, r, t, f"déjà {u} {i}" if i % 3 else "") for u, i, r, t in EVENTS
    ]
    raw = samples.write(tmp_path / "reviews.json", "\n".join(map(json.dumps, rows)))
    data = samples.prepared(raw, tmp_path / "out", ["ctr"], format="amazon", min_item=8)
    for row in range(len(data)):
        user, item = data.user_ids[data.user[row]][1:], data.item_ids[data.item[row]][1:]
        assert data.text(row) == (f"déjà {user} {item}" if int(item) % 3 else "")
        assert data.has_text[row] == (int(item) % 3 != 0)


def test_two_prepares_give_the_same_bytes(raw, data, tmp_path):
    settings = {"format": "amazon", "test_lists": LISTS, "history": 4}
    again = samples.prepared(raw, tmp_path / "out", TASKS, **settings)
    assert same_bytes(data.folder, again.folder)
    moved = shutil.copytree(raw, tmp_path / "moved")  # where the files lie does not matter
    assert same_bytes(
        data.folder, samples.prepared(moved, tmp_path / "2", TASKS, **settings).folder
    )
    other = samples.prepared(raw, tmp_path / "3", TASKS, seed=1, **settings)
    assert not same_bytes(data.folder, other.folder)


def test_rows_are_sampled_with_the_seed(raw, tmp_path):
    tasks = {"ctr": TaskRows(50, 10, 0), "explain": TaskRows(7, 7, 7), "topk": TaskRows(20, 5, 5)}
    one = samples.prepared(raw, tmp_path / "1", tasks, format="amazon")
    assert [len(one.rows("ctr", name)) for name in SPLITS] == [50, 10, 0]
    assert len(one.rows("explain", "test")) == 7
    assert len(one.candidates("train", "uniform9").rows) == 20
    two = samples.prepared(raw, tmp_path / "2", tasks, seed=5, format="amazon")
    assert one.rows("ctr", "train").tolist() != two.rows("ctr", "train").tolist()


def test_the_same_settings_reuse_the_folder(raw, tmp_path, monkeypatch):
    out = tmp_path / "out"
    samples.prepared(raw, out, format="amazon")
    monkeypatch.setattr(module, "_write", None)  # would raise if it were made again
    samples.prepared(raw, out, format="amazon")
    samples.prepared(None, out, format="amazon", path=str(raw))


def test_other_settings_or_files_are_refused(raw, tmp_path):
    out = tmp_path / "out"
    samples.prepared(raw, out, format="amazon")
    with pytest.raises(DataError, match="data.history: 10 there, 3 now.*choose another folder"):
        samples.prepared(raw, out, format="amazon", history=3)
    with pytest.raises(DataError, match="seed: 0 there, 1 now"):
        samples.prepared(raw, out, format="amazon", seed=1)
    changed = samples.amazon(tmp_path / "raw2", EVENTS[:-1])
    with pytest.raises(DataError, match="sources.reviews_Books_5.json.gz"):
        samples.prepared(changed, out, format="amazon")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="no prepared data folder; choose another"):
        samples.prepared(raw, tmp_path / "mine", format="amazon")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("stage", ["write_texts", "select_rows", "write_manifest", "clean"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_on_the_way_leaves_nothing(stage, error, raw, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fail)
        with pytest.raises(type(error)):
            samples.prepared(raw, tmp_path / "out", format="amazon")
    assert list(tmp_path.iterdir()) == []
    assert len(samples.prepared(raw, tmp_path / "out", format="amazon")) == len(EVENTS)


@pytest.mark.parametrize(
    "name",
    ["interactions", "texts", "tasks", "candidates", "names"],
)
def test_every_changed_byte_is_noticed(name, data, tmp_path):
    copy = shutil.copytree(data.folder, tmp_path / "copy")
    path = next(copy.glob(f"{name}.*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{path.name} has sha256 .* prepare it again"):
        load_prepared(copy)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name} is missing.* prepare it again"):
        load_prepared(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_damaged_manifest(text, data, tmp_path):
    copy = shutil.copytree(data.folder, tmp_path / "copy")
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="prepare it again"):
        load_prepared(copy)
    with pytest.raises(DataError, match="prepare it first"):
        load_prepared(tmp_path / "nowhere")


def test_unprepared_tasks_and_lists_say_what_there_is(data):
    with pytest.raises(DataError, match=r"'sing'.*ctr.test"):
        data.rows("sing", "test")
    with pytest.raises(DataError, match=r"'popular99'.*test.uniform19"):
        data.candidates("test", "popular99")


def test_tasks_without_rows_are_refused(tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    with pytest.raises(DataError, match="task 'explain' has no usable row.*needs review texts"):
        samples.prepared(raw, tmp_path / "out", ["ctr", "explain"], format="movielens-100k")
    with pytest.raises(DataError, match="unknown task 'sing'; known are: ctr"):
        samples.prepared(raw, tmp_path / "out", ["sing"], format="movielens-100k")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "netflix"}, "must be one of: movielens-100k"),
        ({"format": "amazon", "split": {"kind": "random"}}, "must be one of: per_user_time"),
        ({"format": "amazon", "split": {"kynd": 1}}, r"unknown keys \['kynd'\]; known are: kind"),
        ({"format": "amazon", "split": {"valid": 0.6, "test": 0.5}}, "below 1"),
        ({"format": "amazon", "split": {"test": 0.0}}, "must lie between 0 and 1"),
        ({"format": "amazon", "history": 0}, "history is 0; it must be a whole number from 1"),
        ({"format": "amazon", "like_threshold": "4"}, "like_threshold is '4'"),
        ({"format": "amazon", "train_list": "uniform7"}, "must be one of: uniform9"),
        ({"format": "amazon", "test_lists": "uniform9"}, r"a list such as \[uniform9\]"),
        ({"format": "amazon", "columns": {"user": "u"}}, "for format 'table' only"),
        ({"format": "table", "columns": {"user": "u"}}, r"lacks item, time, rating \(or label\)"),
        ({"format": "table", "columns": {"usr": "u"}}, "'usr'; it must be one of: user"),
        ({"format": "table", "metadata": "i.csv"}, "metadata is 'i.csv', .* name .* as title"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(DataError, match=said):
        DataConfig("x", **settings)
