"""Tests of scripts/make_tiny_model.py.

Run as a program, this file is also the runner that loads one model in vLLM: only one engine per
process works reliably, so every architecture gets its own process.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_architectures import ARCHITECTURES, SIZES

from tests.helpers.engine import Engine

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_model.py"
# Image edge in pixels -> tokens of a square image.
IMAGE_TOKENS = {
    "qwen2_5_vl": {56: 4, 224: 64, 1120: 1600, 1792: 4096},
    "qwen2_vl": {56: 4, 224: 64, 1120: 1600, 1792: 4096},
    "qwen3_vl": {56: 4, 224: 49, 1120: 1225, 1792: 3136},
    "qwen3_vl_moe": {56: 4, 224: 49, 1120: 1225, 1792: 3136},
    "internvl": {56: 18, 224: 82, 1120: 162, 1792: 162},
    "glm4v": {56: 4, 224: 64, 1120: 1600, 1792: 2025},
    "glm4v_moe": {56: 4, 224: 64, 1120: 1600, 1792: 2025},
    "glm_ocr": {56: 4, 224: 64, 1120: 1600, 1792: 2025},
    "mistral3": {56: 6, 224: 72, 1120: 1640, 1792: 4160},
    "llava": {56: 64, 224: 64, 1120: 64, 1792: 64},
    "llava_next": {56: 136, 224: 336, 1120: 664, 1792: 664},
    "llava_onevision": {56: 136, 224: 336, 1120: 664, 1792: 664},
}
# Four frames of 112 x 112 pixels.
VIDEO_TOKENS = {"qwen2_5_vl": 32, "llava_onevision": 65}


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make_tiny = _load_script()


def _prompt(body: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    )


def _image(seed: int, size: int = 224) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


# --------------------------------------------------------------------------------------------
# Runner
# --------------------------------------------------------------------------------------------


def _run_in_vllm(llm: Any, model_dir: Path, arch: str) -> dict[str, Any]:
    """What vLLM makes of the model, and the largest deviation from transformers."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vllm import SamplingParams

    config = json.loads(Path(model_dir, "config.json").read_text())
    image_id = config.get("image_token_id", config.get("image_token_index"))
    video_id = config.get("video_token_id", config.get("video_token_index"))
    image_text, video_text = ARCHITECTURES[arch].image, ARCHITECTURES[arch].video
    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=20)

    def generate(body: str, **data: list[Any]) -> dict[str, Any]:
        request: Any = {"prompt": _prompt(body), "multi_modal_data": data}
        (result,) = llm.generate(request, sampling, use_tqdm=False)
        assert result.prompt_token_ids is not None
        assert result.outputs[0].logprobs is not None
        return {
            "text": result.outputs[0].text,
            "output_tokens": len(result.outputs[0].token_ids),
            "image_tokens": result.prompt_token_ids.count(image_id),
            "video_tokens": result.prompt_token_ids.count(video_id),
            "logprobs": {k: v.logprob for k, v in result.outputs[0].logprobs[0].items()},
        }

    describe = f"{image_text}Describe the image."
    compare = f"{image_text}{image_text}Compare the two images."
    frames = np.stack([np.asarray(_image(seed, 112)) for seed in range(4)])
    metadata = {
        "fps": 2.0,
        "duration": 2.0,
        "total_num_frames": 4,
        "frames_indices": [0, 1, 2, 3],
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
    results = {
        "text_1": generate("What is shown in this picture?"),
        "text_2": generate("Read the text on the sign."),
        "one_1": generate(describe, image=[_image(1)]),
        "one_2": generate(describe, image=[_image(2)]),
        "two_12": generate(compare, image=[_image(1), _image(2)]),
        "two_13": generate(compare, image=[_image(1), _image(3)]),
        "two_32": generate(compare, image=[_image(3), _image(2)]),
        "large": generate(describe, image=[_image(1, 1120)]),
        "video": generate(f"{video_text}Describe.", video=[(frames, metadata)]),
        "video_reversed": generate(
            f"{video_text}Describe.", video=[(frames[::-1].copy(), metadata)]
        ),
    }

    # All weights were found and put where they belong, if transformers says the same.
    processor = AutoProcessor.from_pretrained(model_dir)
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    inputs = processor(
        text=[_prompt(compare)],
        # The nested form would switch LLaVA-OneVision to its multi-image mode without crops.
        images=[_image(1), _image(2)],
        return_tensors="pt",
    )
    with torch.inference_mode():
        reference = model(**inputs).logits[0, -1].log_softmax(-1)
    results["reference_error"] = max(
        abs(reference[token].item() - logprob)
        for token, logprob in results["two_12"]["logprobs"].items()
    )
    return results


# --------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny.make_tiny_model(
        tmp_path_factory.mktemp("models") / request.param, arch=request.param
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny.make_tiny_model(tmp_path_factory.mktemp("qwen") / "model")


def _weights(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def _difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Largest difference of logprobs; a token missing on one side counts from its bound."""

    def get(side: dict[str, Any], token: str) -> float:
        return side["logprobs"].get(token, min(side["logprobs"].values()))

    tokens = first["logprobs"].keys() | second["logprobs"].keys()
    return max(abs(get(first, token) - get(second, token)) for token in tokens)


@pytest.mark.parametrize(("arch", "size"), [("llava_onevision", "tiny"), ("qwen2_5_vl", "bench")])
def test_vllm_loads_and_runs_the_model(arch: str, size: str, tmp_path: Path) -> None:
    model = make_tiny.make_tiny_model(tmp_path / "model", arch, size)
    engine = Engine(model, None, max_model_len=2048)
    try:
        results = engine.call(_run_in_vllm, model, arch)
    finally:
        engine.close()

    tokens = IMAGE_TOKENS[arch]
    assert results["one_1"]["image_tokens"] == tokens[224]
    assert results["two_12"]["image_tokens"] == 2 * tokens[224]
    assert results["large"]["image_tokens"] == tokens[1120]
    assert results["video"]["video_tokens"] == VIDEO_TOKENS[arch]

    assert _difference(results["text_1"], results["text_2"]) > 0.1
    assert _difference(results["one_1"], results["one_2"]) > 0.1
    # Each of two images matters.
    assert _difference(results["two_12"], results["two_13"]) > 0.1
    assert _difference(results["two_12"], results["two_32"]) > 0.1
    assert _difference(results["video"], results["video_reversed"]) > 0.02

    assert results.pop("reference_error") < 1e-3
    for name, result in results.items():
        assert result["output_tokens"] == 6, name  # no early end
        assert re.fullmatch(r"[ -~]+", result["text"]), (name, result["text"])


def test_number_of_tokens_per_image(model: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(model)
    expected = IMAGE_TOKENS[model.name]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(px, px) for px in expected])
    assert dict(zip(expected, counts["num_image_tokens"], strict=True)) == expected


def test_chat_template_takes_text_images_and_videos(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    image_text, video_text = ARCHITECTURES[model.name].image, ARCHITECTURES[model.name].video
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "text", "text": "What is this"},
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "video"},
                {"type": "text", "text": "?"},
            ],
        }
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == _prompt(f"{image_text}What is this{image_text}{video_text}?")
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
    )


def test_tokenizer_takes_any_text_and_keeps_special_tokens_whole(model: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "What is shown in the image? It's 12.5 % größer — 画像 \U0001f600\n\n  done\t!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    assert len(tokenizer) <= make_tiny.VOCAB_SIZE
    config = json.loads((model / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == make_tiny.VOCAB_SIZE
    architecture = ARCHITECTURES[model.name]
    for text in (architecture.image, architecture.video):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
        assert "".join(pieces) == text
        assert set(pieces) <= set(architecture.special_tokens)
    assert tokenizer.eos_token == "<|im_end|>"
    generation = json.loads((model / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]


def test_an_existing_model_is_reused(qwen: Path) -> None:
    stamp = qwen / make_tiny.STAMP_NAME
    before = stamp.stat().st_mtime_ns
    assert make_tiny.make_tiny_model(str(qwen)) == qwen
    assert stamp.stat().st_mtime_ns == before


def test_a_damaged_or_different_model_is_replaced(tmp_path: Path) -> None:
    target = make_tiny.make_tiny_model(tmp_path / "model")
    weights = target / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size // 2])
    make_tiny.make_tiny_model(target)
    assert weights.stat().st_size == size

    (target / "config.json").unlink()
    make_tiny.make_tiny_model(target, seed=1)
    assert (target / "config.json").is_file()
    stamp = json.loads((target / make_tiny.STAMP_NAME).read_text())
    assert stamp["parameters"]["seed"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_directories_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not made by this script"):
        make_tiny.make_tiny_model(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "precious"
    with pytest.raises(NotADirectoryError):
        make_tiny.make_tiny_model(tmp_path / "precious.txt")


def test_weights_depend_on_the_seed_only(qwen: Path, tmp_path: Path) -> None:
    import torch

    first = _weights(qwen)
    same = _weights(make_tiny.make_tiny_model(tmp_path / "same"))
    other = _weights(make_tiny.make_tiny_model(tmp_path / "other", seed=7))
    assert first.keys() == same.keys() == other.keys()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    for name in ("tokenizer.json", "config.json", "preprocessor_config.json"):
        assert (qwen / name).read_bytes() == (tmp_path / "same" / name).read_bytes()


def test_bfloat16_is_the_rounded_model(qwen: Path, tmp_path: Path) -> None:
    import torch

    rounded = _weights(make_tiny.make_tiny_model(tmp_path / "bf16", dtype="bfloat16"))
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in _weights(qwen).items():
        assert torch.equal(rounded[name], weight.bfloat16()), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_model_sizes(arch: str) -> None:
    import torch

    def parameters(size: str) -> int:
        architecture = ARCHITECTURES[arch]
        ids = dict.fromkeys(architecture.special_tokens, make_tiny.BPE_VOCAB_SIZE)
        with torch.device("meta"):
            model = architecture.model(SIZES[size], ids)
        return sum(parameter.numel() for parameter in model.parameters())

    assert 3e6 < parameters("tiny") < 5e6
    assert 50e6 < parameters("bench") < 100e6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "qwen4"}, "unknown arch 'qwen4': must be one of qwen2_5_vl, qwen2_vl"),
        ({"size": "huge"}, "unknown size 'huge': must be one of tiny, bench"),
        ({"dtype": "float16"}, "unknown dtype 'float16': must be one of float32, bfloat16"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**32 - 1, got -1"),
        ({"seed": 1.5}, "seed must be an integer from 0 to 2**32 - 1, got 1.5"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_tiny.make_tiny_model(tmp_path / "model", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make_tiny.main([str(qwen)]) == 0
    assert capsys.readouterr().out == f"{qwen}\n"

    (tmp_path / "file.txt").touch()
    assert make_tiny.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not empty")

    with pytest.raises(SystemExit, match="2"):
        make_tiny.main(["--arch", "qwen4", str(tmp_path / "model")])
    assert "qwen2_5_vl" in capsys.readouterr().err
