"""A run's directory: everything that explains the run, and all that its continuation needs."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fedsmooth_core.config import RunConfig
from fedsmooth_core.durable import append_durably, write_atomically
from fedsmooth_core.errors import ConfigError
from server import configuration

_PACKAGES = ("fed-smoothadv", "flwr", "torch", "torchvision", "numpy", "scipy", "safetensors")


class RunDirectory:
    """Paths of a run, its resolved configuration, and its metrics as one JSON line a round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.certification = path / "certification"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def open(cls, config: RunConfig) -> "RunDirectory":
        """Make the directory of a new run, or open that of the run to resume.

        Raises:
            ConfigError: when a new run's directory holds a run already, or a resumed one's does not.
        """
        run = cls(_absolute(config))
        recorded = run.path / "config.yaml"
        if config.resume and not recorded.is_file():
            raise ConfigError(
                f"run_dir={run.path} holds no run to resume: leave resume=true out to start one."
            )
        if recorded.exists() and not config.resume:
            raise ConfigError(
                f"run_dir={run.path} holds a run already: add resume=true to continue it, or choose "
                "another run_dir."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        # Where a run lies and whether it was continued are no settings of the run.
        configuration.save(replace(config, run_dir=None, resume=False), recorded)
        append_durably(run.path / "sessions.jsonl", json.dumps(_session(config)))
        return run

    def checkpoint(self, server_round: int) -> Path:
        """Path of the weights after a round (0: the initial model)."""
        return self.checkpoints / f"round-{server_round:04d}.safetensors"

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round, durably."""
        append_durably(self.metrics, json.dumps(line))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rounds so far; a line that a crash cut short is left out."""
        if not self.metrics.is_file():
            return []
        rounds = []
        for line in self.metrics.read_text().splitlines():
            try:
                rounds.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rounds

    def forget_rounds_after(self, server_round: int) -> None:
        """Drop the lines of rounds that a resumed run will do again."""
        kept = [line for line in self.read_metrics() if line["round"] <= server_round]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.metrics, text.encode())


def _absolute(config: RunConfig) -> Path:
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser().resolve()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path("runs") / f"{stamp}-{config.name}"
    suffix = 1
    while path.exists():
        suffix += 1
        path = Path("runs") / f"{stamp}-{config.name}-{suffix}"
    return path.resolve()


def _session(config: RunConfig) -> dict[str, Any]:
    """One process's part in the run, to judge or repeat it: command, versions, revision, hardware."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resumed": config.resume,
        "command": sys.argv,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _git_revision() -> str | None:
    """Return the checkout's revision, marked when files were changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
