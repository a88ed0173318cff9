import threading

import pytest

from fedsmooth_core.errors import ConfigError
from server import certifier
from server.certifier import certify_when_trained, failure_path, is_certified
from server.cli import main
from server.run_directory import RunDirectory

NOT_AT_THE_END = "certification.at_end=false"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(certifier, "_POLL_SECONDS", 0.01)


@pytest.fixture
def train(tiny_overrides, tmp_path):
    def train(*overrides):
        main(
            ["simulate", *tiny_overrides, NOT_AT_THE_END, f"run_dir={tmp_path / 'run'}", *overrides]
        )
        return RunDirectory(tmp_path / "run")

    return train


def test_it_waits_for_the_last_round_and_certifies_it_into_the_run(train, tmp_path, console):
    thread = threading.Thread(
        target=certify_when_trained, args=(tmp_path / "run", [], console), daemon=True
    )
    thread.start()
    run = train()
    thread.join(120)
    assert not thread.is_alive()
    assert is_certified(run, 3)
    assert [path.name for path in run.certification(3).parent.iterdir()] == ["round-0003"]


def test_a_run_that_got_more_rounds_is_not_certified_by_the_old_curve(train, tmp_path, console):
    run = train()
    main(["certify", str(run.path), "--wait"])
    assert is_certified(run, 3)
    train("federation.num_rounds=4", "resume=true")
    assert not is_certified(run, 4)
    certify_when_trained(run.path, [], console)
    assert is_certified(run, 4)


def test_a_curve_that_is_older_than_the_summary_or_half_written_does_not_count(train, console):
    run = train()
    certify_when_trained(run.path, [], console)
    curve = run.path / "curve.svg"
    text = curve.read_text()
    curve.write_text(text[:100])
    assert not is_certified(run, 3)
    curve.write_text(text)
    assert is_certified(run, 3)
    (run.certification(3) / "summary.json").touch()
    assert not is_certified(run, 3)


def test_why_it_failed_is_left_in_the_run_and_taken_back_by_the_next_attempt(train, console):
    run = train()
    with pytest.raises(ConfigError, match="seed"):
        certify_when_trained(run.path, ["federation.num_rounds=9"], console)
    assert "federation.num_rounds" in failure_path(run, 3).read_text()
    certify_when_trained(run.path, [], console)
    assert not failure_path(run, 3).exists()
