"""The deployment's own certificate authority, and the certificate that its servers show."""

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedsmooth_core.durable import sync_folder, write_atomically
from fedsmooth_core.errors import ConfigError

CA, CA_KEY = "ca.crt", "ca.key"
SERVER, SERVER_KEY = "server.crt", "server.key"

_CA_DAYS = 3650  # every device holds a copy: it should outlive them
_SERVER_DAYS = 825  # what clients on Apple's systems accept at most
_CLOCK_SKEW = datetime.timedelta(hours=1)  # a device without a battery-backed clock may be behind

# Flower's SuperLink starts processes of its own that connect to it over the loopback.
_OWN_NAMES = ("localhost", "127.0.0.1")


def ensure_certificates(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Make ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key`` where they are missing.

    What exists is left alone: a CA without a server certificate signs a new one, and a complete set
    (with or without the CA's key) is only checked.

    Args:
        folder: is made when it does not exist.
        hosts: names and IP addresses that the server certificate must stand for, besides the loopback's.

    Returns:
        The names of the files that were made.

    Raises:
        ConfigError: when files of a set are missing, or what is there is expired, of another CA or for
            other hosts.
    """
    names = list(dict.fromkeys((*hosts, *_OWN_NAMES)))
    subjects = [_subject(name) for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    there = {name for name in (CA, CA_KEY, SERVER, SERVER_KEY) if (folder / name).exists()}
    made = []
    if not there:
        _make_ca(folder)
        made += [CA, CA_KEY]
    elif not {CA, CA_KEY} <= there and not {CA, SERVER, SERVER_KEY} <= there:
        raise ConfigError(
            f"{folder} holds {', '.join(sorted(there))} alone, which is no usable set: restore what is "
            f"missing ({CA} with {CA_KEY}, or {CA} with {SERVER} and {SERVER_KEY}), or empty the folder "
            "for a new CA."
        )
    elif len({SERVER, SERVER_KEY} & there) == 1:
        raise ConfigError(
            f"{folder} holds only one of {SERVER} and {SERVER_KEY}: restore the other, or delete this one "
            "for a new certificate."
        )
    if SERVER not in there:
        _make_server(folder, names, subjects)
        made += [SERVER, SERVER_KEY]
    _check(folder, names, subjects)
    return made


def _subject(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.removeprefix("*.").split(".")
    if not all(
        label.replace("-", "").isalnum() and label.isascii() and len(label) <= 63
        for label in labels
    ):
        raise ConfigError(f"{name!r} is neither a host name nor an IP address.")
    return x509.DNSName(name)


def _make_ca(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Fed-SmoothAdv deployment CA")])
    certificate = (
        _builder(key.public_key(), name, name, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_pair(folder, certificate, CA, key, CA_KEY)


def _make_server(folder: Path, names: Sequence[str], subjects: Sequence[x509.GeneralName]) -> None:
    issuer = _read_certificate(folder / CA)
    issuer_key = _read_key(folder / CA_KEY)
    if issuer_key.public_key() != issuer.public_key():
        raise ConfigError(f"{folder / CA_KEY} is not the key of {folder / CA}: restore the pair.")
    key = ec.generate_private_key(ec.SECP384R1())
    # A common name has at most 64 characters; what clients compare are the alternative names.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    certificate = (
        _builder(key.public_key(), name, issuer.subject, _SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
        .sign(issuer_key, hashes.SHA384())
    )
    _write_pair(folder, certificate, SERVER, key, SERVER_KEY)


def _builder(
    key: ec.EllipticCurvePublicKey, subject: x509.Name, issuer: x509.Name, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_pair(
    folder: Path,
    certificate: x509.Certificate,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    key_name: str,
) -> None:
    # The key first: whoever sees the certificate finds its key. It is never readable for others, not
    # even for a moment.
    temporary = folder / f".{key_name}.tmp"
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / key_name)
    sync_folder(folder)
    write_atomically(folder / name, certificate.public_bytes(serialization.Encoding.PEM))


def _check(folder: Path, names: Sequence[str], subjects: Sequence[x509.GeneralName]) -> None:
    authority, server = _read_certificate(folder / CA), _read_certificate(folder / SERVER)
    now = datetime.datetime.now(datetime.UTC)
    for name, certificate in ((CA, authority), (SERVER, server)):
        if certificate.not_valid_after_utc <= now:
            what = "the folder's files" if name == CA else f"it and {SERVER_KEY}"
            raise ConfigError(
                f"{folder / name} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: delete {what} for "
                "a new one, or replace it."
            )
    try:
        server.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(
            f"{folder / SERVER} was not signed by {folder / CA}: replace one of them by its counterpart."
        ) from error
    if _read_key(folder / SERVER_KEY).public_key() != server.public_key():
        raise ConfigError(
            f"{folder / SERVER_KEY} is not the key of {folder / SERVER}: restore the pair, or delete both "
            "for a new certificate."
        )
    missing = [
        name for name, it in zip(names, subjects, strict=True) if it not in _subjects(server)
    ]
    if missing:
        raise ConfigError(
            f"{folder / SERVER} is not for {', '.join(missing)}: delete it and {SERVER_KEY} for a new one "
            "(devices need nothing new), or replace it by one with these names."
        )


def _subjects(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return list(extension.value)


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate in PEM format: replace it.") from error


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    # Of any kind, when the operator brought it; only its public half is compared then.
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is no private key in PEM format without passphrase: replace it."
        ) from error
    return key  # type: ignore[return-value]
