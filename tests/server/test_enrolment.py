"""Who is let in. The SuperLink is a stand-in with Flower's rules; the real one is in tests/e2e."""

import itertools
import types

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesResponse, RegisterNodeResponse
from flwr.proto.node_pb2 import NodeInfo

from fedsmooth_core.errors import EnrolmentError
from server import enrolment
from server.cli import main
from server.enrolment import enrolled, make_key, register, revoke


def refused(status, text):
    request = httpx.Request("POST", "https://127.0.0.1/v1/control")
    response = httpx.Response(status, text=text, request=request)
    return httpx.HTTPStatusError("refused", request=request, response=response)


class StandIn:
    """Keeps every key for ever, as Flower's database does, and takes none twice."""

    def __init__(self):
        self.nodes = []
        self.numbers = itertools.count(7)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ListNodes(self, request):  # noqa: N802 - Flower's name
        return ListNodesResponse(nodes_info=self.nodes)

    def RegisterNode(self, request):  # noqa: N802
        if any(node.public_key == request.public_key for node in self.nodes):
            raise refused(412, '{"code":23,"detail":"Public key already in use."}')
        node = NodeInfo(
            node_id=next(self.numbers),
            name=request.name,
            public_key=request.public_key,
            status="registered",
            registered_at=f"2026-11-22T00:00:{len(self.nodes):02d}+00:00",
        )
        self.nodes.append(node)
        return RegisterNodeResponse(node_id=node.node_id)

    def UnregisterNode(self, request):  # noqa: N802
        (node,) = (node for node in self.nodes if node.node_id == request.node_id)
        node.status = "unregistered"


@pytest.fixture
def superlink(monkeypatch):
    standin = StandIn()
    connection = types.SimpleNamespace(name="test", address="127.0.0.1:8000", insecure=False)
    monkeypatch.setattr(enrolment, "read_superlink_connection", lambda name: connection)
    monkeypatch.setattr(enrolment, "init_http_client_from_connection", lambda connection: standin)
    monkeypatch.setattr(enrolment, "_refuse_without_keys", lambda connection: None)
    return standin


@pytest.fixture
def public_key(tmp_path):
    make_key(tmp_path, "jetson")
    return tmp_path / "jetson.pub"


def sentence(function, *arguments):
    with pytest.raises(EnrolmentError) as error:
        function(*arguments)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_a_device_is_enrolled_once(superlink, public_key):
    assert register(public_key, "jetson") is True
    assert register(public_key, "jetson") is False
    (device,) = enrolled()
    assert (device.name, device.node_id, device.status) == ("jetson", 7, "registered")
    assert not device.revoked


def test_a_revoked_device_is_out_for_good(superlink, public_key, tmp_path):
    register(public_key, "jetson")
    assert revoke("jetson") is True
    assert revoke("jetson") is False
    assert enrolled()[0].revoked
    assert "never takes a key twice" in sentence(register, public_key, "jetson")
    make_key(tmp_path / "new", "jetson")
    assert register(tmp_path / "new" / "jetson.pub", "jetson") is True
    assert revoke("jetson") is True


def test_one_key_has_one_name_and_one_name_one_key(superlink, public_key, tmp_path):
    register(public_key, "jetson")
    assert "enrolled already, as 'jetson'" in sentence(register, public_key, "pi")
    make_key(tmp_path, "other")
    message = sentence(register, tmp_path / "other.pub", "jetson")
    assert "fedsmooth revoke jetson" in message


def test_a_name_must_be_a_plain_one(superlink, public_key):
    assert "'a b' is no name" in sentence(register, public_key, "a b")


def test_a_name_that_nobody_has_is_answered_with_those_there_are(superlink, public_key):
    assert "the names are none" in sentence(revoke, "pi")
    register(public_key, "jetson")
    assert "the names are jetson" in sentence(revoke, "pi")


def test_what_the_superlink_refuses_is_told(superlink, public_key, monkeypatch):
    def full(request):
        raise refused(412, '{"code":23,"detail":"Public key already in use."}')

    monkeypatch.setattr(superlink, "RegisterNode", full)
    assert "refused: Public key already in use." in sentence(register, public_key, "jetson")


def test_a_proxy_for_devices_is_no_superlink(superlink, monkeypatch):
    def closed(request):
        raise refused(404, "<html>404 Not Found</html>")

    monkeypatch.setattr(superlink, "ListNodes", closed)
    message = sentence(enrolled)
    assert "a proxy passes devices alone" in message
    assert "http" not in message


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (httpx.ConnectError("[Errno 111] Connection refused"), "does not answer"),
        (httpx.ReadTimeout("timed out"), "does not answer"),
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer"),
            "was not made by the root-certificates",
        ),
    ],
)
def test_a_superlink_that_cannot_be_asked(superlink, monkeypatch, error, text):
    def unreachable(request):
        raise error

    monkeypatch.setattr(superlink, "ListNodes", unreachable)
    message = sentence(enrolled)
    assert text in message
    assert "127.0.0.1:8000" in message


def test_a_connection_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert "'nowhere' not found" in sentence(enrolled, "nowhere")


def test_flowers_own_simulation_has_no_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text('[superlink.sim]\naddress = ":local:"\n')
    assert "which has no devices" in sentence(enrolled, "sim")


def test_the_commands(superlink, tmp_path, capsys):
    main(["enroll", "jetson", "-o", str(tmp_path)])
    main(["enroll", "jetson", "--public-key", str(tmp_path / "jetson.pub")])
    main(["revoke", "jetson"])
    main(["enroll"])
    output = capsys.readouterr().out
    assert str(tmp_path / "jetson") in output.replace("\n", "")
    assert "jetson is enrolled.\njetson is enrolled already.\njetson is revoked" in output
    assert "revoked │ 7" in output


@pytest.mark.parametrize("given", [[], ["-o", "x", "--public-key", "y"]])
def test_a_key_is_given_or_made(superlink, given, capsys):
    with pytest.raises(SystemExit) as end:
        main(["enroll", "jetson", *given])
    assert end.value.code == 2
    assert "--public-key FILE, or -o FOLDER" in capsys.readouterr().err
