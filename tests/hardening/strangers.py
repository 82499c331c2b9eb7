"""Damaged files of every kind, from valid ones, and what a reader may answer to them."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ckf.data.errors import DataError
from tests.data import samples

FORMATS = {
    "movielens-100k": ("u.data", "u.item"),
    "movielens-1m": ("ratings.dat", "movies.dat"),
    "movielens-csv": ("ratings.csv", "movies.csv"),
    "recbole": ("x.inter", "x.item"),
    "collm": ("train_ood2.jsonl.gz", "items.tsv"),
    "amazon": ("reviews_Books_5.json.gz", "meta_Books.json.gz"),
    "csv": ("mine.csv",),
    "jsonl": ("mine.jsonl",),
    "jsonl.gz": ("mine.jsonl.gz",),
    "parquet": ("mine.parquet",),
}

fuzzed = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

_ugly = st.sampled_from(
    [
        b"\x00", b"\xff\xfe", b"\n", b"\r", b'"', b"\\", b"{", b"[" * 3000, b"nan", b"-1", b"1e999",
        b"9" * 5000, b"\xed\xa0\x80", b"null", b"true", b"\t\t\t\t", b"::::", b",,,,", b"||||",
        rb"\ud800", b"(" * 3000, b"-" * 3000 + b"1", "\u202e\u0000é\U0001f600".encode(), b"1" * 20,
    ]
)  # fmt: skip


@st.composite
def damage(draw):
    """A function from bytes to damaged bytes: cut, spliced, flipped, repeated, or replaced."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["cut", "splice", "over", "flip", "repeat", "whole"]),
                st.floats(0, 1),
                st.floats(0, 1),
                st.one_of(_ugly, st.binary(min_size=1, max_size=12)),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def apply(data: bytes) -> bytes:
        for kind, first, second, piece in steps:
            low, high = sorted((int(first * len(data)), int(second * len(data))))
            if kind == "cut":
                data = data[:low] + data[high:]
            elif kind == "splice":
                data = data[:low] + piece + data[low:]
            elif kind == "over":
                data = data[:low] + piece + data[low + len(piece) :]
            elif kind == "flip" and data:
                low = min(low, len(data) - 1)
                data = data[:low] + bytes([data[low] ^ (piece[0] or 1)]) + data[low + 1 :]
            elif kind == "repeat":
                data = data[:high] + data[low:high] * 3 + data[high:]
            elif kind == "whole":
                data = piece * 20
        return data

    return apply


def write_valid(kind: str, folder) -> tuple[dict, list]:
    """A small valid data set and the settings that read it; and its files, the rows first."""
    rows = samples.events(users=6, items=12, rows=8)
    options = {"format": kind, "max_bad_share": 1.0}
    if "." in kind or kind in ("csv", "jsonl", "parquet"):
        _, columns = samples.table(folder, rows, kind)
        options |= {"format": "table", "columns": columns}
    elif kind == "collm":
        samples.collm(folder, rows)
        options["split"] = "given"
    else:
        getattr(samples, kind.replace("-", "_"))(folder, rows)
    return options, [folder / name for name in FORMATS[kind]]


def answers(function) -> Exception | None:
    """What a reader said to a damaged file: nothing, or an error that it means to raise."""
    try:
        function()
    except DataError as error:
        assert str(error)
        return error
    return None
