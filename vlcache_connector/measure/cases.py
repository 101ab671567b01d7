"""Requests to measure reuse with: a target prompt, and a donor prompt for each of its images.

The donor shows the image somewhere else, behind other text and, by relation, behind another number
of other images. The target then reuses the image's KV, and is compared with a full recompute.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw

from ..calibration import RELATIONS, Relation
from ..config import ConfigError
from .runner import FULL_RECOMPUTE, Outcome, Request, Runner, kl_divergence

_IMAGES_PER_TARGET = 2
"""Of all relations but `single_image`."""
MAX_IMAGES_PER_PROMPT = _IMAGES_PER_TARGET + 1
"""A donor of another ordinal has one image more in front of it than the target."""
MAX_IMAGES_PER_CASE = 5
"""Two in the target; in the donors of another ordinal one and two more."""
MIN_IMAGE_PX = 56
_UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises on files that are damaged, no images or far too large."""

_SENTENCES = (
    "Be brief.",
    "You are a careful assistant.",
    "Answer in plain words and do not guess.",
    "The user is a teacher who prepares a lesson about colours and shapes for small children.",
    "Today is Tuesday, the archive was closed over the weekend, and the first visitors came early.",
    "Please look closely.",
    "All pictures were taken with the same camera, most of them in the afternoon, and none of "
    "them was edited afterwards.",
    "This conversation is part of a test of a catalogue in which every entry has a picture, a "
    "title and a short text that says what can be seen on it.",
    "Here comes the next one.",
    "A colleague asked for a second opinion.",
    "Ignore the frame around the picture.",
    "The following was found in a box in the attic, next to some letters, a broken lamp and a map "
    "of the old town on which three streets are marked in red.",
    "Compare what you see with what you would expect.",
    "You help people who can't see the screen, so mention what matters and leave out the rest.",
    "Note the background as well.",
    "The museum collects posters, tickets and postcards from stations all over the country.",
    "Sorry for the poor light.",
    "One more thing before we go on: the report is due tonight and it has to fit on a single page, "
    "so every sentence counts and nothing should be said twice.",
    "The page was scanned at a low resolution.",
    "Pay attention to the corners.",
    "The shop sells carpets, curtains and wallpaper, and customers send photographs of what they "
    "already have at home.",
    "It is number seventeen in the list.",
    "Speak as if to a friend.",
    "The order of the pictures does not mean anything.",
)
_QUESTIONS = (
    "What is the main colour? Answer with one word.",
    "Is it bright or dark? Answer with one word.",
    "What is in the upper left corner?",
    "Are there any round shapes? Answer yes or no.",
    "Describe what you see in one sentence.",
    "Which colour is missing?",
    "How many different colours are there? Answer with a number.",
    "What is shown in the middle?",
)
_QUESTIONS_FOR_TWO = (
    "Which of the two images is brighter, the first or the second?",
    "What is the main colour of the second image? Answer with one word.",
    "What do both images have in common?",
    "Does the second image show more colours than the first? Answer yes or no.",
    "What is in the upper left corner of the second image?",
    "What is the main colour of the first image? Answer with one word.",
    "Describe the difference in one sentence.",
    "Which image has larger shapes, the first or the second?",
)


class MeasurementError(RuntimeError):
    """The engine did not do what was to be measured."""


# -- images -------------------------------------------------------------------------------------


class ImageSource(Protocol):
    """Where the images come from."""

    @property
    def name(self) -> str:
        """For the calibration file."""

    def draw(self, rng: np.random.Generator, count: int) -> list[Image.Image]:
        """Different images."""


