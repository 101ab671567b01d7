"""Redis addresses and credentials: what is accepted, and that no refusal shows a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlcache_connector.storage.redis_url import Credentials, RedisAddress

SECRET = "s3cr:e/t@x?y"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://host", RedisAddress("single", False, (("host", 6379),))),
        ("redis://host/", RedisAddress("single", False, (("host", 6379),))),
        ("redis://10.0.0.1:7000/3", RedisAddress("single", False, (("10.0.0.1", 7000),), 3)),
        ("rediss://[::1]:6380", RedisAddress("single", True, (("::1", 6380),))),
        (
            "unix:///run/redis%20a.sock",
            RedisAddress("unix", False, socket_path="/run/redis a.sock"),
        ),
        ("redis+cluster://a,b:7", RedisAddress("cluster", False, (("a", 6379), ("b", 7)))),
        ("rediss+cluster://a", RedisAddress("cluster", True, (("a", 6379),))),
    ],
)
def test_urls(url: str, address: RedisAddress) -> None:
    assert RedisAddress.from_url(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:6379",
        "http://host",
        "redis:/host",
        "redis://",
        "redis://:6379",
        "redis://host:",
        "redis://host:0",
        "redis://host:70000",
        "redis://host:port",
        "redis://a,b",
        "redis://a b:1",
        "redis://host/name",
        "redis://host/1/2",
        "redis://host/-1",
        "redis://host?db=1",
        "redis://host#x",
        "unix://relative",
        "unix:///",
        "redis+sentinel://host/main",
        "rediss+sentinel://a,b/main/2",
        "redis+cluster://a,,b",
        "redis+cluster://a/1",
        "redis+unix:///x",
    ],
)
def test_malformed_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="allowed are redis://host:port/db") as caught:
        RedisAddress.from_url(url)
    assert str(caught.value).startswith("redis_url='" + url.split("?")[0])


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@host:6379",
        f"redis://user:{SECRET}@host:6379/0",
        f"rediss+sentinel://user:{SECRET}@a,b/main",
        f"redis+cluster://{SECRET}@a",
        f"unix://:{SECRET}@/run/redis.sock",
        f"user:{SECRET}@host",
        f"redis://host?password={SECRET}",
        f"nonsense://user:{SECRET}@host",
    ],
)
def test_secrets_in_urls_are_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"VLCACHE_REDIS_PASSWORD|options are not taken") as caught:
        RedisAddress.from_url(url)
    text = str(caught.value)
    assert "redis_url=" in text
    for piece in ("s3cr", "e/t", "x?y", "?y"):
        assert piece not in text


def test_credentials_from_variables() -> None:
    read = Credentials.from_environment
    assert read({}) == Credentials(None, None)
    assert read({"VLCACHE_REDIS_PASSWORD": "p"}) == Credentials(None, "p")
    both = {"VLCACHE_REDIS_USERNAME": "u", "VLCACHE_REDIS_PASSWORD": SECRET}
    assert read(both) == Credentials("u", SECRET)
    assert SECRET not in repr(read(both))
    with pytest.raises(ValueError, match="VLCACHE_REDIS_USERNAME is set without"):
        read({"VLCACHE_REDIS_USERNAME": "u"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("user:pass:word\n", Credentials("user", "pass:word")),
        ("secret\nignored\n", Credentials(None, "secret")),
        (":a:b", Credentials(None, "a:b")),
    ],
)
def test_credentials_from_a_file(tmp_path: Path, content: str, expected: Credentials) -> None:
    path = tmp_path / "credentials"
    path.write_text(content)
    assert Credentials.from_environment({"VLCACHE_REDIS_CREDENTIALS_FILE": str(path)}) == expected


@pytest.mark.parametrize("content", [None, b"", b"\n", b"user:\n", b"\xff\xfe"])
def test_useless_files_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "credentials"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"VLCACHE_REDIS_CREDENTIALS_FILE=.*credentials"):
        Credentials.from_environment({"VLCACHE_REDIS_CREDENTIALS_FILE": str(path)})


def test_variables_and_a_file_contradict(tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    path.write_text("from-file")
    with pytest.raises(ValueError, match="unset one or the other") as caught:
        Credentials.from_environment(
            {"VLCACHE_REDIS_CREDENTIALS_FILE": str(path), "VLCACHE_REDIS_PASSWORD": SECRET}
        )
    assert SECRET not in str(caught.value)
