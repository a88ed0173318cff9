import datetime
import ssl

import pytest
from cryptography import x509

from fedsmooth_core.errors import ConfigError
from server import certificates
from server.certificates import ensure_certificates
from server.cli import main

ALL = ["ca.crt", "ca.key", "server.crt", "server.key"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def handshake(folder, name, authority=None):
    """One TLS handshake in memory; raises what the client would see."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=str((authority or folder) / "ca.crt"))
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = set()
    while len(done) < 2:
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass


def test_clients_that_trust_the_ca_accept_the_server_under_each_of_its_names(tmp_path):
    assert ensure_certificates(tmp_path / "new" / "tls", ["fl.example.org", "10.0.0.7"]) == ALL
    for name in ("fl.example.org", "10.0.0.7", "localhost", "127.0.0.1"):
        handshake(tmp_path / "new" / "tls", name)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"other\.example\.org"):
        handshake(tmp_path / "new" / "tls", "other.example.org")


def test_a_client_of_another_ca_refuses_the_server(tmp_path):
    ensure_certificates(tmp_path / "one", [])
    ensure_certificates(tmp_path / "two", [])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path / "one", "localhost", authority=tmp_path / "two")


def test_private_keys_are_their_owners_alone(tmp_path):
    ensure_certificates(tmp_path, [])
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ALL}
    assert modes["ca.key"] == modes["server.key"] == 0o600


def test_what_exists_is_left_alone(tmp_path):
    ensure_certificates(tmp_path, ["fl.example.org"])
    before = contents(tmp_path)
    assert ensure_certificates(tmp_path, ["fl.example.org"]) == []
    assert contents(tmp_path) == before


def test_a_deleted_server_certificate_is_signed_anew_by_the_same_ca(tmp_path):
    ensure_certificates(tmp_path, [])
    authority = contents(tmp_path)["ca.crt"]
    (tmp_path / "server.crt").unlink()
    (tmp_path / "server.key").unlink()
    assert ensure_certificates(tmp_path, ["new.example.org"]) == ["server.crt", "server.key"]
    assert contents(tmp_path)["ca.crt"] == authority
    handshake(tmp_path, "new.example.org")


def test_the_ca_may_keep_its_key_elsewhere(tmp_path):
    ensure_certificates(tmp_path, [])
    (tmp_path / "ca.key").unlink()
    assert ensure_certificates(tmp_path, []) == []


@pytest.mark.parametrize(
    "missing",
    [["server.key"], ["server.crt"], ["ca.crt"], ["ca.key", "server.key"], ["ca.crt", "ca.key"]],
)
def test_half_a_set_is_refused(tmp_path, missing):
    ensure_certificates(tmp_path, [])
    for name in missing:
        (tmp_path / name).unlink()
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="restore"):
        ensure_certificates(tmp_path, [])
    assert contents(tmp_path) == before


def test_a_certificate_for_other_hosts_is_refused(tmp_path):
    ensure_certificates(tmp_path, ["old.example.org"])
    with pytest.raises(ConfigError, match=r"not for new\.example\.org: delete it and server\.key"):
        ensure_certificates(tmp_path, ["old.example.org", "new.example.org"])


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    ensure_certificates(tmp_path / "one", [])
    ensure_certificates(tmp_path / "two", [])
    one = contents(tmp_path / "one")
    for name, match in (("server.key", "not the key"), ("server.crt", "not signed by")):
        (tmp_path / "two" / name).write_bytes(one[name])
        with pytest.raises(ConfigError, match=match):
            ensure_certificates(tmp_path / "two", [])
    for name in ("server.crt", "server.key", "ca.key"):
        (tmp_path / "two" / name).unlink(missing_ok=True)
    (tmp_path / "two" / "ca.key").write_bytes(one["ca.key"])
    with pytest.raises(ConfigError, match="not the key"):
        ensure_certificates(tmp_path / "two", [])


def test_an_expired_certificate_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(certificates, "_SERVER_DAYS", 0)
    with pytest.raises(ConfigError, match="expired on"):
        ensure_certificates(tmp_path, [])


def test_validity(tmp_path):
    ensure_certificates(tmp_path, [])
    now = datetime.datetime.now(datetime.UTC)
    for name, days in (("ca.crt", 3650), ("server.crt", 825)):
        certificate = x509.load_pem_x509_certificate((tmp_path / name).read_bytes())
        assert certificate.not_valid_before_utc < now
        assert abs((certificate.not_valid_after_utc - now).days - days) <= 1


@pytest.mark.parametrize("host", ["", "a b", "http://x", "x:443", "x\n"])
def test_no_host_name(tmp_path, host):
    with pytest.raises(ConfigError, match="neither a host name nor an IP address"):
        ensure_certificates(tmp_path / "tls", [host])
    assert not (tmp_path / "tls").exists()


@pytest.mark.parametrize("name", ALL)
def test_damaged_files_are_one_sentence(tmp_path, name):
    ensure_certificates(tmp_path, [])
    (tmp_path / name).write_bytes(b"nonsense")
    if name == "ca.key":  # is read when something is to be signed
        (tmp_path / "server.crt").unlink()
        (tmp_path / "server.key").unlink()
    with pytest.raises(ConfigError, match="PEM format"):
        ensure_certificates(tmp_path, [])


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "tls"
    main(["certificates", str(folder), "--host", "a.example.org", "--host", "10.1.2.3"])
    assert "Made ca.crt, ca.key, server.crt, server.key" in capsys.readouterr().out
    main(["certificates", str(folder)])
    assert "Left as they are" in capsys.readouterr().out
    handshake(folder, "a.example.org")
