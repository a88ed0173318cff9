"""What each client holds: a table for the terminal and a picture, before any training."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from fedsmooth_core.config import PartitionConfig, RunConfig
from fedsmooth_core.data import DatasetInfo, client_indices, load_dataset

Counts = npt.NDArray[np.int64]

_TABLE_CLIENTS = 20
_TABLE_CLASSES = 12
"""More columns do not fit a terminal."""
_PICTURE_CLIENTS = 60
_LEGEND_CLASSES = 20
"""More classes are told apart by a colour scale."""


def report_partition(config: RunConfig, out_dir: Path) -> list[Path]:
    """Print who holds what under ``config``, and draw it to ``out_dir`` (made if missing).

    Returns:
        The files written: ``partition.png`` and ``partition.svg``.

    Raises:
        ConfigError, DataError: as ``load_dataset`` and ``client_indices``.
    """
    dataset = load_dataset(config.dataset, "train")
    info = dataset.info
    counts = class_counts(dataset.labels, config.partition, config.seed, info.num_classes)
    console = Console()
    console.print(partition_table(counts, info))
    console.print(summary(counts), highlight=False, soft_wrap=True)
    out_dir.mkdir(parents=True, exist_ok=True)
    figure = partition_figure(counts, info, config.partition)
    paths = [out_dir / "partition.png", out_dir / "partition.svg"]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def class_counts(
    labels: npt.NDArray[np.int64], config: PartitionConfig, seed: int, num_classes: int
) -> Counts:
    """Return int64 (clients, classes): how many samples of each class each client holds."""
    return np.stack(
        [
            np.bincount(labels[client_indices(labels, config, seed, client)], minlength=num_classes)
            for client in range(config.num_clients)
        ]
    )


def partition_table(counts: Counts, info: DatasetInfo) -> Table:
    """Return clients x classes, for the first clients; the largest class of each stands out."""
    title = f"Training samples of {info.name} by client and class"
    if len(counts) > _TABLE_CLIENTS:
        title += f" (first {_TABLE_CLIENTS} of {len(counts)} clients)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("client", justify="right", no_wrap=True)
    columns = info.class_names if info.num_classes <= _TABLE_CLASSES else ("major class",)
    for name in columns:
        # Narrow terminals fold a class's name, never its numbers.
        table.add_column(name, justify="right", overflow="fold", min_width=len(str(counts.max())))
    table.add_column("total", justify="right", no_wrap=True)
    table.add_column("major", justify="right", no_wrap=True)
    for client, row in enumerate(counts[:_TABLE_CLIENTS]):
        major = int(row.argmax())
        if info.num_classes <= _TABLE_CLASSES:
            cells = [f"[bold]{n}[/]" if k == major else str(n) for k, n in enumerate(row)]
        else:
            cells = [info.class_names[major]]
        table.add_row(str(client), *cells, str(row.sum()), f"{row[major] / row.sum():.0%}")
    return table


def summary(counts: Counts) -> str:
    """Return one line about all clients: smallest, median and largest size and major share."""
    totals = counts.sum(axis=1)
    shares = counts.max(axis=1) / totals
    return (
        f"{len(counts)} clients, min / median / max: samples {totals.min()} / "
        f"{np.median(totals):g} / {totals.max()}, major share {shares.min():.0%} / "
        f"{np.median(shares):.0%} / {shares.max():.0%}."
    )


def partition_figure(counts: Counts, info: DatasetInfo, config: PartitionConfig) -> Figure:
    """Draw one stacked bar a client, for the first clients, coloured by class."""
    shown = counts[:_PICTURE_CLIENTS]
    clients = np.arange(len(shown))
    has_legend = info.num_classes <= _LEGEND_CLASSES
    height = max(3.2, 1.7 + 0.17 * len(shown), has_legend * (0.8 + 0.22 * info.num_classes))
    # Made without pyplot: no display, and no state that outlives this call.
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    colours = _colours(info.num_classes)
    left = np.zeros(len(shown), dtype=np.int64)
    for label, name in enumerate(info.class_names):
        width = shown[:, label]
        axes.barh(
            clients, width, left=left, height=0.82, color=colours(label), label=name, linewidth=0
        )
        left += width
    axes.set_ylim(len(shown) - 0.4, -0.6)  # client 0 on top
    axes.set_xlim(0, left.max())
    axes.yaxis.set_major_locator(MaxNLocator(nbins=20, steps=[1, 2, 5, 10], integer=True))
    axes.set_ylabel("client")
    axes.set_xlabel("training samples")
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{info.name}: {_describe(config)}"
    if len(counts) > len(shown):
        title += f" (first {len(shown)} of {len(counts)} clients)"
    axes.set_title(title, loc="left")
    if has_legend:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="class")
    else:
        norm = Normalize(-0.5, info.num_classes - 0.5)
        figure.colorbar(ScalarMappable(norm, colours), ax=axes, label="class number")
    return figure


def _colours(num_classes: int) -> Colormap:
    if num_classes <= 10:
        return ListedColormap(colormaps["tab10"](np.arange(num_classes)))
    if num_classes <= _LEGEND_CLASSES:
        return ListedColormap(colormaps["tab20"](np.arange(num_classes)))
    return colormaps["turbo"].resampled(num_classes)


def _describe(config: PartitionConfig) -> str:
    parameter = {
        "major_class": f", gamma = {config.gamma:g}",
        "dirichlet": f", concentration = {config.concentration:g}",
        "iid": "",
    }[config.scheme]
    return f"{config.scheme.replace('_', ' ')}{parameter}"
