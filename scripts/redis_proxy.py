"""A proxy before a Redis or Valkey server that knows what each command is for.

It takes commands apart and hands each one to a fault, which may delay, change, refuse or cut
it. What a command is part of follows from its verb, as LMCache's adapter "valkey" uses them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from typing import Literal

Operation = Literal["lookup", "load", "store"]
OPERATIONS: tuple[Operation, ...] = ("lookup", "load", "store")
_VERBS: Mapping[bytes, Operation] = {
    b"EXISTS": "lookup",
    b"GET": "load",
    b"SET": "store",
}

# -- the protocol -------------------------------------------------------------------------------


def take_command(buffer: bytearray) -> list[bytes] | None:
    """Remove the first command, an array of strings, from what a client sent; None: more is
    needed."""
    end = buffer.find(b"\r\n")
    if end < 0:
        return None
    if buffer[:1] != b"*":
        raise ValueError(f"not a command: {bytes(buffer[:20])!r}")
    arguments, position = [], end + 2
    for _ in range(int(buffer[1:end])):
        end = buffer.find(b"\r\n", position)
        if end < 0:
            return None
        start = end + 2
        position = start + int(buffer[position + 1 : end]) + 2
        if position > len(buffer):
            return None
        arguments.append(bytes(buffer[start : position - 2]))
    del buffer[:position]
    return arguments


def pack_command(arguments: Sequence[bytes]) -> bytes:
    """A command as it is sent."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        parts += [b"$%d\r\n" % len(argument), argument, b"\r\n"]
    return b"".join(parts)


def read_reply(reader: BufferedReader) -> bytes:
    """One reply of a server (RESP 2 or 3), as it came.

    Raises:
        ConnectionError: the server has hung up.
    """
    line = reader.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError("the server has hung up")
    kind = line[:1]
    if kind in b"*~>%":
        count = int(line[1:]) * (2 if kind == b"%" else 1)
        return line + b"".join(read_reply(reader) for _ in range(count))
    if kind not in b"$=" or int(line[1:]) < 0:
        return line
    size = int(line[1:]) + 2
    value = reader.read(size)
    if len(value) != size:
        raise ConnectionError("the server has hung up")
    return line + value


def value_of(reply: bytes) -> bytes | None:
    """The string that a reply consists of; None: it is something else, or no string."""
    head, separator, rest = reply.partition(b"\r\n")
    if head[:1] != b"$" or not separator or head == b"$-1":
        return None
    return rest[:-2]


def pack_value(value: bytes) -> bytes:
    """A reply that consists of a string."""
    return b"$%d\r\n%b\r\n" % (len(value), value)


# -- the proxy ----------------------------------------------------------------------------------


class Cut(Exception):  # noqa: N818 -- what a fault wants, not an error
    """Raised by a fault: the client gets `rest`, and its connection ends."""

    def __init__(self, rest: bytes = b"") -> None:
        super().__init__()
        self.rest = rest


@dataclass(frozen=True)
class Command:
    """What a client sent.

    Attributes:
        received: when its last byte was there (monotonic seconds); commands of one pipeline came
            at the same time.
    """

    arguments: list[bytes]
    received: float

    @property
    def operation(self) -> Operation | None:
        """What it is part of; None: none of the three."""
        return _VERBS.get(self.verb)

    @property
    def verb(self) -> bytes:
        """What is to be done."""
        return self.arguments[0].upper()


Forward = Callable[[Sequence[bytes]], bytes]
"""Puts a command to the server, and returns its reply."""
Fault = Callable[[Command, Forward], bytes]
"""Gives the reply to a command; may raise `Cut`."""


class RedisProxy:
    """Listens on 127.0.0.1 and puts what it gets to the server there; a context manager.

    Args:
        port: of the server.

    Attributes:
        fault: gets every command of an operation; None: all of them go through as they are.
    """

    def __init__(self, port: int) -> None:
        self.fault: Fault | None = None
        self._server_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """For the setting `redis_url`."""
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> RedisProxy:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._open):
            _hang_up(sock)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.add(client)
        try:
            with socket.create_connection(("127.0.0.1", self._server_port)) as server:
                self._open.add(server)
                try:
                    self._pump(client, server)
                finally:
                    self._open.discard(server)
        except Cut as cut:
            with contextlib.suppress(OSError):
                client.sendall(cut.rest)
        except (OSError, ValueError):  # one of the two has gone, and so does the other
            pass
        finally:
            self._open.discard(client)
            _hang_up(client)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        for sock in (client, server):  # the many small replies of a pipeline must not wait
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        replies = server.makefile("rb")

        def forward(arguments: Sequence[bytes]) -> bytes:
            server.sendall(pack_command(arguments))
            return read_reply(replies)

        buffer = bytearray()
        while data := client.recv(1 << 18):
            buffer += data
            received = time.monotonic()
            while (arguments := take_command(buffer)) is not None:
                client.sendall(self._reply(Command(arguments, received), forward))

    def _reply(self, command: Command, forward: Forward) -> bytes:
        fault = self.fault
        if fault is None or command.operation is None:
            return forward(command.arguments)
        return fault(command, forward)


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
