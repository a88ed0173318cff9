"""Local certification by each method and in each precision, from the command line."""

import json
import shutil

import pytest

from fedsmooth_core.certification.rows import read_parameters, read_rows
from server.certify import certify_checkpoint, find_checkpoint
from server.cli import main

SEQUENTIAL = ["certification.method=sequential", "certification.n=1000"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_overrides):
    path = tmp_path_factory.mktemp("trained") / "run"
    main(["simulate", *tiny_overrides, "certification.at_end=false", f"run_dir={path}"])
    return path


def certified(run, out, *settings):
    main(["certify", str(run), "-o", str(out), *settings])
    return read_rows(out / "rows.tsv")


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(arguments)
    return capsys.readouterr().err


def test_sequential_rows_say_their_n_and_what_decided_them(trained, tmp_path):
    rows = certified(trained, tmp_path, *SEQUENTIAL, "certification.radius_step=0.1")
    assert len(rows) == 5
    assert (rows.n <= 1000).all()
    terms = read_parameters(tmp_path / "rows.tsv")
    assert (terms["method"], terms["n"], terms["radius_step"]) == ("sequential", 1000, 0.1)
    assert terms["precision"] == "float32"
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["mean_n"] == rows.n.mean()
    main(["report", str(tmp_path / "rows.tsv"), "-o", str(tmp_path / "curve")])


def test_bfloat16_is_recorded_and_never_mixed_with_float32(trained, tmp_path, capsys):
    certified(trained, tmp_path, "certification.precision=bfloat16")
    assert read_parameters(tmp_path / "rows.tsv")["precision"] == "bfloat16"
    text = refusal(capsys, "certify", str(trained), "-o", str(tmp_path))
    assert "precision ('bfloat16' there, 'float32' now)" in text


def test_fixed_rows_are_in_the_published_format_and_old_ones_are_continued(
    trained, tmp_path, tiny, capsys
):
    assert certified(trained, tmp_path).n is None
    beside = tmp_path / "rows.tsv.parameters.json"
    parameters = json.loads(beside.read_text())
    assert parameters.pop("method") == "fixed"
    assert "radius_step" not in parameters
    # As they were recorded before there was another method; two rows are still owed.
    beside.write_text(json.dumps(parameters))
    lines = (tmp_path / "rows.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.tsv").write_text("".join(lines[:4]))
    certify_checkpoint(find_checkpoint(trained), tiny(), tmp_path)
    assert [line.split("\t")[:5] for line in lines] == [
        line.split("\t")[:5] for line in (tmp_path / "rows.tsv").read_text().splitlines()
    ]
    text = refusal(capsys, "certify", str(trained), "-o", str(tmp_path), *SEQUENTIAL)
    assert "method ('fixed' there, 'sequential' now)" in text


def test_a_run_is_not_resumed_with_another_method_or_grid(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    main(["certify", str(run), *SEQUENTIAL])
    resume = ["simulate", f"run_dir={run}", "resume=true", "certification.at_end=true"]
    assert "method ('sequential' there, 'fixed' now)" in refusal(capsys, *resume)
    finer = [*SEQUENTIAL, "certification.radius_step=0.125"]
    assert "radius_step (0.25 there, 0.125 now)" in refusal(capsys, *resume, *finer)
    main([*resume, *SEQUENTIAL])


def test_too_fine_a_grid_is_refused_before_a_round_is_trained(tmp_path, tiny_overrides, capsys):
    run = tmp_path / "run"
    settings = [*tiny_overrides, *SEQUENTIAL, "certification.radius_step=1e-6", f"run_dir={run}"]
    assert "more than 1000 radii" in refusal(capsys, "simulate", *settings)
    assert not list(run.glob("metrics.jsonl"))
