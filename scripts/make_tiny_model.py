#!/usr/bin/env python
"""Make a small random-weight vision-language checkpoint that vLLM loads like a real one.

The directory holds all a published checkpoint has: ``config.json``, safetensors weights, a
byte-level BPE tokenizer, image and video processor settings, a chat template and generation
settings. Nothing is downloaded. The same arguments give the same weights everywhere, and a
directory that already holds the model asked for is left as it is.

Usage::

    python scripts/make_tiny_model.py --arch qwen2_5_vl --size tiny OUTPUT_DIR

The weights are random, but scaled so that the model behaves: attention is peaked rather than
uniform, answers depend clearly on the prompt and on every image in it, and only ordinary text
tokens are generated.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_architectures import ARCHITECTURES, MAX_POSITIONS, SIZES, VOCAB_SIZE, Architecture

if TYPE_CHECKING:
    import torch
    import transformers
    from tokenizers import Tokenizer

ARCHS = tuple(ARCHITECTURES)
DTYPES = ("float32", "bfloat16")

# To be raised whenever the files written for the same arguments change.
FORMAT_VERSION = 1
STAMP_NAME = "tiny_model.json"

BPE_VOCAB_SIZE = 624

# Gains on top of fan-in scaled weights. They were chosen so that the model shows what matters for
# reusing image KV in another context: with the tiny Qwen2.5-VL and 256 image tokens, a different
# image moves the next-token distribution by about 0.9 nats (KL), keys left at their old positions
# by 1.2, and reused KV at corrected positions by only 0.04, less the more tokens are recomputed.
# With all gains at one, reuse costs as much as showing a wrong image.
QK_GAIN = 1.5  # attention is peaked: of 256 image tokens about 60 carry the weight
VISION_QK_GAIN = 1.2
BRANCH_GAIN = 0.5  # attention and MLP outputs, against the residual stream
TEXT_STD = 0.3  # text embeddings are small ...
IMAGE_GAIN = 3.0  # ... and image embeddings large, so that context does not blur images
LOGIT_STD = 3.0

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
{{- 'IMAGE_PLACEHOLDER' -}}
{%- elif part['type'] in ('video', 'video_url') or 'video' in part or 'video_url' in part -%}
{{- 'VIDEO_PLACEHOLDER' -}}
{%- elif 'text' in part -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TRAINING_TEXT = """\
system
You are a helpful assistant. Answer the question about the image in a few words.
user
What is shown in this picture? Describe the image in detail. How many people are there in the
first image, and how many in the second image? Compare the two images and list the differences.
assistant
The picture shows a street in the morning. There are three people walking along the river, and a
small dog is running behind them. The house on the left has a red door and two white windows. The
tree on the right is taller than the house. In the second image the street is empty and the door
is open. A blue car stands in front of the door, and the sky is grey instead of blue.
user
Read the text on the sign and explain what it means. Which colour is the largest object? Where is
the bicycle? Is the light red or green? Please think step by step and give a short reason.
assistant
The sign says that the bridge is closed between the station and the market until the end of the
month. The largest object is the yellow bus. The bicycle is standing next to the wall, under the
window of the shop. The light is green, so the people can cross the street.
user
Look at the video. What happens first, and what happens after that? When does the ball leave the
table? Summarise the document on this page, then write the total of the table as a number.
assistant
First the woman opens the box, then she takes the ball and puts it on the table. After about four
seconds the ball rolls to the edge and falls. The document is a letter from a school to the
parents. It says that the summer holidays start one week earlier than last year, and that every
child should return the books before then. The total is 1234.56, and the chart shows that the
value went up by 7 percent in 2019, by 8 percent in 2020 and by 30 percent in the last quarter.
user
Here is a chart with several lines. Which line has the highest value, and at which point do the
two lines cross each other? Give the answer as a list of numbers.
assistant
The upper line has the highest value. The lines cross at the point where the temperature is close
to zero, which is in the middle of the winter. Other places on the map have the same pattern:
the north is colder than the south, and the mountains are colder than the coast.
"""


def make_tiny_model(
    output_dir: str | os.PathLike[str],
    arch: str = "qwen2_5_vl",
    size: str = "tiny",
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write the checkpoint into `output_dir`, unless it already lies there.

    Args:
        output_dir: Directory to create. It may exist if it is empty or was written by this
            function; anything else is refused rather than overwritten.
        arch: One of `ARCHS`.
        size: ``tiny`` (3 to 5 M parameters) or ``bench`` (60 to 70 M).
        seed: Seed of the weights.
        dtype: Storage type of the weights. ``bfloat16`` is the rounded ``float32`` model.

    Returns:
        The path of the checkpoint directory.
    """
    _check_choice("arch", arch, ARCHS)
    _check_choice("size", size, tuple(SIZES))
    _check_choice("dtype", dtype, DTYPES)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")

    target = Path(output_dir).resolve()
    parameters = {
        "format_version": FORMAT_VERSION,
        "arch": arch,
        "size": size,
        "seed": seed,
        "dtype": dtype,
    }
    if _holds_model(target, parameters):
        return Path(output_dir)
    _check_replaceable(target)

    # Written beside the target and moved at the end: a crash or a second process working on the
    # same model never leaves a half-written directory that looks complete.
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_checkpoint(work, ARCHITECTURES[arch], size, seed, dtype)
        files = {path.name: path.stat().st_size for path in sorted(work.iterdir())}
        write_json(work / STAMP_NAME, {"parameters": parameters, "files": files})
        work.chmod(0o755)
        _move_into_place(work, target, parameters)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Path(output_dir)


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: must be one of {', '.join(allowed)}")


