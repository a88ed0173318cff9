"""What travels between client and service comes out as it went in; the generated stubs are current."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmooth_core.certification.procedure import Procedure
from fedsmooth_core.certification.row_format import CertifiedRow
from fedsmooth_core.models import ModelSpec
from server.certification import certification_pb2 as pb
from server.certification.jobs import Job, JobState, JobTerms, Submission
from server.certification.messages import job_message, job_of, row_messages, rows_of

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path("server/certification")

positive = st.floats(0, 1e6, exclude_min=True)
count = st.integers(1, 2**32 - 1)
size = st.integers(2, 2**32 - 1)

jobs = st.builds(
    Job,
    spec=st.builds(ModelSpec, st.text(), st.just("he"), size, size, size, size),
    terms=st.builds(
        JobTerms,
        dataset=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", fullmatch=True),
        procedure=st.builds(
            Procedure,
            sigma=positive,
            n0=count,
            n=count,
            alpha=st.floats(0, 1, exclude_min=True, exclude_max=True),
            method=st.just("fixed"),
            radius_step=positive,
            seed=st.integers(0, 2**62),
            precision=st.sampled_from(["float32", "bfloat16"]),
        ),
        image_size=st.none() | count,
        num_images=st.none() | count,
    ),
    weights=st.text(),
    fingerprint=st.text(),
    class_names=st.lists(st.text(), max_size=3).map(tuple),
    device=st.sampled_from(["cpu", "cuda"]),
    num_images=count,
    submissions=st.lists(
        st.builds(Submission, st.sampled_from(["", "run"]), st.integers(0, 2**32 - 1)), max_size=3
    ).map(tuple),
    state=st.sampled_from(JobState),
    problem=st.text(),
    images_done=count,
    # Of this time, a float holds fewer digits than a timestamp.
    submitted_at=st.floats(1e9, 1e10),
    ended_at=st.none() | st.floats(1e9, 1e10),
    seconds=st.floats(0, 1e9),
)


@given(jobs)
def test_a_job_comes_out_as_it_went_in(job):
    sent = pb.Job.FromString(job_message(job).SerializeToString())
    assert job_of(sent) == job
    assert sent.key == job.key


def test_of_very_many_submissions_the_first_and_the_latest_are_written():
    many = tuple(Submission("a run", number) for number in range(150))
    spec = ModelSpec("small_cnn", "he", 10, 1, 8, 8)
    job = Job(spec, JobTerms("digits", Procedure()), "w", "f", (), "cpu", 1, submissions=many)
    assert job_of(job_message(job)).submissions == (many[0], *many[-99:])


@pytest.mark.parametrize("method", ["fixed", "sequential"])
def test_rows_come_out_as_local_certification_makes_them(method):
    n = None if method == "fixed" else 300
    rows = [
        CertifiedRow(3, 1, 1, 0.1 + 0.2, 1, 1 / 3, n),
        CertifiedRow(7, 2, -1, 0.0, 0, 0.0, n),
    ]
    procedure = Procedure(n=1000, method=method)
    sent = [pb.Row.FromString(row.SerializeToString()) for row in row_messages(rows, procedure)]
    assert [row.n for row in sent] == [n or 1000] * 2
    assert rows_of(sent, procedure) == rows


def test_the_generated_stubs_are_current(tmp_path):
    pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools are not installed")
    arguments = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *arguments]
    subprocess.run([*protoc, STUBS / "certification.proto"], cwd=ROOT, check=True)
    for name in ("certification_pb2.py", "certification_pb2.pyi", "certification_pb2_grpc.py"):
        made = (tmp_path / STUBS / name).read_text()
        assert made == (ROOT / STUBS / name).read_text(), (
            "run: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. "
            f"--grpc_python_out=. {STUBS / 'certification.proto'}"
        )
