"""The architectures that `make_tiny_model.py` makes, one entry each.

An entry is a function that builds the transformers model, another one that gives the settings of
its processors, and the special tokens; `make_tiny_model.py` does the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import transformers

VOCAB_SIZE = 640
MAX_POSITIONS = 32768
MIN_PIXELS = 56 * 56
MAX_PIXELS = 1792 * 1792
ROPE_THETA = 1_000_000.0
MROPE_SECTION = [8, 12, 12]
MROPE_SECTION_INTERLEAVED = [12, 10, 10]

CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class Size:
    """Sizes of one model; `head_dim` is one of those vLLM's CPU attention supports."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    crop_px: int  # edge of an image, or of one crop of it, where an encoder takes no other
    head_dim: int = 64


SIZES = {
    "tiny": Size(256, 4, 4, 2, 512, 128, 2, 4, 256, 112),
    "bench": Size(768, 8, 12, 4, 2048, 384, 6, 6, 1024, 224),
}

TokenIds = dict[str, int]
"""Ids of the special tokens."""


@dataclass(frozen=True)
class Architecture:
    """How the checkpoint of one architecture is made.

    Attributes:
        special_tokens: of the tokenizer, in the order of their ids.
        image: prompt text that stands for one image.
        video: prompt text that stands for one video, empty where the model takes none.
        model: the transformers model, with its default (unused) initial weights.
        processors: content of the files with the processors' settings, by name.
        named_tokens: special tokens that the processor asks its tokenizer for, by name.
        published: name and form of a weight in published checkpoints, by those that transformers
            saves it with; None where they are the same. vLLM knows the published ones only.
    """

    special_tokens: tuple[str, ...]
    image: str
    video: str
    model: Callable[[Size, TokenIds], "transformers.PreTrainedModel"]
    processors: Callable[[Size], dict[str, dict[str, Any]]]
    named_tokens: dict[str, str] = field(default_factory=dict)
    published: Callable[[str, "torch.Tensor"], tuple[str, "torch.Tensor"]] | None = None


CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Every model has them: its chat template is the same."""


def _text(size: Size, ids: TokenIds) -> dict[str, Any]:
    """What all language models are configured with."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }


def _rope(**further: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": ROPE_THETA, **further}


# What all image and video processors are configured with.
_PIXELS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}


# -- Qwen-VL ---------------------------------------------------------------------------------------

QWEN_TOKENS = (
    *CHAT_TOKENS,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def _qwen_ids(ids: TokenIds) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _qwen2_vl(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=_text(size, ids)
            | {
                "rope_parameters": _rope(mrope_section=MROPE_SECTION),
                "max_window_layers": size.layers,
            },
            vision_config={
                "depth": size.vision_layers,
                "num_heads": size.vision_heads,
                "embed_dim": size.vision_hidden,
                "hidden_size": size.hidden,
                "mlp_ratio": size.vision_mlp // size.vision_hidden,
            },
            **_qwen_ids(ids),
        )
    )


def _qwen2_5_vl(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=_text(size, ids)
            | {
                "rope_parameters": _rope(mrope_section=MROPE_SECTION),
                "max_window_layers": size.layers,
            },
            vision_config={
                "depth": size.vision_layers,
                "num_heads": size.vision_heads,
                "hidden_size": size.vision_hidden,
                "intermediate_size": size.vision_mlp,
                "out_hidden_size": size.hidden,
                # Both kinds of layers occur: windows, and full attention in every second layer.
                "fullatt_block_indexes": list(range(1, size.vision_layers, 2)),
            },
            **_qwen_ids(ids),
        )
    )


def _qwen3_text(size: Size, ids: TokenIds) -> dict[str, Any]:
    rope = _rope(mrope_section=MROPE_SECTION_INTERLEAVED, mrope_interleaved=True)
    return _text(size, ids) | {"head_dim": size.head_dim, "rope_parameters": rope}


def _qwen3_vision(size: Size) -> dict[str, Any]:
    return {
        "depth": size.vision_layers + 1,  # one layer more, so that deepstack taps inner ones
        "num_heads": size.vision_heads,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 24 * 24,
        "deepstack_visual_indexes": [0, size.vision_layers - 1],
    }