def _read_stamp(directory: Path) -> dict[str, Any] | None:
    """The stamp of a directory written by `make_tiny_model`, or None."""
    try:
        stamp = json.loads((directory / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(stamp, dict) or not isinstance(stamp.get("files"), dict):
        return None
    return stamp


def _holds_model(directory: Path, parameters: dict[str, Any]) -> bool:
    stamp = _read_stamp(directory)
    if stamp is None or stamp.get("parameters") != parameters:
        return False
    try:
        return all(
            (directory / name).stat().st_size == size for name, size in stamp["files"].items()
        )
    except OSError:
        return False


def _check_replaceable(target: Path) -> None:
    if not target.exists() or _read_stamp(target) is not None:
        return
    if not target.is_dir():
        raise NotADirectoryError(f"{target} exists and is not a directory")
    if any(target.iterdir()):
        raise FileExistsError(
            f"{target} is not empty and was not made by this script (no {STAMP_NAME}); "
            "choose another directory"
        )


def _move_into_place(work: Path, target: Path, parameters: dict[str, Any]) -> None:
    if _holds_model(target, parameters):
        return  # another process was faster, and its files are the same ones
    if target.exists():
        shutil.rmtree(target)
    try:
        work.rename(target)
    except OSError:
        if not _holds_model(target, parameters):
            raise


def _write_checkpoint(
    directory: Path, architecture: Architecture, size: str, seed: int, dtype: str
) -> None:
    import torch

    tokenizer = _train_tokenizer(architecture.special_tokens)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in architecture.special_tokens}

    model = architecture.model(SIZES[size], ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_parameter(name, tuple(parameter.shape), seed))
        # A zero logit is never the largest in practice. So what is generated is readable text of
        # the length asked for: no early end, no stray image placeholders, no broken UTF-8.
        model.get_output_embeddings().weight[_silent_tokens(tokenizer)] = 0
    save_model(model.to(getattr(torch, dtype)), directory, architecture.published)

    chat_template = CHAT_TEMPLATE.replace("IMAGE_PLACEHOLDER", architecture.image)
    chat_template = chat_template.replace("VIDEO_PLACEHOLDER", architecture.video)
    _write_tokenizer(directory, tokenizer, architecture, chat_template)
    write_processors(directory, architecture, size, chat_template)
    write_json(
        directory / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": False,
        },
    )


def write_processors(
    directory: Path, architecture: Architecture, size: str, chat_template: str
) -> None:
    """Write the settings of an architecture's image, video and text processors."""
    for name, content in architecture.processors(SIZES[size]).items():
        write_json(directory / name, content)
    (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def save_model(
    model: "transformers.PreTrainedModel",
    directory: Path,
    published: "Callable[[str, torch.Tensor], tuple[str, torch.Tensor]] | None" = None,
) -> None:
    """Write `config.json` and the weights; `published` is `Architecture.published`."""
    from safetensors.torch import load_file, save_file
    from transformers.utils import logging

    show_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(directory)
    finally:
        if show_progress:
            logging.enable_progress_bar()
    weights_path = directory / "model.safetensors"
    if published is not None:
        weights = dict(published(*item) for item in load_file(weights_path).items())
        save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)  # safetensors creates files that only their owner can read


