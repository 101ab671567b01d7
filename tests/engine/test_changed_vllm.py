"""An engine whose vLLM is not the one that VLCache was made for."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from vllm.v1.core.block_pool import BlockPool

from tests.helpers.engine import IMAGE, Ask, Engine

ASKS = (
    Ask(f"first {IMAGE} what", ((1, 112),), max_tokens=2),
    Ask(f"behind another text {IMAGE} what", ((1, 112),), max_tokens=2),
)


def change_vllm(log: Path) -> None:
    """A vLLM without one function, and with another signature; it runs all the same."""
    import vllm.tokenizers

    logging.getLogger("vlcache_connector").addHandler(logging.FileHandler(log))
    del vllm.tokenizers.cached_tokenizer_from_config
    take = BlockPool.get_new_blocks
    BlockPool.get_new_blocks = lambda self, count: take(self, count)  # type: ignore[method-assign]


def test_an_engine_whose_vllm_has_changed_serves_as_plain_vllm(
    engines: Callable[..., Engine], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    expected = [engines(None).ask(ask)[0] for ask in ASKS]
    engine = Engine(tiny_model(), {}, prepare=functools.partial(change_vllm, log))
    try:
        answers = [engine.ask(ask)[0] for ask in ASKS]
    finally:
        engine.close()
    for answer, plain in zip(answers, expected, strict=True):
        assert answer.tokens == plain.tokens
        assert answer.figures is None
        np.testing.assert_array_equal(answer.logprobs, plain.logprobs)
    [line] = log.read_text().splitlines()
    assert line.startswith("VLCache is off, vLLM runs as without it: vLLM ")
    assert "BlockPool.get_new_blocks takes (count), not (num_blocks)" in line
    assert "and 1 more" in line
