"""Runs as rows of attention metadata, down to what a real causal kernel makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.config import CacheConfig, CUDAGraphMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vlcache_connector.attention.metadata import MetadataFactory, Row, max_rows_of, slots_of
from vlcache_connector.protocol import Span

BLOCK = 32
NUM_BLOCKS = 16
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
LAYERS = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]

needs_cpu_backend = pytest.mark.skipif(
    not current_platform.is_cpu(), reason="reads the CPU backend's metadata and KV layout"
)


def naive_slots(span: Span, block_ids: Sequence[int], block_size: int) -> list[int]:
    slots = []
    for token in range(span.start, span.end):
        block, offset = divmod(token, block_size)
        slots.append(block_ids[block] * block_size + offset)
    return slots


@settings(max_examples=60)
@given(
    block_size=st.sampled_from([1, 2, 16, 32, 48]),
    block_ids=st.lists(st.integers(0, 1 << 20), min_size=1, max_size=8, unique=True),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_slots_are_those_of_a_loop_over_the_tokens(
    block_size: int, block_ids: list[int], ends: tuple[float, float]
) -> None:
    room = len(block_ids) * block_size
    span = Span(*sorted(round(end * room) for end in ends))
    slots = slots_of(span, block_ids, block_size)
    assert slots.dtype == np.int64
    assert slots.tolist() == naive_slots(span, block_ids, block_size)


def test_slots_by_example() -> None:
    assert slots_of(Span(2, 9), [7, 0, 3], 4).tolist() == [30, 31, 0, 1, 2, 3, 12]


def test_slots_of_large_caches_do_not_overflow() -> None:
    assert slots_of(Span(15, 16), (1 << 30,), 16).tolist() == [(1 << 34) + 15]


def test_tokens_behind_the_last_block_have_no_slot() -> None:
    with pytest.raises(IndexError):
        slots_of(Span(0, 9), [5, 6], 4)


@pytest.fixture(scope="module")
def layers(tiny_model: Callable[..., Path]) -> tuple[VllmConfig, dict[str, Attention]]:
    """Two attention layers with an empty KV cache."""
    config = VllmConfig(
        model_config=ModelConfig(model=str(tiny_model()), dtype="float32", max_model_len=512),
        cache_config=CacheConfig(block_size=BLOCK),
    )
    made = {}
    with set_current_vllm_config(config):
        for name in LAYERS:
            layer = Attention(
                HEADS,
                HEAD_DIM,
                HEAD_DIM**-0.5,
                num_kv_heads=KV_HEADS,
                cache_config=config.cache_config,
                prefix=name,
            )
            layer.kv_cache = torch.zeros(NUM_BLOCKS, KV_HEADS, BLOCK, 2 * HEAD_DIM)
            made[name] = layer
    return config, made


@pytest.fixture
def factory(layers: tuple[VllmConfig, dict[str, Attention]]) -> MetadataFactory:
    config, made = layers
    spec = made[LAYERS[0]].get_kv_cache_spec(config)
    group = KVCacheGroupSpec(LAYERS, spec)
    return MetadataFactory(
        config, KVCacheConfig(NUM_BLOCKS, [], [group]), made, torch.device("cpu")
    )


@needs_cpu_backend
def test_every_run_is_a_row_that_ends_with_its_last_token(factory: MetadataFactory) -> None:
    first, second = (9, 4, 2, 7), (3, 1)
    rows = [Row(Span(0, 5), first), Row(Span(40, 41), first), Row(Span(30, 50), second)]
    metadata, slots = factory.build(rows)
    assert list(metadata) == list(slots) == LAYERS
    assert metadata[LAYERS[0]] is metadata[LAYERS[1]]
    built: Any = metadata[LAYERS[0]]
    assert built.query_start_loc.tolist() == [0, 5, 6, 26]
    assert built.seq_lens.tolist() == [5, 41, 50]
    assert built.block_table.tolist() == [[9, 4, 2, 7], [9, 4, 2, 7], [3, 1, 0, 0]]
    assert (built.num_actual_tokens, built.max_query_len, built.max_seq_len) == (26, 20, 50)
    assert built.causal is True
    expected = [slot for row in rows for slot in naive_slots(row.span, row.block_ids, BLOCK)]
    for name in LAYERS:
        assert slots[name].tolist() == expected


def naive_attention(query: Tensor, key: Tensor, value: Tensor, position: int) -> Tensor:
    """Attention of one token, [heads, head_dim], over positions up to its own, in float64."""
    key, value = (
        kv[: position + 1].double().repeat_interleave(HEADS // KV_HEADS, dim=1)
        for kv in (key, value)
    )
    scores = torch.einsum("hd,nhd->hn", query.double(), key) * HEAD_DIM**-0.5
    return torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), value)


@needs_cpu_backend
@pytest.mark.parametrize(
    "runs",
    [
        [(0, Span(0, 70))],
        [(0, Span(0, 1)), (0, Span(33, 40)), (0, Span(69, 70))],
        [(0, Span(5, 9)), (1, Span(0, 45)), (0, Span(64, 66))],
        [(1, Span(31, 33)), (0, Span(31, 33))],
    ],
    ids=["all", "one request", "two requests", "across blocks"],
)
def test_each_token_of_a_run_attends_to_its_own_request_up_to_itself(
    layers: tuple[VllmConfig, dict[str, Attention]],
    factory: MetadataFactory,
    runs: list[tuple[int, Span]],
) -> None:
    """The whole KV is in the cache already, so a token that saw too much would show it."""
    layer = layers[1][LAYERS[0]]
    generator = torch.Generator().manual_seed(0)
    lengths, blocks = [70, 45], [[5, 11, 2], [0, 8]]
    keys, values = (
        [torch.randn(n, KV_HEADS, HEAD_DIM, generator=generator) for n in lengths] for _ in "kv"
    )
    metadata, _ = factory.build([Row(span, blocks[request]) for request, span in runs])
    for key, value, block_ids in zip(keys, values, blocks, strict=True):
        slots = torch.from_numpy(slots_of(Span(0, len(key)), block_ids, BLOCK))
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)
    tokens = [(request, t) for request, span in runs for t in range(span.start, span.end)]
    query = torch.randn(len(tokens), HEADS, HEAD_DIM, generator=generator)
    own = [torch.stack([kv[request][t] for request, t in tokens]) for kv in (keys, values)]
    output = torch.empty_like(query)
    layer.impl.forward(layer, query, *own, layer.kv_cache, metadata[LAYERS[0]], output)
    expected = torch.stack(
        [
            naive_attention(query[row], keys[request], values[request], t)
            for row, (request, t) in enumerate(tokens)
        ]
    )
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def flash_attention_builder(config: VllmConfig, layers: list[str], spec: Any) -> Any:
    """FlashAttention 3's builder under full CUDA graphs, whose kernels are not called."""
    from vllm.v1.attention.backends import flash_attn

    with pytest.MonkeyPatch.context() as patched, set_current_vllm_config(config):
        patched.setattr(flash_attn, "get_flash_attn_version", lambda *_, **__: 3)
        return flash_attn.FlashAttentionMetadataBuilder(spec, layers, config, torch.device("cpu"))


