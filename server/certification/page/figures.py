"""The geometry of a figure: numbers in, coordinates of an SVG out. ``figure.html`` draws it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from fedsmooth_core.certification.analysis import Rows, certified_accuracy, confidence_interval

MAX_SERIES = 7
"""As many series as there are colours and dashes in ``style.css``: more could not be told apart."""

# The viewBox, and the frame of the axes inside it; sized so that text is readable on a telephone.
WIDTH, HEIGHT = 480, 310
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 470, 10, 266

# A curve of more steps than this is drawn through as many points: finer than a pixel.
_MAX_POINTS = 500


@dataclass(frozen=True)
class Series:
    """One line of a figure; ``y`` and the band around it are shares in [0, 1]."""

    label: str
    x: Sequence[float]
    """Ascending, all >= 0."""
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series as it is drawn."""

    label: str
    number: int
    """From 0: names colour and dashes."""
    points: str
    """Of a ``<polyline>``."""
    band: str
    """Of the ``<polygon>`` of the 95 % interval; empty for a single point."""
    dots: tuple[tuple[float, float], ...]
    """Where the measured values are marked."""


@dataclass(frozen=True)
class Figure:
    """All that ``figure.html`` needs to draw one figure."""

    name: str
    """Unique on its page."""
    title: str
    description: str
    x_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP
    bottom: int = _BOTTOM


def certified_curve(label: str, rows: Rows) -> Series:
    """Return certified accuracy against l2 radius as a series, with its 95 % interval.

    Its points are the radii at which the accuracy falls, from 0 to a little beyond the last one.
    """
    certified = rows.radius[(rows.correct == 1) & np.isfinite(rows.radius)]
    radii = np.unique(np.append(certified, 0.0))
    if len(radii) > _MAX_POINTS:
        radii = np.linspace(0, radii[-1], _MAX_POINTS)
    grid = np.append(radii, radii[-1] * 1.04 or 1.0)
    low, high = confidence_interval(rows, grid)
    return Series(
        label, grid.tolist(), certified_accuracy(rows, grid).tolist(), low.tolist(), high.tolist()
    )


def radius_figure(name: str, title: str, description: str, curves: Sequence[Series]) -> Figure:
    """Draw certified accuracy against radius: steps, for an image counts up to its own radius.

    Args:
        name: unique on its page.
        title: what it shows, in a few words.
        description: the same for who cannot see it.
        curves: of :func:`certified_curve`, at least one and at most ``MAX_SERIES``.
    """
    span = (0.0, max(curve.x[-1] for curve in curves))
    return Figure(
        name,
        title,
        description,
        "l2 radius (pixels in [0, 1])",
        _ticks(*span, span),
        _percent_ticks(),
        tuple(_steps(curve, number, span) for number, curve in enumerate(curves)),
    )


def rounds_figure(name: str, title: str, description: str, lines: Sequence[Series]) -> Figure:
    """Draw certified accuracy against the round, a line for each radius, a dot for each model.

    Args:
        name: unique on its page.
        title: what it shows, in a few words.
        description: the same for who cannot see it.
        lines: ``x`` are rounds; at least one and at most ``MAX_SERIES``.
    """
    first = min(line.x[0] for line in lines)
    last = max(line.x[-1] for line in lines)
    # A single round stands in the middle; several have a little room at both ends.
    room = 1.0 if first == last else 0.03 * (last - first)
    span = (first - room, last + room)
    return Figure(
        name,
        title,
        description,
        "round",
        _ticks(first, last, span, whole=True),
        _percent_ticks(),
        tuple(_polyline(line, number, span) for number, line in enumerate(lines)),
    )


def _x(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return round(_LEFT + (_RIGHT - _LEFT) * (value - low) / (high - low), 1)


def _y(share: float) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * share, 1)


def _steps(curve: Series, number: int, span: tuple[float, float]) -> Line:
    low, high = _stairs(curve.x, curve.low, span), _stairs(curve.x, curve.high, span)
    points = _text(_stairs(curve.x, curve.y, span))
    return Line(curve.label, number, points, _text([*high, *reversed(low)]), ())


def _stairs(
    x: Sequence[float], y: Sequence[float], span: tuple[float, float]
) -> list[tuple[float, float]]:
    corners = [(_x(x[0], span), _y(y[0]))]
    for before, here, value in zip(x, x[1:], y[1:], strict=False):
        corners += [(_x(before, span), _y(value)), (_x(here, span), _y(value))]
    return corners


def _polyline(line: Series, number: int, span: tuple[float, float]) -> Line:
    def along(values: Sequence[float]) -> list[tuple[float, float]]:
        return [(_x(x, span), _y(y)) for x, y in zip(line.x, values, strict=True)]

    dots = along(line.y)
    band = [*along(line.high), *reversed(along(line.low))] if len(dots) > 1 else []
    return Line(line.label, number, _text(dots), _text(band), tuple(dots))


def _text(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _percent_ticks() -> tuple[Tick, ...]:
    return tuple(Tick(_y(percent / 100), f"{percent} %") for percent in range(0, 101, 20))


def _ticks(
    first: float, last: float, span: tuple[float, float], whole: bool = False
) -> tuple[Tick, ...]:
    """Mark multiples of 1, 2, 2.5 or 5 times a power of ten, at most eight of them."""
    if first == last:
        return (Tick(_x(first, span), f"{first:g}"),)
    power = Decimal(10) ** math.floor(math.log10((last - first) / 8))
    steps = [power * Decimal(factor) for factor in ("1", "2", "2.5", "5", "10", "20")]
    step = next(
        one
        for one in steps
        if (last - first) / float(one) <= 7 and not (whole and one != one.to_integral_value())
    )
    begin, end = math.ceil(first / float(step)), math.floor(last / float(step))
    return tuple(
        Tick(_x(float(i * step), span), f"{float(i * step):g}") for i in range(begin, end + 1)
    )
