#!/usr/bin/env python
"""A chat that gets one more image in every turn, and keeps only the last few messages.

When the oldest messages fall out of the window, everything behind them moves: vLLM's prefix cache
has nothing of it any more, VLCache has all images but the new one. There is one image less in front
of them now: they are reused once `vlcache verify` has shown that the model stands that.

Usage::

    vllm serve MODEL --config configs/gpu.yaml
    python scripts/examples/multi_turn_chat.py a.jpg b.jpg c.jpg d.jpg
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image, ImageOps


def samples() -> list[bytes]:
    """PNGs, for those who have no images at hand."""
    contents = []
    for colour in ("red", "green", "blue", "yellow", "orange"):
        gradient = Image.linear_gradient("L").resize((448, 448))
        buffer = io.BytesIO()
        ImageOps.colorize(gradient, "white", colour).save(buffer, format="PNG")
        contents.append(buffer.getvalue())
    return contents


def main() -> None:
    parser = argparse.ArgumentParser(description="A chat that keeps adding images.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(%(default)s)")
    parser.add_argument("--api-key", default="none", help="the server's, if it has one")
    parser.add_argument("--model", help="by default the one that is served")
    parser.add_argument("--window", type=int, default=3, help="turns that are kept (%(default)s)")
    parser.add_argument("images", nargs="*", type=Path, help="by default they are made")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.api_key)
    model = args.model or client.models.list().data[0].id
    messages: list[Any] = []
    for number, content in enumerate([path.read_bytes() for path in args.images] or samples(), 1):
        url = "data:image;base64," + base64.b64encode(content).decode()
        question = f"This is image {number}. What has changed?"
        messages.append(
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": question},
                    {"type": "image_url", "image_url": {"url": url}},
                ],
            }
        )
        messages = messages[-(2 * args.window - 1) :]  # questions with the answers between them
        response = client.chat.completions.create(
            model=model, messages=messages, max_completion_tokens=32
        )
        answer = response.choices[0].message.content
        messages.append({"role": "assistant", "content": answer})
        figures = (response.model_extra or {}).get("kv_transfer_params") or {}
        print(f"Turn {number}, {len(messages) // 2} images: {answer!r}\n  {figures.get('vlcache')}")


if __name__ == "__main__":
    main()
