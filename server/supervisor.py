"""See a run through at a SuperLink: submit it, watch it, and submit it again with resume when it dies.

Flower marks a run whose ServerApp or SuperLink was killed as failed, and never resumes it.
"""

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rich.console import Console

from fedsmooth_core.checkpoint import latest_checkpoint
from fedsmooth_core.config import RunConfig
from fedsmooth_core.durable import write_atomically
from fedsmooth_core.errors import ConfigError, TrainingError
from server.collection import collect, forget_failures
from server.configuration import compose
from server.owed import ROWS, is_certified, owed
from server.run_directory import RunDirectory, new_run_path

APP = Path(__file__).resolve().parent.parent
"""The folder that `flwr run` bundles: this checkout."""

_POLL_SECONDS = 1.0
_STATUS_SECONDS = 15.0  # between two questions while the log flows: each starts a process
_RELEASE_SECONDS = 120.0  # until a ServerApp that lost its SuperLink has noticed
_SUBMISSION = "submission.json"
_STOPPED = "finished:stopped"
_RAISED = "ServerApp failed with exception: "  # how Flower's details begin when it was not killed
_MISCONFIGURED = ("Flower configuration file", "read certificate file")
_DEVICES_ALONE = "Client error '404 Not Found'"
_SILENT = ("is unavailable", "Server error '5")

_T = TypeVar("_T")


class Unanswered(Exception):  # noqa: N818 - not an error by itself: the SuperLink may come back
    """The SuperLink could not be asked."""


