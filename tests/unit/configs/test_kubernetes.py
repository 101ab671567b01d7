"""configs/kubernetes: valid, and its parts fit together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from tests.helpers.deployment import CONFIGS, parse_command
from vlcache_connector.config import VLCacheConfig

FILES = sorted((CONFIGS / "kubernetes").glob("*.yaml"))
RESOURCES: list[dict[str, Any]] = [
    document for path in FILES for document in yaml.safe_load_all(path.read_text())
]
VERSIONS = ("1.29", kubernetes_validate.latest_version())
SECRET = {"redis_credentials", "users.acl"}
"""Keys of the secret, which is made by configs/docker/make_secrets.sh."""


def resource(kind: str, name: str) -> Any:
    [found] = [
        each for each in RESOURCES if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def pod(name: str) -> Any:
    return resource("Deployment", name)["spec"]["template"]


def container(name: str) -> Any:
    [found] = pod(name)["spec"]["containers"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", RESOURCES, ids=lambda each: each["kind"])
def test_the_schema_is_kept(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)
    wrong = copy.deepcopy(document)
    wrong["metadata"]["nmae"] = wrong["metadata"].pop("name")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, version, strict=True)


def test_everything_is_in_one_namespace() -> None:
    assert resource("Namespace", "vlcache")
    for each in RESOURCES:
        if each["kind"] != "Namespace":
            assert each["metadata"]["namespace"] == "vlcache", each["kind"]


@pytest.mark.parametrize("name", ["redis", "vllm"])
def test_labels_and_ports_fit(name: str) -> None:
    labels = pod(name)["metadata"]["labels"]
    assert resource("Deployment", name)["spec"]["selector"]["matchLabels"] == labels
    service = resource("Service", name)["spec"]
    assert service["selector"] == labels
    ports = {each["name"] for each in container(name)["ports"]}
    assert {each["targetPort"] for each in service["ports"]} <= ports
    probes = [value for key, value in container(name).items() if key.endswith("Probe")]
    assert len(probes) >= 2
    for probe in probes:
        if "httpGet" in probe:
            assert probe["httpGet"] == {"path": "/health", "port": "http"}


@pytest.mark.parametrize("name", ["redis", "vllm"])
def test_every_volume_is_there(name: str) -> None:
    volumes = {each["name"]: each for each in pod(name)["spec"]["volumes"]}
    mounted = {each["name"] for each in container(name)["volumeMounts"]}
    assert mounted == set(volumes)
    for volume in volumes.values():
        if "configMap" in volume:
            assert resource("ConfigMap", volume["configMap"]["name"])
        if "secret" in volume:
            assert volume["secret"]["secretName"] == "vlcache-redis"
            assert {item["key"] for item in volume["secret"]["items"]} < SECRET


@pytest.mark.parametrize("name", ["redis", "vllm"])
def test_pods_keep_the_restricted_standard(name: str) -> None:
    enforced = resource("Namespace", "vlcache")["metadata"]["labels"]
    assert enforced["pod-security.kubernetes.io/enforce"] == "restricted"
    spec, context = pod(name)["spec"], container(name)["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert all(set(volume) & {"configMap", "secret", "emptyDir"} for volume in spec["volumes"])


def test_only_vllm_reaches_redis() -> None:
    policy = resource("NetworkPolicy", "redis")["spec"]
    assert policy["podSelector"]["matchLabels"] == pod("redis")["metadata"]["labels"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    [allowed] = policy["ingress"]
    [who] = allowed["from"]
    assert who == {"podSelector": {"matchLabels": pod("vllm")["metadata"]["labels"]}}
    [port] = container("redis")["ports"]
    assert allowed["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
    assert policy["egress"] == []


def test_the_servers_have_the_redis_configuration(tmp_path: Path) -> None:
    text = resource("ConfigMap", "vllm")["data"]["redis.yaml"]
    assert yaml.safe_load(text) == yaml.safe_load((CONFIGS / "redis.yaml").read_text())
    [mount] = [each for each in container("vllm")["volumeMounts"] if each["name"] == "config"]
    (tmp_path / "redis.yaml").write_text(text)
    args = parse_command(
        [part.replace(mount["mountPath"], str(tmp_path)) for part in container("vllm")["args"]]
    )
    assert args.model_tag.startswith("Qwen/")
    url = args.kv_transfer_config.kv_connector_extra_config["redis_url"]
    [port] = resource("Service", "redis")["spec"]["ports"]
    assert url.startswith(f"redis://redis:{port['port']}")


def test_the_servers_have_the_password() -> None:
    [mount] = [each for each in container("vllm")["volumeMounts"] if each["name"] == "redis"]
    [volume] = [each for each in pod("vllm")["spec"]["volumes"] if each["name"] == "redis"]
    [item] = volume["secret"]["items"]
    [variable] = container("vllm")["env"]
    assert variable == {
        "name": "VLCACHE_REDIS_CREDENTIALS_FILE",
        "value": f"{mount['mountPath']}/{item['path']}",
    }


def test_the_servers_have_room_for_what_they_keep() -> None:
    text = resource("ConfigMap", "vllm")["data"]["redis.yaml"]
    options = yaml.safe_load(text)["kv-transfer-config"]["kv_connector_extra_config"]
    config = VLCacheConfig.from_extra_config(options)
    [shm] = [each for each in pod("vllm")["spec"]["volumes"] if each["name"] == "shm"]
    taken = config.cpu_bytes + config.encoder_cpu_bytes + config.write_queue_bytes
    taken += _bytes(shm["emptyDir"]["sizeLimit"])
    assert taken + (8 << 30) <= _bytes(container("vllm")["resources"]["limits"]["memory"])
    redis = container("redis")
    maxmemory = redis["args"][redis["args"].index("--maxmemory") + 1]
    assert maxmemory.endswith("gb")  # Redis' own 2**30
    assert int(maxmemory[:-2]) << 30 < _bytes(redis["resources"]["limits"]["memory"])


def _bytes(quantity: str) -> int:
    return TypeAdapter(ByteSize).validate_python(f"{quantity}B")


def test_two_servers_are_scraped() -> None:
    assert resource("Deployment", "vllm")["spec"]["replicas"] == 2
    annotations = pod("vllm")["metadata"]["annotations"]
    [port] = container("vllm")["ports"]
    assert annotations == {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(port["containerPort"]),
        "prometheus.io/path": "/metrics",
    }
