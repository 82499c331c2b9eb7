"""Every format gives the same interactions from the same events."""

import gzip
import json

import numpy as np
import pytest

from ckf.data.errors import DataError
from tests.data import samples

EVENTS = samples.events()


def rows_of(data) -> set[tuple]:
    """{(user id, item id, time)} with the ids' letters taken off."""
    return {
        (int(data.user_ids[u].lstrip("Au")), int(data.item_ids[i].lstrip("Bi")), int(t))
        for u, i, t in zip(data.user, data.item, data.time, strict=True)
    }


def check_same(data, ratings: bool = True) -> None:
    assert len(data) == len(EVENTS)
    assert rows_of(data) == {(u, i, t) for u, i, _, t in EVENTS}
    assert (data.n_users, data.n_items) == (12, len({i for _, i, _, _ in EVENTS}))
    stars = {(u, i): r for u, i, r, _ in EVENTS}
    for row in range(len(data)):
        key = (
            int(data.user_ids[data.user[row]].lstrip("Au")),
            int(data.item_ids[data.item[row]].lstrip("Bi")),
        )
        assert data.label[row] == (stars[key] >= 4)
        assert not ratings or data.rating[row] == stars[key]
    keys = list(zip(data.user.tolist(), data.time.tolist(), strict=True))
    assert keys == sorted(keys)


def title_of(data, item: str) -> str:
    return data.titles[data.item_ids.index(item)]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (samples.movielens_100k, "movielens-100k"),
        (samples.movielens_1m, "movielens-1m"),
        (samples.movielens_csv, "movielens-csv"),
        (samples.recbole, "recbole"),
    ],
)
def test_movielens_and_recbole(make, name, tmp_path):
    data = samples.prepared(make(tmp_path / "raw", EVENTS), tmp_path / "out", format=name)
    check_same(data)
    assert [title_of(data, str(item)) for item in range(1, 5)] == samples.READ_TITLES
    assert not data.has_text.any() and data.text(0) == "" and data.explanation(0) == ""


def test_movielens_1m_never_opens_the_users(tmp_path):
    raw = samples.movielens_1m(tmp_path / "raw", EVENTS)
    samples.prepared(raw, tmp_path / "out", format="movielens-1m")
    assert not any(b"48067" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_movielens_copies_in_utf8_are_read_too(tmp_path):
    raw = samples.movielens_1m(tmp_path / "raw", EVENTS)
    movies = (raw / "movies.dat").read_bytes().decode("latin-1")
    samples.write(raw / "movies.dat", movies)
    data = samples.prepared(raw, tmp_path / "out", format="movielens-1m")
    assert title_of(data, "2") == "Amélie (2001)"


def test_half_stars(tmp_path):
    raw = samples.movielens_csv(tmp_path / "raw", EVENTS)
    text = (raw / "ratings.csv").read_text().replace(",4.0,", ",3.5,").replace(",1.0,", ",0.5,")
    samples.write(raw / "ratings.csv", text)
    data = samples.prepared(raw, tmp_path / "out", tasks=["rating"], format="movielens-csv")
    assert set(np.unique(data.rating)) == {0.5, 2.0, 3.0, 3.5, 5.0}
    assert (data.label == (data.rating >= 4)).all()
    assert sum(len(data.rows("rating", name)) for name in ("train", "valid", "test")) == len(data)


def test_collm_keeps_its_split_and_ignores_his(tmp_path):
    raw = samples.collm(tmp_path / "raw", EVENTS)
    data = samples.prepared(raw, tmp_path / "out", format="collm", split="given")
    check_same(data, ratings=False)
    assert np.isnan(data.rating).all() and (data.not_cold == 1).all()
    assert np.bincount(data.split).tolist() == [72, 24, 24]
    assert title_of(data, "1") == "The Matrix (1999)"
    assert (data.history[data.time == data.time.min()] == -1).all()  # not item 7, not item 0


def test_collm_needs_the_given_split(tmp_path):
    raw = samples.collm(tmp_path / "raw", EVENTS)
    with pytest.raises(DataError, match="set data.split.kind: given"):
        samples.prepared(raw, tmp_path / "out", format="collm")


@pytest.mark.parametrize("year", [2014, 2018, 2023])
@pytest.mark.parametrize("category", ["Books", "Movies_and_TV"])
def test_amazon(year, category, tmp_path):
    raw = samples.amazon(tmp_path / "raw", EVENTS, year, category)
    tasks = ["ctr", "topk", "rating", "explain", "review_rating"]
    data = samples.prepared(raw, tmp_path / "out", tasks=tasks, format="amazon")
    check_same(data)
    assert data.has_text.all()
    assert data.text(3) == "Bought it in May. I love how it sounds & feels!It never fails."
    assert data.explanation(3) == "I love how it sounds & feels!"
    assert title_of(data, "B8") == "Film & 8 (1980)"
    assert title_of(data, "B1") == "Matrix, The (1999)"  # articles are moved for MovieLens only
    assert [title_of(data, f"B{item}") for item in (6, 7)] == ["", ""]
    assert data.title(data.item_ids.index("B6")) == "item B6"
    stored = b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())
    assert b"Jane Roe" not in stored and b"Not reviewed" not in stored


