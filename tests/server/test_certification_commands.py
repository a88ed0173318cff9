"""`fedsmooth certifier, token, jobs, predict` and `certify --service`: what they print, make and refuse."""

import json
import re
import stat

import numpy as np
import pytest
from certification_harness import SPEC, serving, terms, weights
from PIL import Image

from fedsmooth_core.certification.rows import read_parameters, read_rows
from fedsmooth_core.checkpoint import load_checkpoint
from fedsmooth_core.config import DatasetConfig
from fedsmooth_core.data import load_dataset
from server.certification.auth import Tokens
from server.certification.jobs import Submission
from server.cli import main


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_overrides):
    """A run without certificates."""
    path = tmp_path_factory.mktemp("trained") / "run"
    main(["simulate", *tiny_overrides, "certification.at_end=false", f"run_dir={path}"])
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture(scope="module")
def at(service):
    return ["--service", service.address, "--insecure"]


@pytest.fixture
def job(service):
    with service.client() as client:
        job = client.submit(SPEC, terms(), weights(1), Submission("the [run]", 3))
        *_, last = client.watch(job.key)
        return last.job


@pytest.fixture
def pictures(tmp_path):
    """Two digits as files: grey and of the model's size, in colour and larger."""
    images = load_dataset(DatasetConfig("digits"), "test").images
    paths = [tmp_path / "grey.png", tmp_path / "colour.png"]
    Image.fromarray(images[0, 0] * np.uint8(15)).save(paths[0])
    Image.fromarray(images[1, 0] * np.uint8(15)).convert("RGB").resize((20, 20)).save(paths[1])
    return [str(path) for path in paths]


