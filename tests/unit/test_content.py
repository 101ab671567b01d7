"""What is taken for an item's content, and what for a name: through vLLM's own frontend."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.scale_out.token_in_token_out.mm_features import (
    extract_mm_features,
    mm_kwargs_from_features,
)
from vllm.entrypoints.scale_out.token_in_token_out.protocol import MultiModalFeatures
from vllm.inputs import mm_input
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.media import MediaWithBytes
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.request import Request

from tests.helpers.engine import IMAGE, VIDEO, Ask, grid, request_of
from vlcache_connector import register
from vlcache_connector.config import VLCacheConfig
from vlcache_connector.content import frontend_seconds, may_be_kept
from vlcache_connector.media import ArrivedImage

STRICT, TRUSTING = VLCacheConfig(), VLCacheConfig(trust_client_names=True)
TRANSFER = {"kv_connector": "VLCacheConnector", "kv_role": "kv_both"}


def engine_config(model: Path) -> VllmConfig:
    register()
    return EngineArgs(
        model=str(model),
        max_model_len=2048,
        limit_mm_per_prompt={"image": 4, "video": 2},
        kv_transfer_config=TRANSFER,
    ).create_engine_config()


class Frontend:
    """Makes requests as vLLM's engine clients do."""

    def __init__(self, model: Path) -> None:
        self.processor = InputProcessor(engine_config(model))

    def render(self, prompt: dict[str, Any]) -> Any:
        renderer = self.processor.renderer
        [parsed] = renderer.render_prompts([prompt])
        [tokens] = renderer.tokenize_prompts([parsed], renderer.default_cmpl_tok_params)
        return renderer._process_tokens(tokens, skip_mm_cache=True)

    def features(self, engine_input: Any) -> list[MultiModalFeatureSpec]:
        request = self.processor.process_inputs(
            "r", engine_input, SamplingParams(max_tokens=1), ("generate",)
        )
        return list(request.mm_features or ())

    def identifiers(self, prompt: dict[str, Any]) -> list[str]:
        return [feature.identifier for feature in self.features(self.render(prompt))]


@pytest.fixture(scope="module")
def frontend(tiny_model: Callable[..., Path]) -> Frontend:
    return Frontend(tiny_model())


def image(seed: int, side: int = 112) -> Image.Image:
    return Image.fromarray(grid(seed, side, side))


def prompt_of(*images: Image.Image, **more: Any) -> dict[str, Any]:
    text = " and ".join([IMAGE] * len(images))
    return {"prompt": text, "multi_modal_data": {"image": list(images)}, **more}


def test_content_says_how_many_tokens_and_rows_it_has(frontend: Frontend) -> None:
    [small, large] = frontend.identifiers(prompt_of(image(1), image(1, 224)))
    assert may_be_kept(small, STRICT)
    assert small.startswith("vlcache-content:16:16:")
    assert large.startswith("vlcache-content:64:64:")
    assert small.split(":")[-1] != large.split(":")[-1]


def test_the_path_of_the_model_is_no_part_of_it(
    frontend: Frontend, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "mounted").symlink_to(tiny_model())
    elsewhere = Frontend(tmp_path / "mounted")
    assert frontend.identifiers(prompt_of(image(1))) == elsewhere.identifiers(prompt_of(image(1)))


def test_options_of_a_request_are(frontend: Frontend) -> None:
    plain, other = prompt_of(image(1, 224)), prompt_of(image(1, 224))
    other["mm_processor_kwargs"] = {"max_pixels": 12544}
    [without], [with_options] = frontend.identifiers(plain), frontend.identifiers(other)
    assert may_be_kept(with_options, STRICT)
    assert with_options != without