def _random_parameter(name: str, shape: tuple[int, ...], seed: int) -> "torch.Tensor":
    """Random values for one parameter, depending only on the seed, its name and its shape.

    Weights are scaled by their fan-in, so activations keep their magnitude through the network,
    times the gains above.
    """
    import torch

    # The generator looks at the lower 32 bits of its seed only, so both go into these.
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
    values = torch.randn(shape, generator=generator)
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    in_vision = "visual." in name or "vision_tower." in name
    # The last linear layer before the language model. Deepstack's mergers are other modules.
    makes_image_embeddings = any(
        part in name
        for part in (
            "visual.merger.mlp.2",
            "visual.merger.linear_fc2",
            "visual.merger.down_proj",
            "projector.linear_2",
        )
    )

    if leaf in ("q_norm", "k_norm"):  # they undo the scale of q_proj and k_proj
        return QK_GAIN * (1 + 0.1 * values)
    if name.endswith(".bias"):
        return (0.1 * IMAGE_GAIN if makes_image_embeddings else 0.1) * values
    if leaf in ("post_self_attn_layernorm", "post_mlp_layernorm"):  # they give branches a scale
        return BRANCH_GAIN * (1 + 0.1 * values)
    if leaf == "embed_tokens":
        return TEXT_STD * values
    if leaf == "image_newline":
        return values
    if leaf in ("pos_embed", "position_embedding"):
        return 0.5 * values
    if len(shape) == 1:  # the remaining vectors are norm weights
        return 1 + 0.1 * values

    # Of all experts the weights are one tensor.
    fan_in = shape[-1] if ".experts." in name else values[0].numel()
    values = values / fan_in**0.5
    if leaf == "lm_head":
        return LOGIT_STD * values
    if makes_image_embeddings:
        return IMAGE_GAIN * values
    if leaf == "qkv":
        values[: 2 * shape[0] // 3] *= VISION_QK_GAIN
        return values
    if leaf in ("q_proj", "k_proj"):
        return (VISION_QK_GAIN if in_vision else QK_GAIN) * values
    if leaf in ("o_proj", "down_proj") and not in_vision:
        return BRANCH_GAIN * values
    return values


def _train_tokenizer(special_tokens: Sequence[str]) -> "Tokenizer":
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT.splitlines(keepends=True), trainer)
    if tokenizer.get_vocab_size() != BPE_VOCAB_SIZE:
        raise RuntimeError(
            f"the training text gave {tokenizer.get_vocab_size()} tokens instead of "
            f"{BPE_VOCAB_SIZE}: it is too short"
        )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    return tokenizer


def _silent_tokens(tokenizer: "Tokenizer") -> list[int]:
    """Tokens that are not to be generated: special, unused, or not printable ASCII."""
    pieces = {i: tokenizer.decode([i]) for i in range(BPE_VOCAB_SIZE)}
    readable = {i for i, piece in pieces.items() if piece.isascii() and piece.isprintable()}
    return [i for i in range(VOCAB_SIZE) if i not in readable]


def _write_tokenizer(
    directory: Path, tokenizer: "Tokenizer", architecture: Architecture, chat_template: str
) -> None:
    special_tokens = architecture.special_tokens
    tokenizer.save(str(directory / "tokenizer.json"))
    model = json.loads(tokenizer.to_str())["model"]
    write_json(directory / "vocab.json", model["vocab"])
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in special_tokens
            },
            "additional_special_tokens": [t for t in special_tokens if t != "<|endoftext|>"],
            "bos_token": None,
            "chat_template": chat_template,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": MAX_POSITIONS,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "unk_token": None,
            **architecture.named_tokens,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    parser = argparse.ArgumentParser(
        description="Make a small random-weight vision-language checkpoint for tests and trials."
    )
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path)
    parser.add_argument("--arch", choices=ARCHS, default="qwen2_5_vl")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    args = parser.parse_args(argv)
    try:
        path = make_tiny_model(args.output_dir, args.arch, args.size, args.seed, args.dtype)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
