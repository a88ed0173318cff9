"""``fedsmooth attack``: on a certified run, on forged certificates, on none, and on what does not fit."""

import json
import shutil

import pytest
from PIL import Image

from fedsmooth_core.certification.rows import read_rows
from fedsmooth_core.checkpoint import load_checkpoint
from server.attacked import ATTACK, AttackTerms, attack_checkpoint
from server.certify import find_checkpoint
from server.cli import main
from server.configuration import with_overrides

QUICK = ["--steps", "2", "--draws", "16", "-n", "200"]


@pytest.fixture(scope="module")
def certified(tmp_path_factory, tiny_overrides):
    """A tiny run, with certificates of five images."""
    path = tmp_path_factory.mktemp("certified") / "run"
    main(["simulate", *tiny_overrides, "training.local_steps=20", f"run_dir={path}"])
    return path


@pytest.fixture
def run(certified, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(certified, tmp_path / "run")


def folder_of(run):
    return run / "certification" / "round-0003"


def forge(rows, radius):
    """Let every image be certified as its true class, up to a radius."""
    header, *lines = rows.read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    forged = ["\t".join([c[0], c[1], c[1], str(radius), "1", c[5]]) for c in cells]
    rows.write_text("\n".join([header, *forged]) + "\n")


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["attack", *map(str, arguments)])
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    return text


def test_a_certified_run_is_attacked_and_compared(run, capsys):
    main(["attack", str(run), *QUICK])
    printed = capsys.readouterr().out
    found = json.loads((folder_of(run) / ATTACK).read_text())
    rows = read_rows(folder_of(run) / "rows.tsv")
    parameters = found["parameters"]
    assert (parameters["sigma"], parameters["precision"]) == (0.25, "float32")
    assert (parameters["num_images"], parameters["n"], parameters["steps"]) == (5, 200, 2)
    assert len(parameters["weights"]) == len(parameters["rows"]) == 64
    assert [one["radius"] for one in found["radii"]] == [0.125, 0.25, 0.5]
    assert found["radii"][0]["num_certified"] > 0
    for one in found["radii"]:
        certified = (rows.correct == 1) & (rows.radius >= one["radius"])
        assert one["num_certified"] == certified.sum()
        assert one["certified_accuracy"] == certified.mean()
        assert one["empirical_accuracy"] >= one["certified_accuracy"]
        low, high = one["confidence_interval_95"]
        assert low <= one["empirical_accuracy"] <= high
        assert one["broken"] == one["broken_beyond_sampling_error"] == []
    assert found["holds"] is True
    assert "Under attack, at sigma 0.25" in printed
    assert "Radius 0.5:" in printed
    assert str(folder_of(run) / ATTACK) in printed


def test_a_forged_certificate_ends_with_status_1_and_is_named(run, capsys):
    rows = folder_of(run) / "rows.tsv"
    forge(rows, 5.0)
    with pytest.raises(SystemExit) as exit_:
        main(["attack", str(run), *QUICK, "--radius", "2", "--radius", "6"])
    assert exit_.value.code == 1
    assert "beyond sampling error: THE CERTIFICATES ARE BROKEN." in capsys.readouterr().out
    within, beyond = json.loads((folder_of(run) / ATTACK).read_text())["radii"]
    assert within["num_certified"] == 5
    assert set(within["broken_beyond_sampling_error"]) <= set(read_rows(rows).idx.tolist())
    assert not within["holds"]
    assert beyond["num_certified"] == 0
    assert beyond["holds"]


def test_without_certificates_the_accuracy_stands_alone(run, tmp_path, capsys):
    shutil.rmtree(run / "certification")
    main(["attack", str(run), *QUICK, "--images", "3", "certification.sigma=0.5", "--radius", "0"])
    printed = capsys.readouterr().out
    found = json.loads((folder_of(run) / ATTACK).read_text())
    assert found["holds"] is None
    assert (found["parameters"]["sigma"], found["parameters"]["num_images"]) == (0.5, 3)
    assert set(found["radii"][0]) == {"radius", "empirical_accuracy", "confidence_interval_95"}
    assert "fedsmooth certify" in printed


