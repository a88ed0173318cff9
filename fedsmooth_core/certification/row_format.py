"""The published format of certification rows: `idx label predict radius correct time`, tabs.

Rows of sequential certification have a seventh column, `n`, which the header says.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsmooth_core.certification.bounds import ABSTAIN
from fedsmooth_core.errors import CertificationError

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
HEADER = "\t".join(COLUMNS)
HEADER_WITH_N = f"{HEADER}\tn"
"""Of rows that say how many draws each image took."""

# How Cohen et al.'s code prints a duration: str(datetime.timedelta).
_INTEGER = re.compile(r"-?[0-9]{1,18}")
_TIMEDELTA = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True)
class CertifiedRow:
    """What is certified for one image: one line of the published format."""

    idx: int
    """Index of the image in its data set."""
    label: int
    """True class."""
    predict: int
    """Class of the smoothed classifier, or ``ABSTAIN``."""
    radius: float
    """Certified l2 radius in [0, 1] pixel units; 0 where the row abstains."""
    correct: int
    """1 if ``predict`` is ``label``, else 0."""
    time: float
    """Seconds spent on the image."""
    n: int | None = None
    """Draws that the certificate rests on, where each image has its own number; else None."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Certification rows as columns: NumPy arrays of one length, int64 or float64."""

    idx: NDArray[np.int64]
    label: NDArray[np.int64]
    predict: NDArray[np.int64]
    radius: NDArray[np.float64]
    correct: NDArray[np.int64]
    time: NDArray[np.float64]
    n: NDArray[np.int64] | None = None
    """None where all rows took the same number of draws, which the parameters say."""

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def of(cls, rows: Iterable[CertifiedRow]) -> "Rows":
        """Gather single rows, in their order; all of them say their n, or none.

        Raises:
            CertificationError: if some say it and some do not.
        """
        kept = list(rows)
        draws = [row.n for row in kept if row.n is not None]
        if draws and len(draws) < len(kept):
            raise CertificationError("some rows say how many draws they took and some do not.")
        return cls(
            idx=np.array([row.idx for row in kept], np.int64),
            label=np.array([row.label for row in kept], np.int64),
            predict=np.array([row.predict for row in kept], np.int64),
            radius=np.array([row.radius for row in kept], np.float64),
            correct=np.array([row.correct for row in kept], np.int64),
            time=np.array([row.time for row in kept], np.float64),
            n=np.array(draws, np.int64) if draws else None,
        )


def format_row(row: CertifiedRow) -> str:
    """Return the row's line, without its end; floats are written so that they read back exactly."""
    cells = [
        str(row.idx),
        str(row.label),
        str(row.predict),
        repr(float(row.radius)),
        str(row.correct),
        repr(float(row.time)),
    ]
    if row.n is not None:
        cells.append(str(row.n))
    return "\t".join(cells)


def read_rows(path: Path) -> Rows:
    """Read a file of rows, ours or published (time as seconds or as ``0:00:13.736080``).

    Blank lines at the end and Windows line ends are fine; a file of a header alone has no rows.

    Raises:
        CertificationError: naming file and line, if the file cannot be read, its header or a line
            is not of this format, or an image occurs twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CertificationError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_rows(content, path)


def parse_rows(content: bytes, path: Path) -> Rows:
    """Read rows from the content of a file; ``path`` is what errors call it.

    Raises:
        CertificationError: as :func:`read_rows`.
    """
    # What is not UTF-8 is not a number either: its line says so.
    lines = content.decode("utf-8", errors="replace").split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    header = lines[0].rstrip("\r") if lines else ""
    if header not in (HEADER, HEADER_WITH_N):
        raise CertificationError(
            f"{path}, line 1: the header is {header[:80]!r}, but certification rows start with "
            f"{HEADER!r} or {HEADER_WITH_N!r}."
        )
    rows: list[CertifiedRow] = []
    line_of_idx: dict[int, int] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = _parse_row(line.rstrip("\r"), with_n=header == HEADER_WITH_N)
        except ValueError as error:
            raise CertificationError(f"{path}, line {number}: {error}.") from error
        if row.idx in line_of_idx:
            raise CertificationError(
                f"{path}, line {number}: image {row.idx} is on line {line_of_idx[row.idx]} too: "
                "an image is certified once, so remove one of the two lines."
            )
        line_of_idx[row.idx] = number
        rows.append(row)
    return Rows.of(rows)


def _parse_row(line: str, with_n: bool) -> CertifiedRow:
    """Raise ValueError, saying what is wrong, if the line is not a row."""
    cells = line.split("\t")
    if len(cells) != len(COLUMNS) + with_n:
        raise ValueError(f"{len(cells)} columns where {len(COLUMNS) + with_n} are wanted")
    correct = _whole("correct", cells[4])
    if correct not in (0, 1):
        raise ValueError(f"correct={correct} is neither 0 nor 1")
    label, predict = _whole("label", cells[1]), _whole("predict", cells[2])
    if predict < ABSTAIN:
        raise ValueError(f"predict={predict} is neither a class nor {ABSTAIN}, an abstention")
    if correct != (predict == label):
        raise ValueError(f"correct={correct} contradicts label={label} and predict={predict}")
    return CertifiedRow(
        idx=_whole("idx", cells[0]),
        label=label,
        predict=predict,
        radius=_not_negative("radius", cells[3]),
        correct=correct,
        time=_seconds(cells[5]),
        n=_at_least_one("n", cells[6]) if with_n else None,
    )


def _whole(name: str, cell: str) -> int:
    # Not all that int() takes: no underscores, no spaces, and nothing beyond 64 bits.
    if _INTEGER.fullmatch(cell) is None:
        raise ValueError(f"{name}={cell!r} is not a whole number")
    return int(cell)


def _at_least_one(name: str, cell: str) -> int:
    value = _whole(name, cell)
    if value < 1:
        raise ValueError(f"{name}={cell} is less than 1")
    return value


def _not_negative(name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={cell!r} is not a finite number >= 0")
    return value


def _seconds(cell: str) -> float:
    match = _TIMEDELTA.fullmatch(cell)
    if match is None:
        return _not_negative("time", cell)
    days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
