#!/usr/bin/env python
"""Ask two questions about one image through the OpenAI API; the second one reuses its KV.

Usage::

    vllm serve MODEL --config configs/gpu.yaml
    python scripts/examples/openai_client.py --image photo.jpg
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw


def sample() -> bytes:
    """A PNG, for those who have no image at hand."""
    image = Image.new("RGB", (672, 672), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((80, 80, 300, 300), fill="red")
    draw.rectangle((360, 340, 600, 580), fill="blue")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Two questions about one image.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(%(default)s)")
    parser.add_argument("--api-key", default="none", help="the server's, if it has one")
    parser.add_argument("--model", help="by default the one that is served")
    parser.add_argument("--image", type=Path, help="by default one is drawn")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.api_key)
    model = args.model or client.models.list().data[0].id
    content = args.image.read_bytes() if args.image else sample()
    url = "data:image;base64," + base64.b64encode(content).decode()
    image: dict[str, Any] = {"type": "image_url", "image_url": {"url": url}}

    # The text stands in front of the image: what follows differs, so no prefix cache can help.
    for question in ("Name all the colours you see.", "Which object is on the left?"):
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [{"type": "text", "text": question}, image]}],
            max_completion_tokens=32,
            # Switches of this request: a larger share is recomputed than the server's default.
            extra_body={"kv_transfer_params": {"vlcache": {"recompute_ratio": 0.1}}},
        )
        print(f"{question}\n  {response.choices[0].message.content!r}")
        # Only responses that are not streamed carry these figures.
        figures = (response.model_extra or {}).get("kv_transfer_params") or {}
        print(f"  {figures.get('vlcache', 'nothing of VLCache: is the connector on?')}")


if __name__ == "__main__":
    main()
