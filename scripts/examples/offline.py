#!/usr/bin/env python
"""Reuse images in a process of one's own, without a server: vLLM's `LLM`.

Usage::

    python scripts/examples/offline.py --model Qwen/Qwen2.5-VL-3B-Instruct first.jpg second.jpg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description="Two images, asked about twice.")
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="(%(default)s)")
    parser.add_argument("--max-model-len", type=int, default=8192, help="(%(default)s)")
    parser.add_argument("images", nargs="*", type=Path, help="two; by default they are made")
    args = parser.parse_args()
    if len(args.images) not in (0, 2):
        parser.error("two images are needed, or none")

    llm = LLM(
        args.model,
        max_model_len=args.max_model_len,
        limit_mm_per_prompt={"image": 2},
        kv_transfer_config={
            "kv_connector": "VLCacheConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes": "1GiB", "encoder_cpu_bytes": "256MiB"},
        },
    )
    made = [Image.radial_gradient("L"), Image.linear_gradient("L")]
    first, second = (
        image.convert("RGB") for image in ([Image.open(path) for path in args.images] or made)
    )
    for text in (
        "Compare the two images.",
        "Look at both of them once more, and in detail: what is different?",
    ):
        content = [{"type": "text", "text": text}]
        content += [{"type": "image_pil", "image_pil": image} for image in (first, second)]
        [output] = llm.chat(
            [{"role": "user", "content": content}], SamplingParams(temperature=0, max_tokens=32)
        )
        print(f"{text}\n  {output.outputs[0].text!r}")
        print(f"  {(output.kv_transfer_params or {}).get('vlcache')}")


if __name__ == "__main__":
    main()
