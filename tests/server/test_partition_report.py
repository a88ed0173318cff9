"""The table and the picture of who holds what."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fedsmooth_core.config import PartitionConfig, RunConfig
from fedsmooth_core.data import DatasetInfo, client_indices
from server.partition_report import (
    class_counts,
    partition_figure,
    partition_table,
    report_partition,
    summary,
)


def info(num_classes):
    return DatasetInfo(
        name="toy",
        class_names=tuple(f"class{k}" for k in range(num_classes)),
        shape=(1, 2, 2),
        max_value=255,
        mean=(0.5,),
        std=(0.2,),
        fingerprint="0",
    )


def printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.parametrize("scheme", ["major_class", "iid", "dirichlet"])
def test_counts_are_those_of_the_clients_indices(scheme):
    labels = np.repeat([0, 1, 2], 40)
    config = PartitionConfig(scheme=scheme, num_clients=4, gamma=0.5)
    counts = class_counts(labels, config, seed=3, num_classes=5)
    assert counts.shape == (4, 5)
    for client in range(4):
        held = labels[client_indices(labels, config, 3, client)]
        assert counts[client].tolist() == [int((held == k).sum()) for k in range(5)]


def test_the_table_has_one_row_a_client():
    text = printed(partition_table(np.array([[3, 1], [0, 8]]), info(2)))
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["0"], ["1"])]
    assert rows == [["0", "3", "1", "4", "75%"], ["1", "0", "8", "8", "100%"]]


def test_many_clients_and_classes_are_summed_up():
    counts = np.ones((1000, 100), dtype=np.int64)
    counts[5, 42] = 101
    text = printed(partition_table(counts, info(100)))
    assert "first 20 of 1000 clients" in " ".join(text.split())
    assert "class42" in text
    assert len(text.splitlines()) < 30
    assert summary(counts) == (
        "1000 clients, min / median / max: samples 100 / 100 / 200, major share 1% / 1% / 50%."
    )


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (70, 10), (5, 20), (5, 100)])
def test_the_picture_shows_every_sample_of_the_clients_drawn(num_clients, num_classes):
    counts = np.random.default_rng(0).integers(1, 9, (num_clients, num_classes))
    figure = partition_figure(counts, info(num_classes), PartitionConfig(num_clients=num_clients))
    axes = figure.axes[0]
    shown = min(num_clients, 60)
    assert len(axes.patches) == shown * num_classes
    assert sum(patch.get_width() for patch in axes.patches) == counts[:shown].sum()
    assert ("first 60 of 70" in axes.get_title(loc="left")) == (num_clients == 70)
    figure.draw_without_rendering()


def test_report_prints_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEDSMOOTH_CACHE", str(tmp_path / "cache"))
    png, svg = report_partition(RunConfig(), tmp_path / "new" / "folder")
    out = capsys.readouterr().out
    assert "digits" in out
    assert "10 clients" in out
    assert Image.open(png).width > 1000
    assert svg.read_text().rstrip().endswith("</svg>")