class SyntheticImages:
    """Coloured cells, gradients and shapes.

    Args:
        size: longest side in px; sides vary between half of it and all of it.
    """

    name = "synthetic"

    def __init__(self, size: int) -> None:
        self._size = size

    def draw(self, rng: np.random.Generator, count: int) -> list[Image.Image]:
        """Images that no other draw has."""
        return [self._render(rng) for _ in range(count)]

    def _render(self, rng: np.random.Generator) -> Image.Image:
        smallest = max(MIN_IMAGE_PX, self._size // 2)
        width, height = (int(side) for side in rng.integers(smallest, self._size + 1, 2))
        paint = (_cells, _gradient, _shapes)[rng.integers(3)]
        return paint(rng, width, height)


def _cells(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    rows, columns = rng.integers(2, 12, 2)
    cells = rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)


def _gradient(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def _shapes(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), _colour(rng))
    brush = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 9)):
        left, top = int(rng.integers(0, width)), int(rng.integers(0, height))
        side = int(rng.integers(min(width, height) // 8, min(width, height) // 2))
        box = (left, top, left + side, top + side)
        if rng.integers(2):
            brush.ellipse(box, fill=_colour(rng))
        else:
            brush.rectangle(box, fill=_colour(rng))
    return image


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in rng.integers(0, 256, 3))
    return red, green, blue


class FolderImages:
    """The images in a folder and those below it.

    Args:
        size: longest side in px; larger images are scaled down. Those with a side below
            `MIN_IMAGE_PX` (then) are left out.
        part: (index, number of parts): only every n-th image, for samples that share none.

    Raises:
        ConfigError: the folder has too few images for one case.
    """

    def __init__(self, folder: Path, size: int, part: tuple[int, int] = (0, 1)) -> None:
        if not folder.is_dir():
            raise ConfigError(f"--images={folder}: no such folder")
        self.name = str(folder)
        self._size = size
        index, parts = part
        known = Image.registered_extensions()
        files = [p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file()]
        self._paths = sorted(files)[index::parts]
        found = len(list(islice(filter(self._is_usable, self._paths), MAX_IMAGES_PER_CASE)))
        if found < MAX_IMAGES_PER_CASE:
            raise ConfigError(
                f"--images={folder}: {MAX_IMAGES_PER_CASE * parts} images of at least "
                f"{MIN_IMAGE_PX} px that Pillow can read are needed, there are "
                f"{sum(map(self._is_usable, files))}"
            )

    def draw(self, rng: np.random.Generator, count: int) -> list[Image.Image]:
        """Images from different files; those that can't be decoded are passed over."""
        images: list[Image.Image] = []
        for index in rng.permutation(len(self._paths)):
            path = self._paths[index]
            if not self._is_usable(path):
                continue
            try:
                with Image.open(path) as file:
                    image = file.convert("RGB")
            except _UNREADABLE:
                continue
            image.thumbnail((self._size, self._size))
            images.append(image)
            if len(images) == count:
                return images
        raise ConfigError(f"--images={self.name}: fewer than {count} images can be decoded")

    def _is_usable(self, path: Path) -> bool:
        """By the file's header."""
        try:
            with Image.open(path) as file:
                scale = min(1.0, self._size / max(file.size))
                return min(file.size) * scale >= MIN_IMAGE_PX
        except _UNREADABLE:
            return False


# -- prompts ------------------------------------------------------------------------------------

Render = Callable[[str, Sequence[str], str], str]
"""Prompt text from system text, the text in front of each image, and the question."""


def make_render(tokenizer: Any, hf_config: Any) -> Render:
    """How this model's prompts are written: by its chat template, or else plainly with its
    placeholder tokens.

    Raises:
        ConfigError: there is neither, or the template drops images.
    """
    ids = [
        getattr(hf_config, name, None)
        for name in ("vision_start_token_id", "image_token_id", "vision_end_token_id")
    ]
    ids[1] = getattr(hf_config, "image_token_index", None) if ids[1] is None else ids[1]
    if ids[1] is None:
        raise ConfigError("--model: its config.json names no image placeholder token")
    tokens = ["" if id_ is None else tokenizer.convert_ids_to_tokens(id_) for id_ in ids]
    image_token = tokens[1]

    def by_template(system: str, leads: Sequence[str], question: str) -> str:
        content: list[dict[str, str]] = []
        for lead in leads:
            content += [{"type": "text", "text": f"{lead} "}, {"type": "image"}]
        content.append({"type": "text", "text": f" {question}"})
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": content},
        ]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def plainly(system: str, leads: Sequence[str], question: str) -> str:
        images = "".join(f"{lead} {''.join(tokens)} " for lead in leads)
        return f"{system}\n{images}{question}\n"

    render = by_template if getattr(tokenizer, "chat_template", None) else plainly
    try:
        sample = render("S", ["A", "B"], "Q")
    except Exception as error:  # a template's own errors may be anything
        raise ConfigError(f"--model: its chat template fails on two images: {error}") from None
    if sample.count(image_token) != 2:
        raise ConfigError(
            f"--model: its chat template writes {sample.count(image_token)} placeholders "
            f"{image_token!r} for two images"
        )
    return render


