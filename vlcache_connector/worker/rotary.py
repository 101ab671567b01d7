"""Reads a model's rotation off its live rotary module.

vLLM seam: `vllm/model_executor/layers/rotary_embedding` (0.32), the classes that `get_rope` makes,
their `_compute_inv_freq`, and their `cos_sin_cache` [positions, rotary_dim], which holds the
cosines of a position in its first half and the sines in its second.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import (
    DynamicNTKAlphaRotaryEmbedding,
    DynamicNTKScalingRotaryEmbedding,
    LinearScalingRotaryEmbedding,
    Llama3RotaryEmbedding,
    MRotaryEmbedding,
    RotaryEmbedding,
    YaRNScalingRotaryEmbedding,
)

from vlcache_connector.rope import RotarySpec


class UnsupportedRotaryError(ValueError):
    """The model's rotary module is of no known kind, or does not rotate as its kind should."""

    def __init__(self, module: nn.Module, reason: str) -> None:
        super().__init__(f"{type(module).__name__}: {reason}")


def rotary_spec(rotary_module: nn.Module) -> RotarySpec:
    """Derives the spec of a live rotary module and checks it against the module's cos/sin cache.

    Args:
        rotary_module: the `rotary_emb` of a vLLM attention module. It is not changed.

    Returns:
        The spec, with inv_freq on the CPU, so that its fingerprint does not depend on the device
        that the model runs on.

    Raises:
        UnsupportedRotaryError: the class is not one of those known to rotate every key by fixed
            frequencies, or its cache holds other angles than its frequencies give.
    """
    # The exact class counts: subclasses such as Ernie4_5_VLRotaryEmbedding deal their frequencies
    # to the axes in another order than their parent, over the very same cache.
    inv_freq_of = _INV_FREQ_BY_CLASS.get(type(rotary_module))
    if inv_freq_of is None:
        raise UnsupportedRotaryError(rotary_module, "rotary class is not supported")
    module: Any = rotary_module
    section = getattr(module, "mrope_section", None)
    try:
        # Without the context a caller's default device would decide where these are made.
        with torch.device("cpu"):
            inv_freq = inv_freq_of(module)
        spec = RotarySpec(
            inv_freq=inv_freq.to(torch.float32),
            head_dim=module.head_size,
            rotary_dim=module.rotary_dim,
            is_neox=module.is_neox_style,
            mrope_section=tuple(section) if section else None,
            mrope_interleaved=bool(section and module.mrope_interleaved),
        )
    except ValueError as error:
        raise UnsupportedRotaryError(module, str(error)) from error
    _verify(module, spec)
    return spec


def _base_inv_freq(module: Any) -> Tensor:
    return module._compute_inv_freq(module.base)


def _linear_inv_freq(module: Any) -> Tensor:
    if len(module.scaling_factors) != 1:
        raise ValueError(f"several linear scaling factors at once: {module.scaling_factors}")
    return module._compute_inv_freq(module.base) / module.scaling_factors[0]


def _dynamic_alpha_inv_freq(module: Any) -> Tensor:
    exponent = module.rotary_dim / (module.rotary_dim - 2)
    return module._compute_inv_freq(module.base * module.scaling_alpha**exponent)


def _dynamic_scaling_inv_freq(module: Any) -> Tensor:
    exponent = module.rotary_dim / (module.rotary_dim - 2)
    factor = module.scaling_factor
    stretch = factor * module.max_position_embeddings / module.max_trained_positions - (factor - 1)
    return module._compute_inv_freq(module.base * stretch**exponent)


def _yarn_inv_freq(module: Any) -> Tensor:
    # YaRN's _compute_inv_freq takes the scaling factor where the other classes take the base.
    return module._compute_inv_freq(module.scaling_factor)


def _mrope_inv_freq(module: Any) -> Tensor:
    return _base_inv_freq(module) if module.scaling_factor is None else _yarn_inv_freq(module)


_INV_FREQ_BY_CLASS: dict[type[nn.Module], Callable[[Any], Tensor]] = {
    RotaryEmbedding: _base_inv_freq,
    LinearScalingRotaryEmbedding: _linear_inv_freq,
    DynamicNTKAlphaRotaryEmbedding: _dynamic_alpha_inv_freq,
    DynamicNTKScalingRotaryEmbedding: _dynamic_scaling_inv_freq,
    YaRNScalingRotaryEmbedding: _yarn_inv_freq,
    Llama3RotaryEmbedding: _base_inv_freq,
    MRotaryEmbedding: _mrope_inv_freq,
}


def _verify(module: Any, spec: RotarySpec) -> None:
    cache: Tensor = module.cos_sin_cache
    if cache.dim() != 2 or not cache.shape[0] or cache.shape[1] != spec.rotary_dim:
        raise UnsupportedRotaryError(
            module, f"cos_sin_cache must be [positions, {spec.rotary_dim}], got {list(cache.shape)}"
        )
    # Powers of two bring every frequency to angles large enough to tell it from its neighbours.
    last = cache.shape[0] - 1
    positions = torch.tensor(
        [0, *(1 << bit for bit in range(last.bit_length())), last], device="cpu"
    )
    actual = cache[positions.to(cache.device)].to("cpu", torch.float64)
    angles = positions[:, None].to(torch.float64) * spec.inv_freq.to(torch.float64)
    expected = torch.cat((angles.cos(), angles.sin()), dim=-1)

    # The attention factor scales every entry alike, so it is the common modulus.
    modulus = torch.hypot(*actual.chunk(2, dim=-1)).mean()
    # vLLM builds the cache from float32 angles, possibly on another device; a cast to the model's
    # dtype follows. The cache may have been cast up again from a coarser dtype since.
    resolution = max(torch.finfo(cache.dtype).eps, torch.finfo(module.dtype).eps)
    angle_error = 16 * torch.finfo(torch.float32).eps * (1 + angles.abs())
    tolerance = modulus * (2 * resolution * expected.abs() + torch.cat((angle_error,) * 2, dim=-1))
    error = (actual - modulus * expected).abs()
    # Written so that a cache of NaN or of zeros fails as well.
    if not bool((error < tolerance).all()):
        worst = positions[(error - tolerance).amax(dim=-1).argmax()]
        raise UnsupportedRotaryError(
            module, f"cos_sin_cache disagrees with the frequencies (worst at position {worst})"
        )
