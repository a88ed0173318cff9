"""``fedsmooth status``: how a run stands, from its directory alone."""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsmooth_core.config import RunConfig
from server import configuration
from server.conduct import Conduct
from server.owed import (
    Delivery,
    failure_path,
    failures,
    is_collecting,
    is_filed,
    owed,
    rounds_text,
)
from server.report import ROWS_IN_RUN, Curve, load_curve, print_table, table_radii
from server.run_directory import RunDirectory

_ROUNDS_SHOWN = 8
_PHASES = {
    "connect": "connect",
    "train": "train",
    "slowest_client": "client",
    "aggregate": "sum",
    "evaluate": "test",
}
_LEGEND = (
    "Seconds: connect, waiting for clients; train, asking to last reply; client, the slowest one's own "
    "work in that; sum, aggregating; test, evaluating."
)


@dataclass(frozen=True)
class ClientRecord:
    """What one client did wrong so far."""

    client: int
    refused: int
    last_round: int
    last_reason: str
    suspended: bool


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    state: str
    """``running`` (a process works on it), ``interrupted``, ``trained`` (but not certified) or
    ``finished`` (certified, too)."""
    completed_rounds: int
    num_rounds: int
    asked: dict[str, Any] | None
    """The attempt that is under way: its round, attempt, cohort and the time it began."""
    rounds: list[dict[str, Any]]
    clients: list[ClientRecord]
    certified_images: int
    """Of the last round that has any."""
    certification_failure: str | None
    """Why the final model was given up."""
    given_up: dict[int, str]
    """By round, why the certification service does not certify a model."""
    owed: list[int]
    """Rounds that the certification service owes certificates of, newest first."""
    is_collecting: bool
    """Whether a process deals with the certification service now."""
    delivery: Delivery
    """How the dealings with the service stand, or stood when the last process dealt with it."""


def read_status(path: Path) -> Status:
    """Read a run's directory, whether a process works on it or not.

    Raises:
        FedSmoothError: when it holds no run, or its records are damaged.
    """
    config = configuration.load(path)
    run = RunDirectory(path)
    rounds = run.read_metrics()
    completed = rounds[-1]["round"] if rounds else 0
    last = config.federation.num_rounds
    asked = run.read_asked()
    is_running = run.is_in_use()
    if not is_running or (asked and asked["round"] <= completed):
        asked = None
    state = "interrupted"
    if is_running:
        state = "running"
    elif completed >= last:
        state = "finished" if is_filed(run, last) else "trained"
    failure = failure_path(run, last)
    curves = _curves(path)
    return Status(
        state,
        completed,
        last,
        asked,
        rounds,
        _clients(config, run, rounds, completed),
        len(curves[-1].rows) if curves else 0,
        failure.read_text().strip() if failure.is_file() else None,
        failures(run),
        owed(run, config),
        is_collecting(run),
        Delivery.read(run),
    )


def show_status(path: Path, console: Console, as_json: bool) -> None:
    """Print how a run stands: the round, who failed and why, seconds a phase, certified accuracy.

    Raises:
        FedSmoothError: when it holds no run, or its records are damaged.
    """
    status = read_status(path)
    if as_json:
        console.file.write(json.dumps(asdict(status), indent=2) + "\n")
        return

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    say(f"{path}: {status.state}, {status.completed_rounds} of {status.num_rounds} rounds done.")
    if status.asked:
        ago = max(0.0, time.time() - status.asked["since"])
        say(
            f"Round {status.asked['round']}, attempt {status.asked['attempt']}: asked clients "
            f"{status.asked['cohort']} {ago:.0f} s ago."
        )
    if status.rounds:
        _print_rounds(status.rounds[-_ROUNDS_SHOWN:], console)
    on_devices = [line for line in status.rounds if "federated_certified_accuracy" in line]
    if on_devices:
        say(_on_devices(on_devices[-1]))
    if status.clients:
        _print_clients(status.clients, console)
    curves = _curves(path)
    if curves:
        radius_step = configuration.load(path).certification.radius_step
        print_table(curves, table_radii(curves, radius_step), console)
    for server_round, why in status.given_up.items():
        if server_round != status.num_rounds:
            say(f"The model of round {server_round} is not certified: {why}")
    for line in _owed(status, path):
        say(line)
    if status.certification_failure:
        say(f"The certification failed: {status.certification_failure}")
    elif status.state != "finished":
        say("The final model is not certified yet.")


