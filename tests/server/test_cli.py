"""The command line: every command does its job, and every mistake is one sentence."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from fedsmooth_core.certification.rows import read_rows
from fedsmooth_core.config import RunConfig, from_nested
from server.cli import main
from server.configuration import compose
from server.run_directory import RunDirectory


@pytest.fixture(scope="module")
def simulated(tmp_path_factory, tiny_overrides):
    """One finished run of `fedsmooth simulate`, for the commands that look at one."""
    path = tmp_path_factory.mktemp("simulated") / "run"
    main(["simulate", *tiny_overrides, "certification.at_end=false", f"run_dir={path}"])
    return path


def refused(capsys, *arguments):
    """Run a command that must fail; return its one sentence."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def rows_of(run):
    (path,) = run.glob("certification/round-*/rows.tsv")
    return read_rows(path)


def is_picture(path):
    with Image.open(path) as image:
        return min(image.size) > 200


# --- training


def test_simulate_trains_certifies_and_says_where_everything_is(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    main(["simulate", *tiny_overrides, f"run_dir={run}"])
    printed = capsys.readouterr().out
    assert "Round 3 of 3" in printed
    assert "Certified accuracy (%) at l2 radius" in printed
    for place in (run, run / "curve.png", run / "curve.svg"):
        assert str(place) in printed
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(rows_of(run)) == 5
    assert is_picture(run / "curve.png")


def test_simulate_resumes_from_the_run_directory_alone(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    two = [*tiny_overrides, "federation.num_rounds=2", "certification.at_end=false"]
    main(["simulate", *two, f"run_dir={run}"])
    main(["simulate", f"run_dir={run}", "resume=true", "federation.num_rounds=3"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert "Resumed after round 2 of 3" in capsys.readouterr().out


def test_a_sweep_is_a_run_for_each_value_and_one_joint_picture(tmp_path, tiny_overrides, capsys):
    root = tmp_path / "sweep"
    main(["simulate", "-m", *tiny_overrides, "smoothing.sigma=0.25,0.5", f"run_dir={root}"])
    printed = capsys.readouterr().out
    runs = sorted(path.parent for path in root.glob("*/config.yaml"))
    assert len(runs) == 2
    sigmas = [
        yaml.safe_load((run / "config.yaml").read_text())["smoothing"]["sigma"] for run in runs
    ]
    assert sigmas == [0.25, 0.5]
    assert all(len(rows_of(run)) == 5 for run in runs)
    (joint,) = root.glob("*.png")
    assert is_picture(joint)
    assert str(joint) in printed
    svg = joint.with_suffix(".svg").read_text()
    table = printed[printed.rindex("Certified accuracy") :]
    for label in ("sigma=0.25", "sigma=0.5"):
        assert label in table
        assert label in svg


def test_a_mistake_anywhere_in_a_sweep_is_found_before_the_first_run(
    tmp_path, tiny_overrides, capsys
):
    root = tmp_path / "sweep"
    settings = [*tiny_overrides, "smoothing.sigma=0.25,-1", f"run_dir={root}"]
    assert "smoothing.sigma=-1" in refused(capsys, "simulate", "-m", *settings)
    assert not root.exists()


def test_centralized_trains_on_the_pool(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    main(
        [
            "centralized",
            *tiny_overrides,
            "training.local_steps=40",
            "training.learning_rate=0.02",
            f"run_dir={run}",
        ]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert {line["num_examples"] for line in lines} == {1438}
    assert lines[-1]["metrics"]["train-loss"] < lines[0]["metrics"]["train-loss"]
    assert len(rows_of(run)) == 5


def test_centralized_has_the_papers_batches_unless_told_otherwise(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "server.centralized.run_centralized", lambda config, *rest: seen.append(config)
    )
    with pytest.raises(AttributeError):  # what the stand-in returns is no run
        main(["centralized"])
    with pytest.raises(AttributeError):
        main(["centralized", "training.local_steps=7"])
    assert [(c.training.local_steps, c.training.batch_size) for c in seen] == [(1000, 60), (7, 60)]


def test_centralized_resumes_with_the_settings_it_had(tmp_path, tiny_overrides):
    run = tmp_path / "run"
    two = [*tiny_overrides, "federation.num_rounds=2", "certification.at_end=false"]
    main(["centralized", *two, f"run_dir={run}"])
    main(["centralized", f"run_dir={run}", "resume=True", "federation.num_rounds=3"])
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


# --- certify


def test_certify_writes_rows_summary_and_curve_into_the_runs_own_folder(simulated, capsys):
    main(["certify", str(simulated)])
    folder = simulated / "certification" / "round-0003"
    assert len(read_rows(folder / "rows.tsv")) == 5
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["parameters"]["n"] == 100
    assert is_picture(folder / "curve.png")
    assert "Certified accuracy" in capsys.readouterr().out


def test_certify_takes_any_round_and_any_parameters_into_a_folder_of_choice(simulated, tmp_path):
    early = simulated / "checkpoints" / "round-0001.safetensors"
    out = tmp_path / "elsewhere"
    settings = ["certification.n=50", "certification.num_images=3", "certification.sigma=0.5"]
    main(["certify", str(early), "-o", str(out), *settings])
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["parameters"]["n"], summary["parameters"]["sigma"]) == (50, 0.5)
    assert len(read_rows(out / "rows.tsv")) == summary["num_images"] == 3


def test_rows_of_other_parameters_are_never_mixed(simulated, tmp_path, capsys):
    out = ["-o", str(tmp_path / "rows")]
    main(["certify", str(simulated), *out])
    before = (tmp_path / "rows" / "rows.tsv").read_bytes()
    for setting, named in (
        ("certification.n=200", "n (100 there, 200 now)"),
        ("certification.sigma=0.5", "sigma (0.25 there, 0.5 now)"),
        ("certification.alpha=0.01", "alpha (0.001 there, 0.01 now)"),
        ("seed=1", "seed (0 there, 1 now)"),
    ):
        assert named in refused(capsys, "certify", str(simulated), *out, setting)
    early = simulated / "checkpoints" / "round-0001.safetensors"
    assert "weights" in refused(capsys, "certify", str(early), *out)
    assert (tmp_path / "rows" / "rows.tsv").read_bytes() == before


def test_an_interrupted_certification_is_continued_not_repeated(simulated, tmp_path):
    out = tmp_path / "rows"
    main(["certify", str(simulated), "-o", str(out)])
    whole = (out / "rows.tsv").read_bytes()
    lines = whole.splitlines(keepends=True)
    marked = [line.rsplit(b"\t", 1)[0] + b"\t12345.0\n" for line in lines[1:3]]
    (out / "rows.tsv").write_bytes(lines[0] + b"".join(marked) + lines[3][:7])  # torn
    main(["certify", str(simulated), "-o", str(out)])
    again = (out / "rows.tsv").read_bytes().splitlines(keepends=True)
    assert again[1:3] == marked
    assert [line.rsplit(b"\t", 1)[0] for line in again] == [
        line.rsplit(b"\t", 1)[0] for line in lines
    ]


def test_a_checkpoint_far_from_its_run_is_certified_all_the_same(simulated, tmp_path):
    for suffix in (".safetensors", ".json"):
        source = (simulated / "checkpoints" / "round-0003").with_suffix(suffix)
        (tmp_path / f"model{suffix}").write_bytes(source.read_bytes())
    main(["certify", str(tmp_path / "model.safetensors"), "certification.num_images=2"])
    (rows,) = tmp_path.rglob("rows.tsv")
    assert len(read_rows(rows)) == 2


# --- report, partition, config


def test_report_shows_several_runs_side_by_side(simulated, tmp_path, capsys):
    files = []
    for sigma in ("0.25", "0.5"):
        out = tmp_path / f"at-{sigma}"
        main(["certify", str(simulated), "-o", str(out), f"certification.sigma={sigma}"])
        files.append(out / "rows.tsv")
    for file, name in zip(files, ("one", "two"), strict=True):
        file.rename(tmp_path / f"{name}.tsv")
    capsys.readouterr()
    paths = [str(tmp_path / "one.tsv"), str(tmp_path / "two.tsv")]
    main(["report", *paths, "-o", str(tmp_path / "both")])
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.splitlines() if line} >= {"one", "two"}
    assert is_picture(tmp_path / "both.png")
    assert "one" in (tmp_path / "both.svg").read_text()
    main(["report", "--json", *paths, "--radius-step", "0.1"])
    data = json.loads(capsys.readouterr().out)
    assert [curve["label"] for curve in data["curves"]] == ["one", "two"]
    assert data["curves"][0]["certified_accuracy"][1]["radius"] == 0.1


def test_partition_says_and_draws_who_holds_what(tmp_path, capsys):
    settings = ["num_clients=3", "samples_per_client=100", "gamma=0.5"]
    main(["partition", "-o", str(tmp_path), *(f"partition.{setting}" for setting in settings)])
    printed = capsys.readouterr().out
    assert "3 clients" in printed
    assert is_picture(tmp_path / "partition.png")
    assert "</svg>" in (tmp_path / "partition.svg").read_text()


def test_config_prints_the_resolved_configuration_and_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["config", "experiment=fig7", "seed=3"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert from_nested(RunConfig, printed) == compose(["experiment=fig7", "seed=3"])
    assert list(tmp_path.iterdir()) == []


# --- mistakes


@pytest.mark.parametrize("command", ["simulate", "centralized", "partition", "config"])
def test_a_wrong_setting_is_one_sentence(command, capsys):
    assert "did you mean smoothing.sigma?" in refused(capsys, command, "smoothing.sigmo=1")
    assert "smoothing.sigma='x'" in refused(capsys, command, "smoothing.sigma=x")


def test_an_unknown_data_set_or_model_is_one_sentence(tmp_path, capsys):
    place = f"run_dir={tmp_path / 'run'}"
    assert "imagenet" in refused(capsys, "simulate", "dataset.name=imagenet", place)
    assert "vgg" in refused(capsys, "simulate", "model.name=vgg", place)
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_is_named(tmp_path, capsys):
    missing = str(tmp_path / "missing.safetensors")
    assert missing in refused(capsys, "certify", missing)
    assert str(tmp_path) in refused(capsys, "certify", str(tmp_path))
    assert str(tmp_path) in refused(capsys, "report", str(tmp_path))
    gone = str(tmp_path / "gone.tsv")
    assert gone in refused(capsys, "report", gone)
    resumed = [f"run_dir={tmp_path}", "resume=true"]
    assert str(tmp_path) in refused(capsys, "simulate", *resumed)


def test_a_run_is_not_written_over(simulated, tiny_overrides, capsys):
    before = (simulated / "metrics.jsonl").read_bytes()
    message = refused(capsys, "simulate", *tiny_overrides, f"run_dir={simulated}")
    assert "resume=true" in message
    assert (simulated / "metrics.jsonl").read_bytes() == before


def test_a_model_of_another_data_set_is_not_certified(simulated, tmp_path, capsys):
    place = ["-o", str(tmp_path / "rows")]
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / "0.png")
    settings = ["dataset.name=imagefolder", f"dataset.root={tmp_path / 'images'}"]
    message = refused(capsys, "certify", str(simulated), *place, *settings)
    assert "(1, 8, 8)" in message
    assert "(3, 8, 8)" in message


def test_the_installed_command_ends_with_status_2_and_no_traceback(tmp_path):
    """As a shell sees it: nothing on the standard output, one sentence on the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from server.cli import main; main()"]
    result = subprocess.run(
        [*command, "config", "seed=x"], capture_output=True, text=True, env=environment
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: seed='x' has the wrong type")
    assert result.stderr.count("\n") == 1


# --- what attacks and accidents did to earlier versions


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_which_no_client_ever_succeeded_is_an_error(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    diverging = [*tiny_overrides, "training.learning_rate=1e30", f"run_dir={run}"]
    text = refused(capsys, "simulate", *diverging)
    assert "No round of 3 had enough good replies" in text
    assert "not a finite number" in text
    assert len(metrics_of(run)) == 3
    assert not (run / "certification").exists()


def test_centralised_training_that_diverges_stops_with_a_sentence(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    diverging = [*tiny_overrides, "training.learning_rate=1e30", f"run_dir={run}"]
    assert "Training diverged in round" in refused(capsys, "centralized", *diverging)


def test_a_refused_resume_leaves_the_run_as_it_was(simulated, capsys):
    files = [path for path in simulated.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    text = refused(
        capsys, "simulate", f"run_dir={simulated}", "resume=true", "federation.num_rounds=1"
    )
    assert "federation.num_rounds=1 is less than the 3 rounds" in text
    assert {path: path.read_bytes() for path in files} == before


def test_a_centralised_sweep_starts_what_is_left_as_centralised(tmp_path, tiny_overrides):
    root = tmp_path / "sweep"
    short = ["training.local_steps=3", "certification.at_end=false", "smoothing.sigma=0.1,0.2"]
    sweep = [*tiny_overrides, *short, f"run_dir={root}"]
    kept = [setting for setting in sweep if not setting.startswith("training.batch_size")]
    main(["centralized", "-m", *kept])
    shutil.rmtree(root / "1")
    main(["centralized", "-m", *kept, "resume=true"])
    sizes = [
        yaml.safe_load((root / number / "config.yaml").read_text())["training"]["batch_size"]
        for number in ("0", "1")
    ]
    assert sizes == [60, 60]
    assert [line["round"] for line in metrics_of(root / "1")] == [1, 2, 3]


def test_a_run_that_is_being_worked_on_is_refused_to_others(simulated, capsys):
    config = compose([f"run_dir={simulated}", "resume=true"])
    working = RunDirectory.open(config, "federated")
    try:
        text = refused(capsys, "simulate", f"run_dir={simulated}", "resume=true")
    finally:
        working.close()
    assert "is another process's" in text


def tampered(change):
    def spoil(run):
        path = run / "checkpoints" / "round-0003.json"
        sidecar = json.loads(path.read_text())
        change(sidecar["metadata"])
        path.write_text(json.dumps(sidecar))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        tampered(lambda metadata: metadata.pop("round")),
        tampered(lambda metadata: metadata.update(round="x")),
        tampered(lambda metadata: metadata.pop("dataset")),
        tampered(lambda metadata: metadata.update(dataset=[])),
        lambda run: (run / "config.yaml").write_text(""),
        lambda run: (run / "config.yaml").write_text("{bad"),
        lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"),
        lambda run: (run / "checkpoints" / "round-0003.safetensors").write_bytes(b"junk"),
    ],
)
def test_a_damaged_run_is_not_resumed_but_named(simulated, tmp_path, capsys, spoil):
    run = shutil.copytree(simulated, tmp_path / "run")
    spoil(run)
    refused(capsys, "simulate", f"run_dir={run}", "resume=true", "federation.num_rounds=4")
    assert len(metrics_of(run)) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.pop("config"),
        lambda metadata: metadata.update(config=[1]),
        lambda metadata: metadata.update(config="text"),
        lambda metadata: metadata["config"].pop("seed"),
        lambda metadata: metadata.update(model=[]),
        lambda metadata: metadata["model"].pop("name"),
    ],
)
def test_a_checkpoint_that_does_not_say_what_it_is_is_not_certified(
    simulated, tmp_path, capsys, change
):
    run = shutil.copytree(simulated, tmp_path / "run")
    tampered(change)(run)
    refused(capsys, "certify", str(run), "-o", str(tmp_path / "rows"))


@pytest.mark.parametrize("content", ["{bad", "[1]", ""])
def test_damaged_parameters_of_rows_are_named(simulated, tmp_path, capsys, content):
    main(["certify", str(simulated), "-o", str(tmp_path / "rows")])
    (tmp_path / "rows" / "rows.tsv.parameters.json").write_text(content)
    rows = str(tmp_path / "rows" / "rows.tsv")
    assert "parameters.json" in refused(capsys, "report", rows, "-o", str(tmp_path / "x"))
    refused(capsys, "report", rows, "--json", "--radius-step", "inf")


def test_a_file_where_a_folder_must_be_is_named(simulated, tmp_path, capsys):
    (tmp_path / "file").touch()
    below = str(tmp_path / "file" / "x")
    assert str(tmp_path / "file") in refused(capsys, "certify", str(simulated), "-o", below)
    assert str(tmp_path / "file") in refused(capsys, "partition", "-o", below)


@pytest.mark.parametrize(
    "words",
    [
        ["simulate", "-m", "experiment=glob(*)", "smoothing.sigma=foo(1)"],
        ["simulate", "-m", "smoothing.sigma=0.1,0.2", "resume=yes"],
        ["simulate", "foo"],
        ["simulate", ""],
        ["simulate", "partition.num_clients=1000000000"],
        ["simulate", "name=../../elsewhere"],
        ["certify", "nothere"],
    ],
)
def test_every_odd_command_line_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "hydra.cc" not in refused(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_options_may_stand_anywhere(simulated, tmp_path, capsys):
    out = tmp_path / "rows"
    main(["certify", "-o", str(out), str(simulated), "certification.n=50"])
    main(["certify", str(simulated), "-o", str(tmp_path / "more"), "certification.n=50"])
    rows = [str(out / "rows.tsv"), str(tmp_path / "more" / "rows.tsv")]
    main(["report", rows[0], "-o", str(tmp_path / "joint"), rows[1]])
    assert is_picture(tmp_path / "joint.png")
    with pytest.raises(SystemExit):
        main(["simulate", "--nonsense"])


def contents(run):
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("setting", ["certification.n=7", "certification.num_images=3"])
def test_a_certified_model_is_not_resumed_on_other_terms(tmp_path, tiny_overrides, capsys, setting):
    run = tmp_path / "run"
    main(["simulate", *tiny_overrides, f"run_dir={run}"])
    before = contents(run)
    assert "on other terms" in refused(capsys, "simulate", f"run_dir={run}", "resume=true", setting)
    assert contents(run) == before
    main(["simulate", f"run_dir={run}", "resume=true"])


def test_terms_that_were_refused_never_leave_a_run_stuck(simulated, tmp_path, capsys):
    run = shutil.copytree(simulated, tmp_path / "run")
    shutil.rmtree(run / "certification", ignore_errors=True)  # of another test
    main(["certify", str(run), "certification.n=50"])
    before = contents(run)
    resume = [f"run_dir={run}", "resume=true", "certification.at_end=true"]
    assert "on other terms" in refused(capsys, "simulate", *resume)
    assert contents(run) == before
    main(["simulate", *resume, "certification.n=50"])


@pytest.mark.parametrize("content", ["null", "[]", "{bad", ""])
def test_rows_whose_parameters_are_damaged_are_not_continued(simulated, tmp_path, capsys, content):
    main(["certify", str(simulated), "-o", str(tmp_path / "rows")])
    (tmp_path / "rows" / "rows.tsv.parameters.json").write_text(content)
    text = refused(capsys, "certify", str(simulated), "-o", str(tmp_path / "rows"))
    assert "parameters.json is damaged" in text


def test_one_failing_part_of_a_sweep_leaves_the_others(tmp_path, tiny_overrides, capsys):
    root = tmp_path / "sweep"
    kept = [setting for setting in tiny_overrides if "learning_rate" not in setting]
    rates = ["training.learning_rate=1e30,0.1", f"run_dir={root}"]
    text = refused(capsys, "simulate", "-m", *kept, *rates)
    assert "1 of the sweep's 2 runs failed" in text
    assert is_picture(root / "curve.png")
    assert "needs the sweep" in refused(capsys, "simulate", "-m", *kept, "seed=1,2", "resume=true")


def test_a_device_without_the_servers_packages_is_told_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.delitem(sys.modules, "server.configuration", raising=False)
    sentence = refused(capsys, "config")
    assert "needs hydra" in sentence
    assert "'.[server]'" in sentence
