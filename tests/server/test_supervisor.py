"""The supervisor against a `flwr` of the test's own, which plays what a SuperLink would do."""

import io
import json
import runpy
import sys

import pytest
from rich.console import Console

from fedsmooth_core.errors import ConfigError, TrainingError
from server import supervisor
from server.configuration import compose, save
from server.owed import failure_path
from server.report import rows_sha256
from server.run_directory import RunDirectory
from server.supervisor import deploy

ROUNDS = 3
OVERRIDES = [f"federation.num_rounds={ROUNDS}", "federation.connect_timeout_seconds=30"]
UNCERTIFIED = [*OVERRIDES, "certification.at_end=false"]
KILLED = {"status": "finished:failed"}

# Each submission takes the next act of the play: how many rounds it completes, and how it ends.
FAKE = """#!{python} -S
import json, pathlib, shlex, sys, tomllib

stage = pathlib.Path({stage!r})
state = json.loads((stage / "state.json").read_text())
command, arguments = sys.argv[1], sys.argv[2:]
away = "Using SuperLink: x\\n\\nConnection to the SuperLink is unavailable."
answer = {{"success": False, "error-message": away}}
if command == "log":
    print("\\n".join(state["log"]))
    sys.exit()
if breakdown := state["breakdowns"].get(str(state["questions"])):
    state["questions"] += 1
    (stage / "state.json").write_text(json.dumps(state))
    sys.stderr.write(breakdown)
    sys.exit(1)
state["questions"] += 1
if state["misled"]:
    print(json.dumps(answer | {{"error-message": state["misled"]}}))
    sys.exit()
if state["away"]:
    state["away"] -= 1
elif command == "run":
    settings = tomllib.loads(pathlib.Path(arguments[arguments.index("--run-config") + 1]).read_text())
    overrides = shlex.split(settings["overrides"])
    state["submitted"].append(overrides)
    act = state["acts"][len(state["submitted"]) - 1]
    if "refused" in act:
        answer["error-message"] = "Building the app\\n\\n" + act["refused"]
    else:
        (folder,) = [pathlib.Path(item[8:]) for item in overrides if item.startswith("run_dir=")]
        if not act.get("elsewhere"):
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text((stage / "config.yaml").read_text())
            for number in range(act.get("rounds", 0) + 1):
                for ending in ("safetensors", "json"):
                    (folder / "checkpoints" / f"round-{{number:04d}}.{{ending}}").touch()
        answer = {{"success": True, "run-id": str(len(state["submitted"]))}}
        state["away"] = act.get("away", 0)
elif command == "ls":
    run_id = int(arguments[arguments.index("--run-id") + 1])
    if run_id > len(state["acts"]):
        answer["error-message"] = "Using SuperLink: x\\n\\n[code: 16] Run ID not found."
    else:
        act = state["acts"][run_id - 1]
        state["asked"] += 1
        status = "running" if state["asked"] <= act.get("running", 0) else act["status"]
        run = {{"status": status, "status-details": act.get("details", "")}}
        answer = {{"success": True, "runs": [run]}}
(stage / "state.json").write_text(json.dumps(state))
print(json.dumps(answer))
"""


class Stage:
    """What the fake plays, and what it was asked."""

    def __init__(self, folder):
        self.folder = folder
        self.run = RunDirectory(folder / "run")
        self.console = Console(file=io.StringIO(), width=1000)

    @property
    def said(self):
        return self.console.file.getvalue().splitlines()

    def play(self, *acts, away=0, settings=UNCERTIFIED, breakdowns=None, misled=""):
        """Breakdowns: what the questions of these numbers, from 0, end with instead of an answer."""
        state = {"acts": acts, "submitted": [], "asked": 0, "away": away, "log": ["one", "two"]}
        state |= {"questions": 0, "breakdowns": breakdowns or {}, "misled": misled}
        (self.folder / "state.json").write_text(json.dumps(state))
        save(compose(settings), self.folder / "config.yaml")

    @property
    def submitted(self):
        return json.loads((self.folder / "state.json").read_text())["submitted"]

    def deploy(self, overrides=UNCERTIFIED, max_restarts=2):
        given = [*overrides, f"run_dir={self.run.path}"]
        return deploy(given, "x", max_restarts, self.console)

    def certify(self):
        folder = self.run.certification(ROUNDS)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("rows.tsv", "summary.json"):
            (folder / name).touch()
        for name in ("curve.png", "curve.svg"):
            (self.run.path / name).write_text(f"{rows_sha256(folder / 'rows.tsv')}</svg>\n")


@pytest.fixture
def stage(tmp_path, monkeypatch):
    command = tmp_path / "bin" / "flwr"
    command.parent.mkdir()
    command.write_text(FAKE.format(python=sys.executable, stage=str(tmp_path)))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(command.parent), prepend=":")
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.01)
    return Stage(tmp_path)


