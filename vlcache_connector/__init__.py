"""Position-independent reuse of image KV for vision-language models in vLLM."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_CONNECTORS = {
    "VLCacheConnector": "connector",
    "VLCacheEncoderConnector": "encoder_connector",
}


def register() -> None:
    """Plugin entry point (`vllm.general_plugins`); vLLM runs it in every process, maybe twice.

    What vLLM has changed is left alone: it has to run without the connectors in any case. So has a
    process that uses none of them: all that is patched here does nothing more without VLCache.
    """
    from . import seams

    frontend_users = (
        *("frontend.py", "content.py", "media.py"),
        *("identity.py", "refusals.py", "support.py"),
    )
    if all(map(seams.intact, frontend_users)):
        from . import frontend

        frontend.prepare_configurations()
    if seams.intact("worker/loaded.py") and seams.intact("attention/hook.py"):
        from .worker import loaded

        loaded.watch_model_loading()
    if seams.intact("__init__.py"):
        from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        factories: tuple[Any, ...] = (KVConnectorFactory, ECConnectorFactory)
        for factory, name in zip(factories, _CONNECTORS, strict=True):
            if name not in factory._registry:
                factory.register_connector(name, __name__, name)


def __getattr__(name: str) -> Any:
    """The connectors' classes; where a seam has changed, those that do nothing."""
    if name not in _CONNECTORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import seams

    module = "off" if seams.changes() else _CONNECTORS[name]
    return getattr(import_module(f".{module}", __name__), name)
