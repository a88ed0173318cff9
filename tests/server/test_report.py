import io
import json

import pytest
from rich.console import Console

from fedsmooth_core.certification.row_format import HEADER, CertifiedRow, format_row
from fedsmooth_core.config import RunConfig, from_nested
from fedsmooth_core.errors import CertificationError
from server import configuration
from server.report import (
    load_curve,
    plot_curves,
    print_table,
    report,
    table_radii,
    to_json,
    with_labels,
)

ROWS = [
    CertifiedRow(0, 3, 3, 0.30, 1, 0.5),
    CertifiedRow(1, 4, 4, 0.60, 1, 0.5),
    CertifiedRow(2, 5, -1, 0.0, 0, 0.5),
    CertifiedRow(3, 6, 1, 0.90, 0, 0.5),
]


def write_rows(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in [HEADER, *map(format_row, rows)]))
    return path


def make_run(path, settings, rows=ROWS):
    write_rows(path / "certification" / "round-0003" / "rows.tsv", rows)
    configuration.save(from_nested(RunConfig, settings), path / "config.yaml")
    return path


def printed(curves, radii, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_table(curves, radii, console)
    return console.file.getvalue()


def test_runs_are_labelled_by_the_settings_in_which_they_differ(tmp_path):
    settings = [
        {"name": "a", "run_dir": "x", "smoothing": {"sigma": 0.25}},
        {"name": "b", "smoothing": {"sigma": 0.5}, "attack": {"estimator": "one_point"}},
    ]
    runs = [make_run(tmp_path / str(i), one) for i, one in enumerate(settings)]
    labels = [curve.label for curve in with_labels([load_curve(run) for run in runs])]
    assert labels == ["sigma=0.25, estimator=stochastic", "sigma=0.5, estimator=one_point"]


def test_settings_of_one_name_keep_their_section(tmp_path):
    settings = [
        {"smoothing": {"sigma": 0.25}, "certification": {"sigma": 0.5}},
        {"smoothing": {"sigma": 0.5}, "certification": {"sigma": 0.25}},
    ]
    runs = [make_run(tmp_path / str(i), one) for i, one in enumerate(settings)]
    labels = [curve.label for curve in with_labels([load_curve(run) for run in runs])]
    assert labels[0] == "smoothing.sigma=0.25, certification.sigma=0.5"


def test_without_differing_settings_names_or_paths_are_the_labels(tmp_path):
    run = make_run(tmp_path / "first", {"name": "a"})
    again = make_run(tmp_path / "again", {"name": "b"})
    file = write_rows(tmp_path / "one" / "published_0.25.tsv")
    namesake = write_rows(tmp_path / "two" / "published_0.25.tsv")

    def labels(*paths):
        return [curve.label for curve in with_labels([load_curve(path) for path in paths])]

    assert labels(run) == ["first"]
    assert labels(run, again) == ["first", "again"]
    assert labels(run, file) == ["first", "published_0.25"]
    assert labels(file, namesake) == [str(file), str(namesake)]
    with pytest.raises(CertificationError, match="named twice"):
        labels(file, file)


def test_the_table_holds_every_figure_even_on_a_narrow_terminal(tmp_path):
    curve = load_curve(write_rows(tmp_path / "rows.tsv"))
    radii = table_radii([curve], 0.05)
    lines = printed([curve], radii, width=40).splitlines()
    header, row = lines[1].split(), lines[2].split()
    assert header == [*(f"{radius:g}" for radius in radii), "ACR", "abstained", "(%)", "images"]
    assert row[0] == "rows"
    assert row[1:8] == ["50.0"] * 7  # 0.3 is certified at 0.3
    assert row[8] == "25.0"
    assert row[-3:] == ["0.2250", "25.0", "4"]


def test_radii_are_multiples_up_to_the_first_beyond_all_certificates(tmp_path):
    curve = load_curve(write_rows(tmp_path / "rows.tsv"))
    assert table_radii([curve], 0.25) == [0, 0.25, 0.5, 0.75, 1.0]
    assert table_radii([curve], 0.1)[3] == 0.3
    for step in (0, -1, 1e-9, float("nan")):
        with pytest.raises(CertificationError, match="radius_step"):
            table_radii([curve], step)


def test_json_is_strict_and_says_what_the_table_says(tmp_path):
    run = make_run(tmp_path / "run", {"smoothing": {"sigma": 0.25}})
    data = json.loads(json.dumps(to_json([load_curve(run)], [0, 0.5]), allow_nan=False))
    curve = data["curves"][0]
    assert curve["label"] == "run"
    assert curve["settings"]["smoothing.sigma"] == 0.25
    assert [one["accuracy"] for one in curve["certified_accuracy"]] == [0.5, 0.25]


def test_figures_are_written_whatever_dots_their_name_has(tmp_path):
    curves = [load_curve(write_rows(tmp_path / "rows.tsv"))]
    written = plot_curves(curves, tmp_path / "new" / "sigma_0.25")
    assert [path.name for path in written] == ["sigma_0.25.png", "sigma_0.25.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in written[1].read_text()
    assert plot_curves(curves, tmp_path / "new" / "sigma_0.25.png") == written


def test_a_curve_that_abstains_everywhere_is_drawn_and_tabled(tmp_path):
    rows = write_rows(tmp_path / "rows.tsv", [ROWS[2]])
    assert len(report([rows], tmp_path / "curve", 0.25, as_json=False)) == 2


def test_report_prints_a_table_or_json(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.tsv")
    assert report([rows], None, 0.5, as_json=False) == []
    assert "Certified accuracy" in capsys.readouterr().out
    assert report([rows], None, 0.5, as_json=True) == []
    assert json.loads(capsys.readouterr().out)["curves"][0]["num_images"] == 4


def test_nothing_to_report_is_one_sentence(tmp_path):
    empty = write_rows(tmp_path / "empty.tsv", [])
    (tmp_path / "folder").mkdir()
    cases = [
        ([tmp_path / "absent.tsv"], "absent.tsv cannot be read"),
        ([empty], "no rows yet"),
        ([tmp_path / "folder"], "nothing in it is certified yet"),
        ([], "nothing to report"),
    ]
    for paths, message in cases:
        with pytest.raises(CertificationError, match=message) as caught:
            report(paths, None, 0.25, as_json=False)
        assert "\n" not in str(caught.value)
