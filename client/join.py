"""Take part in a federation: a SuperNode and its warm worker, started, watched and ended together."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from client.node import NodeFacts
from fedsmooth_core.errors import ConfigError, NodeError

_LEASE_SECONDS = 75.0
"""A device that went without signing off is refused for 60 s; some more for clocks and polls."""
_RETRY_SECONDS = 5.0
_PATIENCE_SECONDS = 15.0  # for processes that were asked to end
_WATCH_SECONDS = 0.2

_REFUSED = "[code: 2004]"
_NO_KEY = "[code: 2001]"
_CONNECTED = "SuperNode ID:"
_WAITING = "Connection attempt failed"
_PLAIN_TO_TLS = "Client error '400 Bad Request'"
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LOG_LINE = re.compile(r"(INFO|WARNING) *:|For more information")  # what says nothing of why


@dataclass(frozen=True)
class Membership:
    """Where a device joins, and as whom."""

    server: str
    """HOST:PORT that the federation's server gives to its devices."""
    root_certificates: Path | None = None
    """The certificate authority that signed the server's certificate; None takes the system's."""
    key: Path | None = None
    """This device's private key, enrolled at the server."""
    insecure: bool = False
    """No TLS: for tests on one machine."""
    node_config: str = ""
    """Facts of this device, ``key=value`` separated by spaces, texts in double quotes."""
    port: int | None = None
    """Loopback port between the SuperNode and its worker; None takes a free one."""

    def check(self) -> None:
        """Refuse what cannot work before anything is started.

        Raises:
            ConfigError, NodeError, KeyFileError: naming the option or the file, and what to do.
        """
        # Imported here: the module reads Flower's protocol, and only this needs it.
        from client.connection import Address, check_key, tls_context

        if self.insecure and (self.key or self.root_certificates):
            raise ConfigError(
                "--insecure connects without TLS, where --key and --root-certificates have no use: "
                "leave out --insecure, or the other two."
            )
        for option, path in (("--key", self.key), ("--root-certificates", self.root_certificates)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{option} {path} is no file: give the path of one.")
        # A SuperNode stumbles over these with a traceback, and over a broken certificate it hangs.
        Address.parse(self.server)
        if self.root_certificates is not None:
            tls_context(self.root_certificates)
        if self.key is not None:
            check_key(self.key)
        NodeFacts.parse(self.node_config)

    def command(self, port: int) -> list[str]:
        """Return the SuperNode's command line."""
        command = [_flower_command("flower-supernode"), "--superlink", self.server]
        command += ["--isolation", "process", "--host", "127.0.0.1", "--port", str(port)]
        if self.insecure:
            command += ["--insecure"]
        if self.root_certificates is not None:
            command += ["--root-certificates", str(self.root_certificates)]
        if self.key is not None:
            command += ["--auth-supernode-private-key", str(self.key)]
        if self.node_config:
            command += ["--node-config", self.node_config]
        return command


def _flower_command(name: str) -> str:
    """Return the command of this Python's own installation, active or not."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = shutil.which(name, path=places)
    if found is None:
        raise NodeError(f"Flower's command {name} is missing: install the package again.")
    return found


def join(membership: Membership, say: Callable[[str], None]) -> None:
    """Stay a member until SIGTERM or SIGINT asks to leave; then end both processes and return.

    Args:
        membership: where and as whom.
        say: prints a line for the person at the device.

    Raises:
        ConfigError: for options that cannot work.
        NodeError: when the server refuses or dismisses this device, in one sentence; whoever started
            this process may start it again.
    """
    membership.check()
    port = membership.port or _free_port()
    end, told = time.monotonic() + _LEASE_SECONDS, False
    with _signals() as leaving, _environment() as environment:
        while True:
            member = _Member(membership, port, environment, say)
            try:
                member.watch(leaving)
            finally:
                member.end()
            if leaving.is_set():
                return
            if not member.refused or time.monotonic() > end:
                raise NodeError(member.why())
            if not told:
                told = True
                say(
                    f"{membership.server} refuses this key: it is not enrolled there, or this device was "
                    f"cut off within the last minute. Trying for {_LEASE_SECONDS:.0f} s."
                )
            leaving.wait(_RETRY_SECONDS)


class _Member:
    """One SuperNode and, from when the server has accepted it, its worker."""

    def __init__(
        self,
        membership: Membership,
        port: int,
        environment: Mapping[str, str],
        say: Callable[[str], None],
    ) -> None:
        self._membership, self._port = membership, port
        self._environment, self._say = dict(environment), say
        self._last: deque[str] = deque(maxlen=30)
        self._connected, self._told = threading.Event(), False
        self._worker: subprocess.Popen[bytes] | None = None
        self._worker_ended: int | None = None  # its exit code, if it was over before the SuperNode
        self._supernode = subprocess.Popen(
            membership.command(port),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def refused(self) -> bool:
        """Whether the server did not accept the key."""
        return _REFUSED in "".join(self._last)

    def watch(self, leaving: threading.Event) -> None:
        """Return when the device is to leave, or one of the processes is over."""
        while not leaving.wait(_WATCH_SECONDS):
            if self._supernode.poll() is not None:
                return
            if self._connected.is_set() and self._worker is None:
                self._start_worker()
            self._worker_ended = self._worker.poll() if self._worker else None
            if self._worker_ended is not None:
                return

    def _start_worker(self) -> None:
        command = [sys.executable, "-P", "-m", "client.worker", f"127.0.0.1:{self._port}"]
        command += ["--supernode", str(self._supernode.pid)]
        self._worker = subprocess.Popen(command, env=self._environment)

    def _read(self) -> None:
        assert self._supernode.stdout is not None
        for line in self._supernode.stdout:
            self._last.append(line)
            sys.stdout.write(line)
            sys.stdout.flush()
            if _CONNECTED in line:
                self._connected.set()
            if _WAITING in line and not self._told:
                self._told = True
                plain = " It may speak TLS, which --insecure does not." * self._membership.insecure
                self._say(
                    f"No answer from {self._membership.server} yet: is the server up, and is that its "
                    f"address?{plain} Trying on."
                )

    def end(self) -> None:
        """Ask both processes to end, kill what stays, and hear the SuperNode's last words."""
        # The SuperNode first: its signing off needs no worker, a message cut off needs no reply.
        for process in (self._supernode, self._worker):
            if process is not None and process.poll() is None:
                process.terminate()
        for process in (self._supernode, self._worker):
            if process is not None:
                try:
                    process.wait(_PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._reader.join(_PATIENCE_SECONDS)

    def why(self) -> str:
        """Say in one sentence why the device is no member (any more), and what to do."""
        server, text = self._membership.server, _COLOURS.sub("", "".join(self._last))
        if self.refused:
            return (
                f"{server} does not accept the key {self._membership.key}: it was never enrolled there, "
                "or was revoked; give the public half (.pub) to whoever runs the server."
            )
        if _NO_KEY in text:
            return f"{server} takes enrolled devices alone: give this device's key with --key FILE."
        if self._membership.insecure and _PLAIN_TO_TLS in text:
            return (
                f"{server} speaks TLS: leave out --insecure, and give the server's ca.crt with "
                "--root-certificates."
            )
        if "handshake error" in text:
            return (
                f"The certificate of {server} is not signed by "
                f"{self._membership.root_certificates or 'an authority that this system knows'}, is for "
                "another name, or is out of date: ask whoever runs the server for its current ca.crt."
            )
        if "Exit Code: 302" in text:
            return (
                f"{self._membership.key} is no private key on a NIST elliptic curve in OpenSSH format, "
                "without passphrase: make one with fedsmooth enroll."
            )
        if not self._connected.is_set() or "Exit Code:" in text:
            lines = (text.partition("Exit Code:")[2] or text).splitlines()
            words = " ".join(" ".join(x for x in lines if not _LOG_LINE.match(x)).split())
            return f"The SuperNode could not join {server}: {words[-500:]}"
        if self._worker_ended is not None:
            return (
                f"This device's worker ended (exit code {self._worker_ended}), so the device leaves: its "
                "last lines say why; join again."
            )
        return (
            f"{server} dismissed this device: it was revoked, or the server was started anew without "
            "its memory; join again, and if that is refused ask whoever runs the server."
        )


@contextlib.contextmanager
def _environment() -> Iterator[dict[str, str]]:
    """Make what both processes see; SuperNodes must never share one FLWR_HOME."""
    defaults = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with contextlib.ExitStack() as stack:
        if "FLWR_HOME" not in os.environ:
            folder = tempfile.TemporaryDirectory(
                prefix="fedsmooth-node-", ignore_cleanup_errors=True
            )
            defaults["FLWR_HOME"] = stack.enter_context(folder)
        yield defaults | os.environ


@contextlib.contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn SIGTERM and SIGINT into an event while the block runs."""
    leaving = threading.Event()

    def leave(_number: int, _frame: FrameType | None) -> None:
        leaving.set()

    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, leave) for kind in kinds]
    try:
        yield leaving
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