@pytest.mark.parametrize("kwargs", [None, {"max_pixels": 12544}], ids=["plain", "with options"])
def test_a_name_is_none(frontend: Frontend, kwargs: dict[str, Any] | None) -> None:
    named = prompt_of(image(1), image(2), multi_modal_uuids={"image": ["holiday", None]})
    if kwargs:
        named["mm_processor_kwargs"] = kwargs
    first, second = frontend.identifiers(named)
    assert not may_be_kept(first, STRICT)
    assert may_be_kept(first, TRUSTING)
    assert may_be_kept(second, STRICT)


@pytest.mark.parametrize("kwargs", [None, {"fps": [2.0]}, {"num_frames": [4]}], ids=str)
@pytest.mark.parametrize("arch", ["qwen2_5_vl", "qwen3_vl"])
def test_a_name_of_a_video_is_none_whatever_the_options(
    tiny_model: Callable[..., Path], arch: str, kwargs: dict[str, Any] | None
) -> None:
    """Qwen3-VL hashes what it has again where an option is a list, one value for each video."""
    if kwargs is not None and arch != "qwen3_vl":
        pytest.skip("takes no lists")
    frontend = Frontend(tiny_model(arch))

    def identifiers(names: list[str | None]) -> list[str]:
        prompt, _ = request_of(Ask(f"see {VIDEO}", videos=((5, 112, 4),)))
        prompt["multi_modal_uuids"] = {"video": names}
        if kwargs is not None:
            for _, metadata in prompt["multi_modal_data"]["video"]:
                metadata["do_sample_frames"] = True
            prompt["mm_processor_kwargs"] = kwargs
        return frontend.identifiers(prompt)

    [named], [content] = identifiers(["clip"]), identifiers([None])
    assert not may_be_kept(named, STRICT)
    assert may_be_kept(content, STRICT)


def test_an_image_id_is_a_name(frontend: Frontend) -> None:
    """vLLM takes an EXIF ImageID for the image's content."""

    def with_id(seed: int) -> Any:
        named = image(seed)
        named.getexif()[Image.ExifTags.Base.ImageID] = uuid.UUID(int=7)
        return MediaWithBytes(named, original_bytes=named.tobytes())

    prompt = prompt_of(image(1))
    prompt["multi_modal_data"]["image"] = with_id(1)
    [first] = frontend.identifiers(prompt)
    prompt["multi_modal_data"]["image"] = with_id(2)
    assert frontend.identifiers(prompt) == [first]
    assert not may_be_kept(first, STRICT)


def token_in(rendered: Any, **changes: Any) -> Any:
    """What vLLM's token-in endpoint makes of a request's body."""
    features = extract_mm_features(rendered)
    assert features is not None
    body = MultiModalFeatures(**(features.model_dump() | changes))
    places = {
        modality: [PlaceholderRange(offset=p.offset, length=p.length) for p in ranges]
        for modality, ranges in body.mm_placeholders.items()
    }
    return mm_input(
        prompt_token_ids=rendered["prompt_token_ids"],
        mm_kwargs=MultiModalKwargsItems(mm_kwargs_from_features(body)),
        mm_hashes=body.mm_hashes,
        mm_placeholders=places,
    )


def test_a_hash_in_the_body_of_a_request_is_a_name_even_if_it_is_right(frontend: Frontend) -> None:
    rendered = frontend.render(prompt_of(image(1)))
    [content] = frontend.features(rendered)
    right = rendered["mm_hashes"]["image"][0]
    for claimed in (str(right), content.identifier, "client-chosen:x", "x"):
        [feature] = frontend.features(token_in(rendered, mm_hashes={"image": [claimed]}))
        assert not may_be_kept(feature.identifier, STRICT)
        assert may_be_kept(feature.identifier, TRUSTING)
        # In vLLM's own caches, too, it is another item's.
        assert feature.mm_hash != content.mm_hash