def test_a_run_that_completes_is_submitted_once_and_its_log_shown_once(stage, capfd):
    stage.play({"status": "finished:completed", "rounds": ROUNDS, "running": 3})
    assert stage.deploy() == stage.run.path
    (submitted,) = stage.submitted
    assert submitted == [*UNCERTIFIED, f"run_dir={stage.run.path}"]
    assert capfd.readouterr().out.split() == ["one", "two"]


def test_a_run_without_a_directory_gets_one_of_its_own(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage.play({"status": "finished:completed", "rounds": ROUNDS})
    path = deploy([*UNCERTIFIED, "name=mine"], None, 0, stage.console)
    assert path.parent == tmp_path / "runs"
    assert path.name.endswith("-mine")
    assert f"run_dir={path}" in stage.submitted[0]


def test_a_killed_run_is_continued(stage):
    stage.play(KILLED | {"rounds": 1}, {"status": "finished:completed", "rounds": ROUNDS})
    stage.deploy()
    first, second = stage.submitted
    assert "resume=true" not in first
    assert second == [*first, "resume=true"]


def test_a_run_killed_before_it_wrote_anything_is_started_anew(stage):
    stage.play(KILLED | {"elsewhere": True}, {"status": "finished:completed", "rounds": ROUNDS})
    stage.deploy()
    assert stage.submitted[0] == stage.submitted[1]


def test_a_run_that_never_gets_on_is_given_up(stage):
    stage.play(*[KILLED | {"rounds": 1}] * 9)
    with pytest.raises(TrainingError, match="died 2 times after 1 of 3 rounds"):
        stage.deploy(max_restarts=1)
    assert len(stage.submitted) == 2


def test_every_new_round_renews_the_patience(stage):
    deaths = [KILLED | {"rounds": number} for number in range(1, ROUNDS)]
    stage.play(*deaths, {"status": "finished:completed", "rounds": ROUNDS})
    stage.deploy(max_restarts=1)
    assert len(stage.submitted) == ROUNDS


def test_the_same_exception_twice_is_final_and_its_sentence_is_told(stage):
    raised = "ServerApp failed with exception: dataset.root=x does not exist."
    stage.play(*[KILLED | {"details": raised}] * 9)
    with pytest.raises(TrainingError, match=r"twice after 0 of 3 rounds: dataset\.root=x does not"):
        stage.deploy(max_restarts=5)
    assert len(stage.submitted) == 2


def test_a_run_that_was_stopped_on_purpose_is_not_continued(stage):
    stage.play({"status": "finished:stopped", "rounds": 1})
    with pytest.raises(TrainingError, match="stopped on purpose"):
        stage.deploy()
    assert len(stage.submitted) == 1


def test_a_finished_run_is_left_alone(stage):
    stage.play({"status": "finished:completed", "rounds": ROUNDS})
    stage.deploy()
    stage.deploy()
    assert len(stage.submitted) == 1
    assert "finished already" in stage.said[-1]


def test_a_run_killed_after_its_last_round_is_finished(stage):
    stage.play(KILLED | {"rounds": ROUNDS})
    stage.deploy()
    assert len(stage.submitted) == 1


def test_a_run_whose_certificate_is_missing_is_not_finished(stage):
    stage.play(
        KILLED | {"rounds": ROUNDS},
        {"status": "finished:completed", "rounds": ROUNDS},
        settings=OVERRIDES,
    )
    with pytest.raises(TrainingError, match="does not hold its final model"):
        stage.deploy(OVERRIDES)
    assert len(stage.submitted) == 2
    stage.certify()
    stage.deploy(OVERRIDES)
    assert len(stage.submitted) == 2


def test_a_server_app_that_writes_elsewhere_is_noticed(stage):
    stage.play({"status": "finished:completed", "elsewhere": True})
    with pytest.raises(TrainingError, match="under the same path"):
        stage.deploy()


def test_a_second_supervisor_looks_after_the_run_that_is_at_work(stage):
    stage.play({"status": "finished:completed", "rounds": ROUNDS, "running": 3})
    stage.run.path.mkdir()
    (stage.run.path / "submission.json").write_text('{"run-id": "1"}')
    stage.run.checkpoints.mkdir()
    with pytest.raises(TrainingError, match="does not hold its final model"):
        stage.deploy()
    assert stage.submitted == []
    assert "Run 1 is at work" in stage.said[0]


def test_a_run_that_the_superlink_forgot_is_submitted_again(stage):
    stage.play({"status": "finished:completed", "rounds": ROUNDS})
    stage.run.path.mkdir()
    (stage.run.path / "submission.json").write_text('{"run-id": "77"}')
    stage.deploy()
    assert len(stage.submitted) == 1


def test_a_superlink_that_restarts_is_waited_for(stage):
    stage.play({"status": "finished:completed", "rounds": ROUNDS, "away": 3}, away=3)
    stage.deploy()
    assert len(stage.submitted) == 1
    assert any("waiting for it" in line for line in stage.said)


@pytest.mark.parametrize("question", [0, 1])
def test_a_flwr_that_fails_once_is_asked_again(stage, question):
    traceback = "Traceback (most recent call last):\nMemoryError: no memory left"
    done = {"status": "finished:completed", "rounds": ROUNDS}
    stage.play(done, breakdowns={question: traceback})
    stage.deploy()
    assert len(stage.submitted) == 1
    assert any("waiting for it" in line for line in stage.said)


def test_a_flwr_that_always_fails_is_told_by_its_last_line(stage):
    impatient = [*UNCERTIFIED, "federation.connect_timeout_seconds=0.2"]
    stage.play(breakdowns=dict.fromkeys(range(99), "Traceback\nMemoryError: none left"))
    with pytest.raises(TrainingError, match="flwr run ended with status 1: MemoryError: none left"):
        stage.deploy(impatient)


def test_a_flwr_that_cannot_be_started_is_tried_again(stage, monkeypatch):
    stage.play({"status": "finished:completed", "rounds": ROUNDS})
    run, failures = supervisor.subprocess.run, [BlockingIOError(11, "no more processes")]

    def busy(*arguments, **options):
        if failures:
            raise failures.pop()
        return run(*arguments, **options)

    monkeypatch.setattr(supervisor.subprocess, "run", busy)
    stage.deploy()
    assert len(stage.submitted) == 1


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (
            "An unexpected error occurred while reading the Flower configuration file (/x/config.toml). "
            "SuperLink connection 'x' not found in the Flower configuration file (/x/config.toml).",
            r"^SuperLink connection 'x' not found",
        ),
        ("Using SuperLink: x\n\nFailed to read certificate file `/ca.crt`: no", "^Failed to read"),
        (
            "Using SuperLink: x\n\nClient error '404 Not Found' for url 'http://x'\nFor more: y",
            "a proxy passes devices alone",
        ),
    ],
)
def test_a_wrong_connection_is_refused_at_once(stage, reason, words):
    stage.play(misled=reason)
    with pytest.raises(ConfigError, match=words):
        stage.deploy()


