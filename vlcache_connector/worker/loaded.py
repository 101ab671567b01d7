"""The model object that vLLM loaded.

vLLM seam, patched: `BaseModelLoader.load_model`
(`vllm/model_executor/model_loader/base_loader.py`). Connectors are not handed the model, and this
is the only place that sees it for both model runners.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from .. import weights
from ..attention import hook
from ..support import config_of, own_transfer, uses_vlcache
from .checksum import checksum

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


logger = init_logger(__name__)


@dataclass(frozen=True)
class _Loaded:
    config: weakref.ref[ModelConfig]
    model: weakref.ref[torch.nn.Module]
    checksum: str | None
    """Of its weights as they were loaded; None where nobody will ask."""


_loaded: list[_Loaded] = []


def watch_model_loading() -> None:
    """Patch the model loader, once per process.

    Where VLCache is used, attention backends are wrapped before the model is made, and the model is
    remembered.
    """
    original = BaseModelLoader.load_model
    if hasattr(original, "_vlcache_original"):
        return

    @functools.wraps(original)
    def load_model(
        self: BaseModelLoader, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        if not uses_vlcache(vllm_config):
            return original(self, vllm_config, model_config, prefix)
        if own_transfer(vllm_config) is not None:
            hook.install()
        model = original(self, vllm_config, model_config, prefix)
        tiers = config_of(vllm_config).tier_keys
        _loaded.append(
            _Loaded(
                weakref.ref(model_config), weakref.ref(model), checksum(model) if tiers else None
            )
        )
        weights.watch(model)
        return model

    load_model._vlcache_original = original  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model  # type: ignore[method-assign]


def loaded_model(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model that this process loaded for `vllm_config`.

    Raises:
        RuntimeError: no loader was seen; the plugin was not active when the model was loaded.
    """
    return _find(vllm_config)[1]


def holds_what_was_loaded(vllm_config: VllmConfig) -> bool:
    """Whether the model has the weights that it was loaded with."""
    try:
        loaded, model = _find(vllm_config)
        return checksum(model) == loaded.checksum
    except Exception:
        logger.exception("VLCache: the weights can't be compared with those that were loaded")
        return False


def _find(vllm_config: VllmConfig) -> tuple[_Loaded, torch.nn.Module]:
    for loaded in reversed(_loaded):
        model = loaded.model()
        if model is not None and loaded.config() is vllm_config.model_config:
            return loaded, model
    raise RuntimeError(
        "VLCache did not see the model being loaded: the vLLM plugin `vlcache` was not active. "
        "Install the package (its entry point is in vllm.general_plugins) and, if VLLM_PLUGINS is "
        "set, add `vlcache` to it"
    )
