"""A device's key: made once, readable for its owner alone, and of the one kind that Flower takes."""

import stat
import subprocess

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from fedsmooth_core.errors import KeyFileError
from fedsmooth_core.keys import make_key, read_private_key, read_public_key


def write_private(path, key):
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
    return path


def write_public(path, key):
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    path.write_bytes(key.public_key().public_bytes(encoding, form))
    return path


def sentence(read, path):
    with pytest.raises(KeyFileError) as error:
        read(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_new_key_is_its_owners_alone_and_fits_its_public_half(tmp_path):
    path = make_key(tmp_path / "keys", "jetson")
    assert path == tmp_path / "keys" / "jetson"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    private = read_private_key(path)
    assert isinstance(private.curve, ec.SECP384R1)
    public = read_public_key(tmp_path / "keys" / "jetson.pub")
    assert public == private.public_key()


def test_a_key_that_is_there_is_kept(tmp_path):
    path = make_key(tmp_path, "jetson")
    content = path.read_bytes()
    (tmp_path / "jetson.pub").unlink()
    assert make_key(tmp_path, "jetson").read_bytes() == content
    assert read_public_key(tmp_path / "jetson.pub") == read_private_key(path).public_key()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "two words", "/etc/x"])
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(KeyFileError, match="is no name for a device"):
        make_key(tmp_path / "keys", name)
    assert list(tmp_path.iterdir()) == []


def ssh_keygen(path, passphrase=""):
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", passphrase, "-f", str(path)]
    try:
        subprocess.run(command, check=True)
    except FileNotFoundError:
        pytest.skip("needs ssh-keygen")
    return path


def test_a_key_that_ssh_keygen_made_is_read(tmp_path):
    path = ssh_keygen(tmp_path / "device")
    assert read_private_key(path).public_key() == read_public_key(tmp_path / "device.pub")


def test_a_passphrase_is_refused(tmp_path):
    path = ssh_keygen(tmp_path / "device", "secret")
    assert "protected by a passphrase" in sentence(read_private_key, path)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519"),
        (rsa.generate_private_key(65537, 2048), "RSA"),
    ],
    ids=["ed25519", "rsa"],
)
def test_another_kind_of_key_is_named(tmp_path, key, kind):
    for message in (
        sentence(read_private_key, write_private(tmp_path / "key", key)),
        sentence(read_public_key, write_public(tmp_path / "key.pub", key)),
    ):
        assert f"of the kind {kind}" in message
        assert "ssh-keygen -t ecdsa" in message


def test_one_half_given_for_the_other_is_told(tmp_path):
    path = make_key(tmp_path, "device")
    assert "is a private key" in sentence(read_public_key, path)
    message = sentence(read_private_key, tmp_path / "device.pub")
    assert "give the file without .pub" in message


@pytest.mark.parametrize("read", [read_private_key, read_public_key])
def test_what_is_no_key_is_refused(tmp_path, read):
    path = tmp_path / "key"
    path.write_bytes(b"\xff\x00 no key")
    assert "is no OpenSSH" in sentence(read, path)
    assert "cannot be read" in sentence(read, tmp_path / "nowhere")
    assert "cannot be read" in sentence(read, tmp_path)
