"""What lmms-eval needs to know about a question on coloured grids; see grid_vqa.yaml.

A document names a question by `seed` and `number`; it is made from them. All query families take
turns, each question is about two images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts"))

import grid_vqa

Doc = Mapping[str, Any]


def question_of(doc: Doc) -> grid_vqa.Question:
    """The question."""
    families = list(grid_vqa.FAMILIES)
    rng = np.random.default_rng([doc["seed"], doc["number"]])
    return grid_vqa.make_question(rng, families[doc["number"] % len(families)])


def doc_to_visual(doc: Doc) -> list[Image.Image]:
    """Its images."""
    return [Image.fromarray(pixels) for pixels in question_of(doc).images()]


def doc_to_text(doc: Doc) -> str:
    """Its text, with a mark for each image."""
    return question_of(doc).text("<image>")


def doc_to_target(doc: Doc) -> str:
    """Its answer."""
    return question_of(doc).answer


def doc_to_messages(doc: Doc) -> list[dict[str, Any]]:
    """One user message with texts and images in turn."""
    question = question_of(doc)
    content: list[dict[str, Any]] = []
    for part in question.parts:
        if isinstance(part, int):
            image = Image.fromarray(grid_vqa.render(question.grids[part]))
            content.append({"type": "image", "url": image})
        else:
            content.append({"type": "text", "text": part})
    return [{"role": "user", "content": content}]


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the first word of what was answered is right."""
    return {"exact_match": float(results[0].split()[:1] == [question_of(doc).answer])}
