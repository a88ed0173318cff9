"""Every kind of bad client in one cohort with good ones, over real processes."""

import shutil
from pathlib import Path

import misbehaving_clients
import pytest
from flower_processes import (
    REPOSITORY,
    assert_same_weights,
    flwr_run,
    needs_proc,
    rounds,
    simulate_the_good,
)
from misbehaving_clients import DEADLINE_SECONDS, MISDEEDS, NUM_CLIENTS

pytestmark = [pytest.mark.slow, needs_proc, pytest.mark.timeout(500)]

ROUNDS = 3
SILENT, LATE, KILLED = 2, 3, 5
OVERRIDES = [
    "seed=8",
    "runtime.device=cpu",
    "runtime.threads=1",
    f"partition.num_clients={NUM_CLIENTS}",
    "partition.samples_per_client=100",
    f"federation.num_rounds={ROUNDS}",
    "federation.cohort_fraction=1.0",
    "federation.quorum=0.1",
    "federation.strikes=100",
    f"federation.deadline_seconds={DEADLINE_SECONDS}",
    "federation.connect_timeout_seconds=240",
    "federation.max_num_examples=1000",
    "training.local_steps=5",
    "training.learning_rate=0.1",
    "certification.at_end=false",
]
IN_TIME = "no reply came in time"
REASONS = {
    "silence": IN_TIME,
    "late": IN_TIME,
    # A warm worker (`fedsmooth join`) tells at once, a SuperNode alone after a minute.
    "exit": "ended without an answer (exit code 1)",
    "killed": IN_TIME,
    "exception": "this client cannot go on",
    "nan": "has values that are not finite",
    "infinite": "has values that are not finite",
    "shape": "has shape",
    "dtype": "is torch.float64 instead of torch.float32",
    "missing tensor": "missing ['",
    "extra tensor": "extra ['backdoor']",
    "negative": "num-examples=-100 is not an integer in [1, 1000]",
    "zero": "num-examples=0 is not an integer in [1, 1000]",
    "absurd": "num-examples=1000000000000 is not an integer in [1, 1000]",
    "no number": "num-examples=nan is not a finite number",
    "list of numbers": "num-examples=[100, 100] is not a finite number",
    "text": "it lacks the record",
    "metric missing": "its metrics are",
    "metric more": "its metrics are",
    "garbage": "cannot be decoded",
}


def project_with_bad_clients(folder):
    """A copy of the project whose ClientApp misbehaves."""
    for part in ("client", "conf", "fedsmooth_core", "server"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / part, folder / part, ignore=ignored)
    for name in ("LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copy(Path(misbehaving_clients.__file__), folder / "client" / "misbehaving.py")
    settings = (REPOSITORY / "pyproject.toml").read_text()
    ours = 'clientapp = "client.app:app"'
    assert ours in settings
    theirs = settings.replace(ours, 'clientapp = "client.misbehaving:app"')
    (folder / "pyproject.toml").write_text(theirs)
    return folder


def test_every_bad_client_is_refused_by_name_and_changes_nothing(deployment, tmp_path):
    for client in range(NUM_CLIENTS):
        join = deployment.join if client == KILLED else deployment.join_warm
        join(f"node{client}", f"partition-id={client} num-partitions={NUM_CLIENTS}")
    run_dir, log = deployment.folder / "run", tmp_path / "flwr.log"
    app = project_with_bad_clients(tmp_path / "project")
    flwr_run(deployment.environment, [*OVERRIDES, f"run_dir={run_dir}"], log, app=app)

    lines = rounds(run_dir)
    assert [line["round"] for line in lines] == [1, 2, 3], log.read_text()[-3000:]
    for line, misdeeds in zip(lines, MISDEEDS.values(), strict=True):
        refused = {refusal["client"]: refusal["reason"] for refusal in line["refused"]}
        assert refused.keys() == misdeeds.keys()
        for client, misdeed in misdeeds.items():
            assert REASONS[misdeed] in refused[client], misdeed
        assert line["aggregated"] == sorted(set(line["cohort"]) - misdeeds.keys())
        assert line["attempts"] == 1
    assert lines[0]["aggregated"] == lines[1]["aggregated"] == [0, 1]
    # Who still owes an answer is not asked anew; an answer that comes late is dropped.
    assert not {SILENT, LATE, KILLED} & set(lines[1]["cohort"])
    (late,) = (late for line in lines for late in line["late"] if late["client"] == LATE)
    assert late["reason"] == "its reply to round 1 came after that was over, and is dropped"

    good = {line["round"]: line["aggregated"] for line in lines}
    simulate_the_good(OVERRIDES, tmp_path / "simulated", good)
    assert_same_weights(run_dir, tmp_path / "simulated", ROUNDS)
