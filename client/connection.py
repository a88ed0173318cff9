"""Can this device reach its server, is it the right one, and does it know this device's key?

Nothing here changes anything at the server.
"""

import datetime
import re
import socket
import ssl
import stat
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedsmooth_core.errors import KeyFileError, NodeError
from fedsmooth_core.keys import read_private_key

_TIMEOUT_SECONDS = 10.0
# [0-9] and not \d, which takes the digits of every script; Flower's client takes these alone.
_ADDRESS = re.compile(r"(\[[^\s/\[\]]+\]|[^\s/\[\]:]+):([0-9]{1,5})")
_CLOCK_TOLERANCE_SECONDS = 5  # a signature from the future is refused beyond this


class Address(NamedTuple):
    """Where the server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Read HOST:PORT; an IPv6 address stands in brackets.

        Raises:
            NodeError: when it is none.
        """
        parts = _ADDRESS.fullmatch(text)
        if parts is None or not 0 < int(parts[2]) < 65536:
            raise NodeError(
                f"{text!r} is no address of a server: give HOST:PORT with a port in 1 to 65535, e.g. "
                "fl.example.org:443."
            )
        return cls(parts[1].strip("[]"), int(parts[2]))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def check_reachable(address: Address) -> str:
    """Open a TCP connection.

    Raises:
        NodeError: when there is no such host, or nobody listens there.
    """
    try:
        socket.create_connection(address, timeout=_TIMEOUT_SECONDS).close()
    except socket.gaierror as error:
        raise NodeError(
            f"No host is called {address.host} ({error.strerror}): check the name, and this device's "
            "network and DNS."
        ) from error
    except TimeoutError as error:
        raise NodeError(
            f"{address} does not answer within {_TIMEOUT_SECONDS:.0f} s: check the address, and the "
            "firewalls between this device and the server."
        ) from error
    except ConnectionRefusedError as error:
        raise NodeError(
            f"{address.host} refuses connections on port {address.port}: check the port, and that the "
            "server is up."
        ) from error
    except (OSError, UnicodeError) as error:
        raise NodeError(
            f"{address} cannot be reached ({error}): check the address and this device's network."
        ) from error
    return f"{address} accepts connections."


def tls_context(root_certificates: Path | None) -> ssl.SSLContext:
    """Return what the server's certificate is checked with; None takes the system's authorities.

    Raises:
        NodeError: when the file holds no certificate that Flower can read.
    """
    if root_certificates is None:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=root_certificates.read_bytes().decode("ascii"))
    except (ssl.SSLError, ValueError) as error:  # SSLError is an OSError, too
        raise NodeError(
            f"{root_certificates} holds no certificate, or a damaged one: take the ca.crt of the joining "
            "kit."
        ) from error
    except OSError as error:
        raise NodeError(
            f"{root_certificates} cannot be read ({error.strerror}): take the ca.crt of the joining kit."
        ) from error
    return context


def check_certificate(address: Address, context: ssl.SSLContext) -> str:
    """Shake hands and verify the server's certificate.

    Raises:
        NodeError: when it is expired, for another host, or of another authority, or there is no TLS.
    """
    try:
        with (
            socket.create_connection(address, timeout=_TIMEOUT_SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=address.host) as secure,
        ):
            certificate = secure.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        raise NodeError(_explain(address, error)) from error
    except TimeoutError as error:
        raise NodeError(
            f"{address} accepts connections, but does not speak TLS (it was silent for "
            f"{_TIMEOUT_SECONDS:.0f} s): check the port, or ask the operator."
        ) from error
    except (OSError, UnicodeError) as error:  # ssl.SSLError is an OSError
        raise NodeError(
            f"{address} does not speak TLS ({getattr(error, 'reason', None) or error}): check the port, or "
            "ask the operator."
        ) from error
    return f"The certificate is right, and valid until {certificate.get('notAfter', 'an unknown day')}."


def _explain(address: Address, error: ssl.SSLCertVerificationError) -> str:
    now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    match error.verify_code:  # OpenSSL's codes
        case 10:
            return (
                f"The certificate of {address} has expired: ask the operator for a new one, unless this "
                f"device's clock ({now}) is wrong."
            )
        case 9:
            return (
                f"The certificate of {address} is not valid yet: set this device's clock ({now}), or ask "
                "the operator."
            )
        case 62 | 64:
            return (
                f"The certificate of {address} is for another host name: join under a name that it is for, "
                f"or ask the operator for one that includes {address.host}."
            )
        case _:
            return (
                f"The certificate of {address} was made by an authority that this device does not trust "
                f"({error.verify_message}): give the ca.crt of this federation's joining kit as "
                "--root-certificates."
            )


def check_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read this device's private key, which nobody else may be able to read.

    Raises:
        KeyFileError: naming the file and what to do.
    """
    key = read_private_key(path)
    if stat.S_IMODE(path.expanduser().stat().st_mode) & 0o077:
        raise KeyFileError(f"{path} can be read by other users of this device: chmod 600 {path}.")
    return key


def check_enrolled(
    address: Address, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey
) -> str:
    """Ask the server whether it knows this key.

    Raises:
        NodeError: when it does not, or does not answer as Flower's server does.
    """
    # Flower looks the key up before it looks at the interval, and this one it refuses: nothing comes of it.
    request = ActivateNodeRequest(
        public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=-1.0
    )
    other = NodeError(
        f"{address} answers otherwise than Flower's server: check the address and port."
    )
    with FleetHttpClient(
        f"https://{address}",
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        verify=context,
        timeout=_TIMEOUT_SECONDS,
    ) as fleet:
        try:
            fleet.ActivateNode(request)
        except httpx.HTTPStatusError as error:
            known = FlowerError.from_json(error.response.text)
            if known is not None and known.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
                return "The server knows this device's key."
            raise NodeError(_refusal(address, error.response, known)) from error
        except ValueError as error:  # an answer that Flower cannot read
            raise other from error
        except httpx.HTTPError as error:
            raise NodeError(
                f"{address} ends the connection ({error or type(error).__name__}): ask the operator."
            ) from error
    raise other


def _refusal(address: Address, response: httpx.Response, known: FlowerError | None) -> str:
    if known is not None and known.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            "The server does not know this device's key, or it was revoked: send the .pub file to the "
            "operator, who runs `fedsmooth enroll`."
        )
    seconds = _clock_difference(response)
    if response.status_code == httpx.codes.UNAUTHORIZED and abs(seconds) > _CLOCK_TOLERANCE_SECONDS:
        return (
            f"This device's clock is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the "
            "server's, which therefore refuses its signature: set the clock (timedatectl set-ntp true)."
        )
    if response.status_code in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE):
        return f"{address} is up, but Flower's server behind it is not: ask the operator."
    reason = f"HTTP {response.status_code}" if known is None else known.message
    return (
        f"{address} answers {reason}, which Flower's server does not: check the address and port."
    )


def _clock_difference(response: httpx.Response) -> float:
    """Return by how many seconds this device's clock is ahead of the server's; 0 when it does not say."""
    try:
        there = parsedate_to_datetime(response.headers["date"])
    except (KeyError, ValueError):
        return 0.0
    return (datetime.datetime.now(datetime.UTC) - there).total_seconds()