def _qwen3_vl(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.Qwen3VLForConditionalGeneration(
        transformers.Qwen3VLConfig(
            text_config=_qwen3_text(size, ids), vision_config=_qwen3_vision(size), **_qwen_ids(ids)
        )
    )


def _qwen3_vl_moe(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    experts = {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,  # for vLLM; transformers does it always
        # No expert's matrix is square: transformers tells by its shape whether it is transposed.
        "moe_intermediate_size": size.mlp // 8,
    }
    return transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config=_qwen3_text(size, ids) | experts,
            vision_config=_qwen3_vision(size),
            **_qwen_ids(ids),
        )
    )


def _transposed_experts(name: str, weight: "torch.Tensor") -> tuple[str, "torch.Tensor"]:
    return name, weight.transpose(1, 2).contiguous() if ".experts." in name else weight


def _qwen_processors(
    processor: str, image: str, video: str, **pixels: Any
) -> dict[str, dict[str, Any]]:
    common = {
        **_PIXELS,
        **pixels,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "processor_class": processor,
    }
    return {
        "preprocessor_config.json": common | {"image_processor_type": image},
        "video_preprocessor_config.json": common
        | {"video_processor_type": video, "cap_pixels_per_frame": False},
        "processor_config.json": {"processor_class": processor},
    }


def _qwen2_processors(processor: str) -> dict[str, dict[str, Any]]:
    return _qwen_processors(
        processor,
        "Qwen2VLImageProcessor",
        "Qwen2VLVideoProcessor",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        patch_size=14,
    )


def _qwen3_processors(_: Size) -> dict[str, dict[str, Any]]:
    return _qwen_processors(
        "Qwen3VLProcessor",
        "Qwen2VLImageProcessorFast",
        "Qwen3VLVideoProcessor",
        image_mean=HALF,
        image_std=HALF,
        patch_size=16,
    )


# -- LLaVA -----------------------------------------------------------------------------------------


def _nested_vision_tower(name: str, weight: "torch.Tensor") -> tuple[str, "torch.Tensor"]:
    """transformers 5 dropped one level from the module trees of CLIP and SigLIP."""
    prefix, nested = "vision_tower.", "vision_tower.vision_model."
    if name.startswith(prefix) and not name.startswith(nested):
        name = nested + name.removeprefix(prefix)
    return name, weight


