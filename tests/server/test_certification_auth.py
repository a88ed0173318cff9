"""Who is let in: tokens, TLS, client certificates."""

import datetime
import stat
import threading

import grpc
import pytest
from certification_harness import SPEC, serving, terms, weights
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import generate_latest

from fedsmooth_core.errors import ConfigError, ServiceError, ServiceUnreachableError
from server.certificates import ensure_certificates
from server.certification import certification_pb2 as pb
from server.certification.auth import check_exposure, make_token, server_credentials
from server.certification.certification_pb2_grpc import CertificationStub
from server.certification.client import CertificationClient, Connection


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A deployment's CA with a server's certificate, and one of another deployment."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        ensure_certificates(folder / name, [])
        _client_certificate(folder / name)
    return folder


def _client_certificate(folder):
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "client")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "client.crt").write_bytes(certificate.public_bytes(pem))
    (folder / "client.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def _token(tokens, folder, days=1.0, name="me"):
    token, _ = make_token(name, tokens, days)
    path = folder / f"{name}.token"
    path.write_text(f"{token}\n")
    return path


# --------------------------------------------------------------------------------------------------
# Tokens


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    tokens = folder / "tokens"
    make_token("somebody", tokens, 1)
    with serving(folder / "service", tokens=tokens) as service:
        yield service, tokens


def _refused(service, **connection):
    with (
        service.client(**connection) as client,
        pytest.raises(ServiceError) as refused,
    ):
        client.jobs()
    assert refused.value.status == "UNAUTHENTICATED"
    assert service.left_behind()["jobs"] == 0
    return str(refused.value)


def test_a_token_lets_in_until_its_line_is_removed(guarded, tmp_path, caplog):
    caplog.set_level("INFO", "server.certification")
    service, tokens = guarded
    path = _token(tokens, tmp_path)
    with service.client(token_file=path) as client:
        assert client.jobs() == []
        with pytest.raises(ServiceError, match="no job"):
            client.get("a")
        assert "refused Get for me at ipv4:127.0.0.1:" in caplog.text
        lines = tokens.read_text().splitlines()
        tokens.write_text("".join(f"{line}\n" for line in lines if not line.startswith("me ")))
        with pytest.raises(ServiceError, match="unknown or revoked"):
            client.jobs()
        # A new one in the same file of the client's is used at once.
        path.write_text(make_token("me", tokens, 1)[0])
        assert client.jobs() == []


def test_missing_unknown_and_expired_tokens_are_refused(guarded, tmp_path):
    service, tokens = guarded
    assert "wants a token" in _refused(service)
    unknown = tmp_path / "unknown"
    unknown.write_text("a" * 43)
    assert "unknown or revoked" in _refused(service, token_file=unknown)
    expired = _token(tokens, tmp_path, days=1e-9, name="late")
    assert "the token of late has expired at 20" in _refused(service, token_file=expired)


def test_uploads_and_watches_without_a_token_are_refused_unread(guarded):
    service, _ = guarded
    with grpc.insecure_channel(service.address) as channel:
        stub = CertificationStub(channel)
        for call in (
            lambda: stub.Submit(iter([pb.SubmitRequest(weights=bytes(100))])),
            lambda: next(stub.Watch(pb.WatchRequest(key="a"))),
            lambda: stub.Predict(pb.PredictRequest()),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call()
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        # Reflection tells what there is to call: to those who may call it.
        reflection = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        )
        with pytest.raises(grpc.RpcError) as refused:
            next(reflection(iter([b""])))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic abc", "Bearer é"])
def test_odd_authorizations_are_refused(guarded, value):
    service, _ = guarded
    with grpc.insecure_channel(service.address) as channel:
        metadata = [("authorization", value.encode("ascii", "replace").decode())]
        with pytest.raises(grpc.RpcError) as refused:
            CertificationStub(channel).List(pb.ListRequest(), metadata=metadata)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_line_that_is_none_keeps_nobody_else_out(guarded, tmp_path, caplog):
    service, tokens = guarded
    path = _token(tokens, tmp_path, name="good")
    with tokens.open("a") as file:
        file.write("half a li")
    with service.client(token_file=path) as client:
        assert client.jobs() == []
    assert "is no token" in caplog.text
    # A token that is made then stands on a line of its own.
    with service.client(token_file=_token(tokens, tmp_path, name="next")) as client:
        assert client.jobs() == []


def test_a_file_of_tokens_that_is_gone_lets_nobody_in(guarded, tmp_path, caplog):
    service, tokens = guarded
    path = _token(tokens, tmp_path, name="again")
    content = tokens.read_bytes()
    tokens.unlink()
    assert "unknown or revoked" in _refused(service, token_file=path)
    _refused(service, token_file=path)
    assert caplog.text.count("nobody is let in") == 1
    tokens.write_bytes(content)
    with service.client(token_file=path) as client:
        assert client.jobs() == []


def test_what_a_caller_made_up_is_no_label_and_floods_no_log(guarded, caplog):
    caplog.set_level("INFO", "server.certification")
    service, _ = guarded
    with grpc.insecure_channel(service.address) as channel:
        for number in range(20):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/no.Service/Method{number}")(b"")
    figures = generate_latest(service.server._metrics.registry).decode()
    assert 'code="UNAUTHENTICATED",method="unknown"' in figures
    assert "Method" not in figures
    assert "Method" not in caplog.text
    assert caplog.text.count("refused ") < 10


def test_calls_of_health_without_a_token_keep_nobody_else_out(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr("server.certification.guard._HEALTH_SECONDS", 0.2)
    service, tokens = guarded
    path = _token(tokens, tmp_path, name="other")
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        watching = [stub.Watch(request) for _ in range(32)]
        for call in watching:
            assert next(call).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refused:
            next(stub.Watch(request))
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # Who watches takes no place of those who ask once.
        assert stub.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        silent = channel.stream_unary("/grpc.health.v1.Health/Check")
        with pytest.raises(grpc.RpcError) as refused:
            silent(iter(threading.Event().wait, True))
        assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.RpcError) as refused:
            silent(iter([b"no message"]))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with service.client(token_file=path) as client:
            client.jobs()
        for call in watching:
            call.cancel()


def test_a_revoked_token_reads_no_more_of_an_open_stream(guarded, tmp_path):
    service, tokens = guarded
    path = _token(tokens, tmp_path, name="reader")
    with service.client(token_file=path) as client:
        # Long enough that it does not end before the token is gone.
        job = client.submit(SPEC, terms(num_images=300, n=20_000), weights())
        watching = client.watch(job.key)
        next(watching)
        lines = tokens.read_text().splitlines(keepends=True)
        tokens.write_text("".join(line for line in lines if not line.startswith("reader ")))
        with pytest.raises(ServiceError, match="revoked") as refused:
            list(watching)
        assert refused.value.status == "UNAUTHENTICATED"
    with service.client(token_file=_token(tokens, tmp_path, name="reader")) as client:
        client.cancel(job.key)


def test_the_file_of_tokens_holds_no_token_and_is_its_owners_alone(tmp_path):
    tokens = tmp_path / "folder" / "tokens"
    token, expires = make_token("me", tokens, 2)
    assert token not in tokens.read_text()
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    left = expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=1.9) < left <= datetime.timedelta(days=2)
    assert make_token("me", tokens, 2)[0] != token
    assert len(tokens.read_text().splitlines()) == 2