@pytest.mark.parametrize(("max_num_seqs", "captured"), [(8, 16), (700, 512), (3, 1)])
def test_as_many_rows_as_flash_attentions_buffer_holds(
    layers: tuple[VllmConfig, dict[str, Attention]], max_num_seqs: int, captured: int
) -> None:
    config, made = layers
    config = copy.deepcopy(config)
    config.scheduler_config.max_num_seqs = max_num_seqs
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.max_cudagraph_capture_size = captured
    config.compilation_config.static_forward_context = dict(made)
    spec = made[LAYERS[0]].get_kv_cache_spec(config)
    builder = flash_attention_builder(config, LAYERS, spec)
    most = max_rows_of(builder)
    assert most is not None
    assert most >= max(max_num_seqs, captured)

    def entries(rows: int) -> Tensor:
        """What the kernel's own function gives: one entry, four for each row, in fours."""
        return torch.ones(1 + -(-rows // 4) * 16, dtype=torch.int32)

    builder._store_scheduler_metadata(entries(most))
    with pytest.raises(RuntimeError):
        builder._store_scheduler_metadata(entries(most + 1))


def test_without_full_cuda_graphs_any_number_of_rows(
    layers: tuple[VllmConfig, dict[str, Attention]],
) -> None:
    config, made = layers
    spec = made[LAYERS[0]].get_kv_cache_spec(config)
    config = copy.deepcopy(config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    config.compilation_config.static_forward_context = dict(made)
    assert max_rows_of(flash_attention_builder(config, LAYERS, spec)) is None


def test_as_many_rows_as_flashinfer_says() -> None:
    """It can't be imported here: the name is what its buffers are made with."""
    path = Path(vllm.__file__).parent / "v1/attention/backends/flashinfer.py"
    text = path.read_text()
    assert "self.max_num_reqs = max_num_reqs" in text
    assert "self.paged_kv_indptr = CpuGpuBuffer(\n            max_num_reqs + 1," in text
    assert max_rows_of(SimpleNamespace(max_num_reqs=9)) == 9
