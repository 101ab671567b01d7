"""Connections of redis-py that keep the deadline of the call they are used for.

redis-py itself knows timeouts of single waits only, which begin anew with each piece that arrives.
"""

from __future__ import annotations

import math
import socket
import threading
from typing import Any

from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from typing_extensions import Buffer

from .base import Deadline

_SEND_BYTES = 1 << 20
_SENTINEL_SECONDS = 0.25  # a sentinel that is down leaves time to ask the next one


class CurrentCall(threading.local):
    """The deadline of the call that this thread is in: redis-py passes none on to sockets."""

    deadline: Deadline | None = None

    def seconds_left(self) -> float:
        return 1.0 if self.deadline is None else self.deadline.seconds_left


current_call = CurrentCall()


class _DeadlineSocket:
    """A socket that waits for nothing longer than the thread's call has time.

    A socket's own timeout starts anew with each piece that arrives.
    """

    def __init__(self, sock: socket.socket, longest_wait: float) -> None:
        self._sock = sock
        self._longest_wait = longest_wait
        self._polling = False

    def settimeout(self, seconds: float | None) -> None:
        self._polling = seconds == 0  # redis-py asks whether a pooled connection is still good

    def recv(self, size: int) -> bytes:
        return self._ready().recv(size)

    def recv_into(self, *args: Any) -> int:
        return self._ready().recv_into(*args)

    def sendall(self, data: Buffer) -> None:
        view = memoryview(data)
        while view:
            view = view[self._ready().send(view[:_SEND_BYTES]) :]

    def _ready(self) -> socket.socket:
        left = 0.0 if self._polling else min(current_call.seconds_left(), self._longest_wait)
        if left == 0.0 and not self._polling:
            raise TimeoutError("the deadline has passed")
        self._sock.settimeout(left)
        return self._sock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class _Bounded:
    """Makes a connection of redis-py keep the deadline, while connecting and after."""

    longest_wait = math.inf

    def _wait(self) -> float:
        return max(0.001, min(current_call.seconds_left(), self.longest_wait))

    socket_timeout = property(lambda self: self._wait(), lambda self, _: None)
    socket_connect_timeout = property(lambda self: self._wait(), lambda self, _: None)

    def _connect(self) -> _DeadlineSocket:
        return _DeadlineSocket(super()._connect(), self.longest_wait)  # type: ignore[misc]


class Plain(_Bounded, Connection):
    pass


class Tls(_Bounded, SSLConnection):
    pass


class Unix(_Bounded, UnixDomainSocketConnection):
    pass


class PlainManaged(_Bounded, SentinelManagedConnection):
    pass


class TlsManaged(_Bounded, SentinelManagedSSLConnection):
    pass


class PlainToSentinel(Plain):
    longest_wait = _SENTINEL_SECONDS


class TlsToSentinel(Tls):
    longest_wait = _SENTINEL_SECONDS
