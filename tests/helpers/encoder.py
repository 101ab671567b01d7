"""Vision encoder runs and encoder rows, looked at inside an engine's process."""

from __future__ import annotations

from typing import Any

from .engine import Ask


def forget_vllms_encoder_cache(llm: Any) -> None:
    """Empty vLLM's own encoder cache, on both sides."""
    llm.llm_engine.reset_encoder_cache()


def count_encoder_runs(llm: Any, ask: Ask) -> int:
    """Run `ask`; how often the vision encoder ran."""
    from vlcache_connector.worker.loaded import loaded_model

    from .engine import run

    model = loaded_model(llm.llm_engine.vllm_config)
    runs = 0
    encode = model.embed_multimodal

    def counting(**kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        return encode(**kwargs)

    model.embed_multimodal = counting
    try:
        run(llm, [ask])
    finally:
        del model.embed_multimodal
    return runs
