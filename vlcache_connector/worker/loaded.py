"""The model object that vLLM loaded.

vLLM seam, patched: `BaseModelLoader.load_model`
(`vllm/model_executor/model_loader/base_loader.py`). Connectors are not handed the model, and this
is the only place that sees it for both model runners.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..attention import hook
from ..support import own_transfer

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_loaded: list[tuple[weakref.ref[ModelConfig], weakref.ref[torch.nn.Module]]] = []


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
        if own_transfer(vllm_config) is None:
            return original(self, vllm_config, model_config, prefix)
        hook.install()
        model = original(self, vllm_config, model_config, prefix)
        _loaded.append((weakref.ref(model_config), weakref.ref(model)))
        return model

    load_model._vlcache_original = original  # type: ignore[attr-defined]
    BaseModelLoader.load_model = load_model  # type: ignore[method-assign]


def loaded_model(vllm_config: VllmConfig) -> torch.nn.Module:
    """The model that this process loaded for `vllm_config`.

    Raises:
        RuntimeError: no loader was seen; the plugin was not active when the model was loaded.
    """
    for config_ref, model_ref in reversed(_loaded):
        model = model_ref()
        if model is not None and config_ref() is vllm_config.model_config:
            return model
    raise RuntimeError(
        "VLCache did not see the model being loaded: the vLLM plugin `vlcache` was not active. "
        "Install the package (its entry point is in vllm.general_plugins) and, if VLLM_PLUGINS is "
        "set, add `vlcache` to it"
    )
