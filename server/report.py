"""Certified accuracy of finished certifications, side by side: a table, a figure, or JSON."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsmooth_core.certification.analysis import (
    Rows,
    abstention_rate,
    average_certified_radius,
    certified_accuracy,
    confidence_interval,
    read_rows,
    summary,
)
from fedsmooth_core.certification.rows import read_parameters
from fedsmooth_core.config import Scalar, to_flat
from fedsmooth_core.errors import CertificationError
from server import configuration

ROWS_IN_RUN = "certification/round-*/rows.tsv"
"""Where a run directory keeps its certification rows: a folder for each certified round."""

_TERMS = tuple(
    f"certification.{key}" for key in ("method", "sigma", "n0", "n", "alpha", "precision")
)

# Settings that do not say what was trained or certified, so no curve is named after them.
_SAYS_NOTHING = (
    "name",
    "run-dir",
    "resume",
    "runtime.",
    "evaluation.",
    "service.",
    "certification.every",
    "federation.checkpoint-every",
)

# Okabe and Ito's colours, told apart by colour-blind readers; line styles repeat it in grey print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", "-.", ":")
_GRID_POINTS = 1000


@dataclass(frozen=True, eq=False)
class Curve:
    """One certification: what to call it, its rows, and the settings they came from."""

    label: str
    rows: Rows
    path: Path
    """What the user named: a run directory or a file of rows."""
    details: Mapping[str, Scalar]
    """The run's settings, flat, under kebab-case keys; empty for a bare file of rows."""
    sha256: str
    """Of the file of rows."""


def report(
    paths: Sequence[Path], out: Path | None, radius_step: float, as_json: bool
) -> list[Path]:
    """Print the certified accuracy of runs or files of rows, and draw it if ``out`` is given.

    Args:
        paths: run directories or files of rows, at least one.
        out: the figure without its ending: ``out``.png and ``out``.svg are written.
        radius_step: step of the table's radii, in [0, 1] pixel units, > 0.
        as_json: print JSON on the standard output instead of a table.

    Returns:
        The files written.

    Raises:
        CertificationError: if there is nothing to report, or a file is missing or malformed.
        ConfigError: if a run's recorded settings cannot be read.
    """
    if not paths:
        raise CertificationError("nothing to report: name run directories or files of rows.")
    curves = with_labels([load_curve(path) for path in paths])
    radii = table_radii(curves, radius_step)
    console = Console()
    if as_json:
        console.file.write(json.dumps(to_json(curves, radii), indent=2, allow_nan=False) + "\n")
    else:
        print_table(curves, radii, console)
    return [] if out is None else plot_curves(curves, out)


def show(paths: Sequence[Path], out: Path, radius_step: float, console: Console) -> None:
    """Print the table, draw the pictures, and say where they are."""
    for picture in report(paths, out, radius_step, as_json=False):
        console.print(f"Picture: {picture}", soft_wrap=True, markup=False)


def load_curve(path: Path) -> Curve:
    """Read one certification, labelled with its name.

    ``path`` is a file of rows, or a run directory: that has those of its last certified round.

    Raises:
        CertificationError: if there are no rows, or they cannot be read.
        ConfigError: if a run's recorded settings cannot be read.
    """
    if path.is_dir():
        certified = sorted(path.glob(ROWS_IN_RUN))
        if not certified:
            raise CertificationError(
                f"{path} holds no {ROWS_IN_RUN}: it is no run, or nothing in it is certified yet."
            )
        file, label = certified[-1], path.resolve().name
        # What these rows were certified with rules, should the run have been given other settings since.
        settings = {
            f"certification.{key}": value for key, value in (read_parameters(file) or {}).items()
        }
        details = to_flat(configuration.load(path))
        details |= {key: value for key, value in settings.items() if key in _TERMS}
    else:
        file, label, details = path, path.name.removesuffix(".tsv"), read_parameters(path) or {}
    # Taken first: should rows come meanwhile, no picture claims to show more than it does.
    digest = rows_sha256(file) if file.is_file() else ""
    rows = read_rows(file)
    if not len(rows):
        raise CertificationError(f"{file} has no rows yet: report it once an image is certified.")
    return Curve(label, rows, path, details, digest)


