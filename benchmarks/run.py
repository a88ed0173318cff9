"""All benchmarks in one command: tables as they come, the short one last, everything in one JSON file.

    python benchmarks/run.py [--quick] [--device cpu] [--parts PART ...] [-o FILE]

`make bench` and `make bench-gpu` call it. A part that needs a package that is not installed is left out
with a sentence; a part that fails is reported and fails the command at its end, after all others.
"""

import importlib
import sys
import time
import traceback
from importlib.util import find_spec

import torch
from harness import Section, Size, arguments, machine, print_table, show, write_report

from fedsmooth_core.device import choose_device
from fedsmooth_core.errors import FedSmoothError

PARTS = (
    "training",
    "paper_run",
    "one_point",
    "roofline",
    "certification",
    "aggregation",
    "pfl_sgd",
    "flower_runtime",
)
"""Modules beside this one, in the order in which they run."""
OURS = ("fedsmooth_core", "client", "server", "harness", "workload", *PARTS)


def _section(part: str, size: Size, device: torch.device) -> Section:
    """Run a part, or say which package it lacks."""
    try:
        module = importlib.import_module(part)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            raise
        why = f"It needs {package}, which is not installed here."
        return Section(part, {}, [], left_out={part: why})
    section: Section = module.run(size, device)
    return section


def main() -> int:
    """Run the parts; return the exit status."""
    parser = arguments(__doc__ or "", "bench.json")
    present = [part for part in PARTS if find_spec(part) is not None]
    parser.add_argument("--parts", nargs="+", choices=present, default=present)
    options = parser.parse_args()
    size = Size.QUICK if options.quick else Size.FULL
    try:
        device = choose_device(options.device)
    except FedSmoothError as error:
        sys.exit(str(error))
    facts = machine(device)
    sections: dict[str, Section] = {}
    failed: list[str] = []
    started = time.monotonic()
    for part in options.parts:
        print(f"[{time.monotonic() - started:.0f} s] {part}", file=sys.stderr, flush=True)
        try:
            sections[part] = _section(part, size, device)
        except Exception as error:  # the other parts have their say
            traceback.print_exc()
            failed.append(part)
            why = f"It failed ({type(error).__name__}: {error})."
            sections[part] = Section(part, {}, [], left_out={part: why})
        show(sections[part])
        # After each part, so that an interrupted command leaves what it has.
        write_report(options.output, size, facts, sections)
    headlines = [line for section in sections.values() for line in section.headlines]
    print_table(
        "In short" if size is Size.FULL else "In short (quick: it runs; the figures mean nothing)",
        {"what": "What", "measured": "Measured", "target": "Wanted"},
        [vars(line) for line in headlines],
    )
    minutes = (time.monotonic() - started) / 60
    print(
        f"{minutes:.1f} minutes; load before: {facts['load_before'][0]:.1f}; in {options.output}."
    )
    if failed:
        print(f"Failed, see above: {', '.join(failed)}.")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