def refused(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    return text


# --------------------------------------------------------------------------------------------------
# certify --service


def test_a_checkpoint_is_certified_at_a_service_as_on_this_machine(run, at, tmp_path, capsys):
    checkpoint = run / "checkpoints/round-0003.safetensors"
    here, there = tmp_path / "here", tmp_path / "there"
    main(["certify", str(checkpoint), "-o", str(here)])
    main(["certify", str(checkpoint), "-o", str(there), *at])
    printed = capsys.readouterr().out
    assert printed.count("Certified accuracy (%) at l2 radius") == 2
    assert sorted(path.name for path in there.iterdir()) == sorted(
        path.name for path in here.iterdir()
    )
    for name in ("summary.json", "rows.tsv.parameters.json"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    one, other = read_rows(here / "rows.tsv"), read_rows(there / "rows.tsv")
    for column in ("idx", "label", "predict", "radius", "correct"):
        assert (getattr(one, column) == getattr(other, column)).all()
    # Again: the same job, and rows that are there are left alone.
    before = (there / "rows.tsv").read_bytes()
    main(["certify", str(checkpoint), "-o", str(there), *at])
    assert (there / "rows.tsv").read_bytes() == before


def test_a_job_that_was_cancelled_is_said_to_be(run, service, at, tmp_path, capsys, monkeypatch):
    def cancelled(store, key, *arguments, **others):
        store.cancel(key)

    monkeypatch.setattr(type(service.store), "append", cancelled)
    checkpoint = run / "checkpoints/round-0002.safetensors"
    text = refused(capsys, "certify", checkpoint, "-o", tmp_path / "out", *at)
    assert "is cancelled after 0 of 5 images" in text
    assert not (tmp_path / "out" / "rows.tsv").exists()


# --------------------------------------------------------------------------------------------------
# jobs


def test_jobs_are_listed_shown_watched_and_fetched(at, job, tmp_path, capsys):
    main(["jobs", *at, "--run", "the [run]"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    how = r"small_cnn +digits +0.25 +100 +fixed +4 of 4"
    assert re.match(rf"{job.key[:12]} +done +the \[run\] +3 +{how}", listed[1])
    main(["jobs", job.key[:8], *at])
    shown = capsys.readouterr().out
    assert job.key in shown
    assert "round 3 of the [run]" in shown
    main(["jobs", job.key, "--watch", *at])
    assert "4 of 4, certified accuracy at radius 0" in capsys.readouterr().out
    main(["jobs", job.key, "--fetch", str(tmp_path), *at])
    assert len(read_rows(tmp_path / "rows.tsv")) == 4
    assert read_parameters(tmp_path / "rows.tsv")["weights"] == job.weights
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["num_images"], summary["num_test_images"]) == (4, None)
    capsys.readouterr()
    main(["jobs", *at, "--run", "another"])
    assert capsys.readouterr().out == "No jobs.\n"


def test_a_job_on_all_images_says_how_many_there_are(service, at, tmp_path):
    with service.client() as client:
        job = client.submit(SPEC, terms(num_images=None, n0=1, n=1), weights(4))
        next(now for now in client.watch(job.key) if now.job.images_done)
        client.cancel(job.key)
    main(["jobs", job.key, "--fetch", str(tmp_path), *at])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num_test_images"] == job.num_images > 4


def test_jobs_that_differ_in_how_they_certify_are_told_apart(service, at, capsys):
    with service.client() as client:
        procedure = {"method": "sequential", "precision": "bfloat16"}
        job = client.submit(SPEC, terms(**procedure), weights(3), Submission("named", 7))
        list(client.watch(job.key))
        client.submit(SPEC, terms(**procedure), weights(3))
    main(["jobs", *at])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if job.key[:12] in line]
    assert "sequential, bfloat16" in line
    # Somebody who names no run submitted it later.
    assert re.search(r"done +named +7 ", line)


def test_a_job_is_cancelled_from_the_shell(service, at, capsys):
    with service.client() as client:
        long = client.submit(SPEC, terms(num_images=300, n=50_000), weights(2))
    main(["jobs", long.key, "--cancel", *at])
    assert "  cancelled, " in capsys.readouterr().out


def test_what_jobs_cannot_do_is_one_sentence(at, job, capsys):
    assert "there is no job" in refused(capsys, "jobs", "f" * 64, *at)
    assert "there is no job" in refused(capsys, "jobs", "xyz", *at)
    assert "about one job" in refused(capsys, "jobs", "--cancel", *at)
    assert "is not available" in refused(capsys, "jobs", "--service", "127.0.0.1:1", "--insecure")
    assert "cannot be read" in refused(capsys, "jobs", *at, "--token-file", "nowhere")


# --------------------------------------------------------------------------------------------------
# predict


@pytest.mark.parametrize("certify", [False, True])
def test_images_are_labelled_here_and_at_a_service(run, at, pictures, job, capsys, certify):
    options = ["--n", "200", *(["--certify", "--n0", "20"] if certify else [])]
    for model in (["--checkpoint", str(run)], ["--model", job.key, *at]):
        main(["predict", *pictures, *options, *model])
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["image", "label", *(["radius"] if certify else [])]
        assert [line.split()[0] for line in lines] == pictures
        assert all(re.fullmatch(r"[0-9]|ABSTAIN", line.split()[1]) for line in lines)
        main(["predict", *pictures, *options, *model, "--json"])
        for path, answer in zip(pictures, json.loads(capsys.readouterr().out), strict=True):
            assert answer["image"] == path
            assert ("radius" in answer) is certify
            assert (answer["label"] is None) == (answer["class_name"] is None)


def test_a_model_serves_here_in_the_precision_of_its_run(run, pictures, capsys, monkeypatch):
    from fedsmooth_core.certification import precision

    asked = []
    true = precision.in_precision
    monkeypatch.setattr(
        precision, "in_precision", lambda model, name: asked.append(name) or true(model, name)
    )
    checkpoint = load_checkpoint(run / "checkpoints/round-0003.safetensors")
    checkpoint.metadata["config"]["certification"]["precision"] = "bfloat16"
    monkeypatch.setattr("fedsmooth_core.checkpoint.load_checkpoint", lambda path: checkpoint)
    main(["predict", *pictures, "--n", "50", "--checkpoint", str(run)])
    assert "bfloat16" in asked


def test_the_file_that_is_no_image_is_named(run, pictures, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for path in (broken, tmp_path / "missing.png", tmp_path):
        text = refused(capsys, "predict", *pictures, path, "--checkpoint", run)
        assert str(path) in text


def test_a_prediction_needs_a_model(run, at, pictures, capsys):
    assert "give the model" in refused(capsys, "predict", *pictures)
    assert "give the model" in refused(capsys, "predict", *pictures, "--checkpoint", run, *at)
    assert "belong together" in refused(capsys, "predict", *pictures, *at)
    text = refused(capsys, "predict", *pictures, "--checkpoint", run, "--n", 0)
    assert "n0 and n must be >= 1" in text


# --------------------------------------------------------------------------------------------------
# certifier and token


def test_a_token_is_printed_once_and_alone(tmp_path, capsys):
    tokens = tmp_path / "tokens"
    main(["token", "me", "--tokens", str(tokens), "--days", "2"])
    out, err = capsys.readouterr()
    assert Tokens(tokens).name_of(f"Bearer {out.strip()}") == "me"
    assert out.count("\n") == 1
    assert "kept nowhere" in err
    assert "days" in refused(capsys, "token", "me", "--tokens", tokens, "--days", "0")


def test_a_token_is_written_to_a_file_that_its_owner_alone_reads(tmp_path, capsys):
    tokens, secret = tmp_path / "tokens", tmp_path / "secret"
    secret.write_text("an old one")
    secret.chmod(0o644)
    main(["token", "me", "--tokens", str(tokens), "--output", str(secret)])
    out, err = capsys.readouterr()
    assert out == ""
    assert str(secret) in " ".join(err.split())
    assert Tokens(tokens).name_of(f"Bearer {secret.read_text().strip()}") == "me"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "tokens"]
    nowhere = tmp_path / "nowhere" / "secret"
    assert "cannot hold" in refused(capsys, "token", "me", "--tokens", tokens, "-o", nowhere)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "needs a certificate"),
        (["--insecure", "--listen", "0.0.0.0:0"], "plain text"),
        (["--insecure", "--listen", "localhost"], "is no address"),
        (["--insecure", "--tokens", "nowhere"], "cannot be read"),
        (["--insecure", "--data", "digits"], "NAME=FOLDER"),
        (["--insecure", "--data", "a=b", "--data", "a=c"], "twice"),
        (["--insecure", "--data", "a/b=c"], "cannot name"),
        (["--insecure", "--max-n", "0"], "max_n"),
        (["--insecure", "--batch-size", "0"], "--batch-size"),
        (["--insecure", "--threads", "0"], "--threads"),
        (["--insecure", "--device", "tpu"], "device"),
        (["--insecure", "--http", "127.0.0.1"], "is no address"),
        (["--certificate", "nowhere", "--key", "nowhere"], "cannot be read"),
    ],
    ids=" ".join,
)
def test_a_service_that_cannot_start_says_why(tmp_path, capsys, options, said):
    assert said in refused(capsys, "certifier", "--directory", tmp_path / "service", *options)


def test_a_directory_or_a_port_in_use_is_one_sentence(service, tmp_path, capsys):
    start = ["certifier", "--insecure", "--directory"]
    text = refused(capsys, *start, service.store.directory, "--listen", "127.0.0.1:0")
    assert "in use by another" in text
    for option in ("--listen", "--http"):
        text = refused(capsys, *start, tmp_path / "own", option, service.address)
        assert "cannot be listened on" in text
