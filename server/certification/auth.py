"""Who is let in: bearer tokens, TLS, client certificates."""

import datetime
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fedsmooth_core.config import FILE_NAME
from fedsmooth_core.durable import append_durably
from fedsmooth_core.errors import ConfigError, ServiceError

_log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_UNREADABLE = ()


class UnauthenticatedError(ServiceError):
    """A call without a token that is valid now."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, "UNAUTHENTICATED")


@dataclass(frozen=True)
class _Token:
    name: str
    sha256: str
    expires: datetime.datetime


class Tokens:
    """The tokens of a file, one a line: name, SHA-256 of the token, expiry in UTC.

    The file is read again when it has changed: a line that is removed revokes its token at once. A line
    that is none, as in a file that is being edited, lets nobody in and is logged.

    Raises:
        ConfigError: when the file is missing, or one of its lines is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._version: tuple[int, ...] | None = None
        self._tokens: list[_Token] = []
        problems = self._refresh()
        if problems:
            raise ConfigError(problems[0])

    def name_of(self, authorization: str | None) -> str:
        """Return whose token an ``authorization`` value holds.

        Raises:
            UnauthenticatedError: when it holds none, an unknown one, or one that has expired.
        """
        for problem in self._refresh():
            _log.warning("%s", problem)
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise UnauthenticatedError(
                "this service wants a token: send the metadata 'authorization: Bearer <token>'."
            )
        digest = hashlib.sha256(token.encode()).hexdigest()
        # Every line is compared, in the same time: how long it takes says nothing about the tokens.
        found = [one for one in self._tokens if hmac.compare_digest(one.sha256, digest)]
        if not found:
            raise UnauthenticatedError(
                "this token is unknown or revoked: ask the service's operator for another one."
            )
        newest = max(found, key=lambda one: one.expires)
        if newest.expires <= datetime.datetime.now(datetime.UTC):
            raise UnauthenticatedError(
                f"the token of {newest.name} has expired at {newest.expires:{_TIME}}: ask the service's "
                "operator for another one."
            )
        return newest.name

    def _refresh(self) -> list[str]:
        """Read the file if it has changed; return a sentence for each line that is none."""
        try:
            facts = self._path.stat()
            version = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if version == self._version:
                return []
            lines = self._path.read_text("utf-8", "replace").splitlines()
        except OSError as error:
            self._tokens = []
            if self._version == _UNREADABLE:
                return []  # said once, not at every call
            self._version = _UNREADABLE
            return [f"the tokens {self._path} cannot be read ({error.strerror}): nobody is let in."]
        self._version = version
        tokens, problems = [], []
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            try:
                tokens.append(_parse(line))
            except ValueError:
                problems.append(
                    f"{self._path}, line {number} is no token (name, SHA-256 and expiry such as "
                    "2030-01-31T00:00:00Z): remove it, or make one with fedsmooth token."
                )
        self._tokens = tokens
        return problems


def _parse(line: str) -> _Token:
    name, sha256, expires = line.split()
    if not _SHA256.fullmatch(sha256):
        raise ValueError("no SHA-256")
    when = datetime.datetime.strptime(expires, _TIME).replace(tzinfo=datetime.UTC)
    return _Token(name, sha256, when)


def make_token(name: str, path: Path, days: float) -> tuple[str, datetime.datetime]:
    """Make a token, and put what it is known by into a file of tokens.

    The token itself is kept nowhere. A name may have several: the old one works until it expires or its
    line is removed.

    Args:
        name: of its owner, for the log.
        path: the file; it is made, for its owner's eyes alone, where it is missing.
        days: until it expires, > 0.

    Returns:
        The token, and when it expires.

    Raises:
        ConfigError: for a name or a number of days that cannot be.
    """
    if not FILE_NAME.test(name):
        raise ConfigError(f"the name {name!r} cannot be: allowed is {FILE_NAME.text}.")
    if not 0 < days <= 36_500:
        raise ConfigError(f"--days {days:g} is out of range: allowed is a number in (0, 36500].")
    token = secrets.token_urlsafe(32)
    digest = hashlib.sha256(token.encode()).hexdigest()
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made before it is written to, so that it is never open to others.
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    append_durably(path, f"{name} {digest} {expires:{_TIME}}")
    return token, expires


def write_token(token: str, path: Path) -> None:
    """Write a token to a file that its owner alone may read; one that is there is replaced.

    Raises:
        ConfigError: when the file cannot be written.
    """
    # Renamed into place: who reads it finds the old token or the new one, never a part of it.
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{token}\n")
        new.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot hold the token ({error.strerror}): choose a file that can be written; the "
            "token is lost, so remove its line and make another."
        ) from error


def server_credentials(
    certificate: Path | None, key: Path | None, client_authority: Path | None
) -> grpc.ServerCredentials | None:
    """Return what the service shows and asks for; None when no certificate is given.

    Args:
        certificate: of the service (PEM, with its chain).
        key: the certificate's private key (PEM).
        client_authority: whoever calls must show a certificate that this authority (PEM) signed.

    Raises:
        ConfigError: when a file cannot be used, or one is missing.
    """
    if certificate is None or key is None:
        if certificate or key:
            raise ConfigError("a certificate and its key go together: give both, or neither.")
        if client_authority is not None:
            raise ConfigError(
                "client certificates need TLS: give the service's own --certificate and --key too."
            )
        return None
    chain, private = _content(certificate), _content(key)
    # gRPC itself would only say, call by call, that handshakes fail.
    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except ValueError as error:
        raise ConfigError(f"{certificate} is no certificate in PEM format: replace it.") from error
    try:
        loaded = serialization.load_pem_private_key(private, None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{key} is no private key in PEM format without passphrase: replace it."
        ) from error
    if loaded.public_key() != leaf.public_key():
        raise ConfigError(f"{key} is not the key of {certificate}: give the pair that belongs.")
    if leaf.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise ConfigError(
            f"{certificate} expired on {leaf.not_valid_after_utc:%Y-%m-%d}: replace it and its key."
        )
    authority = None
    if client_authority is not None:
        authority = _content(client_authority)
        try:
            x509.load_pem_x509_certificates(authority)
        except ValueError as error:
            raise ConfigError(
                f"{client_authority} is no certificate in PEM format: replace it."
            ) from error
    return grpc.ssl_server_credentials(
        [(private, chain)], authority, require_client_auth=authority is not None
    )


def check_exposure(host: str, has_tls: bool, knows_callers: bool, insecure: bool) -> None:
    """Refuse to listen where others could listen in, or to whoever calls, or in plain text unasked.

    Args:
        host: what the service listens on.
        has_tls: whether it shows a certificate.
        knows_callers: whether it wants tokens or client certificates.
        insecure: whether plain text was asked for.

    Raises:
        ConfigError: saying what to give.
    """
    if has_tls and insecure:
        raise ConfigError("--insecure means no TLS: leave it out, or --certificate and --key.")
    if not has_tls and not insecure:
        raise ConfigError(
            "the service needs a certificate for TLS: give --certificate and --key, or --insecure for a "
            "test on this machine."
        )
    if is_loopback(host):
        return
    if not has_tls:
        raise ConfigError(
            f"--insecure sends models and tokens in plain text, so it is for this machine alone: listen "
            f"on 127.0.0.1 instead of {host}, or give --certificate and --key."
        )
    if not knows_callers:
        raise ConfigError(
            f"on {host} anybody could use the service: give --tokens or --client-authority, or listen on "
            "127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
