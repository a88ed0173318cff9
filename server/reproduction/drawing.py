"""A figure's picture: certified accuracy against the l2 radius, a curve a series, as in the paper."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from server.reproduction.figures import (
    ESTIMATORS,
    FIGURES,
    GAMMAS,
    centralized_label,
    federated_label,
)
from server.reproduction.results import FigureResult

_GRID_POINTS = 600
# Okabe and Ito's colours. In a comparison the colour says who trains and the line says the estimator.
_BLACK, _BLUE, _ORANGE, _GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
_GREY = "#606060"
_COLOURS = (_BLUE, _ORANGE, _GREEN, _BLACK)
_LINES = ("-", "--", "-.", ":")


def draw(result: FigureResult, stem: Path) -> list[Path]:
    """Draw the mean over seeds of each series, with the band from the lowest to the highest seed.

    Args:
        result: at least one of its series has a model.
        stem: the pictures without their endings.

    Returns:
        The files written: ``stem``.png and ``stem``.svg.
    """
    there = [one for one in result.series if one.models]
    largest = max(float(one.certified_radii().max()) for one in there) or result.sigma
    grid = np.linspace(0, 1.04 * largest, _GRID_POINTS)
    styles = _styles(result)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one in there:
        curves = np.stack([one.outcomes(radius).mean(1) for radius in grid], axis=1)
        colour, line = styles[one.label]
        axes.fill_between(
            grid, curves.min(0), curves.max(0), step="pre", color=colour, alpha=0.10, linewidth=0
        )
        axes.plot(
            grid,
            curves.mean(0),
            drawstyle="steps-pre",
            color=colour,
            linestyle=line,
            label=one.label,
        )
    axes.set_xlim(0, grid[-1])
    axes.set_ylim(0, None)
    cap = result.largest_radius
    if cap < grid[-1]:
        # Where the curves end is no fact about the models.
        axes.axvline(cap, color=_GREY, linestyle=":", linewidth=0.8)
        axes.text(
            cap,
            0.02,
            f"{result.settings['n']:,} draws certify no more ",
            transform=axes.get_xaxis_transform(),
            horizontalalignment="right",
            color=_GREY,
            fontsize="small",
        )
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_xlabel(r"$\ell_2$ radius (images in [0, 1])")
    axes.set_ylabel("certified accuracy")
    # On two lines, for a long name of the data would not fit on one.
    axes.set_title(title(result).replace("; ", "\n"), fontsize="medium", loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in written:
        figure.savefig(path, dpi=160)
    return written


def title(result: FigureResult) -> str:
    """Return what a figure is about, in one line."""
    figure = FIGURES[result.figure]
    if figure.kind == "recipe":
        what = f"a stronger recipe, sigma {result.sigma:g}"
    else:
        what = f"sigma {result.sigma:g}, epsilon {result.epsilon_255:g}/255"
    model = result.settings["model"]
    on = (
        result.data if model == "alexnet" else f"{result.data}, {model}"
    )  # the paper's needs no name
    return f"{figure.number}: {what}; {on}, scale {result.scale}"


def _styles(result: FigureResult) -> dict[str, tuple[str, str]]:
    """Return colour and line of each series, by its label."""
    styles = {
        one.label: (_COLOURS[place % len(_COLOURS)], _LINES[place % len(_LINES)])
        for place, one in enumerate(result.series)
    }
    for estimator, line in zip(ESTIMATORS, _LINES[:2], strict=True):
        styles[centralized_label(estimator)] = (_BLACK, line)
        for gamma, colour in zip(GAMMAS, (_BLUE, _ORANGE), strict=True):
            styles[federated_label(gamma, estimator)] = (colour, line)
    return styles
