"""vLLM's own attention backends, wrapped so that KV writes can be observed.

vLLM seams: `register_backend` (`vllm/v1/attention/backends/registry.py`) and
`AttentionImpl.do_kv_cache_update`, the one place that sees post-RoPE K, V and slots on every
backend and KV layout. A wrapped backend is its parent class in all but this: without an
observer it does nothing more.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

WRAPPED_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
"""Members of `AttentionBackendEnum` whose KV write is a call of its own."""


class KVWriteObserver(Protocol):
    """Sees what is written into the paged KV cache."""

    def on_kv_write(
        self, layer_name: str, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """K and V [num_tokens, kv_heads, head_dim] were written to `slots` [num_tokens] int64."""


_observer: KVWriteObserver | None = None


def observe_kv_writes(observer: KVWriteObserver | None) -> None:
    """Make `observer` see all further KV writes of this process; None ends it."""
    global _observer
    _observer = observer


class KVWriteHook:
    """Mixin over an `AttentionImpl`."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write as the parent does, then tell the observer."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if _observer is not None:
            _observer.on_kv_write(layer.layer_name, key, value, slot_mapping)


def write_kv(layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write K and V [n, kv_heads, head_dim] to `slots` [n] int64 of `layer`'s paged KV cache.

    The observer does not see it: reused KV is never stored again.
    """
    super(KVWriteHook, layer.impl).do_kv_cache_update(layer, key, value, layer.kv_cache, slots)


def install() -> None:
    """Register the wrapped backends for the models that are loaded next; safe to call again."""
    for name in WRAPPED_BACKENDS:
        member = AttentionBackendEnum[name]
        if not member.is_overridden():
            register_backend(member, f"{__name__}.{name}")


def __getattr__(name: str) -> type:
    """Wrap backend `name` when vLLM first resolves it: importing all of them would need a GPU."""
    if name not in WRAPPED_BACKENDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    parent = resolve_obj_by_qualname(AttentionBackendEnum[name].value)
    parent_impl = parent.get_impl_cls()
    impl = type(f"VLCache{parent_impl.__name__}", (KVWriteHook, parent_impl), {})
    backend = type(
        name,
        (parent,),
        {"__module__": __name__, "get_impl_cls": staticmethod(lambda: impl)},
    )
    globals()[name] = backend
    return backend