def test_a_name_is_no_content_hash_in_vllms_own_caches(frontend: Frontend) -> None:
    """Whoever names an image by the hash of another one does not get in between."""
    [content] = frontend.features(frontend.render(prompt_of(image(1))))
    forged = prompt_of(image(2), multi_modal_uuids={"image": [str(content.mm_hash)]})
    [named] = frontend.features(frontend.render(forged))
    assert named.mm_hash != content.mm_hash
    assert named.identifier != content.identifier
    injected: dict[str, list[Any]] = {"image": [content.data]}
    frontend.processor.inject_into_mm_cache({"image": ["abc"]}, injected)
    cache = frontend.processor.renderer.mm_processor_cache
    assert cache is not None
    assert cache.is_cached(["abc", "client-chosen:abc"]) == [False, True]


def test_the_engine_gets_plain_strings(frontend: Frontend) -> None:
    [feature] = frontend.features(frontend.render(prompt_of(image(1))))
    assert type(feature.identifier) is type(feature.mm_hash) is str


def seconds_of(frontend: Frontend, rendered: Any, **extra: Any) -> dict[str, float]:
    """What the engine is told that a request took in the frontend."""
    params = SamplingParams(max_tokens=1, extra_args=extra or None)
    sent = frontend.processor.process_inputs("r", rendered, params, ("generate",))
    assert sent.sampling_params is not None
    assert params.extra_args == (extra or None)  # the caller's own are left alone
    assert {**extra, **(sent.sampling_params.extra_args or {})} == sent.sampling_params.extra_args
    seconds: Any = frontend_seconds(Request.from_engine_core_request(sent, None))
    return seconds


def test_the_engine_is_told_what_the_processor_took(frontend: Frontend) -> None:
    begun = time.perf_counter()
    rendered = frontend.render(prompt_of(image(5), image(6, 224)))
    took = time.perf_counter() - begun
    seconds = seconds_of(frontend, rendered)
    assert set(seconds) == {"processor"}
    assert 0 < seconds["processor"] <= took


def test_images_that_are_loaded_side_by_side_took_as_long_as_all_of_them(
    frontend: Frontend,
) -> None:
    spans = [(1.0, 1.5), (1.25, 2.0)]
    loaded: list[Any] = [
        ArrivedImage(image(seed), str(seed).encode(), loading=span)
        for seed, span in zip((7, 8), spans, strict=True)
    ]
    assert seconds_of(frontend, frontend.render(prompt_of(*loaded)))["media"] == 1.0
    # One of unknown origin leaves the whole unknown.
    mixed = frontend.render(prompt_of(*loaded, image(9)))
    assert set(seconds_of(frontend, mixed)) == {"processor"}


def test_nothing_is_known_of_items_that_were_processed_elsewhere(frontend: Frontend) -> None:
    rendered = frontend.render(prompt_of(image(1)))
    assert seconds_of(frontend, token_in(rendered)) == {}


def test_a_client_does_not_tell_what_its_request_took(frontend: Frontend) -> None:
    params = SamplingParams(
        max_tokens=1, extra_args={"vlcache_seconds": {"media": 1e9}, "kv_transfer_params": {"a": 1}}
    )
    rendered = frontend.render(prompt_of(image(1)))
    sent = frontend.processor.process_inputs("r", rendered, params, ("generate",))
    request = Request.from_engine_core_request(sent, None)
    assert set(frontend_seconds(request)) == {"processor"}
    assert request.kv_transfer_params == {"a": 1}


def test_a_named_item_of_another_size_is_another_item(frontend: Frontend) -> None:
    sizes = [frontend.render(prompt_of(image(1, side))) for side in (112, 224)]
    [[first], [second]] = [
        frontend.features(token_in(rendered, mm_hashes={"image": ["same"]})) for rendered in sizes
    ]
    assert first.mm_hash == second.mm_hash
    assert first.identifier != second.identifier


def test_arrays_and_images_are_hashed_alike(frontend: Frontend) -> None:
    as_array = prompt_of(image(3))
    as_array["multi_modal_data"]["image"] = [np.asarray(image(3))]
    for identifier in frontend.identifiers(as_array):
        assert may_be_kept(identifier, STRICT)
