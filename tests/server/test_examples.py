"""scripts/examples, as a user runs them."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import SERVER_ENV, VLLMServer, make_image

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"
ONLINE = ("openai_client", "multi_turn_chat", "document_pages", "video_twice")


def run(name: str, *args: str, timeout: float = 600) -> str:
    """What an example prints."""
    env = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "no_proxy": "127.0.0.1",
        # An engine's model is traced, but not compiled, and runs in the same process.
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *args],
        env=os.environ | SERVER_ENV | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(output: str) -> list[dict[str, Any]]:
    """The figures that were printed, one per request."""
    return [ast.literal_eval(each) for each in re.findall(r"^  (\{.*\})$", output, re.MULTILINE)]


def reused(output: str) -> list[int]:
    return [each["reused_tokens"] for each in figures(output)]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 80
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported <= {*sys.stdlib_module_names, "openai", "PIL", "vllm"}
    assert path.stem in (*ONLINE, "offline")


def test_two_questions_about_one_image(cpu_server: VLLMServer, tmp_path: Path) -> None:
    url = ("--url", f"{cpu_server.base_url}/v1")
    tokens = (672 // 28) ** 2
    assert reused(run("openai_client", *url)) == [0, tokens - round(0.1 * tokens)]
    photo = tmp_path / "photo.jpg"
    make_image(1, 280).save(photo)
    output = run("openai_client", *url, "--model", cpu_server.model, "--image", str(photo))
    assert reused(output) == [0, 100 - 10]


def test_a_chat_that_keeps_adding_images(cpu_server: VLLMServer, tmp_path: Path) -> None:
    url = ("--url", f"{cpu_server.base_url}/v1")
    output = run("multi_turn_chat", *url)
    counts = [int(each) for each in re.findall(r"^Turn \d, (\d) images", output, re.MULTILINE)]
    assert counts == [1, 2, 3, 3, 3]
    # While the window fills, the prefix cache has all that came before; then it has nothing.
    sides = (448 // 28) ** 2
    assert reused(output)[3:] == [2 * (sides - round(0.05 * sides))] * 2
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        make_image(10 + seed, 112).save(path)
    output = run("multi_turn_chat", *url, "--window", "1", *map(str, paths))
    assert reused(output) == [0, 0, 0]


def test_pages_in_changing_order(cpu_server: VLLMServer, tmp_path: Path) -> None:
    url = ("--url", f"{cpu_server.base_url}/v1")
    first, turned, two = reused(run("document_pages", *url))
    assert first == 0
    assert turned * 2 == two * 3 > 0
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        make_image(20 + seed, 112).save(path)
    assert reused(run("document_pages", *url, *map(str, paths)))[1] > 0


def test_a_video_asked_about_twice(cpu_server: VLLMServer, tmp_path: Path) -> None:
    import cv2
    import numpy as np

    url = ("--url", f"{cpu_server.base_url}/v1")
    first, again = reused(run("video_twice", *url))
    assert first == 0 < again
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 4.0, (224, 224))
    for seed in range(8):
        writer.write(np.asarray(make_image(seed, 224))[..., ::-1])
    writer.release()
    first, again = reused(run("video_twice", *url, "--video", str(clip)))
    assert first == 0 < again


def test_offline(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.png" for seed in range(2)]
    for seed, path in enumerate(paths):
        make_image(30 + seed, 448).save(path)
    Image.open(paths[0]).convert("L").save(paths[0])  # any image will do
    options = ("--model", str(tiny_model()), "--max-model-len", "4096")
    output = run("offline", *options, *map(str, paths), timeout=900)
    sides = (448 // 28) ** 2
    assert reused(output) == [0, 2 * (sides - round(0.05 * sides))]