class Flower:
    """Flower's command line, at one connection of its config.toml."""

    def __init__(self, superlink: str | None) -> None:
        beside = shutil.which("flwr", path=str(Path(sys.executable).parent))
        command = shutil.which("flwr") or beside
        if command is None:
            raise ConfigError("The command flwr is missing: install this package's dependencies.")
        self._command = command
        self._connection = [superlink] if superlink else []
        self._has_answered = False

    def submit(self, overrides: Sequence[str]) -> str:
        """Submit the app with these settings; return the run's id.

        Raises:
            TrainingError: when it is refused.
            ConfigError: when the connection of the first question is a wrong one.
            Unanswered: when there is nobody to refuse it.
        """
        with tempfile.TemporaryDirectory() as folder:
            # In a file, for Flower's own reading of the command line knows no quotes within quotes.
            settings = Path(folder) / "run.toml"
            settings.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n")
            answer = self._ask("run", str(APP), *self._connection, "--run-config", str(settings))
        if "run-id" in answer:
            return str(answer["run-id"])
        reason = str(answer.get("error-message", "no reason given"))
        if any(words in reason for words in _SILENT):
            raise Unanswered(_last_paragraph(reason))
        raise TrainingError(f"The SuperLink did not take the run: {_last_paragraph(reason)}")

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status and its details; "unknown" is one that the SuperLink forgot.

        Raises:
            ConfigError: when the connection of the first question is a wrong one.
            Unanswered: when the SuperLink could not be asked.
        """
        answer = self._ask("ls", *self._connection, "--run-id", run_id)
        if answer.get("success") and answer.get("runs"):
            run = answer["runs"][0]
            return str(run["status"]), str(run.get("status-details") or "")
        reason = str(answer.get("error-message", ""))
        if "not found" in reason:
            return "unknown", "the SuperLink does not know the run any more"
        raise Unanswered(_last_paragraph(reason))

    def log(self, run_id: str) -> subprocess.Popen[str]:
        """Start a process that writes the ServerApp's log from its beginning, until the run's end."""
        return subprocess.Popen(
            [self._command, "log", run_id, *self._connection, "--stream"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Run one command; its exit status says nothing, its JSON does."""
        try:
            result = subprocess.run(
                [self._command, *arguments, "--format", "json"],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise Unanswered("no answer within 120 s") from error
        except OSError as error:
            raise Unanswered(f"flwr cannot be started: {error.strerror or error}") from error
        try:
            answer = dict(json.loads(result.stdout))
        except (ValueError, TypeError):
            # Killed, out of memory or threads: a traceback, or nothing.
            lines = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()
            raise Unanswered(
                f"flwr {arguments[0]} ended with status {result.returncode}: {lines[-1].strip()}"
            ) from None
        if answer.get("success"):
            self._has_answered = True
        else:
            self._refuse_wrong_connection(str(answer.get("error-message", "")))
        return answer

    def _refuse_wrong_connection(self, reason: str) -> None:
        if _DEVICES_ALONE in reason:
            sentence = (
                "The address of this connection in Flower's config.toml is no SuperLink that takes runs: a "
                "proxy passes devices alone, so give the SuperLink's own address."
            )
        elif any(words in reason for words in _MISCONFIGURED):
            sentence = re.sub(
                r"^An unexpected error occurred while reading [^()]*\([^()]*\)\. ",
                "",
                _last_paragraph(reason),
            )
        else:
            return
        # What has answered once is the right one.
        raise Unanswered(sentence) if self._has_answered else ConfigError(sentence)


def _last_paragraph(text: str) -> str:
    return " ".join(text.strip().rpartition("\n\n")[2].split())


class Supervisor:
    """One run directory, and what has to happen until its final model is certified."""

    def __init__(
        self,
        overrides: Sequence[str],
        flower: Flower,
        max_restarts: int,
        console: Console,
    ) -> None:
        config = compose(overrides)
        path = Path(config.run_dir).expanduser().resolve() if config.run_dir else None
        self._run = RunDirectory(path or new_run_path(config.name))
        chosen = [f"run_dir={self._run.path}"]
        self._overrides = [
            item for item in overrides if not item.startswith(("run_dir=", "resume="))
        ] + chosen
        self._flower, self._max_restarts, self._console = flower, max_restarts, console
        # Refuses other settings than those that the run was started with, before anything is submitted.
        self._config: RunConfig = compose(self._submission())
        self._printed = 0
        self._run_id: str | None = None

    def see_through(self) -> Path:
        """Return the run's directory once its final model is there, and certified if it is to be.

        Raises:
            FedSmoothError: one sentence about why it never will be.
        """
        if self._trained():
            self._say(f"The run in {self._run.path} is finished already.")
        else:
            self._train()
        if self._config.service.address is not None:
            # Whoever gives this command again wants what was refused to be tried again.
            forget_failures(self._config, self._run)
            if owed(self._run, self._config):
                self._say("Waiting for what the certification service owes.")
                collect(self._config, self._run, self._console)
        return self._run.path

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _train(self) -> None:
        restarts, progress, last_reason = 0, self._progress(), ""
        self._run_id = self._running()
        while True:
            if self._run_id is None:
                self._run_id = self._submit()
            status, reason = self._follow(self._run_id)
            if self._trained():
                return
            if status == _STOPPED:
                raise TrainingError(
                    f"The run was stopped on purpose (flwr stop) after {self._so_far()}: the same command "
                    "continues it."
                )
            if status == "finished:completed":
                raise TrainingError(
                    f"The run ended well, but {self._run.path} does not hold its final model: this command "
                    "must see the folder that the ServerApp writes, under the same path."
                )
            has_raised = reason.startswith(_RAISED)
            reason = reason.removeprefix(_RAISED) or "no reason given"
            if self._progress() > progress:
                restarts, progress, last_reason = 0, self._progress(), ""
            # What is raised twice in the same words without a new round between is raised every time.
            if has_raised and reason == last_reason:
                raise TrainingError(f"The run failed twice after {self._so_far()}: {reason}")
            if restarts >= self._max_restarts:
                raise TrainingError(
                    f"The run died {restarts + 1} times after {self._so_far()}, and is given up; the last "
                    f"reason was: {reason}"
                )
            restarts, last_reason = restarts + 1, reason
            self._say(
                f"The run died after {self._so_far()}: {reason.rstrip('.')}. Submitting it again (restart "
                f"{restarts} of {self._max_restarts} without a new round)."
            )
            self._wait_for_release()
            self._run_id = None

    def _running(self) -> str | None:
        """Return the run that an earlier supervisor of this folder submitted, if it is alive."""
        try:
            run_id = str(json.loads((self._run.path / _SUBMISSION).read_bytes())["run-id"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        status, _ = self._patiently(lambda: self._flower.status(run_id))
        if status.startswith("finished") or status == "unknown":
            return None
        self._say(f"Run {run_id} is at work on {self._run.path} already: looking after it.")
        return run_id

    def _submission(self) -> list[str]:
        is_begun = (self._run.path / "config.yaml").is_file()
        return [*self._overrides, *(["resume=true"] if is_begun else [])]

    def _submit(self) -> str:
        # Before there is a run that a folder without permission, or a full disk, would leave alone.
        self._run.path.mkdir(parents=True, exist_ok=True)
        self._note({})
        run_id = self._patiently(lambda: self._flower.submit(self._submission()))
        self._note({"run-id": run_id})
        self._printed = 0
        self._say(f"Submitted run {run_id}; run directory: {self._run.path}")
        return run_id

    def _note(self, content: dict[str, str]) -> None:
        write_atomically(self._run.path / _SUBMISSION, f"{json.dumps(content)}\n".encode())

    def _follow(self, run_id: str) -> tuple[str, str]:
        """Show the log until the run's end; return its last status and the details."""
        while True:
            reader, process = self._read_log(run_id)
            try:
                end = time.monotonic() + _STATUS_SECONDS
                while reader.is_alive() and time.monotonic() < end:
                    reader.join(_POLL_SECONDS)
                while True:
                    status, details = self._patiently(lambda: self._flower.status(run_id))
                    if status.startswith("finished") or status == "unknown":
                        reader.join(5.0)  # its last lines
                        return status, details
                    if not reader.is_alive():
                        break
                    reader.join(_STATUS_SECONDS)
            finally:
                process.terminate()
                process.wait()
                reader.join(5.0)
            time.sleep(_POLL_SECONDS)

    def _read_log(self, run_id: str) -> tuple[threading.Thread, subprocess.Popen[str]]:
        process = self._flower.log(run_id)
        known = self._printed

        def read() -> None:
            assert process.stdout is not None
            # Every connection tells the whole log again.
            for number, line in enumerate(process.stdout, start=1):
                if number > known:
                    sys.stdout.write(line)
                    sys.stdout.flush()
                    self._printed = number

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        return reader, process

    def _patiently(self, question: Callable[[], _T]) -> _T:
        """Ask until the SuperLink answers; a restarted one may take a while."""
        patience = self._config.federation.connect_timeout_seconds
        end, told = time.monotonic() + patience, False
        while True:
            try:
                return question()
            except Unanswered as error:
                if time.monotonic() > end:
                    raise TrainingError(
                        f"The SuperLink has not answered for {patience:g} seconds "
                        f"(federation.connect_timeout_seconds): {error}"
                    ) from error
                if not told:
                    self._say("The SuperLink does not answer; waiting for it.")
                told = True
            time.sleep(_POLL_SECONDS)

    def _wait_for_release(self) -> None:
        """Wait until no ServerApp holds the run: one that outlived its SuperLink notices late."""
        end = time.monotonic() + _RELEASE_SECONDS
        while self._run.is_in_use() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)

    def _trained(self) -> bool:
        final = self._config.federation.num_rounds
        if not self._run.checkpoint(final).with_suffix(".json").is_file():
            return False
        # What a service owes is asked for here, whether a ServerApp lives to wait for it or not.
        is_done = self._config.service.address is not None or not self._config.certification.at_end
        return is_done or is_certified(self._run, final)

    def _progress(self) -> tuple[int, int]:
        """Return what only grows as the run gets on: completed rounds, bytes of certificates."""
        rows = self._run.certification(self._config.federation.num_rounds) / ROWS
        return self._rounds(), rows.stat().st_size if rows.is_file() else 0

    def _rounds(self) -> int:
        latest = latest_checkpoint(self._run.checkpoints)
        return int(latest.stem.rpartition("-")[2]) if latest else 0

    def _so_far(self) -> str:
        return f"{self._rounds()} of {self._config.federation.num_rounds} rounds"

    def leave(self) -> None:
        """Say what becomes of the run that this process no longer looks after."""
        if self._run_id is not None:
            self._say(
                f"Run {self._run_id} goes on at the SuperLink. To look after it again, give this command "
                f"with run_dir={self._run.path}; to stop it: flwr stop {self._run_id}"
            )


def deploy(
    overrides: Sequence[str],
    superlink: str | None,
    max_restarts: int,
    console: Console,
) -> Path:
    """Train and certify at a SuperLink; return the run's directory.

    A SIGTERM or Ctrl-C ends the watching alone: the run belongs to the SuperLink, and the same command
    finds it again.

    Args:
        overrides: settings; without a ``run_dir`` a new one below ``runs`` is chosen.
        superlink: name of a connection in Flower's config.toml; None takes its default.
        max_restarts: how often in a row a run that died is submitted again without a new round between.
        console: is told what happens.

    Raises:
        FedSmoothError: one sentence about why the run has no certified final model.
    """
    supervisor = Supervisor(overrides, Flower(superlink), max_restarts, console)
    with _sigterm_as_interrupt():
        try:
            return supervisor.see_through()
        except KeyboardInterrupt:
            supervisor.leave()
            raise


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
