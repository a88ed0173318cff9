"""A figure's results as text: a table and the checks, for the terminal and as Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedsmooth_core.errors import CertificationError
from server.reproduction.checks import Check, checks_in
from server.reproduction.drawing import title
from server.reproduction.figures import FIGURES
from server.reproduction.results import FigureResult, SeriesResult


def table_radii(result: FigureResult) -> list[float]:
    """Return the radii of a figure's table: sigma, and the grid's up to what can be certified."""
    step = result.settings["radius_step"]
    # Rounded so that 3 steps of 0.1 read 0.3.
    grid = {round(i * step, 12) for i in range(int(result.largest_radius / step) + 1)}
    return sorted(grid | {result.sigma})


def print_figure(result: FigureResult, checks: Sequence[Check], console: Console) -> None:
    """Print the table and, under it, what holds."""
    header, rows = _table(result)
    heading = escape(f"{title(result)}; certified accuracy (%)")
    table = Table(title=heading, title_justify="left", box=None)
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # As wide as it needs: rich would shorten numbers to fit a narrow terminal.
    unlimited = console.options.update(max_width=100_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, soft_wrap=True)
    for check in checks:
        style = {"holds": "green", "does not hold": "red"}.get(check.verdict, "yellow")
        console.print(
            f"[{style}]{check.verdict:>13}[/]  {check.statement}", soft_wrap=True, highlight=False
        )
        for line in check.measured:
            console.print(f"{'':>15}{line}", soft_wrap=True, markup=False, highlight=False)


def page_of(results: Path) -> str:
    """Return, as Markdown, all figures in a folder of results: what holds, then each of them.

    Args:
        results: holds a folder for each scale. The page's pictures are named relative to its parent.

    A damaged file is left out, and said to be.
    """
    found, damaged = [], []
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        for name in FIGURES:
            path = folder / f"{name}.json"
            if path.is_file():
                try:
                    result = FigureResult.load(path)
                except CertificationError as error:  # no reason to keep the others from their page
                    damaged.append(str(error))
                    continue
                found.append((folder, result, checks_in(folder, result)))
    # A statement about two figures is one of both: it is said once, under both names.
    verdicts: dict[tuple[str, ...], list[str]] = {}
    for _, result, checks in found:
        for check in checks:
            key = (result.scale, check.statement, check.verdict, *check.measured)
            verdicts.setdefault(key, []).append(FIGURES[result.figure].number)
    rows = [
        _row([f"{', '.join(numbers)}; {scale}", statement, f"**{verdict}**"])
        for (scale, statement, verdict, *_), numbers in verdicts.items()
    ]
    head = [_row(["", "Statement", "Verdict"]), "|---|---|---|"]
    figures = [
        markdown(result, checks, f"{results.name}/{folder.name}")
        for folder, result, checks in found
    ]
    return "\n\n".join(["\n".join([*head, *rows]), *damaged, *figures])


def markdown(result: FigureResult, checks: Sequence[Check], pictures: str) -> str:
    """Return a figure's part of a results page; ``pictures`` is their folder as the page names it."""
    header, rows = _table(result)
    settings, machine = result.settings, result.machine
    revisions = sorted(
        {
            _revision(found)
            for one in result.series
            for model in one.models
            for found in model.git_revisions
        }
    )
    parts = [
        f"### {title(result)}",
        f"![{title(result)}]({pictures}/{result.figure}.png)",
        _row(["certified accuracy (%) at r", *header[1:]]) + "\n|---|" + "---:|" * len(header[1:]),
    ]
    parts[-1] += "".join("\n" + _row(row) for row in rows)
    parts.append(
        "Means over seeds, with their standard deviation; ACR is the average certified radius. The band of "
        "a curve is from its lowest to its highest seed. Training is the time of local training, with "
        "whatever else the machine did then: no comparison of the estimators' speed."
    )
    if different := [
        f"- {one.label}: `{' '.join(one.settings)}`" for one in result.series if one.settings
    ]:
        parts.append("What a series has otherwise than is said below:\n\n" + "\n".join(different))
    parts += [
        f"**{check.verdict.capitalize()}**: {check.statement}.\n"
        + "".join(f"\n- {line}" for line in check.measured)
        for check in checks
    ]
    parts.append(
        f"Data: {result.data}, {_num_images(result)} test images. {_of_federation(settings)} "
        f"{_of_certificates(result)}"
    )
    parts.append(
        f"Machine: {_of_machine(machine)}. Program: {', '.join(revisions)}. Command:\n\n"
        f"```bash\n{result.command}\n```"
    )
    return "\n\n".join(parts) + "\n"


