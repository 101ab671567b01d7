"""configs/docker: images and the composition, without an engine to run them in."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from deployment import CONFIGS, parse_command
from local_redis import LocalRedis, find_server, free_port
from redis.backoff import NoBackoff
from redis.retry import Retry
from serving import ROOT, VLLMServer

from vlcache_connector.tiers import Deadline, Name, RedisTier

DOCKER = CONFIGS / "docker"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = ("vllm-a", "vllm-b")
TOOLS = Path(sys.executable).parent


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


# -- images -------------------------------------------------------------------------------------


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """Name and arguments of a Dockerfile's instructions, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in found]


def arguments(dockerfile: Path, name: str) -> list[str]:
    return [rest for found, rest in instructions(dockerfile) if found == name]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_has_no_complaint(dockerfile: Path, tmp_path: Path) -> None:
    linted = run(TOOLS / "hadolint", dockerfile)
    assert linted.returncode == 0, linted.stdout
    broken = tmp_path / "Dockerfile"
    broken.write_text(dockerfile.read_text() + "RUN apt-get install curl\n")
    assert run(TOOLS / "hadolint", broken).returncode != 0


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_is_made_of(dockerfile: Path) -> None:
    setup = (ROOT / "scripts" / "setup.sh").read_text()
    versions = dict(re.findall(r"^(VLLM|LMCACHE)=(\S+)$", setup, re.MULTILINE))
    assert set(arguments(dockerfile, "ARG")) == {
        f"VLLM_VERSION={versions['VLLM']}",
        f"LMCACHE_VERSION={versions['LMCACHE']}",
    }
    [base] = arguments(dockerfile, "FROM")
    assert re.fullmatch(r"vllm/vllm-openai(-cpu)?:v\$\{VLLM_VERSION\}", base)
    assert arguments(dockerfile, "USER")[-1] == "2000:0"
    assert arguments(dockerfile, "ENTRYPOINT") == ['["vllm", "serve"]']
    assert not re.search(r"password|token|secret", "".join(arguments(dockerfile, "ENV")), re.I)


def copied_files(dockerfile: Path) -> list[Path]:
    """What `COPY` takes out of the repository."""
    found = []
    for rest in arguments(dockerfile, "COPY"):
        *sources, _ = rest.split()
        for source in sources:
            paths = sorted(ROOT.glob(source))
            assert paths, source
            for path in paths:
                below = path.rglob("*") if path.is_dir() else [path]
                found += [file for file in below if file.is_file() and file.suffix != ".pyc"]
    return found


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_copied_files_make_the_package(dockerfile: Path, tmp_path: Path) -> None:
    for path in copied_files(dockerfile):
        target = tmp_path / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    built = run(sys.executable, "-m", "pip", "wheel", *options, tmp_path / "source")
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = tmp_path.glob("*.whl")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "vlcache_connector"
    assert {str(path.relative_to(ROOT)) for path in package.rglob("*.py")} <= in_wheel
    # Calibration files are found beside an editable installation.
    listed = run(
        *(sys.executable, "-c"),
        "from vlcache_connector.calibration import known_names; print(*known_names())",
        cwd=tmp_path / "source",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "source")},
    )
    names = [path.stem for path in sorted((CONFIGS / "schedules").glob("*.yaml"))]
    assert listed.stdout.split() == names, listed.stderr


def test_nothing_else_is_sent_to_the_builder() -> None:
    [everything, *rest] = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert everything == "*"
    allowed = [line.removeprefix("!") for line in rest if line.startswith("!")]
    for dockerfile in DOCKERFILES:
        for path in copied_files(dockerfile):
            name = str(path.relative_to(ROOT))
            assert any(fnmatch.fnmatch(name, f"{each}*") for each in allowed), name
    for secret in ("configs/docker/secrets/users.acl", ".env", ".git/config", ".venv/bin/python"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in allowed), secret
        assert not any(secret.startswith(f"{pattern}/") for pattern in allowed), secret


@pytest.mark.slow
@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_health_check_tells_a_server_from_none(
    dockerfile: Path, cpu_server: VLLMServer
) -> None:
    [check] = arguments(dockerfile, "HEALTHCHECK")
    python, *rest = json.loads(check.partition("CMD ")[2])
    assert python == "python3"

    def healthy(port: int | str) -> bool:
        command = [part.replace(":8000/", f":{port}/") for part in rest]
        return run(sys.executable, *command).returncode == 0

    assert healthy(cpu_server.base_url.rpartition(":")[2])
    assert not healthy(free_port())


