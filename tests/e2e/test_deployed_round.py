"""The benchmark of a deployed round runs and reports; how fast is nobody's test."""

import json
import subprocess
import sys

import pytest
from flower_processes import REPOSITORY, needs_proc

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]


def test_the_benchmark_runs_and_says_what_it_measured(tmp_path):
    report = tmp_path / "report.json"
    systems = ["bare+torch", "ours+join"]
    command = [sys.executable, REPOSITORY / "benchmarks" / "deployed_round.py", "--quick"]
    done = subprocess.run(
        [*command, "--systems", *systems, "-o", report, "--keep", tmp_path / "logs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(report.read_text())
    assert measured["model_mb"] == pytest.approx(9.9, abs=0.1)
    assert list(measured["systems"]) == systems
    for system in systems:
        row = measured["systems"][system]
        assert row["rounds"] == 2
        assert row["median_seconds"] > 0
        assert {"idle", "receive", "answer", "send"} <= row["median_seconds_by_phase"].keys()
    assert "Seconds a round" in done.stdout