def test_rows_say_sigma_precision_and_images_and_more_than_wanted_are_thinned_evenly(run, tmp_path):
    settings = ["certification.sigma=0.5", "certification.precision=bfloat16"]
    main(["certify", str(run), "-o", str(tmp_path / "rows"), *settings])
    rows = tmp_path / "rows" / "rows.tsv"
    forge(rows, 5.0)
    output = tmp_path / "deep" / "figures.json"
    options = ["--rows", str(rows), "--images", "2", "--radius", "4", "-o", str(output)]
    with pytest.raises(SystemExit):
        main(["attack", str(run), *QUICK, *options])
    found = json.loads(output.read_text())
    assert (found["parameters"]["sigma"], found["parameters"]["precision"]) == (0.5, "bfloat16")
    assert found["radii"][0]["num_certified"] == found["parameters"]["num_images"] == 2
    assert set(found["radii"][0]["broken"]) <= set(read_rows(rows).idx[[0, 2]].tolist())
    assert not (folder_of(run) / ATTACK).exists()


def test_another_module_gets_what_is_written(run, console):
    path = find_checkpoint(run)
    config = with_overrides(load_checkpoint(path).metadata["config"], [], str(path))
    terms = AttackTerms(radii=(0.25,), steps=1, draws=16, n=50, images=2)
    rows = folder_of(run) / "rows.tsv"
    found = attack_checkpoint(path, config, rows, terms, console)
    assert json.loads((folder_of(run) / ATTACK).read_text()) == found
    # Seeded by the run, so it is repeatable.
    assert attack_checkpoint(path, config, rows, terms, console) == found
    (folder_of(run) / ATTACK).unlink()
    assert attack_checkpoint(path, config, None, terms, console)["holds"] is None
    assert not (folder_of(run) / ATTACK).exists()
    assert "Attacking at sigma 0.25: 2 of 2" in console.file.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--radius", "-1"], "--radius -1 is out of range"),
        (["--radius", "nan"], "--radius nan is out of range"),
        (["--radius", "16"], "allowed is a number in [0, 16)"),
        (["--steps", "0"], "--steps 0 is out of range"),
        (["--draws", "0"], "--draws 0 is out of range"),
        (["-n", "49"], "-n 49 is out of range: allowed is 50 or more"),
        (["--images", "0"], "--images 0 is out of range"),
        (["training.local_steps=3"], "does not concern the certification"),
        (["certification.sigma=0.5"], "certification.sigma=0.5 has no say"),
        (["certification.precision=bfloat16"], "certification.precision=bfloat16 has no say"),
        (["--rows", "nowhere.tsv"], "nowhere.tsv cannot be read"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(certified, capsys, options, said):
    assert said in refused(capsys, certified, *options)
    assert not (folder_of(certified) / ATTACK).exists()


def test_certificates_of_another_model_or_of_unknown_terms_are_refused(run, capsys):
    early = run / "checkpoints" / "round-0001.safetensors"
    rows = folder_of(run) / "rows.tsv"
    assert "of other weights" in refused(capsys, early, "--rows", rows)
    beside = folder_of(run) / "rows.tsv.parameters.json"
    terms = json.loads(beside.read_text())
    beside.write_text(json.dumps(terms | {"dataset": "x"}))
    assert "of other images than the test set of digits" in refused(capsys, run)
    beside.write_text(json.dumps(terms | {"sigma": "x"}))
    assert "cannot be compared" in refused(capsys, run)
    beside.unlink()
    assert "cannot be compared" in refused(capsys, run)
    beside.write_text(json.dumps(terms))
    text = rows.read_text()
    rows.write_text(text.replace("\n0\t", "\n99999\t", 1))
    assert "of other images than the test set of digits" in refused(capsys, run)
    rows.write_text(text.splitlines()[0] + "\n")
    assert "no rows yet" in refused(capsys, run)


def test_a_model_of_other_images_is_refused(certified, tmp_path, capsys):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / split / name / "0.png")
    settings = ["dataset.name=imagefolder", f"dataset.root={tmp_path / 'images'}"]
    message = refused(capsys, certified, *settings)
    assert "(1, 8, 8)" in message
    assert "(3, 8, 8)" in message
