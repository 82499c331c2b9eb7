"""Records on disk: JSON with the environment, CSV with the rows; an interrupted run goes on."""

import csv
import json
import os
from datetime import UTC, datetime
from pathlib import Path

FORMAT = 2


class Record:
    """The rows of one benchmark, written after every case.

    A case that is finished in the file is kept where settings, commit and sources are the same;
    else the file is written anew, and what was there stays beside it, as ``<name>.<time>.json``,
    until all its cases are measured. Cases with a red check are measured again.

    Args:
        name: of the files, ``<out>/<name>.json`` and ``.csv``.
        out: folder, or None to keep nothing on disk.
        about: ``harness.environment``.
        settings: what else must agree for a row to be kept.
        fresh: keep nothing of an earlier run.
    """

    def __init__(
        self, name: str, out: Path | None, about: dict, settings: dict, fresh: bool = False
    ) -> None:
        self.name, self.out = name, out
        self.about, self.settings = about, settings
        self.cases: list[dict] = []  # {"case", "rows", "skipped"}
        earlier = None if out is None else self._earlier()
        if earlier is not None and not fresh and self._goes_on(earlier):
            self.cases, earlier = earlier["cases"], None
        self._other = earlier  # what is to be written over
        self.resumed = sum(not _open(case) for case in self.cases)

    @property
    def rows(self) -> list[dict]:
        return [case["case"] | row for case in self.cases for row in case["rows"]]

    def done(self, case: dict) -> bool:
        """Whether the rows of a case are there already; what was red or cut is measured again."""
        return any(known["case"] == case and not _open(known) for known in self.cases)

    def add(
        self,
        case: dict,
        rows: list[dict],
        skipped: dict[str, str] | None = None,
        finished: bool = True,
    ) -> None:
        """The rows of a case, a row a provider; ``skipped``: provider to reason; ``finished``:
        False while there are more to come."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.cases = [known for known in self.cases if known["case"] != case]
        own = {"case": case, "time": now, "skipped": skipped or {}, "rows": rows}
        self.cases.append(own if finished else own | {"finished": False})
        self.write()

    def write(self) -> None:
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self._other is not None:
            self._keep_other()
        record = {
            "format": FORMAT,
            "environment": self.about,
            "settings": self.settings,
            "cases": self.cases,
        }
        _replace(self.out / f"{self.name}.json", json.dumps(record, indent=1) + "\n")
        _write_csv(self.out / f"{self.name}.csv", self.rows)

    def _earlier(self) -> dict | None:
        try:
            return load_record(self.out / f"{self.name}.json")
        except (OSError, ValueError):
            return None

    def _goes_on(self, earlier: dict) -> bool:
        keys = ("commit", "sources", "device", "threads", "torch")
        same = all(earlier["environment"].get(k) == self.about.get(k) for k in keys)
        return same and earlier["settings"] == self.settings

    def _keep_other(self) -> None:
        """A short run must not cost the rows of a longer one."""
        time = "".join(c for c in self._other["environment"].get("time", "")[:19] if c != ":")
        path = self.out / f"{self.name}.{time or 'before'}.json"
        measured = [c["case"] for c in self.cases if c["rows"] and c.get("finished", True)]
        if all(case["case"] in measured for case in self._other["cases"] if case["rows"]):
            path.unlink(missing_ok=True)
        elif not path.exists():
            _replace(path, json.dumps(self._other, indent=1) + "\n")


class Outcome:
    """Of one case, written whenever something is known: a time limit may end it anywhere.

    Args:
        record, case: where to; None: nowhere.
    """

    def __init__(self, record: Record | None = None, case: dict | None = None) -> None:
        self.record, self.case = record, case
        self.by_title: dict[str, dict] = {}
        self.reasons: dict[str, str] = {}  # why others have no row
        self._right: dict[str, str] = {}

    @property
    def rows(self) -> list[dict]:
        return list(self.by_title.values())

    def right(self, title: str, where: str) -> None:
        """It passed a check; should it get no row, the record says how far it came."""
        self._right[title] = f"right {where}; cut off before it was timed"
        self._write()

    def fails(self, title: str, why: str) -> None:
        self._right.pop(title, None)
        self.by_title.pop(title, None)
        self.reasons[title] = why
        self._write()

    def measured(self, rows: dict[str, dict]) -> None:
        """Rows by title; of one that has a row, a better one."""
        self.by_title |= rows
        self._write()

    def _write(self) -> None:
        if self.record is not None:
            right = {t: why for t, why in self._right.items() if t not in self.by_title}
            self.record.add(self.case, self.rows, self.reasons | right, finished=False)


def _open(case: dict) -> bool:
    """Red, or cut."""
    return not case.get("finished", True) or any(
        why.startswith("RED") for why in case["skipped"].values()
    )


def load_record(path: Path) -> dict:
    """A record as written; ValueError for a file of another format."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise ValueError(f"{path} has format {found}; expected {FORMAT}; measure again")
    return record


def rows_of(record: dict) -> list[dict]:
    """A dict a provider and case: the case's columns, then the provider's."""
    return [case["case"] | row for case in record["cases"] for row in case["rows"]]


def _write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
