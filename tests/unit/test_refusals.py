"""What is refused at start: each option in one line, with its value and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from vlcache_connector import register
from vlcache_connector.refusals import REFUSALS, check_kv_cache, check_options, uncaptured_steps
from vlcache_connector.support import UnsupportedError, inert_reason

VLCACHE = {"kv_connector": "VLCacheConnector", "kv_role": "kv_both"}
EXAMPLE = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
SHARED = {"kv_connector_extra_config": {"disk_path": "/tmp/nowhere"}}
EXPANDABLE = "expandable_segments:True"

Change = Callable[[VllmConfig], Any]


def engine_config(model: Path, **arguments: Any) -> VllmConfig:
    register()
    arguments = {"kv_transfer_config": VLCACHE, "max_model_len": 1024} | arguments
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def several(*transfers: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": list(transfers)},
    }


@pytest.fixture(scope="module")
def served(tiny_model: Callable[..., Path]) -> VllmConfig:
    """A configuration in which nothing is refused."""
    return engine_config(tiny_model())


def transfer(**changes: Any) -> Change:
    def change(config: VllmConfig) -> None:
        assert config.kv_transfer_config is not None
        for name, value in changes.items():
            setattr(config.kv_transfer_config, name, value)

    return change


def set_(part: str, **values: Any) -> Change:
    def change(config: VllmConfig) -> None:
        target = config
        for name in part.split("."):
            target = getattr(target, name)
        for name, value in values.items():
            setattr(target, name, value)

    return change


def instead(part: str, **values: Any) -> Change:
    return lambda config: setattr(config, part, SimpleNamespace(**values))


def encoder_role(config: VllmConfig) -> None:
    assert config.ec_transfer_config is not None
    config.ec_transfer_config.ec_role = "ec_producer"


CASES: tuple[tuple[str, Change], ...] = (
    ("kv_offloading_size=2", set_("cache_config", kv_offloading_size=2)),
    (
        "kv_connector_extra_config.connectors=VLCacheConnector, ExampleConnector",
        transfer(**several(VLCACHE, EXAMPLE)),
    ),
    ("kv_role=kv_producer", transfer(kv_role="kv_producer")),
    ("ec_role=ec_producer", encoder_role),
    ("pipeline_parallel_size=2", set_("parallel_config", pipeline_parallel_size=2)),
    ("prefill_context_parallel_size=2", set_("parallel_config", prefill_context_parallel_size=2)),
    ("decode_context_parallel_size=4", set_("parallel_config", decode_context_parallel_size=4)),
    ("data_parallel_size=2", set_("parallel_config", data_parallel_size=2, is_moe_model=True)),
    ("enable_dbo=True", set_("parallel_config", enable_dbo=True)),
    ("ubatch_size=2", set_("parallel_config", ubatch_size=2)),
    ("model=Qwen2_5_VLForConditionalGeneration", lambda config: None),
    ("kv_cache_dtype=int8_per_token_head", set_("cache_config", cache_dtype="int8_per_token_head")),
    (
        "attention_backend=FLEX_ATTENTION",
        set_("attention_config", backend=AttentionBackendEnum.FLEX_ATTENTION),
    ),
    (
        "pass_config.fuse_rope_kvcache=True",
        set_("compilation_config.pass_config", fuse_rope_kvcache=True),
    ),
    (
        "pass_config.fuse_qk_norm_rope_kvcache=True",
        set_("compilation_config.pass_config", fuse_qk_norm_rope_kvcache=True),
    ),
    (
        "enable_tower_connector_lora=True",
        instead("lora_config", enable_tower_connector_lora=True),
    ),
    *(
        (f"speculative_config.method={method}", instead("speculative_config", method=method))
        for method in ("eagle3", "draft_model", "extract_hidden_states", "custom_class", "dspark")
    ),
    ("video_pruning_rate=0.5", set_("model_config.multimodal_config", video_pruning_rate=0.5)),
    (
        "mm_processor_cache_type=shm",
        set_("model_config.multimodal_config", mm_processor_cache_type="shm"),
    ),
)


def refusals(config: VllmConfig) -> list[str]:
    with pytest.raises(UnsupportedError) as refused:
        check_options(config)
    heading, *lines = str(refused.value).splitlines()
    assert heading == "VLCacheConnector can't run with:"
    return [line.removeprefix("  ") for line in lines]


def test_every_refusal_has_its_case() -> None:
    cases = {start.partition("=")[0] for start, _ in CASES}
    assert {refusal.option for refusal in REFUSALS} == cases


@pytest.mark.parametrize(("start", "change"), CASES, ids=[start for start, _ in CASES])
def test_a_refusal_is_one_line_with_option_value_and_way_out(
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    change: Change,
) -> None:
    config = engine_config(tiny_model())
    check_options(config)
    if start.startswith("model="):
        monkeypatch.setattr(type(config.model_config), "use_mla", True)
    change(config)
    [line] = refusals(config)
    assert line.startswith(f"{start}: ")
    way_out = line.rpartition("; ")[2]
    assert way_out.split()[0] in ("leave", "set", "use", "run")


def test_several_are_refused_at_once(served: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.parallel_config, "enable_dbo", True)
    monkeypatch.setattr(served.parallel_config, "pipeline_parallel_size", 2)
    assert [line.partition("=")[0] for line in refusals(served)] == [
        "pipeline_parallel_size",
        "enable_dbo",
    ]


@pytest.mark.parametrize("method", ["ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"])
def test_speculation_without_kv_of_its_own_is_served(
    served: VllmConfig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(served, "speculative_config", SimpleNamespace(method=method))
    check_options(served)


# -- before a model is loaded -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"kv_offloading_size": 1}, r"kv_offloading_size=1\.0: vLLM would replace"),
        ({"mm_processor_cache_type": "shm"}, "mm_processor_cache_type=shm: "),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype=int8_per_token_head: "),
        ({"kv_transfer_config": several(VLCACHE, EXAMPLE)}, "VLCacheConnector, ExampleConnector: "),
        (
            {"kv_transfer_config": several(several(EXAMPLE, VLCACHE))},
            "ExampleConnector, VLCacheConnector: ",
        ),
        (
            {
                "kv_transfer_config": several(
                    VLCACHE
                    | {
                        "kv_role": "kv_producer",
                        "kv_connector_extra_config": {"donor": "canonical", "disk_path": "/tmp/x"},
                    },
                    EXAMPLE,
                )
            },
            "donor=first_seen",
        ),
    ],
    ids=["offloading", "shm", "KV format", "sibling", "sibling below", "canonical sibling"],
)
def test_vllms_configuration_is_refused(
    tiny_model: Callable[..., Path], arguments: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UnsupportedError, match=expected):
        engine_config(tiny_model(), **arguments)


def test_a_producer_is_served_beside_others(tiny_model: Callable[..., Path]) -> None:
    producer = VLCACHE | {"kv_role": "kv_producer"} | SHARED
    config = engine_config(tiny_model(), kv_transfer_config=several(EXAMPLE, producer))
    ec = config.ec_transfer_config
    assert ec is not None
    assert (ec.ec_connector, ec.ec_role) == ("VLCacheEncoderConnector", "ec_consumer")
    assert config.kv_transfer_config is not None
    assert ec.engine_id == config.kv_transfer_config.engine_id


@pytest.mark.parametrize(
    "off",
    [
        VLCACHE | {"kv_connector_extra_config": {"enabled": False}},
        several(VLCACHE | {"kv_connector_extra_config": {"enabled": False}}, EXAMPLE),
    ],
    ids=["alone", "beside others"],
)
def test_nothing_is_refused_where_it_is_off(
    tiny_model: Callable[..., Path], off: dict[str, Any]
) -> None:
    engine_config(tiny_model(), kv_transfer_config=off, mm_processor_cache_type="shm")


def test_expandable_segments_are_refused_for_others_only(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", EXPANDABLE)
    engine_config(tiny_model())
    for transfer in (EXAMPLE, several(EXAMPLE, VLCACHE | {"kv_role": "kv_producer"} | SHARED)):
        with pytest.raises(ValueError, match="expandable_segments"):
            engine_config(tiny_model(), kv_transfer_config=transfer)


def test_images_without_content_hashes_are_said_to_turn_it_off(
    tiny_model: Callable[..., Path],
) -> None:
    off = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    reason = inert_reason(engine_config(tiny_model(), **off)) or ""
    assert reason.startswith("enable_prefix_caching=False with mm_processor_cache_gb=0: ")
    assert "; set --mm-processor-cache-gb above 0" in reason
    for option, value in off.items():
        assert inert_reason(engine_config(tiny_model(), **{option: value})) is None


def test_a_frontend_that_tells_no_content_from_names_turns_it_off(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_config(tiny_model())
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True)
    assert (inert_reason(config) or "").startswith("VLLM_USE_RUST_FRONTEND=1: ")


def test_a_model_that_other_classes_run_is_left_alone(tiny_model: Callable[..., Path]) -> None:
    reason = inert_reason(engine_config(tiny_model(), model_impl="transformers")) or ""
    assert reason.startswith("architecture TransformersMultiModalForCausalLM is untested; ")
    assert inert_reason(engine_config(tiny_model(), model_impl="vllm")) is None


# -- the KV cache and CUDA graphs ---------------------------------------------------------------


def spec(**changes: Any) -> FullAttentionSpec:
    shape = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    return FullAttentionSpec(**(shape | changes))


WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=128
)


@pytest.mark.parametrize(
    "specs",
    [[], [WINDOW], [spec(), WINDOW], [spec(sliding_window=128)], [spec(head_size_v=32)]],
    ids=["none", "window", "hybrid", "window after all", "narrow V"],
)
def test_a_kv_cache_of_other_layers_is_refused(specs: list[Any]) -> None:
    groups = [KVCacheGroupSpec([f"layer {i}"], spec) for i, spec in enumerate(specs)]
    with pytest.raises(UnsupportedError) as refused:
        check_kv_cache(KVCacheConfig(4, [], groups))
    kinds = ", ".join(type(spec).__name__ for spec in specs) or "none"
    assert str(refused.value).startswith(f"kv_cache_groups={kinds}: ")
    assert str(refused.value).endswith("; leave it out")


def test_a_plain_kv_cache_is_served() -> None:
    check_kv_cache(KVCacheConfig(4, [], [KVCacheGroupSpec(["layer"], spec())]))


@pytest.mark.parametrize(
    ("mode", "splitting_ops", "way_out"),
    [
        (CUDAGraphMode.NONE, [], None),
        (CUDAGraphMode.FULL_DECODE_ONLY, [], None),
        (CUDAGraphMode.FULL_AND_PIECEWISE, None, None),
        (CUDAGraphMode.PIECEWISE, None, None),
        (CUDAGraphMode.FULL, None, "set cudagraph_mode to FULL_AND_PIECEWISE"),
        # With an inductor partition, and with breakable graphs, nothing is split at KV writes.
        (CUDAGraphMode.FULL_AND_PIECEWISE, [], "leave out use_inductor_graph_partition"),
        (CUDAGraphMode.PIECEWISE, ["vllm::unified_attention_with_output"], "VLLM_BATCH_INVARIANT"),
    ],
)
def test_steps_that_cuda_graphs_hide_are_told_at_start(
    served: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    mode: CUDAGraphMode,
    splitting_ops: list[str] | None,
    way_out: str | None,
) -> None:
    compilation = served.compilation_config
    for name, value in (
        ("cudagraph_mode", mode),
        ("splitting_ops", splitting_ops),
        ("use_inductor_graph_partition", False),
        ("max_cudagraph_capture_size", 512),
    ):
        monkeypatch.setattr(compilation, name, value)
    line = uncaptured_steps(served)
    if way_out is None:
        assert line is None
        return
    assert line is not None
    assert line.startswith(f"cudagraph_mode={mode.name}: images in steps of up to 512 tokens")
    assert way_out in line
