import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import certify_to_file
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedsmooth_core.certification.row_format import (
    HEADER,
    HEADER_WITH_N,
    CertifiedRow,
    format_row,
)
from fedsmooth_core.certification.rows import (
    RowFile,
    parameters_path,
    read_parameters,
    read_rows,
)
from fedsmooth_core.errors import CertificationError

PARAMETERS = {"weights": "ab12", "sigma": 0.25, "n": 1000, "num_images": None}

SEQUENTIAL = PARAMETERS | {"method": "sequential", "radius_step": 0.25}


def row(idx):
    return CertifiedRow(idx, label=3, predict=3, radius=0.1 + idx / 3, correct=1, time=0.5)


def write_rows(path, indices, parameters=PARAMETERS):
    with RowFile(path, parameters) as file:
        for idx in indices:
            file.append(row(idx))


def test_rows_are_appended_over_several_openings(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.tsv"
    write_rows(path, [0, 20])
    with RowFile(path, PARAMETERS) as file:
        assert file.done == {0, 20}
        file.append(row(40))
        assert file.done == {0, 20, 40}
        # On the disk at once, not when the file is closed.
        assert read_rows(path).idx.tolist() == [0, 20, 40]
    expected = "".join(f"{line}\n" for line in [HEADER, *map(format_row, map(row, [0, 20, 40]))])
    assert path.read_text() == expected
    assert read_rows(path).radius.tolist() == [row(idx).radius for idx in (0, 20, 40)]


def test_a_finished_image_is_never_repeated(tmp_path):
    path = tmp_path / "rows.tsv"
    write_rows(path, [5])
    with RowFile(path, PARAMETERS) as file, pytest.raises(CertificationError, match="image 5"):
        file.append(row(5))
    assert read_rows(path).idx.tolist() == [5]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(cut=st.integers(min_value=0, max_value=160))
def test_a_crash_at_any_byte_loses_the_torn_line_alone(tmp_path, cut):
    path = tmp_path / "rows.tsv"
    path.unlink(missing_ok=True)
    write_rows(path, [0, 1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    finished = max(0, whole[:cut].count(b"\n") - 1)
    with RowFile(path, PARAMETERS) as file:
        assert file.done == set(range(finished))
        for idx in range(finished, 3):
            file.append(row(idx))
    assert path.read_bytes() == whole


def test_other_parameters_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "rows.tsv"
    write_rows(path, [0])
    before = path.read_bytes()
    other = {"weights": "cd34", "sigma": 0.25, "n": 1000, "num_images": None, "seed": 3}
    with pytest.raises(CertificationError) as caught:
        RowFile(path, other)
    message = str(caught.value)
    assert "weights ('ab12' there, 'cd34' now)" in message
    assert "seed (None there, 3 now)" in message
    assert "sigma (" not in message
    assert path.read_bytes() == before


def test_parameters_may_change_until_an_image_is_finished(tmp_path):
    path = tmp_path / "rows.tsv"
    write_rows(path, [])
    assert path.read_text() == HEADER + "\n"
    write_rows(path, [0], PARAMETERS | {"n": 7})
    assert json.loads(parameters_path(path).read_text()) == PARAMETERS | {"n": 7}
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "rows.tsv",
        "rows.tsv.parameters.json",
    ]


def test_a_file_begun_before_there_were_methods_is_of_fixed_n(tmp_path):
    path = tmp_path / "rows.tsv"
    write_rows(path, [0])
    assert "method" not in json.loads(parameters_path(path).read_text())
    assert read_parameters(path) == PARAMETERS | {"method": "fixed"}
    write_rows(path, [1], PARAMETERS | {"method": "fixed"})
    write_rows(path, [2])
    assert read_rows(path).idx.tolist() == [0, 1, 2]
    with pytest.raises(CertificationError, match=r"method \('fixed' there, 'sequential' now\)"):
        RowFile(path, SEQUENTIAL)


def test_sequential_rows_say_their_n(tmp_path):
    path = tmp_path / "rows.tsv"
    write_rows(path, [])  # whoever begins, the first row decides
    with RowFile(path, SEQUENTIAL) as file:
        file.append(replace(row(0), n=128))
        with pytest.raises(CertificationError, match="image 1: the column n"):
            file.append(row(1))
    with RowFile(path, SEQUENTIAL) as file:
        file.append(replace(row(1), n=1000))
    assert path.read_text().startswith(HEADER_WITH_N + "\n")
    assert read_rows(path).n.tolist() == [128, 1000]
    fixed = tmp_path / "fixed.tsv"
    with RowFile(fixed, PARAMETERS) as file, pytest.raises(CertificationError, match="column n"):
        file.append(replace(row(0), n=128))


@pytest.mark.parametrize("damage", [None, "{"])
def test_rows_of_unknown_parameters_are_not_continued(tmp_path, damage):
    path = tmp_path / "rows.tsv"
    write_rows(path, [0])
    parameters_path(path).unlink()
    if damage is not None:
        parameters_path(path).write_text(damage)
    with pytest.raises(CertificationError, match=r"cannot be continued|is damaged"):
        RowFile(path, PARAMETERS)


@pytest.mark.parametrize("content", ["a diary\nof importance", "no line end", "\n"])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "diary.txt"
    path.write_text(content)
    with pytest.raises(CertificationError, match="header"):
        RowFile(path, PARAMETERS)
    assert path.read_text() == content


def test_two_writers_at_once_are_refused(tmp_path):
    path = tmp_path / "rows.tsv"
    with RowFile(path, PARAMETERS), pytest.raises(CertificationError, match="another process"):
        RowFile(path, PARAMETERS)
    write_rows(path, [0])


def test_a_killed_certification_resumes_to_the_rows_of_an_undisturbed_one(tmp_path):
    interrupted, undisturbed = tmp_path / "interrupted.tsv", tmp_path / "undisturbed.tsv"
    script = Path(certify_to_file.__file__)
    root = script.parents[3]
    with subprocess.Popen(
        [sys.executable, str(script), str(interrupted)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        process.kill()
    finished = len(read_rows(interrupted))
    assert 3 <= finished < certify_to_file.NUM_IMAGES
    certify_to_file.certify_to(interrupted)
    certify_to_file.certify_to(undisturbed)
    one, other = read_rows(interrupted), read_rows(undisturbed)
    for column in ("idx", "label", "predict", "radius", "correct"):
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
    assert one.idx.tolist() == list(range(certify_to_file.NUM_IMAGES))
