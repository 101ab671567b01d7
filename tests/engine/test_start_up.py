"""Settings that can not be served: vLLM does not start, and says which key, value and remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from local_redis import free_port

from tests.helpers.engine import Engine, EngineError


def refusal(model: Path, connector: dict[str, Any], **arguments: Any) -> str:
    """The last line of what vLLM dies of."""
    with pytest.raises(EngineError) as refused:
        Engine(model, connector, **arguments)
    return str(refused.value).strip().splitlines()[-1].strip()


def is_touched(llm: Any) -> bool:
    """Whether anything stands in place of what vLLM has for images and attention."""
    from vllm.multimodal.processing.inputs import ProcessorInputs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return hasattr(ProcessorInputs.get_mm_hashes, "_vlcache_original") or any(
        AttentionBackendEnum[name].is_overridden()
        for name in ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
    )


def test_a_process_without_it_is_left_as_it_is(engines: Callable[..., Engine]) -> None:
    assert not engines(None).call(is_touched)
    assert engines({}).call(is_touched)


def test_a_disk_path_that_can_not_be_written_to(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / "file" / "segments")
    message = refusal(tiny_model(), {"disk_path": path})
    assert message == (
        f"vlcache_connector.config.ConfigError: kv_connector_extra_config: disk_path={path!r}: "
        "Not a directory; name an empty directory, or one that does not exist yet"
    )


def test_a_redis_that_does_not_answer(tiny_model: Callable[..., Path]) -> None:
    url = f"redis://127.0.0.1:{free_port()}"
    message = refusal(tiny_model(), {"redis_url": url, "require_tiers": True})
    assert f"redis_url={url!r} (valkey) is not there, and require_tiers=true: " in message
    assert message.endswith("see to it that it answers, or set require_tiers=false")


def test_budgets_above_memory(tiny_model: Callable[..., Path]) -> None:
    message = refusal(tiny_model(), {"cpu_bytes": "100TiB"})
    assert f"cpu_bytes={100 << 40}" in message
    assert "are available. Lower them" in message


def test_contradictory_roles(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    def transfer(role: str, **connector: Any) -> dict[str, Any]:
        return {
            "kv_connector": "VLCacheConnector",
            "kv_role": role,
            "kv_connector_extra_config": connector,
        }

    message = refusal(tiny_model(), {}, kv_transfer_config=transfer("kv_consumer"))
    assert message == (
        "kv_role=kv_consumer: no tier that other servers share; set disk_path, l2_adapters or "
        "redis_url, or kv_role=kv_both"
    )
    message = refusal(
        tiny_model(),
        {},
        kv_transfer_config=transfer("kv_consumer", disk_path=str(tmp_path)),
        ec_transfer_config={
            "ec_connector": "VLCacheEncoderConnector",
            "ec_role": "ec_both",
            "ec_connector_module_path": "vlcache_connector.encoder_connector",
        },
    )
    assert message == (
        "ec_role=ec_both: it does not go with the kv_role; leave out --ec-transfer-config, or set "
        "ec_role=ec_consumer"
    )