# -- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        relation: of the images behind the first one; what the first one can't have (it has none in
            front of it) is `single_image`.
        donors: for each image of the target, the request that shows it as its last one.
    """

    relation: Relation
    target: Request
    donors: tuple[Request, ...]


def make_cases(
    relations: Sequence[Relation],
    count: int,
    images: ImageSource,
    render: Render,
    *,
    seed: int,
    label: str,
) -> Iterator[Case]:
    """Cases of the relations in turn.

    A case depends on the arguments and its number only. No text and no other image in front of an
    image occurs in more than one request of its case; the salt is the case's own.

    Args:
        label: cases with different labels differ and share no salt.
    """
    for index, relation in enumerate(islice(cycle(relations), count)):
        stream = [seed, zlib.crc32(label.encode()), RELATIONS.index(relation), index]
        rng = np.random.default_rng(stream)
        yield _make_case(relation, rng, images, render, f"{label}-{seed}-{relation}-{index}")


def _donor_ordinal(relation: Relation, ordinal: int) -> int:
    match relation:
        case "single_image" | "same_ordinal":
            return ordinal
        case "lone_donor":
            return 0
        case "other_ordinal":
            return ordinal + 1


def _make_case(
    relation: Relation, rng: np.random.Generator, images: ImageSource, render: Render, salt: str
) -> Case:
    num_images = 1 if relation == "single_image" else _IMAGES_PER_TARGET
    ordinals = [_donor_ordinal(relation, ordinal) for ordinal in range(num_images)]
    drawn = images.draw(rng, num_images + sum(ordinals))
    shown, others = drawn[:num_images], iter(drawn[num_images:])
    deck = iter(rng.permutation(np.array(_SENTENCES)).tolist())

    def request(pictures: Sequence[Image.Image]) -> Request:
        system = " ".join(islice(deck, int(rng.integers(1, 4))))
        questions = _QUESTIONS if len(pictures) == 1 else _QUESTIONS_FOR_TWO
        text = render(
            system, list(islice(deck, len(pictures))), questions[rng.integers(len(questions))]
        )
        return Request(text, tuple(pictures), salt)

    return Case(
        relation,
        target=request(shown),
        donors=tuple(
            request([*islice(others, ordinal), image])
            for ordinal, image in zip(ordinals, shown, strict=True)
        ),
    )


# -- measuring ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """A target with reuse against itself computed in full.

    Attributes:
        kl: KL divergence of the first answer token from the full recompute, in nats.
        flipped: whether the greedy first token differs.
        token_layers: tokens computed by the sparse prefill, text included, summed over the layers.
    """

    kl: float
    flipped: bool
    token_layers: int


def compare(
    runner: Runner,
    case: Case,
    options: Sequence[Mapping[str, Any]],
    advance: Callable[[], None] | None = None,
) -> list[Comparison]:
    """Run a case's donors, then its target in full and with each of `options`.

    Args:
        advance: called for each of `options`.

    Raises:
        MeasurementError: a target did not reuse all of its images.
    """
    runner.run(case.donors)
    full = replace(case.target, options=FULL_RECOMPUTE)
    [reference] = runner.run([full])
    reusing = [replace(case.target, options=option) for option in options]
    return [_compared(reference, outcome) for outcome in runner.run(reusing, advance)]


def _compared(reference: Outcome, outcome: Outcome) -> Comparison:
    figures = outcome.figures
    if figures.get("tier") is None or figures.get("fallback") is not None:
        raise MeasurementError(
            "a request reused nothing although its images are known "
            f"(fallback: {figures.get('fallback')}); see the engine's log above"
        )
    known = figures["reused_tokens"] + figures["recomputed_tokens"]
    if known < outcome.image_tokens:
        raise MeasurementError(
            f"only {known} of {outcome.image_tokens} image tokens were known although all donors "
            "were asked; raise cpu_bytes, or lower min_segment_tokens for small images"
        )
    return Comparison(
        kl=kl_divergence(reference, outcome),
        flipped=outcome.token != reference.token,
        token_layers=figures["computed_token_layers"],
    )
