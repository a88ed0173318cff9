"""A TLS server on loopback with a certificate of the test's choice."""

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM


class Authority:
    """A certificate authority that certifies whatever it is asked to."""

    def __init__(self, folder, name="test authority"):
        self.folder = folder
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(self.name, self.key, days=(-30, 30))
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = builder.add_extension(constraints, critical=True)
        self.certificate = folder / f"{name.replace(' ', '-')}.crt"
        self.certificate.write_bytes(self._sign(certificate).public_bytes(_PEM))

    def certify(self, *addresses, days=(-1, 10)):
        """Return the path of a certificate with its key, for IP addresses or host names."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = []
        for address in addresses:
            try:
                names.append(x509.IPAddress(ipaddress.ip_address(address)))
            except ValueError:
                names.append(x509.DNSName(address))
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        builder = self._builder(name, key, days)
        certificate = self._sign(
            builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        private = key.private_bytes(
            _PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path = self.folder / f"server-{certificate.serial_number}.pem"
        path.write_bytes(certificate.public_bytes(_PEM) + private)
        return path

    def _builder(self, name, key, days):
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(days=days[0]))
            .not_valid_after(now + datetime.timedelta(days=days[1]))
        )

    def _sign(self, builder):
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        subject = x509.SubjectKeyIdentifier.from_public_key(builder._public_key)
        return (
            builder.add_extension(issuer, critical=False)
            .add_extension(subject, critical=False)
            .sign(self.key, hashes.SHA256())
        )


@contextlib.contextmanager
def serving(certificate=None, response=b""):
    """Answer every connection with ``response``, over TLS when there is a certificate; give the port."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            connection.settimeout(5)
            with contextlib.suppress(OSError), connection:
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                if connection.recv(65536):
                    connection.sendall(response)
                    # Closed with something unread, the client might lose the answer.
                    while connection.recv(65536):
                        pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        # A listener that is closed while another thread waits on it may keep waiting.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
