"""Which items are named by their content, and which by a client.

A key must be derived from what an item is. vLLM identifies items by strings that may come from
anywhere: `multi_modal_uuids`, an image's EXIF ImageID, hashes in the body of a request to its
scale-out and token-in endpoints. So nothing is taken for content but what vLLM's processor hashed
here, in the process that hands the request to the engine. There every item's identifier is written
anew, and says which it is, and how many tokens and encoder rows the item has.

vLLM seams, patched:

- `ProcessorInputs.get_mm_hashes` (`vllm/multimodal/processing/inputs.py`): names are marked, so
  that no name is the hash of another item, in vLLM's own caches either; hashes are of the item
  alone, not of the path that the model was loaded from.
- `BaseMultiModalProcessor.apply` (`vllm/multimodal/processing/processor.py`), the last that sees
  item and hash together: hashes of content are told from others by their type. What was hashed is
  known from then on (`media.py`).
  What they took goes with these hashes as well, and then to the engine with the request.
- `InputProcessor.process_inputs` and `inject_into_mm_cache` (`vllm/v1/engine/input_processor.py`):
  all that goes to the engine passes here.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import BaseMultiModalProcessor
from vllm.v1.engine.input_processor import InputProcessor

from . import media

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.request import Request

    from .config import VLCacheConfig
    from .protocol import TTFTPart

_CONTENT = "vlcache-content:"
_NAMED = "client-chosen:"
"""How identifiers begin; no request can bring one that does."""

_SECONDS = "vlcache_seconds"
"""Key of `SamplingParams.extra_args` for what a request took in the frontend."""


class ItemHash(str):
    """What the processor here calls an item; no request can bring one.

    Attributes:
        loading: when fetching and decoding the item began and ended (`time.perf_counter`), if that
            is known.
        processor_seconds: of the processor, with all items of the request.
    """

    loading: tuple[float, float] | None = None
    processor_seconds: float = 0.0


class ContentHash(ItemHash):
    """A hash that was computed here from an item."""


def may_be_kept(identifier: str, config: VLCacheConfig) -> bool:
    """Whether what belongs to an item may be stored and found under its identifier."""
    return identifier.startswith((_CONTENT, _NAMED) if config.trust_client_names else _CONTENT)


def identify_items() -> None:
    """Patch vLLM's frontend, once per process."""
    _wrap(ProcessorInputs, "get_mm_hashes", _get_mm_hashes)
    _wrap(BaseMultiModalProcessor, "apply", _apply)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(InputProcessor, "inject_into_mm_cache", _inject_into_mm_cache)


def _wrap(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Let `ours` stand in for a method; it is given the original first."""
    original = getattr(owner, name)
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    method._vlcache_original = original  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _get_mm_hashes(
    original: Callable[..., Mapping[str, list[str]]],
    self: ProcessorInputs,
    model_id: str,
    hash_algorithm: Any,
) -> dict[str, list[str]]:
    hashes = original(self, "", hash_algorithm)
    return {
        modality: [
            _NAMED + of_item if is_named else of_item
            for of_item, is_named in zip(of_items, _named(self, modality), strict=True)
        ]
        for modality, of_items in hashes.items()
    }


def _apply(
    original: Callable[..., Any], self: Any, inputs: ProcessorInputs, *args: Any, **kwargs: Any
) -> Any:
    start = time.perf_counter()
    result = original(self, inputs, *args, **kwargs)
    seconds = time.perf_counter() - start
    result["mm_hashes"] = {
        modality: [
            ItemHash(of_item) if is_named else ContentHash(of_item)
            for of_item, is_named in zip(of_items, _named(inputs, modality), strict=True)
        ]
        for modality, of_items in result["mm_hashes"].items()
    }
    for of_items in result["mm_hashes"].values():
        for of_item in of_items:
            of_item.processor_seconds = seconds
    if "image" in inputs.mm_data_items:
        images = inputs.mm_data_items["image"].get_all_items_for_hash()
        for image, of_item in zip(images, result["mm_hashes"]["image"], strict=True):
            of_item.loading = getattr(image, "loading", None)
            if isinstance(of_item, ContentHash):
                media.remember(image, of_item, inputs.cache)
    return result


def _named(inputs: ProcessorInputs, modality: str) -> list[bool]:
    """Of each item, whether it has a name beside or instead of its content."""
    items = inputs.mm_data_items[modality].get_all_items_for_hash()
    names: Sequence[str | None] = (inputs.mm_uuid_items or {}).get(modality) or [None] * len(items)
    return [
        name is not None or _has_image_id(item) for item, name in zip(items, names, strict=True)
    ]


def _has_image_id(item: Any) -> bool:
    image = item.media if isinstance(item, MediaWithBytes) else item
    return hasattr(image, "getexif") and media.image_id(image) is not None


def _process_inputs(
    original: Callable[..., EngineCoreRequest], self: InputProcessor, *args: Any, **kwargs: Any
) -> EngineCoreRequest:
    request = original(self, *args, **kwargs)
    params = request.sampling_params
    if request.mm_features and params is not None:
        # In the place of what a client may have sent under this name.
        seconds = _seconds_of([feature.mm_hash for feature in request.mm_features])
        params.extra_args = {**(params.extra_args or {}), _SECONDS: seconds}
    for feature in request.mm_features or ():
        _identify(feature)
    return request


def _seconds_of(names: Sequence[str | None]) -> dict[TTFTPart, float]:
    """What a request took here, by the names of its items."""
    hashes = [name for name in names if isinstance(name, ItemHash)]
    if len(hashes) < len(names):
        return {}
    seconds: dict[TTFTPart, float] = {
        "processor": max(of_item.processor_seconds for of_item in hashes)
    }
    loading = [of_item.loading for of_item in hashes if of_item.loading is not None]
    if len(loading) == len(hashes):
        # Items are loaded at the same time.
        seconds["media"] = max(end for _, end in loading) - min(start for start, _ in loading)
    return seconds


def frontend_seconds(request: Request) -> dict[TTFTPart, float]:
    """What a request took before it came to the engine, as far as it is known."""
    extra = request.sampling_params.extra_args if request.sampling_params is not None else None
    return dict((extra or {}).get(_SECONDS, {}))


def _identify(feature: MultiModalFeatureSpec) -> None:
    mark = _CONTENT if isinstance(feature.mm_hash, ContentHash) else _NAMED
    size = f"{feature.mm_position.length}:{feature.mm_position.get_num_embeds()}:"
    feature.identifier = mark + size + feature.identifier
    if isinstance(feature.mm_hash, ItemHash):
        feature.mm_hash = str(feature.mm_hash)
    elif feature.mm_hash is not None:
        feature.mm_hash = _marked(feature.mm_hash)


def _marked(name: str) -> str:
    return name if name.startswith(_NAMED) else _NAMED + name


def _inject_into_mm_cache(
    original: Callable[..., None],
    self: InputProcessor,
    mm_hashes: Mapping[str, Sequence[str]],
    mm_kwargs: dict[str, list[Any]],
) -> None:
    marked = {modality: list(map(_marked, names)) for modality, names in mm_hashes.items()}
    original(self, marked, mm_kwargs)
