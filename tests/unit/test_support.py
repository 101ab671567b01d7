"""What is refused at start; the fingerprint of a checkpoint, and what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CacheConfig, ModelConfig, VllmConfig

from vlcache_connector import support
from vlcache_connector.support import (
    UnsupportedError,
    model_fingerprint,
    weights_fingerprint,
)
from vlcache_connector.worker.worker import WorkerSide

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 64,
    "text_config": {"num_hidden_layers": 2, "rope_theta": 1e6, "dtype": "bfloat16"},
}
SIZE = 1 << 20


def weights(seed: int, size: int = SIZE) -> bytes:
    """Bytes without a period that a sample could fall in with."""
    return bytes((seed + i * 7 + (i >> 8) * 13 + (i >> 16) * 29) % 251 for i in range(4096)) * (
        size // 4096
    )


def checkpoint(folder: Path, **files: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(
        tmp_path / "model", one__safetensors=weights(1), two__safetensors=weights(2, 8192)
    )


def fingerprint(
    model: Path | str,
    config: dict[str, Any] | None = None,
    *,
    load_format: str = "auto",
    seed: int = 0,
    dtype: str = "bfloat16",
) -> str:
    hf_config = SimpleNamespace(to_dict=lambda: CONFIG if config is None else config)
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), revision=None, hf_config=hf_config, seed=seed, dtype=dtype
        ),
        load_config=SimpleNamespace(load_format=load_format),
    )
    return weights_fingerprint(vllm_config)


def overwrite(path: Path, offset: int) -> None:
    """Another byte at `offset`, from the end if negative."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_a_fingerprint_is_the_same_every_time(folder: Path) -> None:
    assert fingerprint(folder) == fingerprint(folder)
    assert len(fingerprint(folder)) == 64


def test_it_does_not_depend_on_where_the_checkpoint_lies(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    moved = folder.rename(tmp_path / "other name")
    assert fingerprint(moved) == fingerprint(f"{moved}/") == before


@pytest.mark.parametrize(
    "offset",
    [0, 1, (1 << 16) - 1, *(piece * SIZE // 16 for piece in range(1, 16)), SIZE // 2 + 4095],
)
def test_another_byte_in_a_sampled_piece_is_another_fingerprint(folder: Path, offset: int) -> None:
    before = fingerprint(folder)
    overwrite(folder / "one.safetensors", offset)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("offset", [0, 100, 4095, 4096, 8191])
def test_every_byte_of_a_small_file_counts(folder: Path, offset: int) -> None:
    before = fingerprint(folder)
    overwrite(folder / "two.safetensors", offset)
    assert fingerprint(folder) != before


def test_another_size_is_another_fingerprint(folder: Path) -> None:
    before = fingerprint(folder)
    path = folder / "one.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint(folder) != before


@pytest.mark.parametrize("change", ["missing", "renamed", "one more", "swapped"])
def test_other_weight_files_are_another_fingerprint(folder: Path, change: str) -> None:
    before = fingerprint(folder)
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    if change == "missing":
        two.unlink()
    elif change == "renamed":
        two.rename(folder / "three.safetensors")
    elif change == "one more":
        checkpoint(folder, three__safetensors=b"")
    else:
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    assert fingerprint(folder) != before


def test_other_files_do_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    checkpoint(folder, README__md=b"text", pytorch_model__bin=b"the same weights once more")
    assert fingerprint(folder) == before


def test_bin_files_count_where_there_are_no_others(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", weights__bin=b"a")
    before = fingerprint(folder)
    overwrite(folder / "weights.bin", 0)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "hidden_size": 128},
        {**CONFIG, "text_config": {**CONFIG["text_config"], "num_hidden_layers": 3}},
        {**CONFIG, "text_config": {**CONFIG["text_config"], "rope_theta": 1e5}},
        {**CONFIG, "vision_config": {}},
        {**CONFIG, "architectures": ["Qwen2VLForConditionalGeneration"]},
    ],
    ids=["width", "layers", "theta", "a new part", "architecture"],
)
def test_other_dimensions_are_another_fingerprint(folder: Path, config: dict[str, Any]) -> None:
    assert fingerprint(folder, config) != fingerprint(folder)


@pytest.mark.parametrize(
    "key", ["_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype"]
)
def test_how_a_model_is_named_and_run_does_not_count(folder: Path, key: str) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder, {**CONFIG, key: "x"}) == before
    assert fingerprint(folder, {**CONFIG, key: None}) == before
    nested = {**CONFIG, "text_config": {**CONFIG["text_config"], key: "y"}}
    assert fingerprint(folder, nested) == before
    assert fingerprint(folder, dtype="float16") == before


def test_dummy_weights_are_told_apart_by_their_seed_and_need_no_files() -> None:
    assert fingerprint("no/such", load_format="dummy") == fingerprint("other", load_format="dummy")
    assert fingerprint("m", load_format="dummy") != fingerprint("m", load_format="dummy", seed=1)


def test_a_hub_model_is_read_where_it_was_downloaded_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, bool]] = []

    def downloaded(model: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((model, revision, local_files_only))
        return str(folder)

    monkeypatch.setattr(support, "snapshot_download", downloaded)
    assert fingerprint("org/model") == fingerprint(folder)
    assert asked == [("org/model", None, True)]


@pytest.mark.parametrize("error", [OSError("offline"), ValueError("no such id")], ids=str)
def test_a_model_without_local_files_is_known_by_its_dimensions_only(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(support, "snapshot_download", missing)
    assert fingerprint("org/model") == fingerprint("org/other")
    assert fingerprint("org/model", {**CONFIG, "hidden_size": 1}) != fingerprint("org/model")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_servers_with_another_quantised_kv_cache_share_no_segments(
    tiny_model: Callable[..., Path],
) -> None:
    def fingerprint(cache_dtype: Any) -> str:
        config = VllmConfig(
            model_config=ModelConfig(model=str(tiny_model()), dtype="float16", max_model_len=512),
            cache_config=CacheConfig(cache_dtype=cache_dtype),
        )
        return model_fingerprint(config)

    assert fingerprint("auto") == fingerprint("float16")
    prints = {fingerprint(dtype) for dtype in ("auto", "fp8_e4m3", "fp8_e5m2")}
    assert len(prints) == 3


def test_an_attention_backend_that_is_not_wrapped_is_refused_by_name() -> None:
    backend = SimpleNamespace(get_name=lambda: "FLEX_ATTENTION")
    layer = SimpleNamespace(impl=object(), get_attn_backend=lambda: backend)
    model: Any = SimpleNamespace(layers={"layer": layer})
    nothing: Any = None
    with pytest.raises(UnsupportedError) as refused:
        WorkerSide(
            model,
            nothing,
            nothing,
            rank=0,
            pace=nothing,
            vllm_config=nothing,
            kv_cache_config=nothing,
            device=torch.device("cpu"),
        )
    assert str(refused.value) == (
        "attention backend FLEX_ATTENTION is not wrapped by VLCache; choose --attention-backend "
        "FLASH_ATTN, FLASHINFER or TRITON_ATTN"
    )