def _grid_pinpoints(size: Size) -> list[list[int]]:
    crop = size.crop_px
    return [[crop * rows, crop * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def _clip_vision(size: Size) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_heads,
        "image_size": size.crop_px,
        "patch_size": 14,
    }


def _llava_text(size: Size, ids: TokenIds) -> dict[str, Any]:
    return _text(size, ids) | {"model_type": "llama", "rope_parameters": _rope()}


def _llava(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config=_llava_text(size, ids),
            vision_config=_clip_vision(size),
            image_token_index=ids["<image>"],
            image_seq_length=(size.crop_px // 14) ** 2,
        )
    )


def _clip_processors(
    size: Size, processor: str, image: str, **further: Any
) -> dict[str, dict[str, Any]]:
    return {
        "preprocessor_config.json": _PIXELS
        | {
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "size": {"shortest_edge": size.crop_px},
            "do_center_crop": True,
            "crop_size": {"height": size.crop_px, "width": size.crop_px},
            "image_processor_type": image,
            "processor_class": processor,
            **further,
        },
        "processor_config.json": {
            "processor_class": processor,
            "image_token": "<image>",
            "patch_size": 14,
            "num_additional_image_tokens": 1,  # CLIP's class token, which "default" leaves out
            "vision_feature_select_strategy": "default",
        },
    }


def _llava_next(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(
            text_config=_llava_text(size, ids),
            vision_config=_clip_vision(size),
            image_token_index=ids["<image>"],
            image_grid_pinpoints=_grid_pinpoints(size),
        )
    )


def _llava_onevision(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.LlavaOnevisionForConditionalGeneration(
        transformers.LlavaOnevisionConfig(
            text_config=_text(size, ids)
            | {
                "model_type": "qwen2",
                "rope_parameters": _rope(),
                "max_window_layers": size.layers,
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "hidden_size": size.vision_hidden,
                "intermediate_size": size.vision_mlp,
                "num_hidden_layers": size.vision_layers,
                "num_attention_heads": size.vision_heads,
                "image_size": size.crop_px,
                "patch_size": 14,
                "vision_use_head": False,
            },
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=_grid_pinpoints(size),
        )
    )


def _llava_onevision_processors(size: Size) -> dict[str, dict[str, Any]]:
    processor = "LlavaOnevisionProcessor"
    common = _PIXELS | {
        "image_mean": HALF,
        "image_std": HALF,
        "size": {"height": size.crop_px, "width": size.crop_px},
        "processor_class": processor,
    }
    return {
        "preprocessor_config.json": common
        | {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": _grid_pinpoints(size),
        },
        "video_preprocessor_config.json": common
        | {"video_processor_type": "LlavaOnevisionVideoProcessor"},
        "processor_config.json": {
            "processor_class": processor,
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (size.crop_px // 14) ** 2,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
    }


# -- InternVL --------------------------------------------------------------------------------------


def _internvl_tokens(size: Size) -> int:
    """Tokens of a tile: the projector takes 2 x 2 patches together."""
    return (size.crop_px // 14) ** 2 // 4


def _internvl(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(
            text_config=_text(size, ids)
            | {
                "model_type": "qwen2",
                "rope_parameters": _rope(),
                "max_window_layers": size.layers,
            },
            vision_config={
                "hidden_size": size.vision_hidden,
                "intermediate_size": size.vision_mlp,
                "num_hidden_layers": size.vision_layers,
                "num_attention_heads": size.vision_heads,
                "image_size": size.crop_px,
                "patch_size": 14,
            },
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=_internvl_tokens(size),
            tie_word_embeddings=False,
        )
    )


def _internvl_processors(size: Size) -> dict[str, dict[str, Any]]:
    processor = "InternVLProcessor"
    common = _PIXELS | {
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "size": {"height": size.crop_px, "width": size.crop_px},
        "processor_class": processor,
    }
    return {
        "preprocessor_config.json": common
        | {
            "image_processor_type": "GotOcr2ImageProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 9,
        },
        "video_preprocessor_config.json": common
        | {"video_processor_type": "InternVLVideoProcessor"},
        "processor_config.json": {
            "processor_class": processor,
            "image_seq_length": _internvl_tokens(size),
        },
    }


# -- Mistral ---------------------------------------------------------------------------------------


def _mistral3(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    # Queries grow with their position, every so many tokens. Published models begin at 16,384.
    step, beta = 64, 0.1
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=_text(size, ids)
            | {
                "model_type": "ministral3",
                "head_dim": size.head_dim,
                "rope_parameters": _rope(
                    original_max_position_embeddings=step, llama_4_scaling_beta=beta
                ),
                # The same for vLLM, which reads it from Mistral's own configurations.
                "llama_4_scaling": {"original_max_position_embeddings": step, "beta": beta},
            },
            vision_config={
                "model_type": "pixtral",
                "hidden_size": size.vision_hidden,
                "intermediate_size": size.vision_mlp,
                "num_hidden_layers": size.vision_layers,
                "num_attention_heads": size.vision_heads,
                "image_size": math.isqrt(MAX_PIXELS),
                "patch_size": 14,
                "hidden_act": "silu",
            },
            image_token_index=ids["[IMG]"],
            tie_word_embeddings=False,
        )
    )


def _mistral3_processors(_: Size) -> dict[str, dict[str, Any]]:
    processor = "PixtralProcessor"
    return {
        "preprocessor_config.json": _PIXELS
        | {
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "patch_size": 14,
            "size": {"longest_edge": math.isqrt(MAX_PIXELS)},
            "image_processor_type": "PixtralImageProcessor",
            "processor_class": processor,
        },
        "processor_config.json": {
            "processor_class": processor,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    }


# -- GLM -------------------------------------------------------------------------------------------

_GLM_TOKENS = (
    *CHAT_TOKENS,
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|video|>",
)
_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
_GLM_VIDEO = "<|begin_of_video|><|video|><|end_of_video|>"


def _glm_ids(ids: TokenIds) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_token_id": ids["<|video|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
    }


def _glm_text(size: Size, ids: TokenIds) -> dict[str, Any]:
    # Half of a head is rotated.
    rope = _rope(mrope_section=[4, 6, 6], partial_rotary_factor=0.5)
    # GLM-4.1V's attention has a bias always in transformers, and in vLLM if told so.
    return _text(size, ids) | {"rope_parameters": rope, "attention_bias": True}


def _glm_vision(size: Size) -> dict[str, Any]:
    return {
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "out_hidden_size": size.hidden,
    }


def _glm4v(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    return transformers.Glm4vForConditionalGeneration(
        transformers.Glm4vConfig(
            text_config=_glm_text(size, ids), vision_config=_glm_vision(size), **_glm_ids(ids)
        )
    )


def _glm_ocr(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    # vLLM makes the merger as wide as the text model's MLP, transformers three times its output.
    mlp = {"intermediate_size": 3 * size.hidden, "attention_bias": False}
    return transformers.GlmOcrForConditionalGeneration(
        transformers.GlmOcrConfig(
            text_config=_glm_text(size, ids) | mlp,
            vision_config=_glm_vision(size),
            **_glm_ids(ids),
        )
    )


def _glm4v_moe(size: Size, ids: TokenIds) -> "transformers.PreTrainedModel":
    import transformers

    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_qk_norm": False,  # for vLLM
        "moe_intermediate_size": size.mlp // 8,
    }
    return transformers.Glm4vMoeForConditionalGeneration(
        transformers.Glm4vMoeConfig(
            text_config=_glm_text(size, ids) | experts | {"head_dim": size.head_dim},
            vision_config=_glm_vision(size),
            **_glm_ids(ids),
        )
    )


def _glm_processors(_: Size) -> dict[str, dict[str, Any]]:
    return _qwen_processors(
        "Glm4vProcessor",
        "Glm4vImageProcessor",
        "Glm4vVideoProcessor",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        patch_size=14,
    )


ARCHITECTURES = {
    "qwen2_5_vl": Architecture(
        QWEN_TOKENS,
        _QWEN_IMAGE,
        _QWEN_VIDEO,
        _qwen2_5_vl,
        lambda _: _qwen2_processors("Qwen2_5_VLProcessor"),
    ),
    "qwen2_vl": Architecture(
        QWEN_TOKENS,
        _QWEN_IMAGE,
        _QWEN_VIDEO,
        _qwen2_vl,
        lambda _: _qwen2_processors("Qwen2VLProcessor"),
    ),
    "qwen3_vl": Architecture(QWEN_TOKENS, _QWEN_IMAGE, _QWEN_VIDEO, _qwen3_vl, _qwen3_processors),
    "qwen3_vl_moe": Architecture(
        QWEN_TOKENS,
        _QWEN_IMAGE,
        _QWEN_VIDEO,
        _qwen3_vl_moe,
        _qwen3_processors,
        published=_transposed_experts,
    ),
    "llava": Architecture(
        (*CHAT_TOKENS, "<image>"),
        "<image>",
        "",
        _llava,
        lambda size: _clip_processors(size, "LlavaProcessor", "CLIPImageProcessor"),
        published=_nested_vision_tower,
    ),
    "llava_next": Architecture(
        (*CHAT_TOKENS, "<image>"),
        "<image>",
        "",
        _llava_next,
        lambda size: _clip_processors(
            size,
            "LlavaNextProcessor",
            "LlavaNextImageProcessor",
            do_pad=True,
            image_grid_pinpoints=_grid_pinpoints(size),
        ),
        published=_nested_vision_tower,
    ),
    "llava_onevision": Architecture(
        (*CHAT_TOKENS, "<image>", "<video>"),
        "<image>",
        "<video>",
        _llava_onevision,
        _llava_onevision_processors,
        published=_nested_vision_tower,
    ),
    "internvl": Architecture(
        (*CHAT_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        "<IMG_CONTEXT>",
        "<video>",
        _internvl,
        _internvl_processors,
        named_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "mistral3": Architecture(
        (*CHAT_TOKENS, "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        "[IMG]",
        "",
        _mistral3,
        _mistral3_processors,
    ),
    "glm4v": Architecture(_GLM_TOKENS, _GLM_IMAGE, _GLM_VIDEO, _glm4v, _glm_processors),
    "glm4v_moe": Architecture(_GLM_TOKENS, _GLM_IMAGE, _GLM_VIDEO, _glm4v_moe, _glm_processors),
    "glm_ocr": Architecture(_GLM_TOKENS, _GLM_IMAGE, _GLM_VIDEO, _glm_ocr, _glm_processors),
}
