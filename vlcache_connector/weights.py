"""Updates of the weights in place: noticed, so that nothing made by old ones outlives them.

Weights change under a running engine: `reload_weights`, weight transfer from a trainer, sleeping
with the weights discarded, a trainer in the engine's own process. Whatever may have changed them
begins a new generation: what is kept in memory and what is under way is forgotten, and the workers
compare the weights that they hold with those that they loaded before they use what lies below host
memory again, which is shared under the identity of the files.

vLLM seams, patched: `EngineCore.collective_rpc` and `set_weight_version`
(`vllm/v1/engine/core.py`), by which a running engine is told to do anything to its weights, and
`load_weights` of the model object, for a trainer in the same process.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

_generation = 0
_listeners: list[weakref.WeakMethod[Callable[[], Any]]] = []


def generation() -> int:
    """How often the weights of this process's engine may have changed."""
    return _generation


def may_have_changed() -> None:
    """Begin a new generation."""
    global _generation
    _generation += 1
    for reference in list(_listeners):
        listener = reference()
        if listener is None:
            _listeners.remove(reference)
        else:
            listener()


def listen(listener: Callable[[], Any]) -> None:
    """Have a method called when a generation begins, as long as its object lives."""
    _watch_engine()
    _listeners.append(weakref.WeakMethod(listener))


def watch(model: torch.nn.Module) -> None:
    """Notice when weights are loaded into a model that is being served."""
    load: Any = getattr(model, "load_weights", None)
    if load is not None:
        model.load_weights = _watched(load)  # type: ignore[assignment]


def _watch_engine() -> None:
    """Patch `EngineCore`, once per process."""
    from vllm.v1.engine.core import EngineCore  # this runs in its process

    for name in ("collective_rpc", "set_weight_version"):
        original = getattr(EngineCore, name)
        if not hasattr(original, "_vlcache_original"):
            setattr(EngineCore, name, _watched(original))


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            may_have_changed()

    watched._vlcache_original = function  # type: ignore[attr-defined]
    return watched
