#!/usr/bin/env python
"""Questions about the pages of a document, each of which brings other pages, in another order.

That is what a search over page images does: it puts the best pages first. A page at another place
than before is reused once `vlcache verify` has shown that the model stands that.

Usage::

    vllm serve MODEL --config configs/gpu.yaml
    python scripts/examples/document_pages.py page1.png page2.png page3.png
"""

from __future__ import annotations

import argparse
import base64
import io
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image, ImageDraw


def sample(number: int) -> bytes:
    """A page as PNG, for those who have no document at hand."""
    page = Image.new("RGB", (560, 784), "white")
    draw = ImageDraw.Draw(page)
    for line in range(20):
        text = f"Page {number}, item {line + 1}: {(number * 7919 + line * 104729) % 1000} pieces"
        draw.text((60, 60 + 32 * line), text, fill="black", font_size=22)
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Pages of a document in changing order.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="(%(default)s)")
    parser.add_argument("--api-key", default="none", help="the server's, if it has one")
    parser.add_argument("--model", help="by default the one that is served")
    parser.add_argument("pages", nargs="*", type=Path, help="images; by default they are made")
    args = parser.parse_args()

    client = OpenAI(base_url=args.url, api_key=args.api_key)
    model = args.model or client.models.list().data[0].id
    contents = [path.read_bytes() for path in args.pages] or [sample(n) for n in (1, 2, 3)]
    pages: list[Any] = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image;base64," + base64.b64encode(content).decode()},
        }
        for content in contents
    ]
    for question, found in (
        ("Summarise the document.", pages),
        ("Which page has the largest number?", pages[::-1]),
        ("What does the last page say?", [pages[-1], pages[0]]),
    ):
        text = {"type": "text", "text": f"{question} Pages, best match first:"}
        response = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [text, *found]}],
            max_completion_tokens=32,
        )
        print(f"{question} ({len(found)} pages)\n  {response.choices[0].message.content!r}")
        figures = (response.model_extra or {}).get("kv_transfer_params") or {}
        print(f"  {figures.get('vlcache')}")


if __name__ == "__main__":
    main()
