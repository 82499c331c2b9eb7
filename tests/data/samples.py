"""Small files in every format that is read, generated from one table of events."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from ckf.data.config import DataConfig, SplitConfig, TaskRows
from ckf.data.prepare import prepare

TITLES = ["Matrix, The (1999)", "Amélie (2001)", "Toy Story (1995)", "Misérables, Les (1995)"]
READ_TITLES = ["The Matrix (1999)", "Amélie (2001)", "Toy Story (1995)", "Les Misérables (1995)"]
REVIEW = "Bought it in May. I love how it sounds &amp; feels!It never fails."


def events(users: int = 12, items: int = 30, rows: int = 10, seed: int = 0) -> list[tuple]:
    """(user, item, stars, time) with ties in time; every user has `rows` different items."""
    rng = np.random.default_rng(seed)
    out = []
    for user in range(1, users + 1):
        times = np.sort(rng.integers(0, rows, size=rows)) * 100 + 1_000_000_000
        chosen = rng.choice(items, size=rows, replace=False) + 1
        stars = rng.integers(1, 6, size=rows)
        stars[:3] = 5  # somebody likes something
        stars[-2:] = 4
        out += zip([user] * rows, chosen.tolist(), stars.tolist(), times.tolist(), strict=True)
    return out


def titles(items: int = 30) -> dict[int, str]:
    """Raw titles by item id: the awkward ones first."""
    return {
        item: (TITLES[item - 1] if item <= 4 else f"Film {item} (1980)")
        for item in range(1, items + 1)
    }


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    """Text to a file, packed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def movielens_100k(folder: Path, rows: list[tuple]) -> Path:
    """u.data and u.item (latin-1)."""
    write(folder / "u.data", "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows))
    flags = "|".join("0" * 19)
    write(
        folder / "u.item",
        "".join(f"{i}|{t}|01-Jan-1995||http://x/|{flags}\n" for i, t in titles().items()),
        "latin-1",
    )
    return folder


def movielens_1m(folder: Path, rows: list[tuple]) -> Path:
    """ratings.dat and movies.dat (latin-1), and users.dat with zip codes that nobody may read."""
    write(folder / "ratings.dat", "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in rows))
    write(
        folder / "movies.dat",
        "".join(f"{i}::{t}::Drama|Comedy\n" for i, t in titles().items()),
        "latin-1",
    )
    write(folder / "users.dat", "1::F::1::10::48067\n")
    return folder


def movielens_csv(folder: Path, rows: list[tuple]) -> Path:
    """ratings.csv and movies.csv with quoted titles."""
    lines = "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in rows)
    write(folder / "ratings.csv", "userId,movieId,rating,timestamp\n" + lines)
    lines = "".join(f'{i},"{t}",Drama\n' for i, t in titles().items())
    write(folder / "movies.csv", "movieId,title,genres\n" + lines)
    return folder


def recbole(folder: Path, rows: list[tuple]) -> Path:
    """x.inter and x.item with typed headers; the year in a column of its own."""
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    write(folder / "x.inter", head + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in rows))
    head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    lines = [f"{i}\t{t[:-7]}\t{t[-5:-1]}\tDrama\n" for i, t in titles().items()]
    write(folder / "x.item", head + "".join(lines))
    return folder


def collm(folder: Path, rows: list[tuple]) -> Path:
    """The three files in order of time, packed, and items.tsv."""
    rows = sorted(rows, key=lambda row: row[3])
    cuts = [0, int(len(rows) * 0.6), int(len(rows) * 0.8), len(rows)]
    for number, name in enumerate(["train", "valid", "test"]):
        lines = [
            {"uid": u, "iid": i, "label": int(r > 3), "timestamp": t, "not_cold": 1, "his": [0, 7]}
            for u, i, r, t in rows[cuts[number] : cuts[number + 1]]
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write(folder / f"{name}_ood2.jsonl.gz", text)
    lines = "".join(f"{i}\t{t}\n" for i, t in titles().items())
    write(folder / "items.tsv", "iid\ttitle\n" + lines)
    return folder


def review(year: int, user, item, stars, time, text: str = REVIEW) -> dict:
    """One Amazon review as its year writes it, names and all."""
    if year == 2023:
        return {
            "rating": float(stars),
            "title": "Nice",
            "text": text,
            "images": [],
            "asin": f"V{item}",
            "parent_asin": f"B{item}",
            "user_id": f"A{user}",
            "timestamp": time * 1000 + 123,
            "helpful_vote": 0,
            "verified_purchase": True,
        }
    record = {"reviewerID": f"A{user}", "asin": f"B{item}", "reviewerName": "Jane Roe"}
    record |= {"reviewText": text, "overall": float(stars), "unixReviewTime": time}
    if year == 2018:
        record |= {"verified": True, "vote": "2", "reviewTime": "03 16, 2013"}
    return record


def amazon(folder: Path, rows: list[tuple], year: int = 2014, category: str = "Books") -> Path:
    """Reviews and metadata of a year; item 6 has an empty title, 7 none, 999 no review."""
    lines = "".join(json.dumps(review(year, *row)) + "\n" for row in rows)
    name = f"{category}.jsonl" if year == 2023 else f"{category}_5.json.gz"
    write(folder / (f"reviews_{name}" if year == 2014 else name), lines)
    key = "parent_asin" if year == 2023 else "asin"
    meta = []
    for item, title in [*titles().items(), (999, "Not reviewed")]:
        record = {key: f"B{item}", "title": title.replace("Film", "Film &amp;"), "price": 9.5}
        if item == 6:
            record["title"] = ""
        if item == 7:
            del record["title"]
        meta.append(repr(record) if year == 2014 else json.dumps(record))
    write(folder / ("meta_" + name.replace("_5", "")), "\n".join(meta) + "\n")
    return folder


def table(folder: Path, rows: list[tuple], kind: str = "csv") -> tuple[Path, dict]:
    """The user's own table and its column map."""
    columns = {"user": "who", "item": "what", "rating": "stars", "time": "when"}
    columns |= {"text": "words", "title": "name"}
    names = list(columns.values())
    records = [
        dict(
            zip(
                names, [f"u{u}", f"i{i}", r, t, 'so "good",\nreally good', f"Name {i}"], strict=True
            )
        )
        for u, i, r, t in rows
    ]
    path = folder / f"mine.{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    if kind.startswith("jsonl"):
        write(path, "".join(json.dumps(record) + "\n" for record in records))
    else:
        import polars as pl

        frame = pl.DataFrame(records)
        frame.write_parquet(path) if kind == "parquet" else write(path, frame.write_csv())
    return folder, columns


def prepared(raw: Path | None, out: Path, tasks=("ctr", "topk"), seed: int = 0, **settings):
    """Prepare with short settings; `split` may be a kind."""
    if isinstance(settings.get("split"), str):
        settings["split"] = SplitConfig(settings["split"])
    if not isinstance(tasks, dict):
        tasks = {task: TaskRows() for task in tasks}
    config = DataConfig("sample", **settings)
    return prepare(config, tasks, raw, out, seed, log=lambda line: None)
