"""What a device is told about its server, its certificate and its key."""

import datetime
import email.utils
import json
import socket
import ssl

import pytest
from tls_server import Authority, serving

from client import connection
from client.connection import (
    Address,
    check_certificate,
    check_enrolled,
    check_key,
    check_reachable,
    tls_context,
)
from fedsmooth_core.errors import KeyFileError, NodeError
from fedsmooth_core.keys import make_key, read_private_key


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    return read_private_key(make_key(tmp_path_factory.mktemp("key"), "device"))


def local(port):
    return Address("127.0.0.1", port)


def refusal(function, *arguments, kind=NodeError):
    with pytest.raises(kind) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# --- address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("fl.example.org:443", ("fl.example.org", 443)),
        ("127.0.0.1:8000", ("127.0.0.1", 8000)),
        ("[::1]:8000", ("::1", 8000)),
    ],
)
def test_an_address_is_a_host_and_a_port(text, address):
    assert Address.parse(text) == address
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "fl.example.org",
        "https://fl.example.org:443",
        ":443",
        "a:b",
        "a:0",
        "a:65536",
        "",
        " a:443",
        "a:443\n",
        "a:\u0664\u0664\u0663",
        "::1:443",
    ],
)
def test_what_is_no_address(text):
    assert "give HOST:PORT" in refusal(Address.parse, text)


# --- reachability


def test_a_server_that_listens_is_reached():
    with serving() as port:
        assert "accepts connections" in check_reachable(local(port))


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert f"refuses connections on port {port}" in refusal(check_reachable, local(port))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (socket.gaierror(-2, "Name or service not known"), "No host is called nowhere.test"),
        (TimeoutError("timed out"), "does not answer within"),
        (OSError(101, "Network is unreachable"), "Network is unreachable"),
    ],
)
def test_networks_without_the_server(monkeypatch, error, text):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(connection.socket, "create_connection", fail)
    assert text in refusal(check_reachable, Address("nowhere.test", 443))


def test_a_host_name_that_is_none():
    assert "cannot be reached" in refusal(check_reachable, Address("a" * 70 + ".test", 443))


# --- certificate


def test_the_right_certificate(authority):
    with serving(authority.certify("127.0.0.1")) as port:
        sentence = check_certificate(local(port), tls_context(authority.certificate))
    assert "is right, and valid until" in sentence


@pytest.mark.parametrize(
    ("addresses", "days", "text"),
    [
        (["127.0.0.1"], (-20, -1), "has expired"),
        (["127.0.0.1"], (1, 20), "is not valid yet"),
        (["127.0.0.2", "example.org"], (-1, 20), "is for another host name"),
    ],
)
def test_wrong_certificates_of_the_right_authority(authority, addresses, days, text):
    with serving(authority.certify(*addresses, days=days)) as port:
        message = refusal(check_certificate, local(port), tls_context(authority.certificate))
    assert text in message


def test_a_certificate_for_another_name(authority):
    with serving(authority.certify("example.org")) as port:
        address = Address("localhost", port)
        message = refusal(check_certificate, address, tls_context(authority.certificate))
    assert "is for another host name" in message
    assert "includes localhost" in message


@pytest.mark.parametrize("given", [True, False])
def test_a_certificate_of_another_authority(authority, tmp_path, given):
    with serving(authority.certify("127.0.0.1")) as port:
        other = Authority(tmp_path, "other").certificate if given else None
        message = refusal(check_certificate, local(port), tls_context(other))
    assert "an authority that this device does not trust" in message
    assert "joining kit" in message


def test_a_server_without_tls(authority):
    with serving(response=b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        message = refusal(check_certificate, local(port), tls_context(authority.certificate))
    assert "does not speak TLS" in message


def test_a_server_that_says_nothing(authority, monkeypatch):
    monkeypatch.setattr(connection, "_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = local(listener.getsockname()[1])
        message = refusal(check_certificate, address, tls_context(authority.certificate))
    assert "does not speak TLS (it was silent for" in message
    assert "_ssl" not in message


@pytest.mark.parametrize(
    "content", [None, "", "no certificate", "-----BEGIN CERTIFICATE-----\nx\n"]
)
def test_a_file_that_is_no_certificate(tmp_path, content):
    path = tmp_path / "ca.crt"
    if content is not None:
        path.write_text(content)
    message = refusal(tls_context, path)
    assert str(path) in message
    assert "joining kit" in message


# --- key


def test_a_key_must_be_its_owners_alone(tmp_path):
    path = make_key(tmp_path, "device")
    check_key(path)
    path.chmod(0o640)
    assert f"chmod 600 {path}" in refusal(check_key, path, kind=KeyFileError)


def answer(status, content, headers=()):
    body = json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def ask(authority, key, response):
    with serving(authority.certify("127.0.0.1"), response) as port:
        return check_enrolled(local(port), tls_context(authority.certificate), key)


def test_a_key_that_the_server_knows(authority, key):
    # What a SuperLink says to a known key that announces an absurd interval: tests/e2e asks a real one.
    known = answer(400, {"code": 2003, "detail": "Invalid heartbeat interval."})
    assert "knows this device's key" in ask(authority, key, known)


def test_a_key_that_the_server_does_not_know(authority, key):
    unknown = answer(412, {"code": 2004, "detail": "Failed to activate SuperNode."})
    message = refusal(ask, authority, key, unknown)
    assert "does not know this device's key, or it was revoked" in message


@pytest.mark.parametrize(("minutes", "text"), [(10, "behind"), (-10, "ahead of")])
def test_a_clock_that_is_wrong(authority, key, minutes, text):
    there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(minutes=minutes)
    date = f"Date: {email.utils.format_datetime(there, usegmt=True)}"
    refused = answer(401, {"detail": "Invalid SuperNode authentication"}, [date])
    message = refusal(ask, authority, key, refused)
    assert f"s {text} the server's" in message
    assert "set the clock" in message


def test_a_proxy_whose_server_is_down(authority, key):
    assert "behind it is not" in refusal(ask, authority, key, answer(502, "Bad Gateway"))


@pytest.mark.parametrize(
    "response", [answer(404, "no"), answer(200, ""), b"no HTTP at all\r\n\r\n"]
)
def test_a_server_that_is_not_flowers(authority, key, response):
    refusal(ask, authority, key, response)


def test_the_context_verifies_names(authority):
    assert tls_context(authority.certificate).verify_mode == ssl.CERT_REQUIRED
    assert tls_context(None).check_hostname
