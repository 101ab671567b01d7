"""A TCP proxy that can encrypt, slow down or cut what goes through it."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path


class Proxy:
    """Listens on 127.0.0.1 and forwards to a port there.

    Attributes:
        bytes_per_second: of answers; None: as fast as it goes.
        cut_after: connections are closed after this many bytes of answers; None: never.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.bytes_per_second: int | None = None
        self.cut_after: int | None = None
        self._to_port = port
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        self._run(self._accept)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()

    def drop(self) -> None:
        """Close all connections."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()

    def _run(self, target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
                server = socket.create_connection(("127.0.0.1", self._to_port))
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            self._run(self._pump, client, server, False)
            self._run(self._pump, server, client, True)

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 12 if self.bytes_per_second else 1 << 16):
                target.sendall(data)
                passed += len(data)
                if answers and self.bytes_per_second:
                    time.sleep(len(data) / self.bytes_per_second)
                if answers and self.cut_after is not None and passed > self.cut_after:
                    break
        except OSError:
            pass
        for sock in (source, target):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def make_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """The certificate of an authority, and what a server on 127.0.0.1 uses that it vouches for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        for name in ("test authority", "test")
    ]
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    pem = serialization.Encoding.PEM
    authority, server = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(names[0])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=key is keys[0], path_length=None), critical=True)
        .sign(keys[0], hashes.SHA256())
        .public_bytes(pem)
        for key, name in zip(keys, names, strict=True)
    )
    private = keys[1].private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "authority.pem").write_bytes(authority)
    (folder / "server.pem").write_bytes(server + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return folder / "authority.pem", context
