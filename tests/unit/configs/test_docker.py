"""configs/docker: images and the composition, without an engine to run them in."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from serving import ROOT

from tests.helpers.deployment import (
    COMPOSE,
    CONFIGS,
    DOCKER,
    DOCKERFILES,
    SERVICES,
    arguments,
    parse_command,
    redis_options,
    run,
)

SERVERS = ("vllm-a", "vllm-b")
TOOLS = Path(sys.executable).parent


# -- images -------------------------------------------------------------------------------------


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