def test_nothing_is_submitted_that_could_not_be_noted(stage, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    stage.play({"status": "finished:completed", "rounds": ROUNDS})
    monkeypatch.setattr(supervisor, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        stage.deploy()
    assert stage.submitted == []


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FEDSMOOTH_RUN", "../other", "is no name of a folder"),
        ("FEDSMOOTH_OVERRIDES", "name='x", "without its counterpart"),
        ("FEDSMOOTH_CLIENTS", "four", "no whole number above 0"),
        ("FEDSMOOTH_CLIENTS", "0", "no whole number above 0"),
    ],
)
def test_wrong_variables_of_the_container_are_one_sentence(
    monkeypatch, capsys, variable, value, words
):
    monkeypatch.setenv("FEDSMOOTH_RUN", "run")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(supervisor.APP / "docker/train"), run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Error: {variable}={value}")
    assert words in error


def test_a_superlink_that_stays_away_is_given_up(stage):
    impatient = [*UNCERTIFIED, "federation.connect_timeout_seconds=0.2"]
    stage.play({"status": "finished:completed"}, away=10**6)
    with pytest.raises(TrainingError, match=r"not answered for 0\.2 seconds .*is unavailable"):
        stage.deploy(impatient)


def test_a_refused_submission_is_final(stage):
    stage.play({"refused": "FAB size exceeds maximum."})
    with pytest.raises(TrainingError, match="did not take the run: FAB size"):
        stage.deploy()


def test_wrong_settings_are_refused_before_anything_is_submitted(stage):
    stage.play()
    with pytest.raises(ConfigError, match=r"federation\.num_rounds"):
        stage.deploy(["federation.num_rounds=0"])
    stage.run.path.mkdir()
    save(compose(UNCERTIFIED), stage.run.path / "config.yaml")
    with pytest.raises(ConfigError, match="started with other settings"):
        stage.deploy([*UNCERTIFIED, "seed=9"])
    assert stage.submitted == []


def test_what_a_service_owes_is_collected_once_the_run_has_trained(stage, monkeypatch):
    collected = []

    def collect(config, run, console):
        collected.append(run.path)
        assert not failure_path(run, ROUNDS).exists()  # a new command is a new attempt
        stage.certify()

    monkeypatch.setattr(supervisor, "collect", collect)
    served = [*OVERRIDES, "service.address=127.0.0.1:9", "service.insecure=true"]
    # Killed while it waited for the service: the model is there, so nothing is submitted again.
    stage.play(KILLED | {"rounds": ROUNDS}, settings=served)
    failure = failure_path(stage.run, ROUNDS)
    failure.parent.mkdir(parents=True)
    failure.write_text("The data set is gone.\n")
    assert stage.deploy(served) == stage.run.path
    assert collected == [stage.run.path]
    assert "what the certification service owes" in stage.said[-1]
    stage.deploy(served)
    assert collected == [stage.run.path]
    assert len(stage.submitted) == 1


def test_an_interrupted_supervisor_says_how_to_go_on(stage, monkeypatch):
    stage.play({"status": "finished:completed", "rounds": ROUNDS})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(supervisor.Flower, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        stage.deploy()
    assert "flwr stop 1" in stage.said[-1]
