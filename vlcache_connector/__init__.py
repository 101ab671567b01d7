"""Position-independent reuse of image KV for vision-language models in vLLM."""

__version__ = "0.1.0"


def register() -> None:
    """Plugin entry point (`vllm.general_plugins`); vLLM runs it in every process, maybe twice."""
    from vllm.distributed.ec_transfer.ec_connector.factory import ECConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from . import frontend
    from .attention import hook
    from .worker import model

    frontend.refuse_missing_embeddings()
    frontend.mark_client_chosen_names()
    hook.install()
    model.remember_loaded_models()
    for factory, name, module in (
        (KVConnectorFactory, "VLCacheConnector", "connector"),
        (ECConnectorFactory, "VLCacheEncoderConnector", "encoder_connector"),
    ):
        if name not in factory._registry:
            factory.register_connector(name, f"{__name__}.{module}", name)
