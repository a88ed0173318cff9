"""Who may take part: device keys in a SuperLink that was started with ``--enable-supernode-auth``.

Flower's own command lists neither names nor keys, so this talks to the Control API with Flower's client.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.typing import SuperLinkConnection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest, UnregisterNodeFleetRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsmooth_core.config import FILE_NAME
from fedsmooth_core.errors import EnrolmentError, UnansweredError
from fedsmooth_core.keys import make_key, read_public_key

__all__ = ["Device", "enrolled", "make_key", "register", "revoke"]

_REVOKED = "unregistered"  # what Flower calls it


@dataclass(frozen=True)
class Device:
    """A key that a SuperLink knows."""

    name: str
    """Empty for a node that was registered without a name."""
    node_id: int
    status: str
    """registered (never came), online, offline, or unregistered (revoked)."""
    public_key: bytes
    """PEM."""

    @property
    def revoked(self) -> bool:
        """Whether the key was taken off the list, for good."""
        return self.status == _REVOKED


def enrolled(superlink: str | None = None) -> list[Device]:
    """Return the keys that a SuperLink knows, revoked ones too, in the order of their enrolment.

    Args:
        superlink: name of a connection in Flower's config.toml; None takes its default.

    Raises:
        EnrolmentError: when the SuperLink cannot be asked.
    """
    with _superlink(superlink) as (control, _):
        return _devices(control)


def register(public_key: Path, name: str, superlink: str | None = None) -> bool:
    """Enrol a device's key under a name; return False when it is enrolled as that already.

    Raises:
        KeyFileError: when the file is no usable public key.
        EnrolmentError: when the key or the name cannot be taken, or the SuperLink cannot be asked.
    """
    if not FILE_NAME.test(name):
        raise EnrolmentError(f"{name!r} is no name for a device: allowed is {FILE_NAME.text}.")
    key = public_key_to_bytes(read_public_key(public_key))
    with _superlink(superlink) as (control, connection):
        for device in _devices(control):
            if device.public_key == key and device.revoked:
                raise EnrolmentError(
                    f"The key {public_key} was revoked, and Flower never takes a key twice: make a "
                    f"new key on the device {name} and enrol that."
                )
            if device.public_key == key and device.name != name:
                raise EnrolmentError(
                    f"The key {public_key} is enrolled already, as {device.name!r}: give each device a key "
                    "of its own, or revoke that one first."
                )
            if device.public_key == key:
                return False
            if device.name == name and not device.revoked:
                raise EnrolmentError(
                    f"{name} is enrolled already, with another key: revoke it first (fedsmooth revoke "
                    f"{name}), or choose another name."
                )
        _refuse_without_keys(connection)
        control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
    return True


def revoke(name: str, superlink: str | None = None) -> bool:
    """Take a device off the list, for good; a connected one has to leave. False: it was revoked before.

    Raises:
        EnrolmentError: when no device has that name, or the SuperLink cannot be asked.
    """
    with _superlink(superlink) as (control, _):
        devices = _devices(control)
        named = [device for device in devices if device.name == name]
        if not named:
            names = ", ".join(sorted({device.name for device in devices if device.name})) or "none"
            raise EnrolmentError(f"No device is enrolled as {name!r}: the names are {names}.")
        active = [device for device in named if not device.revoked]
        for device in active:
            control.UnregisterNode(UnregisterNodeRequest(node_id=device.node_id))
    return bool(active)


def _devices(control: ControlHttpClient) -> list[Device]:
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return [
        Device(node.name, node.node_id, node.status, node.public_key)
        for node in sorted(nodes, key=lambda node: str(node.registered_at))
    ]


@contextlib.contextmanager
def _superlink(
    name: str | None,
) -> Iterator[tuple[ControlHttpClient, SuperLinkConnection]]:
    """Open a SuperLink's Control API; whatever goes wrong with it is one sentence."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what Flower says about the connection
            connection = read_superlink_connection(name)
            address = connection.address or ""
            if address.startswith(":"):
                raise EnrolmentError(
                    f"The SuperLink {connection.name!r} is Flower's simulation on this machine, which has "
                    "no devices: name the connection of a deployment in Flower's config.toml."
                )
            with init_http_client_from_connection(connection) as control:
                yield control, connection
    except click.ClickException as error:
        reason = " ".join(error.message.split()).rstrip(".")
        raise EnrolmentError(f"The SuperLink cannot be asked: {reason}.") from error
    except httpx.HTTPStatusError as error:
        known = FlowerError.from_json(error.response.text)
        if known is None and error.response.status_code == httpx.codes.NOT_FOUND:
            raise EnrolmentError(
                f"{address} is no SuperLink that can be asked: a proxy passes devices alone, so give the "
                "SuperLink's own address in Flower's config.toml."
            ) from error
        reason = str(known or error).splitlines()[0].rstrip(".")
        raise EnrolmentError(f"The SuperLink at {address} refused: {reason}.") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise EnrolmentError(
                f"The certificate of the SuperLink at {address} was not made by the root-certificates of "
                "its connection in Flower's config.toml: give the SuperLink's ca.crt there."
            ) from error
        raise UnansweredError(
            f"The SuperLink at {address} does not answer ({error}): start it, or correct its address in "
            "Flower's config.toml."
        ) from error


def _refuse_without_keys(connection: SuperLinkConnection) -> None:
    """A SuperLink without authentication takes enrolments too, and then lets everybody in."""
    stranger = ec.generate_private_key(ec.SECP384R1())
    key = public_key_to_bytes(stranger.public_key())
    with FleetHttpClient.from_server_address(
        connection.address or "",
        connection.insecure,
        connection.root_certificates,
        [NodeAuthHttpInterceptor(stranger, stranger.public_key())],
    ) as fleet:
        try:
            admitted = fleet.RegisterNode(RegisterNodeFleetRequest(public_key=key))
        except httpx.HTTPStatusError:
            return
        fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=admitted.node_id))
    raise EnrolmentError(
        f"The SuperLink at {connection.address} asks no device for a key: start it with "
        "--enable-supernode-auth."
    )
