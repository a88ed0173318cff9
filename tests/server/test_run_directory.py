"""The run directory: one run in each, whole lines, and no round twice."""

import json

import pytest
import yaml

from fedsmooth_core.config import RunConfig, from_nested
from fedsmooth_core.errors import ConfigError
from server.run_directory import RunDirectory


def new(path, kind="federated", **settings):
    config = RunConfig(run_dir=str(path), **settings)
    run = RunDirectory.open(config, kind)
    run.record(config, kind)
    run.close()
    return run


def test_a_run_records_its_settings_and_who_ran_it(tmp_path):
    run = new(tmp_path / "runs" / "one", seed=7)
    recorded = from_nested(RunConfig, yaml.safe_load((run.path / "config.yaml").read_text()))
    assert recorded == RunConfig(seed=7)  # neither where it lies nor whether it was continued
    (session,) = map(json.loads, (run.path / "sessions.jsonl").read_text().splitlines())
    assert session["resumed"] is False
    assert {"flwr", "torch", "numpy"} <= set(session["versions"])
    assert session["versions"]["flwr"].startswith("1.41")
    assert {"git_revision", "python", "platform", "cpu_count", "command"} <= set(session)


def test_a_resumed_run_adds_a_session(tmp_path):
    new(tmp_path / "run")
    new(tmp_path / "run", resume=True)
    lines = (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()
    assert [json.loads(line)["resumed"] for line in lines] == [False, True]


def test_a_run_is_never_written_over(tmp_path):
    new(tmp_path / "run", seed=1)
    with pytest.raises(ConfigError, match="holds a run already: add resume=true"):
        new(tmp_path / "run", seed=2)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(ConfigError, match="holds no run to resume"):
        new(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_by_the_command_that_started_it(tmp_path):
    new(tmp_path)
    with pytest.raises(ConfigError, match="holds a federated run"):
        new(tmp_path, "centralized", resume=True)


@pytest.mark.parametrize("below", ["", "run"])
def test_a_file_in_the_way_is_named_in_a_sentence(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir=.*file.* cannot be made \(.*\): choose"):
        new(tmp_path / "file" / below)


def test_without_a_name_every_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {RunDirectory.open(RunConfig(name="same"), "federated").path for _ in range(3)}
    assert len(paths) == 3
    assert all(path.parent == tmp_path / "runs" and "same" in path.name for path in paths)


def test_metrics_come_back_but_for_a_line_that_a_crash_cut_short(tmp_path):
    run = new(tmp_path)
    assert run.read_metrics() == []
    for server_round in (1, 2, 3):
        run.append_metrics({"round": server_round, "x": [1.5, None]})
    whole = run.metrics.read_text()
    run.metrics.write_text(whole[:-5])
    assert run.read_metrics() == [{"round": k, "x": [1.5, None]} for k in (1, 2)]


@pytest.mark.parametrize("kept", [0, 1, 2, 5])
def test_rounds_that_will_come_again_are_forgotten(tmp_path, kept):
    run = new(tmp_path)
    for server_round in (1, 2, 3):
        run.append_metrics({"round": server_round})
    with run.metrics.open("a") as file:
        file.write('{"round": 4, "coh')
    run.forget_rounds_after(kept)
    run.append_metrics({"round": 99})
    expected = [*range(1, min(kept, 3) + 1), 99]
    assert [json.loads(line)["round"] for line in run.metrics.read_text().splitlines()] == expected


def test_checkpoints_sort_by_round(tmp_path):
    names = [RunDirectory(tmp_path).checkpoint(k).name for k in (0, 9, 10, 150)]
    assert names == sorted(names)


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    new(tmp_path)
    config = RunConfig(run_dir=str(tmp_path), resume=True)
    first = RunDirectory.open(config, "federated")
    with pytest.raises(ConfigError, match="another process"):
        RunDirectory.open(config, "federated")
    first.close()
    RunDirectory.open(config, "federated").close()


def test_opening_a_run_changes_nothing_of_it(tmp_path):
    new(tmp_path, seed=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    RunDirectory.open(RunConfig(run_dir=str(tmp_path), resume=True, seed=1), "federated").close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("line", ["{}", "[]", "7", "{torn", '{"kind": "federated"}'])
def test_lines_that_say_nothing_are_passed_over(tmp_path, line):
    run = new(tmp_path)
    for name in ("sessions.jsonl", "metrics.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(line + "\n")
    run.append_metrics({"round": 1})
    again = RunDirectory.open(RunConfig(run_dir=str(tmp_path), resume=True), "federated")
    again.forget_rounds_after(1)
    again.close()
    assert again.read_metrics() == [{"round": 1}]


def test_one_bad_entry_takes_no_other_number_with_it(tmp_path):
    run = new(tmp_path)
    run.write_clients({0: 2**63, 1: 5})
    assert run.read_clients() == {0: 2**63, 1: 5}
    (tmp_path / "clients.json").write_text('{"0": 7, "True": 8, "2": "x", "3": true}')
    assert run.read_clients() == {0: 7}
    for damaged in ("", "{", "[1]", "3"):
        (tmp_path / "clients.json").write_text(damaged)
        assert run.read_clients() == {}
