"""A run's directory: everything that explains the run, and all that its continuation needs."""

import itertools
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
from typing import IO, Any

import torch

from fedsmooth_core.config import RunConfig
from fedsmooth_core.durable import append_durably, try_lock, write_atomically
from fedsmooth_core.errors import ConfigError
from server import configuration

CERTIFICATION = "certification"
"""Folder, in a run's directory, of one folder of certificates for each certified round."""

_CONFIG = "config.yaml"
_SESSIONS = "sessions.jsonl"
_CLIENTS = "clients.json"
_ASKED = "asked.json"
_LOCK = ".lock"
_PACKAGES = ("fed-smoothadv", "flwr", "torch", "torchvision", "numpy", "scipy", "safetensors")


class RunDirectory:
    """Paths of a run, its resolved configuration, and its metrics as one JSON line a round."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.metrics = path / "metrics.jsonl"
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, config: RunConfig, kind: str) -> "RunDirectory":
        """Make the directory of a new run, or open that of the run to resume, for this process alone.

        ``kind`` says what trains: a resumed run must be of the kind that it was started as. Nothing
        of the run is written yet: :meth:`record` does that once the run has proved possible.

        Raises:
            ConfigError: when a new run's directory holds a run already, a resumed one's does not, or
                another process works on it.
        """
        if config.resume and not (_given(config) / _CONFIG).is_file():
            raise ConfigError(
                f"run_dir={_given(config)} holds no run to resume: leave resume=true out to start one."
            )
        run = cls(_given(config) if config.run_dir is not None else new_run_path(config.name))
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._lock = (run.path / _LOCK).open("w")
        except OSError as error:
            raise ConfigError(
                f"run_dir={run.path} cannot be made ({error.strerror}): choose a folder that can be "
                "written."
            ) from error
        try:
            run._check(config, kind)
        except BaseException:
            run.close()
            raise
        return run

    def _check(self, config: RunConfig, kind: str) -> None:
        assert self._lock is not None
        if not try_lock(self._lock):
            raise ConfigError(
                f"run_dir={self.path} is another process's: wait until it ends, or choose another one."
            )
        if (self.path / _CONFIG).exists() and not config.resume:
            raise ConfigError(
                f"run_dir={self.path} holds a run already: add resume=true to continue it, or choose "
                "another run_dir."
            )
        kinds = {str(session["kind"]) for session in self.read_sessions() if "kind" in session}
        if kinds - {kind}:
            raise ConfigError(
                f"run_dir={self.path} holds a {min(kinds)} run: continue it with the command that "
                "started it."
            )

    def record(self, config: RunConfig, kind: str) -> None:
        """Write the resolved configuration, and that this process works on the run from now on."""
        # Where a run lies and whether it was continued are no settings of the run.
        configuration.save(replace(config, run_dir=None, resume=False), self.path / _CONFIG)
        append_durably(self.path / _SESSIONS, json.dumps(_session(config, kind)))

    def read_sessions(self) -> list[dict[str, Any]]:
        """Return what each process that worked on the run said of itself."""
        return _read_lines(self.path / _SESSIONS)

    def close(self) -> None:
        """Let other processes work on the run."""
        if self._lock is not None:
            self._lock.close()

    def checkpoint(self, server_round: int) -> Path:
        """Path of the weights after a round (0: the initial model)."""
        return self.checkpoints / f"round-{server_round:04d}.safetensors"

    def has_checkpoint(self, server_round: int) -> bool:
        """Whether the weights after a round are on the disk, complete."""
        weights = self.checkpoint(server_round)
        return weights.is_file() and weights.with_suffix(".json").is_file()

    def certification(self, server_round: int) -> Path:
        """Folder of the certificates of the model after a round."""
        return self.path / CERTIFICATION / self.checkpoint(server_round).stem

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round, durably."""
        append_durably(self.metrics, json.dumps(line))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rounds so far; what says nothing of a round is left out, as a crash may leave it."""
        return [line for line in _read_lines(self.metrics) if isinstance(line.get("round"), int)]

    def read_clients(self) -> dict[int, int]:
        """Return {client number: Flower node id}, as far as an earlier process knew them."""
        try:
            known = json.loads((self.path / _CLIENTS).read_bytes())
        except (OSError, ValueError):
            known = None
        if not isinstance(known, dict):
            # Written atomically, so damage is not ours; numbers are then handed out anew.
            return {}
        return {
            int(client): node
            for client, node in known.items()
            if client.isdecimal() and type(node) is int
        }

    def write_clients(self, clients: Mapping[int, int]) -> None:
        """Remember which node has which client number."""
        text = json.dumps({str(client): node for client, node in sorted(clients.items())})
        write_atomically(self.path / _CLIENTS, text.encode())

    def write_asked(self, server_round: int, attempt: int, cohort: list[int]) -> None:
        """Say which clients are at work now, for whoever asks how the run stands."""
        asked = {"round": server_round, "attempt": attempt, "cohort": cohort, "since": time.time()}
        write_atomically(self.path / _ASKED, json.dumps(asked).encode())

    def read_asked(self) -> dict[str, Any] | None:
        """Return what :meth:`write_asked` wrote last; None if that is not readable."""
        for line in _read_lines(self.path / _ASKED):
            match line:
                case {"round": int(), "attempt": int(), "cohort": list(), "since": float() | int()}:
                    return line
        return None

    def is_in_use(self) -> bool:
        """Whether a process works on the run now."""
        if not (self.path / _LOCK).is_file():
            return False
        with (self.path / _LOCK).open() as lock:
            return not try_lock(lock)

    def forget_rounds_after(self, server_round: int) -> None:
        """Drop the lines of rounds that a resumed run will do again."""
        kept = [line for line in self.read_metrics() if line["round"] <= server_round]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(self.metrics, text.encode())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # torn by a crash
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _given(config: RunConfig) -> Path:
    return Path(config.run_dir or "").expanduser().resolve()


def new_run_path(name: str) -> Path:
    """Make and return a folder of its own for a new run, below ``runs`` in the working directory."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in itertools.count(1):
        path = Path("runs", f"{stamp}-{name}" + (f"-{suffix}" if suffix > 1 else "")).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


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
        "cpu": _cpu(),
        "cpu_count": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def _cpu() -> str:
    """Return the processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_revision() -> str | None:
    """Return the checkout's revision, marked when files were changed; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = Path(__file__).resolve().parent
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
