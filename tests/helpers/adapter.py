"""A LoRA adapter of the tiny models, in PEFT's format."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 4


def make_adapter(folder: Path, model: Path) -> Path:
    """Write an adapter of all query and MLP projections that changes every answer.

    Args:
        folder: made here, and returned.
        model: the directory of a tiny Qwen2-VL or Qwen2.5-VL.
    """
    text = json.loads((model / "config.json").read_text())
    text = text.get("text_config", text)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    heads = text["num_attention_heads"]
    widths = {
        "self_attn.q_proj": (hidden, text.get("head_dim", hidden // heads) * heads),
        "self_attn.v_proj": (
            hidden,
            text.get("head_dim", hidden // heads) * text["num_key_value_heads"],
        ),
        "mlp.up_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(text["num_hidden_layers"]):
        for module, (taken, given) in widths.items():
            name = f"base_model.model.model.language_model.layers.{layer}.{module}"
            for part, shape in (("A", (RANK, taken)), ("B", (given, RANK))):
                weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                tensors[f"{name}.lora_{part}.weight"] = weight
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [module.rpartition(".")[2] for module in widths],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
