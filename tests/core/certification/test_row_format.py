from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmooth_core.certification.row_format import (
    HEADER,
    HEADER_WITH_N,
    CertifiedRow,
    Rows,
    format_row,
    parse_rows,
    read_rows,
)
from fedsmooth_core.errors import CertificationError

not_negative = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
certified_rows = st.lists(
    st.builds(
        CertifiedRow,
        idx=st.integers(0, 10**9),
        label=st.integers(0, 1000),
        predict=st.integers(-1, 1000),
        radius=not_negative,
        correct=st.just(0),
        time=not_negative,
    ).map(lambda row: replace(row, correct=int(row.predict == row.label))),
    unique_by=lambda row: row.idx,
)


def written(tmp_path, text):
    path = tmp_path / "rows.tsv"
    path.write_bytes(text.encode())
    return path


@given(certified_rows, st.sampled_from(["\n", "\r\n"]), st.integers(0, 3))
def test_what_is_written_reads_back_exactly(tmp_path_factory, rows, end, blank_lines):
    text = end.join([HEADER, *map(format_row, rows)]) + end * (1 + blank_lines)
    read = parse_rows(text.encode(), tmp_path_factory.getbasetemp())
    expected = Rows.of(rows)
    for column in HEADER.split("\t"):
        actual = getattr(read, column)
        np.testing.assert_array_equal(actual, getattr(expected, column))
        assert actual.dtype == (np.float64 if column in ("radius", "time") else np.int64)


@given(certified_rows, st.lists(st.integers(1, 10**12)))
def test_rows_that_say_their_n_read_back_exactly(tmp_path_factory, rows, draws):
    rows = [replace(row, n=n) for row, n in zip(rows, draws, strict=False)]
    text = "\n".join([HEADER_WITH_N, *map(format_row, rows)])
    read = parse_rows(text.encode(), tmp_path_factory.getbasetemp())
    assert read.idx.tolist() == [row.idx for row in rows]
    assert read.radius.tolist() == [row.radius for row in rows]
    assert ([] if read.n is None else read.n.tolist()) == [row.n for row in rows]


def test_rows_with_and_without_n_do_not_mix():
    row = CertifiedRow(0, label=3, predict=3, radius=0.5, correct=1, time=1.0)
    assert Rows.of([row]).n is None
    with pytest.raises(CertificationError, match="some do not"):
        Rows.of([row, replace(row, idx=1, n=128)])


def test_what_published_files_hold(tmp_path):
    path = written(
        tmp_path,
        f"{HEADER}\n0\t3\t-1\t0.0\t0\t0:00:13.736080\n20\t7\t7\t9.99e-05\t1\t15.4\n"
        "40\t1\t1\t0.5\t1\t1 day, 2:03:04\n60\t1\t2\t0.5\t0\t0:01:00",
    )
    rows = read_rows(path)
    assert rows.idx.tolist() == [0, 20, 40, 60]
    assert rows.predict.tolist() == [-1, 7, 1, 2]
    assert rows.radius.tolist() == [0, 9.99e-05, 0.5, 0.5]
    assert rows.correct.tolist() == [0, 1, 1, 0]
    assert rows.time.tolist() == [13.73608, 15.4, 93784, 60]


def test_a_header_alone_is_no_rows(tmp_path):
    assert len(read_rows(written(tmp_path, HEADER))) == 0
    assert len(read_rows(written(tmp_path, HEADER + "\r\n\r\n"))) == 0


GOOD = "0\t3\t3\t0.5\t1\t1.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1.*header"),
        (f"{GOOD}\n", "line 1.*header"),
        ("idx label predict radius correct time\n", "line 1.*header"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\t0.5\t1\n", "line 3.*5 columns where 6"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\t0.5\t1\t1.0\t1\n", "line 3.*7 columns where 6"),
        (f"{HEADER}\n{GOOD}\n\n{GOOD}\n", "line 3.*1 columns where 6"),
        (f"{HEADER}\n{GOOD}\nx\t3\t3\t0.5\t1\t1\n", "line 3.*idx='x'"),
        (f"{HEADER}\n{GOOD}\n1\t3.0\t3\t0.5\t1\t1\n", "line 3.*label='3.0'"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\tlarge\t1\t1\n", "line 3.*radius='large'"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\tnan\t1\t1\n", "line 3.*radius='nan'"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\t-0.1\t1\t1\n", "line 3.*radius='-0.1'"),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\t0.5\t2\t1\n", "line 3.*correct=2"),
        (f"{HEADER}\n{GOOD}\n1\t3\t4\t0.5\t1\t1\n", "line 3.*correct=1 contradicts"),
        (f"{HEADER}\n{GOOD}\n1\t3\t-7\t0.5\t0\t1\n", "line 3.*predict=-7"),
        (f"{HEADER}\n{GOOD}\n1_0\t3\t3\t0.5\t1\t1\n", "line 3.*idx='1_0'"),
        (f"{HEADER}\n{GOOD}\n{2**64}\t3\t3\t0.5\t1\t1\n", "line 3.*idx="),
        (f"{HEADER}\n{GOOD}\n1\t3\t3\t0.5\t1\t0:0\n", "line 3.*time='0:0'"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", "line 3.*image 0 is on line 2"),
        (f"{HEADER_WITH_N}\n{GOOD}\t128\n1\t3\t3\t0.5\t1\t1\n", "line 3.*6 columns where 7"),
        (f"{HEADER_WITH_N}\n{GOOD}\t0\n", "line 2.*n=0 is less than 1"),
        (f"{HEADER_WITH_N}\n{GOOD}\t1.5\n", r"line 2.*n='1\.5' is not a whole number"),
    ],
)
def test_what_is_no_row_is_named_with_its_file_and_line(tmp_path, text, message):
    with pytest.raises(CertificationError, match=rf"rows\.tsv, {message}") as caught:
        read_rows(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(HEADER.encode() + b"\n\xff\t3\t3\t0.5\t1\t1.0\n")
    with pytest.raises(CertificationError, match="line 2"):
        read_rows(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CertificationError, match=r"absent\.tsv cannot be read"):
        read_rows(tmp_path / "absent.tsv")
