"""Rotary specs read off real vLLM rotary modules."""

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import (
    DualChunkRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    MRotaryEmbedding,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
    get_rope,
)
from vllm.model_executor.layers.rotary_embedding.ernie45_vl_rope import Ernie4_5_VLRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import apply_interleaved_rope

from vlcache_connector.rope import RotarySpec, delta_angles, shift_keys
from vlcache_connector.worker.rotary import UnsupportedRotaryError, rotary_spec

HEAD_DIM = 128
KV_HEADS = 2
MAX_POSITION = 4096
TOKENS = 64

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
CHUNKED = {"mrope_section": [16, 24, 24]}
INTERLEAVED = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}

SUPPORTED = {
    "default": {},
    "default-theta-1e6": {"rope_theta": 1e6},
    "partial": {"partial_rotary_factor": 0.25},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic-factor": {
        "rope_type": "dynamic",
        "factor": 2.0,
        "max_trained_positions": MAX_POSITION // 2,
    },
    "dynamic-alpha": {"rope_type": "dynamic", "alpha": 1000.0},
    "yarn": YARN,
    "yarn-attention-factor": YARN | {"attention_factor": 1.7},
    "yarn-partial-untruncated": YARN | {"partial_rotary_factor": 0.5, "truncate": False},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "mrope-chunked": CHUNKED,
    "mrope-chunked-yarn": YARN | CHUNKED,
    "mrope-interleaved": INTERLEAVED | {"rope_theta": 5e6},
    "mrope-interleaved-yarn": YARN | INTERLEAVED,
    "mrope-interleaved-partial": {
        "partial_rotary_factor": 0.5,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
supported = pytest.mark.parametrize("parameters", SUPPORTED.values(), ids=SUPPORTED)


@pytest.fixture(autouse=True)
def _vllm_config(monkeypatch):
    # get_rope shares modules by their parameters, and a forward in another dtype casts their cache.
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    with set_current_vllm_config(VllmConfig()):
        yield


def make_module(
    parameters: dict, *, is_neox: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Module:
    return get_rope(HEAD_DIM, MAX_POSITION, is_neox, {"rope_type": "default"} | parameters, dtype)


def random_positions(module: nn.Module, generator: torch.Generator) -> Tensor:
    axes = (3,) if getattr(module, "mrope_section", None) else ()
    return torch.randint(0, MAX_POSITION, (*axes, TOKENS), generator=generator)


def rotate_by_module(module: nn.Module, positions: Tensor, keys: Tensor) -> Tensor:
    flat = keys.flatten(1)
    return module.forward_native(positions, flat.clone(), flat.clone())[1].view_as(keys)


@supported
@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "gptj"])
def test_shifted_keys_equal_the_modules_own(parameters, is_neox):
    module = make_module(parameters, is_neox=is_neox)
    spec = rotary_spec(module)
    generator = torch.Generator().manual_seed(0)
    old, new = random_positions(module, generator), random_positions(module, generator)
    keys = torch.randn(TOKENS, KV_HEADS, HEAD_DIM, generator=generator)

    moved = shift_keys(spec, rotate_by_module(module, old, keys), new - old)

    at_new = rotate_by_module(module, new, keys)
    error = (moved - at_new).norm(dim=-1) / at_new.norm(dim=-1)
    # The module rounds its angles, up to MAX_POSITION, to float32; the delta's angle is exact.
    assert error.max() < 4 * MAX_POSITION * torch.finfo(torch.float32).eps
    if spec.rotary_dim < HEAD_DIM:
        assert torch.equal(moved[..., spec.rotary_dim :], keys[..., spec.rotary_dim :])


@supported
def test_small_positions_agree_tightly(parameters):
    module = make_module(parameters)
    generator = torch.Generator().manual_seed(1)
    old = random_positions(module, generator) % 100
    new = random_positions(module, generator) % 100
    keys = torch.randn(TOKENS, KV_HEADS, HEAD_DIM, generator=generator)
    moved = shift_keys(rotary_spec(module), rotate_by_module(module, old, keys), new - old)
    at_new = rotate_by_module(module, new, keys)
    assert ((moved - at_new).norm(dim=-1) / at_new.norm(dim=-1)).max() < 2e-5


