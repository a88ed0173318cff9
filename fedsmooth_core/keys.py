"""A device's key: a NIST elliptic-curve key in OpenSSH's format, which Flower knows its nodes by."""

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsmooth_core.config import FILE_NAME
from fedsmooth_core.errors import KeyFileError

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_MAKE_ONE = 'make a new one with ssh-keygen -t ecdsa -b 384 -N "" -f FILE.'


def make_key(folder: Path, name: str) -> Path:
    """Make the P-384 key ``folder/name`` and its public half ``folder/name.pub``.

    A key that is there already is kept, and its public half written again if it is gone.

    Returns:
        The private key's path; the file is readable for its owner alone.

    Raises:
        KeyFileError: when the name is none for a file, or ``folder/name`` exists and is no usable key.
    """
    if not FILE_NAME.test(name):
        raise KeyFileError(f"{name!r} is no name for a device: allowed is {FILE_NAME.text}.")
    path = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Never over an existing file, and never readable for others, not even for a moment.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        private = read_private_key(path)
    else:
        private = ec.generate_private_key(ec.SECP384R1())
        with os.fdopen(handle, "wb") as file:
            file.write(
                private.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.OpenSSH,
                    serialization.NoEncryption(),
                )
            )
    public = path.with_name(f"{name}.pub")
    if not public.exists():
        line = private.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
        public.write_bytes(line + f" {name}\n".encode())
    return path


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a private key as Flower's SuperNode does.

    Raises:
        KeyFileError: when it cannot be read, has a passphrase, or is of another kind.
    """
    content = _read(path)
    try:
        key = serialization.load_ssh_private_key(content, None)
    except TypeError as error:  # what the library raises for a key that needs a password
        raise KeyFileError(
            f"{path} is protected by a passphrase, which nobody types when a device starts: {_MAKE_ONE}"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = " (give the file without .pub)" if path.suffix == ".pub" else ""
        raise KeyFileError(f"{path} is no OpenSSH private key{hint}: {_MAKE_ONE}") from error
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, _CURVES):
        return key
    raise _wrong_kind(path, key)


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a public key, one line as ``ssh-keygen`` writes it.

    Raises:
        KeyFileError: when it cannot be read, or is of another kind.
    """
    content = _read(path)
    if b"PRIVATE KEY" in content:
        raise KeyFileError(
            f"{path} is a private key, which must not leave its device: give its public half, {path}.pub."
        )
    try:
        key = serialization.load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(
            f"{path} is no OpenSSH public key: give the .pub file beside the device's private key."
        ) from error
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    raise _wrong_kind(path, key)


def _read(path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise KeyFileError(
            f"The key {path} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error


def _wrong_kind(path: Path, key: object) -> KeyFileError:
    kind = type(key).__name__.removesuffix("PublicKey").removesuffix("PrivateKey").strip("_")
    return KeyFileError(
        f"{path} is a key of the kind {kind}, but Flower takes NIST elliptic-curve keys alone: {_MAKE_ONE}"
    )