# -- the composition ----------------------------------------------------------------------------


def test_the_schema_is_kept(tmp_path: Path) -> None:
    check = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    checked = run(*check, DOCKER / "compose.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    wrong = COMPOSE | {"services": {"redis": SERVICES["redis"] | {"helthcheck": {}}}}
    broken = tmp_path / "compose.yaml"
    broken.write_text(yaml.safe_dump(wrong))
    assert run(*check, broken).returncode == 1


def test_every_file_and_name_is_there(tmp_path: Path) -> None:
    made = run("sh", DOCKER / "make_secrets.sh", tmp_path / "secrets")
    assert made.returncode == 0, made.stderr
    for entry in COMPOSE["configs"].values():
        assert (DOCKER / entry["file"]).is_file()
    for entry in COMPOSE["secrets"].values():
        assert (tmp_path / entry["file"]).is_file()
    for name, service in SERVICES.items():
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert {each["source"] for each in service.get("configs", ())} <= set(COMPOSE["configs"])
        assert set(service.get("depends_on", ())) <= set(SERVICES) - {name}
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DOCKER / source).is_dir(), source
        for build in [service["build"]] if "build" in service else []:
            context = (DOCKER / build["context"]).resolve()
            assert context == ROOT
            assert (context / build["dockerfile"]).is_file()
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+", service["image"]), "a version is pinned"


def test_redis_is_reached_by_the_servers_only() -> None:
    assert SERVICES["redis"]["networks"] == ["redis"]
    assert "ports" not in SERVICES["redis"]
    assert COMPOSE["networks"]["redis"] == {"internal": True}
    reach = {name for name, service in SERVICES.items() if "redis" in service["networks"]}
    assert reach == {"redis", *SERVERS}


def test_nothing_listens_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.split(":")[1] for port in ports}) == len(ports)


@pytest.mark.parametrize("name", SERVERS)
def test_the_servers_find_redis_and_its_password(name: str) -> None:
    service = SERVICES[name]
    [config] = service["configs"]
    command = [
        str(DOCKER / COMPOSE["configs"][config["source"]]["file"])
        if part == config["target"]
        else re.sub(r"\$\{MODEL:?.*\}", "a-model", part)
        for part in service["command"]
    ]
    args = parse_command(command)
    assert args.model_tag == "a-model"
    assert args.port == 8000
    url = args.kv_transfer_config.kv_connector_extra_config["redis_url"]
    assert re.fullmatch(r"redis://redis:6379(/0)?", url)
    assert "redis" in SERVICES
    [secret] = service["secrets"]
    path = service["environment"]["VLCACHE_REDIS_CREDENTIALS_FILE"]
    assert path == f"/run/secrets/{secret}"


def test_each_server_has_a_gpu_of_its_own() -> None:
    devices = [SERVICES[name]["deploy"]["resources"]["reservations"]["devices"] for name in SERVERS]
    assert [[device["device_ids"] for device in each] for each in devices] == [[["0"]], [["1"]]]


# -- Redis --------------------------------------------------------------------------------------


def redis_options(command: list[str]) -> dict[str, str]:
    """Options of a redis-server by name, from its command line."""
    program, *rest = command
    assert program == "redis-server"
    return {
        name.removeprefix("--"): value or '""'
        for name, value in zip(rest[::2], rest[1::2], strict=True)
    }