@pytest.mark.parametrize(("name", "days"), [("a b", 1), ("", 1), ("a\nb", 1), ("me", 0)])
def test_tokens_that_cannot_be_are_not_made(tmp_path, name, days):
    with pytest.raises(ConfigError):
        make_token(name, tmp_path / "tokens", days)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("content", [None, "", "two words"])
def test_a_clients_token_file_without_token_is_one_sentence(tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with (
        CertificationClient(Connection("127.0.0.1:1", token_file=path, insecure=True)) as client,
        pytest.raises(ConfigError, match=str(path)),
    ):
        client.jobs()


# --------------------------------------------------------------------------------------------------
# TLS


def _tls(keys, **options):
    return {"certificate": keys / "own/server.crt", "key": keys / "own/server.key"} | options


def _of(keys, whose, **more):
    return {"insecure": False, "root_certificates": keys / whose / "ca.crt"} | more


def test_tls_needs_the_right_authority_and_refuses_plain_text(keys, tmp_path):
    with serving(tmp_path, **_tls(keys)) as service:
        with service.client(**_of(keys, "own")) as client:
            assert client.submit(SPEC, terms(), weights()).num_images == 4
        for wrong in (_of(keys, "other"), {"insecure": True}, {"insecure": False}):
            with (
                service.client(**wrong) as client,
                pytest.raises(ServiceUnreachableError, match="is not available"),
            ):
                client.jobs()
        assert service.left_behind()["jobs"] == 1


def test_client_certificates_are_asked_for_and_checked(keys, tmp_path):
    def own(whose):
        return _of(
            keys,
            "own",
            certificate=keys / whose / "client.crt",
            key=keys / whose / "client.key",
        )

    with serving(tmp_path, **_tls(keys, client_authority=keys / "own/ca.crt")) as service:
        with service.client(**own("own")) as client:
            assert client.jobs() == []
        for wrong in (own("other"), _of(keys, "own")):
            with service.client(**wrong) as client, pytest.raises(ServiceUnreachableError):
                client.jobs()


@pytest.mark.parametrize(
    ("certificate", "key", "authority", "said"),
    [
        ("own/server.crt", None, None, "belong|go together"),
        (None, None, "own/ca.crt", "need TLS"),
        ("own/server.crt", "other/server.key", None, "is not the key of"),
        ("own/server.key", "own/server.key", None, "no certificate"),
        ("own/server.crt", "own/server.crt", None, "no private key"),
        ("own/nothing", "own/server.key", None, "cannot be read"),
        ("own/server.crt", "own/server.key", "own/ca.key", "no certificate"),
    ],
)
def test_key_material_that_cannot_be_used_is_one_sentence(keys, certificate, key, authority, said):
    paths = [None if name is None else keys / name for name in (certificate, key, authority)]
    with pytest.raises(ConfigError, match=said):
        server_credentials(*paths)


@pytest.mark.parametrize(
    ("host", "has_tls", "knows", "insecure", "said"),
    [
        ("127.0.0.1", False, True, False, "needs a certificate"),
        ("127.0.0.1", True, True, True, "means no TLS"),
        ("0.0.0.0", False, True, True, "plain text"),
        ("example.org", False, True, True, "plain text"),
        ("0.0.0.0", True, False, False, "anybody"),
    ],
)
def test_what_would_expose_a_service_is_refused(host, has_tls, knows, insecure, said):
    with pytest.raises(ConfigError, match=said):
        check_exposure(host, has_tls, knows, insecure)


def test_what_does_not_expose_a_service_is_fine():
    check_exposure("127.0.0.1", False, False, True)
    check_exposure("[::1]", False, False, True)
    check_exposure("localhost", True, False, False)
    check_exposure("0.0.0.0", True, True, False)


def test_a_connection_that_contradicts_itself_is_one_sentence(keys):
    certificate = keys / "own/client.crt"
    for connection, said in (
        (Connection("a:1", root_certificates=certificate, insecure=True), "without TLS"),
        (Connection("a:1", certificate=certificate), "go together"),
        (Connection("a:1", root_certificates=keys / "nothing"), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=said):
            CertificationClient(connection)
