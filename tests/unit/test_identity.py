"""The identity of a model: what it covers, what it leaves out, and where there is none."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CacheConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

import vlcache_connector
from vlcache_connector import identity
from vlcache_connector.calibration import load_for
from vlcache_connector.config import ConfigError
from vlcache_connector.identity import check_identity, model_fingerprint, weights_fingerprint

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "hidden_size": 64,
    "text_config": {"num_hidden_layers": 2, "rope_theta": 1e6, "dtype": "bfloat16"},
}
SIZE = 1 << 20


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where digests are kept, of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "_hashed", {})
    return tmp_path / "cache" / "vlcache" / "weights"


def checkpoint(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_in_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint(
        tmp_path / "model",
        one__safetensors=os.urandom(SIZE),
        two__safetensors=os.urandom(8192),
        part_in_three__bin=os.urandom(4096),
    )


def fingerprint(
    model: Path | str,
    config: dict[str, Any] | None = None,
    *,
    model_weights: str = "",
    load_format: str = "auto",
    download_dir: Path | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
) -> str | None:
    hf_config = SimpleNamespace(to_dict=lambda: CONFIG if config is None else config)
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            model_weights=model_weights,
            revision=None,
            hf_config=hf_config,
            seed=seed,
            dtype=dtype,
        ),
        load_config=SimpleNamespace(load_format=load_format, download_dir=download_dir),
    )
    return weights_fingerprint(vllm_config)


def overwrite(path: Path, offset: int) -> None:
    """Another byte at `offset`, in place and of the same size."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    with path.open("r+b") as file:
        file.write(content)


def test_a_fingerprint_is_the_same_every_time_and_everywhere(folder: Path, tmp_path: Path) -> None:
    before = fingerprint(folder)
    assert before is not None
    assert len(before) == 64
    assert fingerprint(folder) == before
    copied = shutil.copytree(folder, tmp_path / "another name")
    assert fingerprint(copied) == fingerprint(f"{copied}/") == before


@pytest.mark.parametrize("file", ["one.safetensors", "two.safetensors", "part/three.bin"])
@pytest.mark.parametrize("offset", [0, 4095, -1, 3000, -3000])
def test_every_byte_of_every_weight_file_counts(folder: Path, file: str, offset: int) -> None:
    before = fingerprint(folder)
    overwrite(folder / file, offset)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "pth", "gguf"])
def test_weights_of_all_kinds_count(tmp_path: Path, suffix: str) -> None:
    made = checkpoint(tmp_path / "model", **{f"weights__{suffix}": b"abc"})
    before = fingerprint(made)
    assert before is not None
    overwrite(made / f"weights.{suffix}", 0)
    assert fingerprint(made) != before


def test_a_checkpoint_of_one_file_counts(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, model__gguf=b"abc") / "model.gguf"
    before = fingerprint(file, load_format="gguf")
    assert before is not None
    overwrite(file, 1)
    assert fingerprint(file, load_format="gguf") != before


@pytest.mark.parametrize("change", ["missing", "renamed", "one more", "swapped"])
def test_other_weight_files_are_another_fingerprint(folder: Path, change: str) -> None:
    before = fingerprint(folder)
    one, two = folder / "one.safetensors", folder / "two.safetensors"
    if change == "missing":
        two.unlink()
    elif change == "renamed":
        two.rename(folder / "other.safetensors")
    elif change == "one more":
        checkpoint(folder, more__safetensors=b"")
    else:
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second)
        two.write_bytes(first)
    assert fingerprint(folder) != before


def test_other_files_do_not_count(folder: Path) -> None:
    before = fingerprint(folder)
    checkpoint(folder, README__md=b"text", model__safetensors__index__json=b"{}")
    assert fingerprint(folder) == before


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
    nested = {**CONFIG, "text_config": {**CONFIG["text_config"], key: "y"}}
    assert fingerprint(folder, nested) == before
    assert fingerprint(folder, dtype="float16") == before


def test_dummy_weights_are_told_apart_by_their_seed_and_need_no_files() -> None:
    assert fingerprint("no/such", load_format="dummy") == fingerprint("other", load_format="dummy")
    assert fingerprint("m", load_format="dummy") != fingerprint("m", load_format="dummy", seed=1)


def hub(root: Path, folder: Path) -> Path:
    """The hub's cache with a checkpoint in it, laid out as huggingface_hub does."""
    repo = root / "models--org--model"
    snapshot = repo / "snapshots" / ("c" * 40)
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c" * 40)
    for file in folder.rglob("*.*"):
        blob = repo / "blobs" / identity._sha256(file)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repo


def test_a_hub_model_is_read_where_it_was_downloaded_to_and_equals_a_copy_of_it(
    folder: Path, tmp_path: Path
) -> None:
    hub(tmp_path / "downloads", folder)
    assert fingerprint("org/model") is None
    assert fingerprint("org/model", download_dir=tmp_path / "downloads") == fingerprint(folder)


def test_the_hubs_own_digests_are_taken_without_reading(folder: Path, tmp_path: Path) -> None:
    repo = hub(tmp_path / "downloads", folder)
    before = fingerprint("org/model", download_dir=tmp_path / "downloads")
    for blob in (repo / "blobs").iterdir():
        blob.write_bytes(b"")
    assert fingerprint("org/model", download_dir=tmp_path / "downloads") == before


