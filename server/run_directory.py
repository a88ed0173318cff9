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

CERTIFICATION = "certification"
"""Folder, in a run's directory, of one folder of certificates for each certified round."""

_SESSIONS = "sessions.jsonl"
_PACKAGES = ("fed-smoothadv", "flwr", "torch", "torchvision", "numpy", "scipy", "safetensors")


class RunDirectory:
    """Paths of a run, its resolved configuration, and its metrics as one JSON line a round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def open(cls, config: RunConfig, kind: str) -> "RunDirectory":
        """Make the directory of a new run, or open that of the run to resume.

        ``kind`` says what trains: a resumed run must be of the kind that it was started as.

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
        started_as = {session["kind"] for session in _read_lines(run.path / _SESSIONS)}
        if started_as - {kind}:
            raise ConfigError(
                f"run_dir={run.path} holds a {min(started_as)} run: continue it with the command that "
                "started it."
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir={run.path} cannot be made ({error.strerror}): choose a folder that can be "
                "written."
            ) from error
        # Where a run lies and whether it was continued are no settings of the run.
        configuration.save(replace(config, run_dir=None, resume=False), recorded)
        append_durably(run.path / _SESSIONS, json.dumps(_session(config, kind)))
        return run

    def checkpoint(self, server_round: int) -> Path:
        """Path of the weights after a round (0: the initial model)."""
        return self.checkpoints / f"round-{server_round:04d}.safetensors"

    def certification(self, server_round: int) -> Path:
        """Folder of the certificates of the model after a round."""
        return self.path / CERTIFICATION / self.checkpoint(server_round).stem

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round, durably."""
        append_durably(self.metrics, json.dumps(line))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rounds so far; a line that a crash cut short is left out."""
        return _read_lines(self.metrics)

    def forget_rounds_after(self, server_round: int) -> None:
        """Drop the lines of rounds that a resumed run will do again."""
        kept = [line for line in self.read_metrics() if line["round"] <= server_round]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.metrics, text.encode())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # torn by a crash
            continue
    return lines


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


def _session(config: RunConfig, kind: str) -> dict[str, Any]:
    """One process's part in the run, to judge or repeat it: command, versions, revision, hardware."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "kind": kind,
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
