"""Where a Redis or Valkey is, and who we are there: the secret never comes from the URL."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

Topology = Literal["single", "unix", "cluster"]

USERNAME_VARIABLE = "VLCACHE_REDIS_USERNAME"
PASSWORD_VARIABLE = "VLCACHE_REDIS_PASSWORD"
FILE_VARIABLE = "VLCACHE_REDIS_CREDENTIALS_FILE"

LOGIN_HINT = (
    f"put who to log in as into {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, or into a file that "
    f"{FILE_VARIABLE} names"
)

_SCHEMES: dict[str, tuple[Topology, bool]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_ALLOWED = (
    "redis://host:port/db, rediss://host:port/db (TLS), unix:///path/of/socket, "
    "redis+cluster://host:port,host:port (rediss+cluster: TLS)"
)
_DEFAULT_PORT = 6379


@dataclass(frozen=True)
class RedisAddress:
    """What a URL names.

    Attributes:
        topology: "single", "unix" (one server, over a socket file) or "cluster".
        tls: whether connections are encrypted.
        hosts: host and port of the server, or of some nodes of the cluster.
        database: number of the database.
        socket_path: "unix": the socket file.
    """

    topology: Topology
    tls: bool
    hosts: tuple[tuple[str, int], ...] = ()
    database: int = 0
    socket_path: str = ""

    @classmethod
    def from_url(cls, url: str) -> RedisAddress:
        """Read the setting `redis_url`.

        Raises:
            ValueError: names the key, its value without secrets, and what is allowed.
        """
        scheme, separator, rest = url.partition("://")
        if "@" in rest or (not separator and "@" in url):
            raise _refused(
                url,
                "a user or password has no place in a URL, which others get to see; put them "
                f"into {USERNAME_VARIABLE} and {PASSWORD_VARIABLE}, or into a file that "
                f"{FILE_VARIABLE} names",
            )
        if scheme.endswith("+sentinel"):
            raise _refused(
                url,
                "sentinels can't be asked; name the primary, or an address that follows it; "
                f"allowed are {_ALLOWED}",
            )
        if not separator or scheme not in _SCHEMES:
            raise _refused(url, f"allowed are {_ALLOWED}")
        if "?" in rest or "#" in rest:
            raise _refused(url, f"options are not taken from the URL; allowed are {_ALLOWED}")
        topology, tls = _SCHEMES[scheme]
        if topology == "unix":
            if not rest.startswith("/") or rest == "/":
                raise _refused(url, f"no socket file; allowed are {_ALLOWED}")
            return cls(topology, tls, socket_path=unquote(rest))
        hosts, *path = rest.rstrip("/").split("/")
        try:
            addresses = parse_hosts(hosts)
        except ValueError as error:
            raise _refused(url, f"{error}; allowed are {_ALLOWED}") from None
        database = path.pop(0) if path and topology != "cluster" else "0"
        is_one = len(addresses) == 1 or topology == "cluster"
        if path or not is_one or not re.fullmatch(r"[0-9]{1,4}", database):
            raise _refused(url, f"allowed are {_ALLOWED}")
        return cls(topology, tls, tuple(addresses), int(database))


@dataclass(frozen=True)
class Credentials:
    """Who we are.

    Attributes:
        username: None: the server's default user.
        password: None: nothing is asked for.
    """

    username: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Credentials:
        """From the two variables, or from the first line of the file, which is `user:password`,
        `:password`, or a password without a colon.

        Raises:
            ValueError: they contradict each other, or the file cannot be read.
        """
        username, password = environ.get(USERNAME_VARIABLE), environ.get(PASSWORD_VARIABLE)
        path = environ.get(FILE_VARIABLE)
        if path:
            if username or password:
                raise ValueError(
                    f"{FILE_VARIABLE} is set together with {USERNAME_VARIABLE} or "
                    f"{PASSWORD_VARIABLE}; unset one or the other"
                )
            try:
                lines = Path(path).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{FILE_VARIABLE}={path!r}: {getattr(error, 'strerror', 'not text')}; name a "
                    "file that this process can read"
                ) from None
            user, colon, secret = (lines[0].strip() if lines else "").partition(":")
            username, password = (user, secret) if colon else (None, user)
            if not password:
                raise ValueError(
                    f"{FILE_VARIABLE}={path!r}: no password in the first line; write "
                    "'user:password' or the password alone"
                )
        if username and not password:
            raise ValueError(f"{USERNAME_VARIABLE} is set without {PASSWORD_VARIABLE}; set both")
        return cls(username or None, password or None)

    def redact(self, text: str) -> str:
        """A text of unknown content without the password."""
        return text.replace(self.password, "***") if self.password else text


def parse_hosts(text: str) -> list[tuple[str, int]]:
    """Hosts and ports of `host:port,host:port`; the port may be left out.

    Raises:
        ValueError: says what is wrong; not the text, which may hold anything.
    """
    return [_host(part.strip()) for part in text.split(",")]


def _host(part: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::([0-9]{1,5}))?", part)
    if match is None:
        raise ValueError("a host is missing or malformed")
    port = int(match[3] or _DEFAULT_PORT)
    if not 1 <= port <= 65535:
        raise ValueError("a port is no number from 1 to 65535")
    return match[1] or match[2], port


def _refused(url: str, problem: str) -> ValueError:
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    shown, *options = rest.split("?")
    if "@" in rest:  # a password may hold any character
        shown = "***@" + rest.rpartition("@")[2].split("?")[0]
    shown = scheme + separator + shown + ("?***" if options else "")
    return ValueError(f"redis_url={shown!r}: {problem}")
