"""`fedsmooth join` around a SuperNode that only says what Flower's says; the real one is in tests/e2e."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tls_server import Authority

from client import join as module
from client.join import Membership, join
from fedsmooth_core.errors import ConfigError, KeyFileError, NodeError
from fedsmooth_core.keys import make_key

SERVER = "fl.example.org:443"


@pytest.fixture
def supernode(monkeypatch):
    """Put a script in Flower's place: it prints ``text``, then ends with ``code`` or stays."""

    def use(text, code=None):
        end = f"sys.exit({code})" if code is not None else "time.sleep(60)"
        script = f"import sys, time\nprint({text!r}, flush=True)\n{end}"
        monkeypatch.setattr(Membership, "command", lambda *_: [sys.executable, "-c", script])

    return use


@pytest.fixture
def worker(monkeypatch):
    """Put a script in the worker's place, and keep its processes."""
    started = []

    def use(script):
        def start(member):
            started.append(subprocess.Popen([sys.executable, "-c", script]))
            member._worker = started[-1]

        monkeypatch.setattr(module._Member, "_start_worker", start)
        return started

    return use


def lines_of(membership):
    said = []
    join(membership, said.append)
    return said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[code: 2001] SuperNode authentication is enabled", "give this device's key with --key"),
        ("ERROR : SSL/TLS handshake error detected.", "is not signed by an authority that this"),
        ("ERROR : Exit Code: 302\nUnable to parse", "no private key on a NIST elliptic curve"),
        ("ERROR : Exit Code: 606\nUpgrade your Flower", "606 Upgrade your Flower"),
        ("Traceback\nRuntimeError: port in use", "RuntimeError: port in use"),
        (
            "\x1b[92mINFO \x1b[0m:      FastAPI lifespan: startup\n"
            "\x1b[91mERROR \x1b[0m:     Exit Code: 606\nUpgrade your Flower\n"
            "INFO:     Shutting down\n\x1b[92mINFO \x1b[0m:      FastAPI lifespan: shutdown\n",
            f"could not join {SERVER}: 606 Upgrade your Flower",
        ),
    ],
)
def test_why_a_device_cannot_join_is_one_sentence(supernode, text, words):
    supernode(text, code=1)
    with pytest.raises(NodeError, match=re.escape(words)) as raised:
        join(Membership(SERVER), print)
    assert SERVER in str(raised.value) or "302" in text
    assert "\n" not in str(raised.value)


def test_insecure_at_a_server_that_speaks_tls_is_one_sentence(supernode):
    refusal = "Client error '400 Bad Request' for url 'http://x'\nFor more information check: y"
    supernode(f"ERROR : Exit Code: 305\n{refusal}\nINFO:     Shutting down", code=1)
    with pytest.raises(NodeError, match=r"speaks TLS: leave out --insecure") as raised:
        join(Membership(SERVER, insecure=True), print)
    assert "INFO" not in str(raised.value)


def test_a_refused_key_is_tried_again_for_the_time_of_a_lease(supernode, monkeypatch):
    monkeypatch.setattr(module, "_LEASE_SECONDS", 2.0)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.1)
    supernode("[code: 2004] Failed to activate SuperNode.", code=1)
    said = []
    started = time.monotonic()
    with pytest.raises(NodeError, match="does not accept the key"):
        join(Membership(SERVER), said.append)
    assert time.monotonic() - started > 2
    assert len(said) == 1
    assert "not enrolled there, or this device was cut off within the last minute" in said[0]


def test_a_server_that_lets_go_is_no_success(supernode, worker):
    worker("import time; time.sleep(60)")
    supernode("SuperNode ID: 5\nSuperNode terminated gracefully.", code=0)
    with pytest.raises(NodeError, match="dismissed this device"):
        join(Membership(SERVER), print)


def test_a_dead_worker_takes_its_supernode_along(supernode, worker):
    supernode("SuperNode ID: 5")
    worker("import sys; sys.exit(1)")
    with pytest.raises(NodeError, match=r"worker ended \(exit code 1\)"):
        join(Membership(SERVER), print)


def test_sigterm_ends_both_and_is_no_error(supernode, worker):
    supernode("SuperNode ID: 5")
    started = worker("import time; time.sleep(60)")
    before = signal.getsignal(signal.SIGTERM)

    def leave():
        while not started:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=leave).start()
    assert lines_of(Membership(SERVER)) == []
    assert started[0].returncode is not None
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_server_that_does_not_answer_is_said_once(supernode, worker):
    worker("import sys; sys.exit(1)")
    waiting = "Connection attempt failed, retrying in 1.00 seconds\n" * 3
    supernode(f"{waiting}SuperNode ID: 5")
    said = []
    with pytest.raises(NodeError):
        join(Membership(SERVER, insecure=True), said.append)
    assert len(said) == 1
    assert "may speak TLS" in said[0]


def test_the_command_is_flowers_with_the_worker_left_to_us(tmp_path):
    key, authority = make_key(tmp_path, "device"), Authority(tmp_path).certificate
    membership = Membership(SERVER, authority, key, node_config="threads=2")
    membership.check()
    command = " ".join(membership.command(9))
    assert "--isolation process --host 127.0.0.1 --port 9" in command
    assert f"--root-certificates {authority} --auth-supernode-private-key {key}" in command
    assert "--insecure" not in command
    assert command.endswith("--node-config threads=2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"server": "https://fl.example.org"}, "give HOST:PORT"),
        ({"server": "fl.example.org"}, "give HOST:PORT"),
        ({"server": "fl.example.org:0"}, "a port in 1 to 65535"),
        ({"server": "fl.example.org:99999"}, "a port in 1 to 65535"),
        ({"node_config": "data-path=/data/images"}, "texts in double quotes"),
        ({"node_config": "threads"}, "texts in double quotes"),
        ({"node_config": "sigma=3"}, "hyper-parameters come from the server alone"),
        ({"key": "missing"}, "--key missing is no file"),
        ({"key": "missing", "insecure": True}, "--insecure connects without TLS"),
    ],
)
def test_options_that_cannot_work_are_refused_first(options, words):
    if "key" in options:
        options = options | {"key": Path(options["key"])}
    with pytest.raises((ConfigError, NodeError), match=re.escape(words)):
        join(Membership(**{"server": SERVER} | options), print)


DAMAGED = "-----BEGIN CERTIFICATE-----\ngarbage\n-----END CERTIFICATE-----\n"


@pytest.mark.parametrize("content", [DAMAGED, "", "\xe9 no certificate"])
def test_a_certificate_that_flower_cannot_read_is_refused_first(tmp_path, content):
    authority = tmp_path / "ca.crt"
    authority.write_text(content, encoding="latin-1")
    with pytest.raises(NodeError, match="holds no certificate, or a damaged one"):
        join(Membership(SERVER, authority), print)


def test_a_key_that_flower_cannot_use_is_refused_first(tmp_path):
    key = make_key(tmp_path, "device")
    with pytest.raises(KeyFileError, match="is no OpenSSH private key"):
        join(Membership(SERVER, key=tmp_path / "device.pub"), print)
    key.chmod(0o644)
    with pytest.raises(KeyFileError, match="can be read by other users"):
        join(Membership(SERVER, key=key), print)