def _on_devices(line: dict[str, Any]) -> str:
    """Say what clients certified of their own images after the last round that asked for it."""
    certified = line["federated_certified_accuracy"]
    what = f"Certified accuracy on the clients' own images after round {line['round']}"
    if not certified.get("accuracy"):
        return f"{what}: none, for {certified.get('problem')}."
    columns = (certified.get(key, []) for key in ("radii", "accuracy", "confidence_interval_95"))
    figures = [
        f"{share:.1%} [{low:.1%}, {high:.1%}] at {radius:g}"
        for radius, share, (low, high) in zip(*columns, strict=False)
    ]
    images, clients, held_out = (
        certified.get(key) for key in ("num_examples", "num_clients", "num_held_out")
    )
    return (
        f"{what}: {', '.join(figures)} ({images} images of {clients} clients, {held_out} of them held "
        "out; 95 % intervals)."
    )


def _clients(
    config: RunConfig, run: RunDirectory, rounds: list[dict[str, Any]], completed: int
) -> list[ClientRecord]:
    conduct = Conduct(config.federation.strikes, config.federation.suspension_rounds)
    conduct.replay(rounds)
    out = conduct.suspended(completed + 1)
    suspended = {client for client, node in run.read_clients().items() if node in out}
    last: dict[int, tuple[int, str]] = {}
    times: Counter[int] = Counter()
    for line in rounds:
        on_devices = line.get("federated_certified_accuracy", {}).get("refused", [])
        for refusal in [*line.get("refused", []), *on_devices]:
            last[int(refusal["client"])] = int(line["round"]), str(refusal["reason"])
            times[int(refusal["client"])] += 1
    return [
        ClientRecord(client, count, *last[client], client in suspended)
        for client, count in times.most_common()
    ]


def _curves(path: Path) -> list[Curve]:
    """Return the certificates of the rounds that have any: of the last ones, oldest first."""
    files = sorted(path.glob(ROWS_IN_RUN))[-_ROUNDS_SHOWN:]
    return [
        replace(load_curve(file), label=f"round {int(file.parent.name.rpartition('-')[2])}")
        for file in files
        if file.read_bytes().count(b"\n") > 1  # the first line names the columns
    ]


def _owed(status: Status, path: Path) -> list[str]:
    """Say what the service owes, how far it is, and why nothing comes if nothing does."""
    if not status.owed:
        return []
    lines = [f"The certification service owes the certificates of {rounds_text(status.owed)}."]
    if not status.is_collecting:
        # What an earlier process noted of the service may be over.
        problem = status.delivery.problem
        if problem is not None:
            lines.append(f"The last attempt to collect them ended with: {problem}")
        if status.state == "running":
            lines.append("Nothing collects them now: the run does at its end.")
        else:
            lines.append(f"Nothing collects them now: fedsmooth certify {path} does.")
        return lines
    for server_round, (done, total) in status.delivery.under_way.items():
        lines.append(f"Round {server_round}: {done} of {total} images are certified there.")
    if status.delivery.problem is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(status.delivery.since))
        lines.append(f"Nothing comes since {since} UTC: {status.delivery.problem}")
    return lines


def _print_rounds(rounds: list[dict[str, Any]], console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("round", "asked", "used", "refused", "tries", "loss", "clean", "noisy"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in _PHASES.values():
        table.add_column(name, justify="right", no_wrap=True)
    for line in rounds:
        seconds = line.get("seconds", {})
        table.add_row(
            str(line["round"]),
            *(str(len(line.get(key, []))) for key in ("cohort", "aggregated", "refused")),
            str(line.get("attempts", "")),
            _number(line.get("metrics", {}).get("train-loss"), ".3f"),
            *(_number(line.get(f"{kind}-accuracy"), ".1%") for kind in ("clean", "noisy")),
            *(_number(seconds.get(phase), ".1f") for phase in _PHASES),
        )
    # As wide as it needs: rich would shorten numbers to fit a narrow terminal.
    unlimited = console.options.update(max_width=100_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, soft_wrap=True)
    console.print(_LEGEND, style="dim")


def _print_clients(clients: list[ClientRecord], console: Console) -> None:
    table = Table(title="Clients that were refused", title_justify="left", box=None, pad_edge=False)
    for name in ("client", "times", "last round", "left out"):
        table.add_column(name, justify="right")
    table.add_column("last reason")
    for record in clients:
        table.add_row(
            *(str(record.client), str(record.refused), str(record.last_round)),
            "yes" if record.suspended else "",
            Text(record.last_reason),  # whatever a client wrote is no mark-up
        )
    console.print(table)


def _number(value: Any, form: str) -> str:
    return format(float(value), form) if isinstance(value, int | float) else ""