def test_amazon_2018_without_text_or_unix_time(tmp_path):
    lines = [samples.review(2018, *row) for row in EVENTS]
    for line in lines[::2]:
        del line["reviewText"]
    lines[0] = {**lines[0], "reviewTime": "09 12, 2006"}
    del lines[0]["unixReviewTime"]
    raw = samples.write(tmp_path / "Books_5.json", "\n".join(map(json.dumps, lines)))
    data = samples.prepared(raw, tmp_path / "out", format="amazon")
    assert data.has_text.sum() == len(EVENTS) // 2
    first = int(np.flatnonzero(data.item == data.item_ids.index(lines[0]["asin"]))[0])
    assert 1158019200 in data.time and first >= 0


def test_amazon_metadata_is_never_evaluated(tmp_path):
    raw = samples.amazon(tmp_path / "raw", EVENTS)
    mark = tmp_path / "evaluated"
    bad = f"{{'asin': 'B1', 'title': open({str(mark)!r}, 'w').name}}\n"
    meta = gzip.decompress((raw / "meta_Books.json.gz").read_bytes()).decode()
    samples.write(raw / "meta_Books.json.gz", meta + bad)
    with pytest.raises(DataError, match=r"meta_Books.json.gz:32: neither JSON nor a Python lit"):
        samples.prepared(raw, tmp_path / "out", format="amazon")
    assert not mark.exists()


def test_gzip_is_told_by_content_not_by_name(tmp_path):
    raw = samples.movielens_100k(tmp_path / "raw", EVENTS)
    plain = (raw / "u.data").read_bytes()
    (raw / "u.data").write_bytes(gzip.compress(plain))
    check_same(samples.prepared(raw, tmp_path / "out", format="movielens-100k"))


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_table(kind, tmp_path):
    raw, columns = samples.table(tmp_path / "raw", EVENTS, kind)
    data = samples.prepared(raw, tmp_path / "out", format="table", columns=columns)
    check_same(data)
    assert data.text(0) == 'so "good", really good'
    assert title_of(data, "i8") == "Name 8"


def test_table_by_path_to_the_file_with_labels_splits_and_dates(tmp_path):
    lines = ["who,what,liked,when,part"]
    for number in range(12):
        part = ["train", "Validation", "test"][number % 3]
        lines.append(f"u{number % 4},i{number},{number % 2},2020-01-{number + 1:02},{part}")
    raw = samples.write(tmp_path / "mine.csv", "\n".join(lines))
    columns = {"user": "who", "item": "what", "label": "liked", "time": "when", "split": "part"}
    data = samples.prepared(
        raw, tmp_path / "out", ["ctr"], format="table", columns=columns, split="given"
    )
    assert len(data) == 12 and data.label.sum() == 6 and np.isnan(data.rating).all()
    assert data.time.min() == 1577836800 and data.time.max() == 1577836800 + 11 * 86400
    assert np.bincount(data.split).tolist() == [4, 4, 4]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_table_with_a_missing_column_lists_what_there_is(kind, tmp_path):
    raw, columns = samples.table(tmp_path / "raw", EVENTS, kind)
    with pytest.raises(DataError, match=r"'points' \(for rating\).*who, what, stars, when"):
        samples.prepared(
            raw, tmp_path / "out", format="table", columns=columns | {"rating": "points"}
        )


def test_movielens_csv_with_a_missing_column(tmp_path):
    raw = samples.movielens_csv(tmp_path / "raw", EVENTS)
    text = (raw / "ratings.csv").read_text().replace("rating,", "score,", 1)
    samples.write(raw / "ratings.csv", text)
    with pytest.raises(DataError, match="no column 'rating'.*userId, movieId, score, timestamp"):
        samples.prepared(raw, tmp_path / "out", format="movielens-csv")
