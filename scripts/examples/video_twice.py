#!/usr/bin/env python
"""Ask two questions about one video; the second one reuses its KV.

Usage::

    vllm serve MODEL --config configs/gpu.yaml
    python scripts/examples/video_twice.py --video clip.mp4
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw


def sample(frames: int = 8) -> str:
    """A falling ball, for those who have no video at hand: vLLM takes frames as JPEG, too."""
    encoded = []
    for number in range(frames):
        frame = Image.new("RGB", (336, 336), "white")
        top = 30 * number
        ImageDraw.Draw(frame).ellipse((130, top, 200, top + 70), fill="red")
        buffer = io.BytesIO()
        frame.save(buffer, format="JPEG")
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(encoded)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two questions about one video.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(%(default)s)")
    parser.add_argument("--api-key", default="none", help="the server's, if it has one")
    parser.add_argument("--model", help="by default the one that is served")
    parser.add_argument("--video", type=Path, help="an MP4 file; by default one is made")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.api_key)
    model = args.model or client.models.list().data[0].id
    if args.video:
        url = "data:video/mp4;base64," + base64.b64encode(args.video.read_bytes()).decode()
    else:
        url = sample()
    video: Any = {"type": "video_url", "video_url": {"url": url}}
    for question in ("What happens first?", "Please describe the end of the video in detail."):
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [{"type": "text", "text": question}, video]}],
            max_completion_tokens=32,
        )
        print(f"{question}\n  {response.choices[0].message.content!r}")
        figures = (response.model_extra or {}).get("kv_transfer_params") or {}
        print(f"  {figures.get('vlcache')}")


if __name__ == "__main__":
    main()