def test_kubernetes_runs_the_same_redis() -> None:
    documents = yaml.safe_load_all((CONFIGS / "kubernetes" / "redis.yaml").read_text())
    [deployment] = [each for each in documents if each["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    here, there = (
        redis_options(each) for each in (SERVICES["redis"]["command"], container["args"])
    )
    assert here.pop("aclfile") == "/run/secrets/users.acl"
    assert there.pop("aclfile") == "/run/secrets/redis/users.acl"
    assert here == there
    assert container["image"] == SERVICES["redis"]["image"]
    [_, check] = SERVICES["redis"]["healthcheck"]["test"]
    for probe in ("readinessProbe", "livenessProbe"):
        assert container[probe]["exec"]["command"] == ["sh", "-c", check]


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    assert run("sh", DOCKER / "make_secrets.sh", folder).returncode == 0
    return folder


@pytest.fixture
def composed_redis(redis_server: Callable[..., LocalRedis], secrets: Path) -> LocalRedis:
    """A redis-server with the options and users of the composition, and one who may look."""
    acl = secrets / "users-and-observer.acl"
    observer = "user observer on nopass ~* &* +@all\n"
    acl.write_text((secrets / "users.acl").read_text() + observer)
    return redis_server(**redis_options(SERVICES["redis"]["command"]) | {"aclfile": acl})


def client(server: LocalRedis, username: str | None, password: str | None = "none") -> Any:
    # By default a refusal is tried again, too.
    retry = Retry(NoBackoff(), 0)
    return redis.Redis(port=server.port, username=username, password=password, retry=retry)


def test_secrets_are_new_each_time_and_never_replaced(secrets: Path, tmp_path: Path) -> None:
    assert run("sh", DOCKER / "make_secrets.sh", secrets).returncode != 0
    assert secrets.stat().st_mode & 0o777 == 0o700
    other = tmp_path / "other"
    assert run("sh", DOCKER / "make_secrets.sh", other).returncode == 0
    for path in secrets.iterdir():
        assert path.read_text() != (other / path.name).read_text()
    user, password = (secrets / "redis_credentials").read_text().strip().split(":")
    assert user == "vlcache"
    assert len(password) == 64
    assert password not in (secrets / "users.acl").read_text()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "configs/docker/secrets/" in ignored


def test_the_tier_needs_no_more_than_its_user_may(
    composed_redis: LocalRedis, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLCACHE_REDIS_CREDENTIALS_FILE", str(secrets / "redis_credentials"))
    tier = RedisTier(composed_redis.url, "dep", 600.0)
    name = Name("kv", "a1b2/3", 0, 1)
    objects = [b"first", bytes(3 << 20)]
    assert tier.models(Deadline(20)) == {}
    tier.record_model("fingerprint", "model", Deadline(20))
    assert tier.models(Deadline(20)) == {"fingerprint": "model"}
    tier.write(name, objects, Deadline(20))
    tier.write(name, objects[:1], Deadline(20))  # over a larger one
    assert tier.sizes([name], Deadline(20)) == [len(objects[0])]
    found = tier.read(name, 1 << 20, Deadline(20))
    assert found is not None
    assert [bytes(each) for each in found] == objects[:1]
    assert [entry.name for entry in tier.entries(Deadline(20))] == [name]
    assert tier.usage(Deadline(20)).num_segments == 1
    assert tier.remove([name], Deadline(20)) == 1
    tier.close()
    refused = [
        entry
        for entry in client(composed_redis, "observer").execute_command("ACL", "LOG")
        if entry["username"] != "default"  # the start of the server, which nobody may ask
    ]
    assert refused == []


def test_others_may_nothing(composed_redis: LocalRedis, secrets: Path) -> None:
    for username in ("default", "vlcache", "nobody"):
        with pytest.raises(redis.AuthenticationError):
            client(composed_redis, username).ping()
    with pytest.raises(redis.AuthenticationError):
        client(composed_redis, None, None).ping()
    health = client(composed_redis, "health")
    assert health.ping()
    for command in (("GET", "vlcache:a"), ("SCAN", "0"), ("INFO",), ("CONFIG", "GET", "*")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            health.execute_command(*command)
    password = (secrets / "redis_credentials").read_text().strip().partition(":")[2]
    own = client(composed_redis, "vlcache", password)
    assert own.set("vlcache:a", "b")
    for command in (("SET", "other:a", "b"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*")):
        with pytest.raises(redis.exceptions.NoPermissionError):
            own.execute_command(*command)


def test_it_is_a_cache(composed_redis: LocalRedis) -> None:
    observer = client(composed_redis, "observer")
    assert observer.config_get("maxmemory") == {"maxmemory": str(16 << 30)}
    assert observer.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
    assert observer.config_get("save") == {"save": ""}
    assert observer.config_get("appendonly") == {"appendonly": "no"}


def test_its_health_check_tells_it_from_none(composed_redis: LocalRedis) -> None:
    redis_cli = Path(str(find_server())).with_name("redis-cli")
    if not redis_cli.exists():
        pytest.skip("no redis-cli")
    [shell, check] = SERVICES["redis"]["healthcheck"]["test"]
    assert shell == "CMD-SHELL"

    def healthy(port: int) -> bool:
        command = check.replace("redis-cli", f"{redis_cli} -p {port}")
        return run("sh", "-c", command).returncode == 0

    assert healthy(composed_redis.port)
    assert not healthy(free_port())
