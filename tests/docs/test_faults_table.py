"""Every row of docs/faults.md names a test that is there, in the file that it links to."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "faults.md"


def rows() -> list[list[str]]:
    """The cells of every table row, without the rows of headings."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "Fault"]


def test_there_are_rows():
    assert len(rows()) > 30


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_a_row_names_a_test_that_is_there(row):
    assert len(row) == 4, "fault, promise, what is seen, test"
    assert all(row)
    *_, tests = row
    parts = re.findall(r"((?:`test_\w+`(?:, | in )?)+)\[(\w+\.py)\]\(([^)]+)\)", tests)
    assert parts, f"no test is named: {tests}"
    assert len(re.findall(r"\btest_\w+\.py\]", tests)) == len(parts)
    for names, shown, link in parts:
        file = (DOCUMENT.parent / link).resolve()
        assert file.name == shown
        existing = re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", names)) <= set(existing)