def rows_sha256(path: Path) -> str:
    """Return the hash of a file of rows, which pictures of it name in their metadata."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def with_labels(curves: Sequence[Curve]) -> list[Curve]:
    """Label several curves by the settings in which their runs differ, e.g. ``sigma=0.25``.

    Where that cannot tell them apart they keep their names, or their paths if those are equal too.
    """
    if len(curves) == 1:
        return list(curves)
    by_settings = _labels_from_settings([curve.details for curve in curves])
    names = [curve.label for curve in curves]
    paths = [str(curve.path) for curve in curves]
    for labels in (by_settings, names, paths):
        if all(labels) and len(set(labels)) == len(labels):
            return [
                replace(curve, label=label) for curve, label in zip(curves, labels, strict=True)
            ]
    raise CertificationError(f"{', '.join(paths)}: the same certification is named twice.")


def _labels_from_settings(settings: Sequence[Mapping[str, Scalar]]) -> list[str]:
    keys = dict.fromkeys(key for one in settings for key in one)
    differing = [
        key
        for key in keys
        if not key.startswith(_SAYS_NOTHING) and len({repr(one.get(key)) for one in settings}) > 1
    ]
    short = [key.rpartition(".")[2] for key in differing]
    said = {
        key: (name if short.count(name) == 1 else key).replace("-", "_")
        for key, name in zip(differing, short, strict=True)
    }
    return [
        ", ".join(f"{said[key]}={one[key]}" for key in differing if key in one) for one in settings
    ]


MOST_RADII = 1000
"""Of a table."""


def table_radii(curves: Sequence[Curve], radius_step: float) -> list[float]:
    """Multiples of the step, from 0 to the first at which no curve has any image left.

    Raises:
        CertificationError: unless the step is > 0 and makes at most 1,000 radii.
    """
    largest = max(float(curve.rows.radius.max()) for curve in curves)
    if not (0 < radius_step < math.inf and largest / radius_step < MOST_RADII):
        raise CertificationError(
            f"radius_step={radius_step} does not suit radii up to {largest:.3g}: allowed is a step "
            f"> 0 that makes at most {MOST_RADII:,} radii."
        )
    # Rounded so that 3 steps of 0.1 read 0.3.
    return [round(i * radius_step, 12) for i in range(int(largest / radius_step) + 2)]


def print_table(curves: Sequence[Curve], radii: Sequence[float], console: Console) -> None:
    """Print certified accuracy in percent, a curve a line and a radius a column, and the totals."""
    table = Table(
        title="Certified accuracy (%) at l2 radius", title_justify="left", box=None, pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for radius in radii:
        table.add_column(f"{radius:g}", justify="right", no_wrap=True)
    for name in ("ACR", "abstained (%)", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for curve in curves:
        accuracy = certified_accuracy(curve.rows, np.asarray(radii))
        table.add_row(
            Text(curve.label),
            *(f"{100 * value:.1f}" for value in accuracy),
            f"{average_certified_radius(curve.rows):.4f}",
            f"{100 * abstention_rate(curve.rows):.1f}",
            f"{len(curve.rows)}",
        )
    # As wide as it needs: rich would shorten numbers to fit a narrow terminal.
    unlimited = console.options.update(max_width=100_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, soft_wrap=True)
    console.print("ACR: average certified radius, in [0, 1] pixel units.", style="dim")


def to_json(curves: Sequence[Curve], radii: Sequence[float]) -> dict[str, Any]:
    """Return all figures of the curves, as plain data."""
    return {
        "curves": [
            {
                "label": curve.label,
                "path": str(curve.path),
                "settings": dict(curve.details),
                **summary(curve.rows, radii),
            }
            for curve in curves
        ]
    }


def plot_curves(curves: Sequence[Curve], out_stem: Path) -> list[Path]:
    """Draw certified accuracy against radius, with a 95 % band for the choice of images.

    The hashes of the files of rows stand in the metadata (``Identifier``): they tell what a picture shows,
    wherever it is copied to.

    Returns:
        The files written: ``out_stem``.png and ``out_stem``.svg (its own such ending is dropped).
    """
    largest = max(float(curve.rows.radius.max()) for curve in curves) or 1.0
    grid = np.linspace(0, 1.04 * largest, _GRID_POINTS)
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, curve in enumerate(curves):
        _draw(axes, curve, grid, number)
    axes.set_xlim(0, grid[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel(r"$\ell_2$ radius (images in [0, 1])")
    axes.set_ylabel("certified accuracy")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    if out_stem.suffix in (".png", ".svg"):
        out_stem = out_stem.with_suffix("")
    out_stem.parent.mkdir(parents=True, exist_ok=True)
    written = [out_stem.with_name(f"{out_stem.name}.{ending}") for ending in ("png", "svg")]
    drawn = {"Identifier": " ".join(curve.sha256 for curve in curves)}
    for path in written:
        figure.savefig(path, dpi=200, metadata=drawn)
    return written


def _draw(axes: Any, curve: Curve, grid: NDArray[np.float64], number: int) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    style = _LINE_STYLES[number % len(_LINE_STYLES)]
    accuracy = certified_accuracy(curve.rows, grid)
    low, high = confidence_interval(curve.rows, grid)
    # The field counts an image at its own radius too: the curve falls after a point, not before.
    axes.fill_between(grid, low, high, step="pre", color=colour, alpha=0.13, linewidth=0)
    axes.plot(
        grid, accuracy, drawstyle="steps-pre", color=colour, linestyle=style, label=curve.label
    )
