"""How a run stands, from its directory alone: while it runs, when it was interrupted, when it is done."""

import io
import json
import socket
import urllib.request
from pathlib import Path

import pytest
from rich.console import Console

from fedsmooth_core.cohort import trainer
from fedsmooth_core.cohort.local_training import train_stacked
from fedsmooth_core.errors import ConfigError, FedSmoothError
from server.federation import run_federation
from server.owed import failure_path
from server.prometheus import Prometheus
from server.recorder import RoundRecord, TrainedRound
from server.replies import Refusal
from server.run_directory import RunDirectory
from server.simulation import InProcessGrid
from server.status import read_status, show_status


class Look:
    """An observer that reads the status of the run it watches at every event."""

    def __init__(self):
        self.seen = []

    def run_started(self, config, run, completed_rounds):
        self.run = run

    def cohort_asked(self, server_round, trained):
        self.seen.append(read_status(self.run.path))

    def round_finished(self, record):
        self.seen.append(read_status(self.run.path))

    def run_finished(self):
        pass


def printed(path, as_json=False):
    console = Console(file=io.StringIO(), width=200)
    show_status(path, console, as_json)
    return console.file.getvalue()


@pytest.fixture
def one_bad_client(monkeypatch):
    def failing(step, take_step, state, members, *args):
        if members[0].client == 2:
            raise RuntimeError("[/no] memory")
        return train_stacked(step, take_step, state, members, *args)

    monkeypatch.setattr(trainer, "train_stacked", failing)


def test_a_running_run_says_whom_it_asked_and_a_finished_one_what_came_of_it(
    tiny, console, one_bad_client
):
    config = tiny("federation.cohort_fraction=1", "federation.strikes=2")
    look = Look()
    run = run_federation(config, InProcessGrid(4, "cpu"), console, [look])
    assert [status.state for status in look.seen] == ["running"] * 6
    asked = [status.asked and status.asked["round"] for status in look.seen]
    assert asked == [1, None, 2, None, 3, None]
    assert look.seen[0].asked["cohort"] == [0, 1, 2, 3]
    assert [status.completed_rounds for status in look.seen] == [0, 1, 1, 2, 2, 3]

    status = read_status(run.path)
    assert (status.state, status.completed_rounds, status.num_rounds) == ("finished", 3, 3)
    assert status.asked is None
    assert status.certified_images == 5
    (record,) = status.clients
    assert (record.client, record.refused, record.last_round) == (2, 2, 2)
    assert record.last_reason == "RuntimeError: [/no] memory"
    assert record.suspended

    text = printed(run.path)
    assert "finished, 3 of 3 rounds done." in text
    assert "RuntimeError: [/no] memory" in text
    assert "Certified accuracy (%) at l2 radius" in text
    assert json.loads(printed(run.path, as_json=True))["completed_rounds"] == 3


class Stop(Look):
    def round_finished(self, record):
        raise KeyboardInterrupt


def test_an_interrupted_run_says_so(tiny, console):
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        run_federation(config, InProcessGrid(4, "cpu"), console, [Stop()])
    path = Path(config.run_dir)
    assert read_status(path).state == "interrupted"
    assert "interrupted, 1 of 3 rounds done." in printed(path)
    assert "The final model is not certified yet." in printed(path)
    held = RunDirectory.open(tiny("resume=true"), "federated")
    assert read_status(path).state == "running"  # as long as somebody holds it
    held.close()


def test_a_folder_without_a_run_is_a_sentence(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_status(tmp_path)


def test_a_trained_run_is_not_finished_before_it_is_certified(tiny, console):
    config = tiny("certification.at_end=false")
    run = run_federation(config, InProcessGrid(4, "cpu"), console, [])
    assert read_status(run.path).state == "trained"
    assert "The final model is not certified yet." in printed(run.path)
    failure = failure_path(run, 3)
    failure.parent.mkdir(parents=True)
    failure.write_text("no images")
    assert "The certification failed: no images" in printed(run.path)


@pytest.mark.parametrize("line", ['{"a": 1}', '{"round": "x", "cohort": []}', '{"round": 4}', "{"])
def test_a_line_that_says_little_of_a_round_stops_nobody_from_looking(tiny, console, line):
    run = run_federation(tiny(), InProcessGrid(4, "cpu"), console, [])
    with run.metrics.open("a") as file:
        file.write(line + "\n")
    assert read_status(run.path).completed_rounds in (3, 4)
    assert "of 3 rounds done" in printed(run.path)


def test_damaged_rows_are_a_sentence(tiny, console):
    run = run_federation(tiny(), InProcessGrid(4, "cpu"), console, [])
    (run.certification(3) / "rows.tsv").write_text("idx\nnonsense\n")
    with pytest.raises(FedSmoothError, match=r"rows\.tsv"):
        printed(run.path)


@pytest.mark.parametrize("content", ["", "{", '{"round": 4}', '{"round": "x", "since": 3}', "[1]"])
def test_a_damaged_note_of_whom_it_asked_is_left_out(tiny, console, content):
    config = tiny()
    with pytest.raises(KeyboardInterrupt):
        run_federation(config, InProcessGrid(4, "cpu"), console, [Stop()])
    path = Path(config.run_dir)
    (path / "asked.json").write_text(content)
    held = RunDirectory.open(tiny("resume=true"), "federated")
    assert read_status(path).asked is None
    held.close()


# --- Prometheus


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_prometheus_serves_the_figures_of_the_rounds(tiny, tmp_path):
    port = free_port()
    config = tiny(f"runtime.metrics_address=127.0.0.1:{port}")
    observer = Prometheus()
    observer.run_started(config, RunDirectory(tmp_path), 7)
    assert scrape(port)["fedsmooth_round"] == "7.0"
    trained = TrainedRound(
        cohort=[0, 1, 2],
        aggregated=[0, 2],
        refused=[Refusal(1, "late")],
        num_connected=4,
        metrics={"train-loss": 1.5},
        seconds={"train": 2.5},
    )
    observer.cohort_asked(8, trained)
    observer.round_finished(RoundRecord(8, trained, {"clean-accuracy": 0.9, "noisy-accuracy": 0.8}))
    figures = scrape(port)
    expected = {
        "fedsmooth_round": 8,
        "fedsmooth_rounds_planned": 3,
        "fedsmooth_connected_clients": 4,
        "fedsmooth_asked_clients": 3,
        "fedsmooth_used_replies": 2,
        "fedsmooth_refused_replies_total": 1,
        "fedsmooth_attempts_total": 1,
        "fedsmooth_kept_rounds_total": 0,
        'fedsmooth_round_seconds{phase="train"}': 2.5,
        'fedsmooth_train{metric="train-loss"}': 1.5,
        'fedsmooth_test_accuracy{kind="clean"}': 0.9,
    }
    assert {name: float(figures[name]) for name in expected} == expected


def test_an_address_that_is_taken_is_a_sentence(tiny, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        config = tiny(f"runtime.metrics_address={address}")
        with pytest.raises(ConfigError, match="cannot be listened on"):
            Prometheus().run_started(config, RunDirectory(tmp_path), 0)
