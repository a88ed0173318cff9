"""What all benchmarks share: the record of the machine, interleaved timing, tables, JSON.

A part is a module with ``run(size, device) -> Section``. ``benchmarks/run.py`` calls all parts, and
``main`` makes each of them a command of its own:

    python benchmarks/PART.py [--quick] [--device cpu] [-o FILE]

Nothing is said on the strength of one shot: ``interleaved`` lets the candidates take turns, so what
else the machine does falls on all of them, and a ratio is the median of the ratios within a round.
Needs the core's own dependencies alone.
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedsmooth_core.device import choose_device
from fedsmooth_core.errors import FedSmoothError

REPOSITORY = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "numpy", "scipy", "flwr", "ray", "pfl", "adversarial-robustness-toolbox")
_FLAGS = {
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "sve",
    "bf16",
}


class Size(Enum):
    """How much a part measures."""

    QUICK = "quick"
    """Seconds, one or two rounds: does it run? CI calls this; its figures mean nothing."""
    FULL = "full"
    """Minutes: the figures that may be quoted."""


@dataclass(frozen=True)
class Headline:
    """One line of the short table at the end: what was measured against what was wanted."""

    what: str
    measured: str
    target: str = ""


@dataclass(frozen=True)
class Section:
    """What one part found."""

    title: str
    columns: Mapping[str, str]
    """The columns to print: key of a row, heading."""
    rows: Sequence[Mapping[str, Any]]
    """JSON values; the file keeps all keys, also those that are not printed."""
    notes: Sequence[str] = ()
    """Sentences that belong under the table: threads, sizes, what the columns mean."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """What could not be measured here, and why."""
    headlines: Sequence[Headline] = ()


Part = Callable[[Size, torch.device], Section]


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate, one value a round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict[str, Any]:
        """Return median, spread and number of runs, as a row's entries."""
        return {
            "median_seconds": self.median,
            "least_seconds": min(self.seconds),
            "most_seconds": max(self.seconds),
            "runs": len(self.seconds),
            "seconds": list(self.seconds),
        }

    def times_faster_than(self, other: "Timing") -> "Ratio":
        """Compare within each round, where both had the same machine."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return Ratio(tuple(theirs / mine for theirs, mine in pairs))


@dataclass(frozen=True)
class Ratio:
    """Another candidate's seconds over this one's, one value a round: above 1 is faster."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({min(self.values):.2f} to {max(self.values):.2f})"


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warm_ups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time the candidates in turns: each once a round, another one first in each round.

    On CUDA a measurement lies between two synchronisations of the whole device, so it holds the
    host's share and every stream. That costs some microseconds: a candidate of less than a
    millisecond should repeat itself.

    Args:
        candidates: name and what to call; results are dropped.
        rounds: >= 1, measurements of each candidate.
        device: where they compute.
        warm_ups: calls of each candidate before the first round.
        clock: ``time.process_time`` counts the CPU seconds of this process and all its threads: the
            choice for single-threaded work on a machine that does other things too.

    Returns:
        Name and its timing, in the order of the candidates.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_ups):
        for name in names:
            candidates[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            wait()
            started = clock()
            candidates[name]()
            wait()
            seconds[name].append(clock() - started)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def fair_clock(device: torch.device) -> tuple[Callable[[], float], str]:
    """Return a clock that other processes disturb as little as they can, and what its seconds are.

    CPU seconds where PyTorch computes in one thread of a CPU; else seconds of the clock on the wall.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "CPU seconds"
    return time.perf_counter, "seconds by the clock"


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Return the bytes that a call needs at most, beyond what was taken before it.

    On CUDA of PyTorch's allocator; else of this process's resident memory, which Linux with glibc
    tells (None elsewhere). What worker processes take is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What earlier calls freed would be taken again unseen.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        call()
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on: hardware, versions, revision, threads, load."""
    model, flags = _processor()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": list(os.getloadavg()),
        "cpu": model,
        "cores": os.cpu_count(),
        "cpu_flags": flags,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "threads": {
            "torch": torch.get_num_threads(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        "device": _accelerator(device),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        },
        "git": _revision(),
    }


def _processor() -> tuple[str, list[str]]:
    """Return the CPU's name and which of the instruction sets that matter here it has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    entries: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    name = entries.get("model name") or platform.processor() or platform.machine()
    words = entries.get("flags") or entries.get("Features") or ""
    return name, sorted(_FLAGS & set(words.split()))


def _accelerator(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "type": device.type,
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.splitlines()[0] if driver else None,
    }


def _revision() -> dict[str, Any]:
    revision = _output("git", "rev-parse", "HEAD")
    changes = _output("git", "status", "--porcelain")
    return {"revision": revision or None, "has_changes": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Return what a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def show(section: Section) -> None:
    """Print a section: its table where it has one, notes, and what was left out."""
    if section.rows:
        print_table(section.title, section.columns, section.rows)
    for note in section.notes:
        print(note)
    for what, why in section.left_out.items():
        print(f"Left out: {what}. {why}")
    print(flush=True)


def print_table(title: str, columns: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table: with rich on a terminal that has it, else as Markdown."""
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    if sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ModuleNotFoundError:
            pass
        else:
            table = Table(*columns.values(), title=title, title_justify="left")
            for line in cells:
                table.add_row(*line)
            Console().print(table)
            return
    headings = list(columns.values())
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    print(f"{title}\n")
    for line in [headings, ["-" * width for width in widths], *cells]:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print(f"| {' | '.join(padded)} |")
    print()


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write_report(
    path: Path, size: Size, facts: Mapping[str, Any], sections: Mapping[str, Section]
) -> None:
    """Write what was measured, and on what, as JSON."""
    report = {
        "size": size.value,
        "machine": facts,
        "parts": {name: asdict(section) for name, section in sections.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def arguments(description: str, output: str) -> argparse.ArgumentParser:
    """Return the options that every command has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="some seconds: does it run?")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:K")
    parser.add_argument("-o", "--output", type=Path, default=Path(output), help="the JSON file")
    return parser


def main(description: str, part: Part) -> None:
    """Run one part as a command."""
    name = Path(sys.argv[0]).stem
    options = arguments(description, f"{name}.json").parse_args()
    size = Size.QUICK if options.quick else Size.FULL
    try:
        device = choose_device(options.device)
    except FedSmoothError as error:
        sys.exit(str(error))
    facts = machine(device)
    section = part(size, device)
    show(section)
    write_report(options.output, size, facts, {name: section})
    print(f"Written to {options.output}.")
