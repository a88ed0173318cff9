"""A file of rows that a certification can be killed over and resumed from, at any moment."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedsmooth_core.certification.row_format import (
    HEADER,
    HEADER_WITH_N,
    CertifiedRow,
    Rows,
    format_row,
    parse_rows,
    read_rows,
)
from fedsmooth_core.durable import sync_folder, try_lock, write_atomically
from fedsmooth_core.errors import CertificationError, RowsInUseError

__all__ = ["Parameters", "RowFile", "Rows", "parameters_path", "read_parameters", "read_rows"]

Parameters = Mapping[str, str | int | float | bool | None]
"""What determines a certificate, by name."""

_NO_METHOD_YET = {"method": "fixed"}


def parameters_path(path: Path) -> Path:
    """Return the file beside a file of rows that says how they were certified."""
    return path.with_name(f"{path.name}.parameters.json")


def read_parameters(rows: Path) -> dict[str, Any] | None:
    """Return what the rows of a file were certified with, or None if that is not recorded.

    Where no ``method`` is recorded it is ``fixed``: there was no other when the file was begun.

    Raises:
        CertificationError: if the record is damaged.
    """
    beside = parameters_path(rows)
    if not beside.is_file():
        return None
    try:
        parameters = json.loads(beside.read_bytes())
    except ValueError:
        parameters = None
    if not isinstance(parameters, dict):
        raise CertificationError(
            f"{beside} is damaged: restore it from a copy, or certify into another file."
        )
    return _NO_METHOD_YET | parameters


class RowFile:
    """Append-only rows on disk, for one certification; a context manager.

    Opening a file again continues it: a last line torn by a crash is dropped (its image is
    certified again, to the same row), and what is finished is in :attr:`done`. An appended row is
    on the disk when :meth:`append` returns, so no finished image is lost, and none is written
    twice. One process at a time holds the file.

    Args:
        path: the file; it and its folder are made where they are missing.
        parameters: everything that determines a certificate (weights' hash, data set's fingerprint,
            and a :class:`~fedsmooth_core.certification.procedure.Procedure`'s terms). They are kept
            in ``<name>.parameters.json`` beside the rows, and must be the same when the rows are
            continued. Where their ``method`` is ``sequential``, rows have the column ``n``.

    Attributes:
        done: dataset indices of the images whose rows are in the file.

    Raises:
        CertificationError: if the rows were made with other or unknown parameters, another process
            is writing them (then a :class:`~fedsmooth_core.errors.RowsInUseError`), or the file is not
            one of rows. The file is then as it was.
    """

    done: set[int]

    def __init__(self, path: Path, parameters: Parameters) -> None:
        self._path = path
        self._with_n = parameters.get("method") == "sequential"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        try:
            self._lock()
            self._continue(dict(parameters))
        except BaseException:
            self._file.close()
            raise

    def append(self, row: CertifiedRow) -> None:
        """Put one row on the disk.

        Raises:
            CertificationError: as :meth:`extend`.
        """
        self.extend([row])

    def extend(self, rows: Sequence[CertifiedRow]) -> None:
        """Put several rows on the disk at once; of those that a crash interrupts, the first are there.

        Raises:
            CertificationError: if an image is in the file already, or a row's n is missing or out of
                place. The file is then as it was.
        """
        done = set(self.done)
        for row in rows:
            self._check(row, done)
            done.add(row.idx)
        if rows:
            self._write("\n".join(format_row(row) for row in rows))
        self.done.update(row.idx for row in rows)

    def _check(self, row: CertifiedRow, done: set[int]) -> None:
        if (row.n is not None) != self._with_n:
            raise CertificationError(
                f"{self._path} cannot hold image {row.idx}: the column n belongs to sequential "
                "certification, and there to every row."
            )
        if row.idx in done:
            raise CertificationError(
                f"image {row.idx} is certified in {self._path} already: skip what is in `done`."
            )

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        if not try_lock(self._file):
            raise RowsInUseError(
                f"{self._path} is being written by another process: wait until it ends, or stop it."
            )

    def _continue(self, parameters: dict[str, str | int | float | bool | None]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        # A file that holds something else must not lose its last line: look before truncating.
        torn_header = not whole and HEADER_WITH_N.encode().startswith(content)
        self.done = set()
        if not torn_header:
            self.done.update(parse_rows(whole or content, self._path).idx.tolist())
        if self.done:
            self._check_parameters(parameters)
            self._file.truncate(len(whole))
            return
        text = json.dumps(parameters, indent=2, sort_keys=True) + "\n"
        write_atomically(parameters_path(self._path), text.encode())
        self._file.truncate(0)
        self._write(HEADER_WITH_N if self._with_n else HEADER)
        sync_folder(self._path.parent)

    def _check_parameters(self, given: dict[str, str | int | float | bool | None]) -> None:
        parameters = _NO_METHOD_YET | given
        known = read_parameters(self._path)
        if known is None:
            raise CertificationError(
                f"{self._path} cannot be continued, because it is not recorded what its rows were "
                "certified with: certify into another file."
            )
        if known != parameters:
            differing = ", ".join(
                f"{name} ({known.get(name)!r} there, {parameters.get(name)!r} now)"
                for name in sorted({*known, *parameters})
                if known.get(name) != parameters.get(name)
            )
            raise CertificationError(
                f"{self._path} holds rows certified with other parameters, namely {differing}: use "
                "the same ones, or certify into another file."
            )

    def _write(self, line: str) -> None:
        # One write a line: a reader of a growing file sees whole lines.
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
