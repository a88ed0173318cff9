"""Sweeps: one run for every combination of comma-separated values, and one picture of them all."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fedsmooth_core.config import RunConfig
from fedsmooth_core.errors import ConfigError, TrainingError
from server.configuration import compose, sweep
from server.report import ROWS_IN_RUN, show


def run_sweep(
    overrides: Sequence[str],
    defaults: Sequence[str],
    console: Console,
    run: Callable[[RunConfig], Path],
) -> None:
    """Run every combination into a numbered folder of ``run_dir`` and report them side by side.

    With ``resume=true`` the combinations that were started are continued and the others started.

    Args:
        overrides: as on the command line; ``a=1,2 b=3,4`` makes four runs.
        defaults: overrides of less weight, for runs that are not continued.
        console: says which run comes next.
        run: does one run and returns its directory.

    Raises:
        FedSmoothError: before the first run if any combination is not a valid configuration, and at
            the end if some runs left no model.
    """
    given = dict(override.partition("=")[::2] for override in overrides)
    run_dir = given.pop("run_dir", "")
    resume = given.pop("resume", "false").lower()
    if resume not in ("true", "false"):
        raise ConfigError(f"resume={resume!r} has the wrong type: allowed is true or false.")
    if resume == "true" and not run_dir:
        raise ConfigError("resume=true needs the sweep to continue: set run_dir=<its folder>.")
    root = Path(run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-sweep").expanduser()
    combinations = sweep([f"{key}={value}" for key, value in given.items()])
    configs = []
    for number, combination in enumerate(combinations):
        folder = root / str(number)
        place = [f"run_dir='{folder}'"]
        if resume == "true" and (folder / "config.yaml").is_file():
            place.append("resume=true")
        # All of them are composed before the first one runs: a typo must not show after an hour.
        configs.append(compose([*combination, *place], defaults))
    paths = []
    for number, (config, combination) in enumerate(zip(configs, combinations, strict=True)):
        console.rule(f"{number + 1} of {len(configs)}: {' '.join(combination)}")
        try:
            paths.append(run(config))
        except TrainingError as error:  # such as a learning rate that diverges: the others may not
            console.print(f"Run {number} failed: {error}", soft_wrap=True, markup=False)
    # A certification service may still owe some of them.
    certified = [path for path in paths if any(path.glob(ROWS_IN_RUN))]
    if certified and configs[0].certification.at_end:
        show(certified, root / "curve", configs[0].certification.radius_step, console)
    if len(paths) < len(configs):
        failed = len(configs) - len(paths)
        raise TrainingError(f"{failed} of the sweep's {len(configs)} runs failed, as said above.")