@supported
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_of_the_cache_does_not_change_the_spec(parameters, dtype):
    expected = rotary_spec(make_module(parameters)).fingerprint()
    assert rotary_spec(make_module(parameters, dtype=dtype)).fingerprint() == expected


def test_bf16_keys_are_as_close_as_the_modules_cache_is():
    module = make_module(CHUNKED, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(2)
    old, new = random_positions(module, generator), random_positions(module, generator)
    keys = torch.randn(TOKENS, KV_HEADS, HEAD_DIM, generator=generator).to(torch.bfloat16)
    moved = shift_keys(rotary_spec(module), rotate_by_module(module, old, keys), new - old)
    at_new = rotate_by_module(module, new, keys)
    assert ((moved - at_new).float().norm(dim=-1) / at_new.float().norm(dim=-1)).max() < 0.01


def test_text_positions_of_an_mrope_model():
    module = make_module(INTERLEAVED)
    keys = torch.randn(TOKENS, KV_HEADS, HEAD_DIM)
    old, new = torch.arange(TOKENS), torch.arange(TOKENS) * 3 + 50
    moved = shift_keys(rotary_spec(module), rotate_by_module(module, old, keys), new - old)
    torch.testing.assert_close(moved, rotate_by_module(module, new, keys), rtol=1e-4, atol=1e-4)


def test_spec_fields():
    module = make_module(SUPPORTED["mrope-interleaved-partial"], is_neox=False)
    spec = rotary_spec(module)
    assert (spec.head_dim, spec.rotary_dim, spec.is_neox) == (HEAD_DIM, HEAD_DIM // 2, False)
    assert (spec.mrope_section, spec.mrope_interleaved) == ((11, 11, 10), True)
    plain = rotary_spec(make_module({}))
    assert (plain.mrope_section, plain.mrope_interleaved) == (None, False)
    exponents = torch.arange(0, HEAD_DIM, 2) / HEAD_DIM
    torch.testing.assert_close(plain.inv_freq, 10_000**-exponents)


@pytest.mark.parametrize(
    "section", [(24, 20, 20), (22, 21, 21), (32, 16, 16), (64, 0, 0), (16, 24, 24)]
)
@pytest.mark.parametrize("interleaved", [True, False])
def test_axis_order_is_vllms(section, interleaved):
    inv_freq = torch.ones(HEAD_DIM // 2)
    spec = RotarySpec(inv_freq, HEAD_DIM, HEAD_DIM, True, section, interleaved)
    delta = torch.tensor([[0], [1], [2]])
    per_axis = delta[:, :, None].expand(3, 1, HEAD_DIM // 2).to(torch.float32)
    if interleaved:
        expected = apply_interleaved_rope(per_axis, list(section))
    else:
        parts = per_axis.split(section, dim=-1)
        expected = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
    torch.testing.assert_close(delta_angles(spec, delta), expected)


def test_reading_leaves_the_module_alone():
    module = make_module(CHUNKED, dtype=torch.bfloat16)
    cache = module.cos_sin_cache
    before = cache.clone()
    rotary_spec(module)
    assert module.cos_sin_cache is cache
    assert torch.equal(cache, before)


def test_default_dtype_and_device_do_not_matter():
    module = make_module(YARN)
    expected = rotary_spec(module).fingerprint()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert rotary_spec(module).fingerprint() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def make_ernie() -> nn.Module:
    return Ernie4_5_VLRotaryEmbedding(
        HEAD_DIM, HEAD_DIM, 64, 1e4, True, torch.float32, mrope_section=[22, 22, 20]
    )


# The constructors of two classes need a model config or an accelerator; those stay unbuilt.
UNSUPPORTED = {
    "Ernie4_5_VLRotaryEmbedding": make_ernie,
    "Phi3LongRoPEScaledRotaryEmbedding": lambda: nn.Module.__new__(
        Phi3LongRoPEScaledRotaryEmbedding
    ),
    "MRotaryEmbeddingInterleaved": lambda: make_module({"rope_type": "openpangu"} | INTERLEAVED),
    "BailingMRotaryEmbedding": lambda: make_module(
        {"rope_type": "bailing_mrope", "mrope_section": [16, 24, 24]}
    ),
    "DualChunkRotaryEmbedding": lambda: nn.Module.__new__(DualChunkRotaryEmbedding),
    "FourierRotaryEmbedding": lambda: make_module(
        {
            "use_fope": True,
            "num_key_value_heads": KV_HEADS,
            "num_inv_freq": None,
            "fope_sep_head": True,
            "fope_init_factor": 1.0,
        }
    ),
    "DeepseekScalingRotaryEmbedding": lambda: make_module(YARN | {"rope_type": "deepseek_yarn"}),
    "NTKScalingRotaryEmbedding": lambda: make_module({"rope_type": "ntk", "factor": 2.0}),
    "Gemma4RotaryEmbedding": lambda: make_module({"rope_type": "proportional"}),
    "Linear": lambda: nn.Linear(2, 2),
}


@pytest.mark.parametrize(("name", "make"), UNSUPPORTED.items(), ids=UNSUPPORTED)
def test_unknown_classes_are_refused(name, make):
    with pytest.raises(UnsupportedRotaryError, match=f"^{name}: "):
        rotary_spec(make())


def test_error_is_a_value_error():
    assert issubclass(UnsupportedRotaryError, ValueError)


def plain_module(base: float = 1e4, dtype: torch.dtype = torch.float32) -> RotaryEmbedding:
    return RotaryEmbedding(HEAD_DIM, HEAD_DIM, MAX_POSITION, base, True, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tamper",
    [
        lambda cache: plain_module(base=1.05e4).cos_sin_cache.to(cache.dtype),
        lambda cache: cache.roll(1, dims=0),
        lambda cache: cache.roll(HEAD_DIM // 2, dims=1),
        lambda cache: torch.cat((cache[:, :32], cache[:, 32:] * 1.5), dim=1),
        torch.zeros_like,
        lambda cache: torch.full_like(cache, torch.nan),
        lambda cache: cache[:, :-2],
        lambda cache: cache[:0],
    ],
    ids=["base", "row", "sin-cos", "uneven", "zeros", "nan", "narrow", "empty"],
)
def test_disagreeing_cache_is_refused(tamper, dtype):
    module = plain_module(dtype=dtype)
    rotary_spec(module)
    module.cos_sin_cache = tamper(module.cos_sin_cache)
    with pytest.raises(UnsupportedRotaryError, match=r"^RotaryEmbedding: cos_sin_cache"):
        rotary_spec(module)


def test_changed_yarn_scaling_is_noticed():
    module = YaRNScalingRotaryEmbedding(HEAD_DIM, HEAD_DIM, 1024, 1e4, True, 4.0, torch.float32)
    module.scaling_factor = 4.1
    with pytest.raises(UnsupportedRotaryError, match="disagrees"):
        rotary_spec(module)


def test_cache_cast_down_and_up_again_is_accepted():
    module = plain_module(dtype=torch.bfloat16)
    module.forward_native(torch.arange(2), torch.zeros(2, HEAD_DIM), torch.zeros(2, HEAD_DIM))
    assert module.cos_sin_cache.dtype == torch.float32
    rotary_spec(module)


def test_several_linear_factors_are_refused():
    module = LinearScalingRotaryEmbedding(
        HEAD_DIM, HEAD_DIM, 64, 1e4, True, [2.0, 4.0], torch.float32
    )
    with pytest.raises(UnsupportedRotaryError, match="LinearScalingRotaryEmbedding: several"):
        rotary_spec(module)


def test_mrope_of_two_axes_is_refused():
    module = MRotaryEmbedding(
        HEAD_DIM, HEAD_DIM, 64, 1e4, True, torch.float32, mrope_section=[32, 32]
    )
    with pytest.raises(UnsupportedRotaryError, match="MRotaryEmbedding: mrope_section"):
        rotary_spec(module)