def _table(result: FigureResult) -> tuple[list[str], list[list[str]]]:
    radii = table_radii(result)
    header = ["", *(f"{radius:g}" for radius in radii), "ACR", "seeds", "training"]
    rows = []
    for one in result.series:
        if not one.models:
            rows.append([one.label, *("-" for _ in radii), "-", "0", "-"])
            continue
        accuracies = [_mean_and_spread(100 * one.outcomes(r).mean(1), ".1f") for r in radii]
        acr = _mean_and_spread(one.average_certified_radius, ".4f")
        rows.append([one.label, *accuracies, acr, str(len(one.models)), _training_time(one)])
    return header, rows


def _mean_and_spread(values: Any, digits: str) -> str:
    spread = f" ± {np.std(values, ddof=1):{digits}}" if len(values) > 1 else ""
    return f"{np.mean(values):{digits}}{spread}"


def _training_time(series: SeriesResult) -> str:
    return f"{np.mean([model.train_seconds for model in series.models]):.0f} s"


def _revision(found: str) -> str:
    """Shorten it; that files were changed is not cut off."""
    revision, dash, changed = found.partition("-")
    return f"{revision[:10]}{dash}{changed}"


def _num_images(result: FigureResult) -> int:
    return max(len(model.radii) for one in result.series for model in one.models)


def _of_federation(settings: dict[str, Any]) -> str:
    step = settings["step_size"]
    return (
        f"{settings['num_clients']} devices of {settings['samples_per_client']} samples, "
        f"{settings['cohort']} a round, {settings['num_rounds']} rounds of E = {settings['local_steps']} "
        f"mini-batches of B = {settings['batch_size']}; {settings['model']} ({settings['init']} "
        f"initialisation), SGD with learning rate {settings['learning_rate']:g}, momentum "
        f"{settings['momentum']:g}, weight decay {settings['weight_decay']:g}, {settings['loss']} loss, "
        f"{_augmentation(settings)}; m = "
        f"{settings['num_noise_vectors']}, T = {settings['attack_steps']}, {settings['step_rule']} steps"
        f"{'' if step is None else f' of {step:g}'}; {settings['training_precision']}."
    )


def _augmentation(settings: dict[str, Any]) -> str:
    used = [name for name in ("flip", "crop_padding") if settings[name]]
    return f"augmented ({', '.join(used)})" if used else "no augmentation"


def _of_certificates(result: FigureResult) -> str:
    settings = result.settings
    return (
        f"Certified at sigma {result.sigma:g} with n0 = {settings['n0']}, n = {settings['n']}, alpha = "
        f"{settings['alpha']:g} in {settings['certification_precision']}: no radius "
        f"can exceed {result.largest_radius:.3f}."
    )


def _of_machine(machine: dict[str, Any]) -> str:
    cpus = ", ".join(str(name) for name in machine["cpu"] if name) or "a CPU without a name"
    count = ", ".join(str(number) for number in machine["cpu_count"])
    gpus = ", ".join(str(name) for name in machine["gpu"] if name)
    versions = "; ".join(
        ", ".join(f"{name} {version}" for name, version in one.items() if name in ("torch", "flwr"))
        for one in machine["versions"]
        if one
    )
    return f"{cpus}, {count} cores, {gpus or 'no GPU'}, {versions}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