def age(path: Path, seconds: float = 60.0) -> None:
    stat = path.stat()
    os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_a_file_is_hashed_once_until_it_changes(
    folder: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "one.safetensors"
    age(file)
    before = identity._sha256(file)
    [note] = notes.iterdir()
    assert json.loads(note.read_text())[-1] == before
    monkeypatch.setattr(identity, "_hashed", {})  # as another process
    note.write_text(json.dumps([*json.loads(note.read_text())[:-1], "noted"]))
    assert identity._sha256(file) == "noted"
    overwrite(file, 0)
    assert identity._sha256(file) not in ("noted", before)


@pytest.mark.parametrize("note", ["", "{}", "[1, 2]", "\0", "[1, 2, 3, 4, 5]"])
def test_a_damaged_note_is_none(folder: Path, notes: Path, note: str) -> None:
    file = folder / "one.safetensors"
    age(file)
    before = identity._sha256(file)
    [path] = notes.iterdir()
    path.write_text(note)
    identity._hashed.clear()
    assert identity._sha256(file) == before


def test_a_file_that_has_just_been_written_is_hashed_each_time(folder: Path, notes: Path) -> None:
    """Its time stamp would not tell a change within the same tick of the clock."""
    identity._sha256(folder / "one.safetensors")
    assert not notes.exists()


def test_where_nothing_can_be_kept_a_process_hashes_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("no folder")
    file = folder / "one.safetensors"
    age(file)
    before = identity._sha256(file)
    monkeypatch.setattr(identity.hashlib, "sha256", lambda *_: pytest.fail("hashed again"))
    monkeypatch.setattr(identity, "_notes", lambda: pytest.fail("not needed"))
    with pytest.raises(pytest.fail.Exception):
        identity._sha256(folder / "two.safetensors")
    assert identity._hashed[file.resolve()][-1] == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"load_format": "runai_streamer", "model_weights": "s3://bucket/model"},
        {"load_format": "tensorizer"},
        {"load_format": "modelexpress"},
        {"load_format": "ipc_cache"},
        {"load_format": "a loader of ours"},
    ],
    ids=lambda arguments: arguments["load_format"],
)
def test_weights_from_elsewhere_have_none(folder: Path, arguments: dict[str, Any]) -> None:
    assert fingerprint(folder, **arguments) is None


def engine_config(model: Path | str, **extra: Any) -> VllmConfig:
    vlcache_connector.register()
    arguments = extra.pop("arguments", {})
    transfer = {
        "kv_connector": "VLCacheConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }
    return EngineArgs(
        model=str(model), max_model_len=1024, kv_transfer_config=transfer, **arguments
    ).create_engine_config()


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"disk_path": "/tmp/x"}, "disk_path"),
        ({"redis_url": "redis://localhost"}, "redis_url"),
        ({"disk_path": "/tmp/x", "redis_url": "redis://h"}, "disk_path and redis_url"),
    ],
    ids=["disk", "redis", "both"],
)
def test_tiers_that_engines_share_are_refused_without_an_identity(
    tiny_model: Callable[..., Path], extra: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named} with model=.*load_format=tensorizer: the weig"):
        engine_config(tiny_model(), **extra, arguments={"load_format": "tensorizer"})


def test_host_memory_is_not(tiny_model: Callable[..., Path]) -> None:
    config = engine_config(tiny_model(), arguments={"load_format": "tensorizer"})
    assert weights_fingerprint(config) is None
    assert model_fingerprint(config)
    check_identity(config, is_loaded=True)


def test_a_folder_without_weights_is_refused_at_once(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="the weights are in no local file"):
        engine_config(model, disk_path=str(tmp_path / "disk"))


def test_no_calibration_is_taken_for_weights_that_nothing_is_known_of(tmp_path: Path) -> None:
    assert load_for("grid-vlm", None, None, 6) is None
    with pytest.raises(ConfigError, match="in no local file that could be compared"):
        load_for("grid-vlm", "grid-vlm", None, 6)


def test_the_calibration_that_comes_with_the_checkout_is_of_its_model() -> None:
    model = Path(__file__).parents[1] / "models" / "grid-vlm"
    config = EngineArgs(model=str(model)).create_engine_config()
    assert load_for(str(model), None, weights_fingerprint(config), 6) is not None


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


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_two_paths_of_one_model_are_one_and_another_preprocessing_is_not(
    tiny_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    before = model_fingerprint(engine_config(tiny_model(arch)))
    model = shutil.copytree(tiny_model(arch), tmp_path / "mounted")
    assert model_fingerprint(engine_config(model)) == before
    files = ["preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"]
    for file in filter(lambda name: (model / name).exists(), files):
        kept = (model / file).read_text()
        settings = json.loads(kept)
        if "image_mean" in settings:
            edit(model / file, image_mean=[0.25, 0.5, 0.5])
        else:
            part = settings.get("image_processor") or {}
            edit(model / file, image_processor={**part, "image_mean": [0.25, 0.5, 0.5]})
        other = model_fingerprint(engine_config(shutil.copytree(model, tmp_path / file)))
        (model / file).write_text(kept)
        if file != "processor_config.json":
            assert other != before, file


@pytest.mark.parametrize(
    "arguments",
    [
        {"mm_processor_kwargs": {"min_pixels": 12544}},
        {"media_io_kwargs": {"video": {"num_frames": 4}}},
        {"mm_device_do_normalize": False},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_the_servers_own_options_of_preprocessing_count(
    tiny_model: Callable[..., Path], arguments: dict[str, Any]
) -> None:
    model = tiny_model()
    changed = engine_config(model, arguments=arguments)
    assert model_fingerprint(changed) != model_fingerprint(engine_config(model))
    assert weights_fingerprint(changed) == weights_fingerprint(engine_config(model))
