"""Every figure of the pages is what their records say."""

import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.summary import speed

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, FRONT = ROOT / "benchmarks" / "README.md", ROOT / "README.md"


def blocks(page: Path) -> dict[str, str]:
    """Text between marks, by name."""
    found = re.findall(
        r"<!-- begin (\S+) -->\n(.*?)<!-- end \1 -->", page.read_text(encoding="utf-8"), re.S
    )
    return {name: text.strip() for name, text in found}


def rendered(folder: str) -> tuple[str, str]:
    """(block of the page, block of the front page); empty without a record to render."""
    results = RESULTS / folder
    try:
        records = report.load_records(results)
    except ValueError:
        return "", ""
    return report.block(records, results, PAGE), speed(records, folder)


@pytest.mark.parametrize("name", sorted(blocks(PAGE)))
def test_the_page_says_what_its_records_say(name):
    assert blocks(PAGE)[name] == rendered(name)[0], (
        f"run python benchmarks/report.py --results benchmarks/results/{name}"
    )


def test_the_front_page_says_what_its_records_say():
    found = {name: text for name, text in blocks(FRONT).items() if name.startswith("speed-")}
    assert found, "README.md has no block for the figures"
    for name, text in found.items():
        assert text == rendered(name.removeprefix("speed-"))[1]
    assert "SPEED_RESULT" not in FRONT.read_text()


def test_every_picture_of_the_page_is_there():
    for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / link).exists(), link


def test_every_measured_folder_has_its_block():
    measured = {path.parent.name for path in RESULTS.glob("*/bench_*.json")}
    assert measured <= set(blocks(PAGE))
