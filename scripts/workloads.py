"""Prompts with recurring images, as datasets for `vllm bench serve`.

No image occurs in two workloads:

- "window": users with turns. A prompt has the user's last images: with each turn one leaves, one is
  new, and all others have moved.
- "agent": as one user of "window", with many screenshots, of which two leave with each turn.
- "documents": questions about documents. A prompt has all pages of one, in another order each time.
- "chat": an image that was shown before, then turns of text only.
- "mixed": ten requests are seven of text only, two with new images and one with images that were
  shown before; several are under way at a time.
- "burst": many images that are never shown again, and now and then some that were shown before;
  several requests are under way at a time.
- "repeat R %": prompts in which R % of the images are known, from a pool shown before.

Each prompt but a chat's begins with a number of its own, so that prefix caching alone can't serve
it, and no image is ever where it was before: it follows more or fewer images, or other text.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench_ttft import BEHIND, IN_FRONT
from serving import Part, make_image, text_part

WORKLOADS = ("window", "agent", "documents", "chat", "mixed", "burst", "repeat")
SCALE_HELP = {
    "users": "window: how many users",
    "turns": "window: of each user",
    "images": "window and repeat: images in a prompt",
    "agent_turns": "agent: how many prompts",
    "screenshots": "agent: images in a prompt",
    "documents": "documents: how many",
    "pages": "documents: pages of each, all of them in a prompt",
    "questions": "documents: how many in all",
    "chats": "chat: how many chats",
    "chat_turns": "chat: of each of them",
    "mixed": "mixed: how many prompts",
    "one_offs": "burst: prompts with images that are never shown again",
    "at_once": "mixed and burst: most requests at a time",
    "requests": "repeat: prompts of each rate",
}
FILLER = "The bridge is closed. "
FILLER_TOKENS = 9
BETWEEN, SEEDS_APART = ", ", 1_000_000
TURN_FILLERS, TEXT_FILLERS = 32, 24
"""Of each turn of a chat, and of a prompt without images."""
IMAGES, ONE_OFFS_PER_KNOWN = 2, 4
"""mixed and burst: images in a prompt; burst: after how many prompts known images come."""
FIRST, LATER = "first turn", "later turns"
LEAVING = 2
"""agent: screenshots that leave with each turn."""
MIXED_OUTPUT_TOKENS = 16


@dataclass(frozen=True)
class Scale:
    """How much is asked; see `SCALE_HELP`."""

    users: int = 2
    turns: int = 4
    images: int = 5
    agent_turns: int = 4
    screenshots: int = 33
    documents: int = 2
    pages: int = 4
    questions: int = 4
    chats: int = 2
    chat_turns: int = 8
    mixed: int = 40
    one_offs: int = 24
    at_once: int = 4
    rates: tuple[int, ...] = (0, 25, 50, 80, 100)
    requests: int = 4


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        images: seeds of its images, in their order.
        fillers: sentences in front of them.
        kind: among which requests of a workload it is counted; empty: all are alike.
        chat: number of the chat; None: the prompt begins with its own number.
        behind: sentences behind the images.
    """

    images: tuple[int, ...]
    fillers: int
    kind: str = ""
    chat: int | None = None
    behind: int = 0


@dataclass(frozen=True)
class Workload:
    """What is asked, and what is shown before that and not measured.

    Attributes:
        at_once: most requests at a time; None: as many as in most workloads.
        output_tokens: of each answer; None: as many as in most workloads.
        room: for how many images there should be memory; None: for all.
    """

    name: str
    prompts: tuple[Prompt, ...]
    primed: tuple[Prompt, ...] = ()
    rate: int | None = None
    at_once: int | None = None
    output_tokens: int | None = None
    room: int | None = None

    @property
    def repeated(self) -> float:
        """Share of the measured prompts' images that were shown before."""
        shown = {image for prompt in self.primed for image in prompt.images}
        repeats = []
        for prompt in self.prompts:
            repeats += [image in shown for image in prompt.images]
            shown.update(prompt.images)
        return sum(repeats) / max(1, len(repeats))

    @property
    def num_images(self) -> int:
        """Different ones in all prompts."""
        prompts = self.primed + self.prompts
        return len({image for prompt in prompts for image in prompt.images})

    @property
    def most_images(self) -> int:
        """Of a prompt."""
        return max(len(prompt.images) for prompt in self.primed + self.prompts)

    @property
    def most_text_tokens(self) -> int:
        """Of a prompt's sentences in front of and behind its images; an upper bound."""
        prompts = self.primed + self.prompts
        return FILLER_TOKENS * max(prompt.fillers + prompt.behind for prompt in prompts)


def shifted(orders: Iterable[Sequence[int]]) -> tuple[Prompt, ...]:
    """Prompts in which each image is at a place where it never was in those before."""
    seen: set[tuple[int, int, int]] = set()
    prompts = []
    for number, images in enumerate(orders):
        for fillers in itertools.count(number % 3):
            places = {(image, slot, fillers) for slot, image in enumerate(images)}
            if not places & seen:
                break
        seen |= places
        prompts.append(Prompt(tuple(images), fillers))
    return tuple(prompts)


def make_workloads(scale: Scale) -> list[Workload]:
    """All workloads, the same for the same scale."""
    seeds = itertools.count(SEEDS_APART, SEEDS_APART)
    return [
        Workload("window", _window(next(seeds), scale.users, scale.turns, scale.images, 1)),
        _agent(scale, next(seeds)),
        _documents(scale, next(seeds)),
        _chats(scale, next(seeds)),
        _mixed(scale, next(seeds)),
        _burst(scale, next(seeds)),
        *(_repeats(rate, scale, next(seeds)) for rate in scale.rates),
    ]


def _window(first: int, users: int, turns: int, images: int, leaving: int) -> tuple[Prompt, ...]:
    """All users' first turns come first."""
    starts = [
        first + user * (images + turns * leaving) + turn * leaving
        for turn in range(turns)
        for user in range(users)
    ]
    return shifted(range(start, start + images) for start in starts)


def _agent(scale: Scale, first: int) -> Workload:
    turns = _window(first, 1, scale.agent_turns, scale.screenshots, LEAVING)
    kinds = [FIRST, *[LATER] * (len(turns) - 1)]
    return Workload(
        "agent", tuple(replace(turn, kind=kind) for turn, kind in zip(turns, kinds, strict=True))
    )


def _documents(scale: Scale, first: int) -> Workload:
    orders = []
    for number in range(scale.questions):
        start = first + number % scale.documents * scale.pages
        pages = list(range(start, start + scale.pages))
        orders.append(random.Random(number).sample(pages, len(pages)))
    return Workload("documents", shifted(orders))


def _chats(scale: Scale, first: int) -> Workload:
    images = [(first + chat,) for chat in range(scale.chats)]
    turns = [
        Prompt(
            images[chat],
            fillers=3,  # elsewhere than where it was shown
            kind=LATER if turn else FIRST,
            chat=chat,
            behind=turn * TURN_FILLERS,
        )
        for turn in range(scale.chat_turns)
        for chat in range(scale.chats)
    ]
    return Workload("chat", tuple(turns), shifted(images))


def _mixed(scale: Scale, first: int) -> Workload:
    kinds: list[str] = []
    while len(kinds) < scale.mixed:
        ten = ["text"] * 7 + ["new images"] * 2 + ["known images"]
        kinds += random.Random(len(kinds)).sample(ten, len(ten))
    primed, prompts = _known_and_new(first, kinds[: scale.mixed])
    about = {"at_once": scale.at_once, "output_tokens": MIXED_OUTPUT_TOKENS}
    return Workload("mixed", prompts, primed, **about)


def _burst(scale: Scale, first: int) -> Workload:
    kinds: list[str] = []
    for number in range(1, scale.one_offs + 1):
        kinds.append("new images")
        kinds += ["known images"] * (number % ONE_OFFS_PER_KNOWN == 0)
    primed, prompts = _known_and_new(first, kinds)
    room = (len(primed) + scale.at_once + 1) * IMAGES
    return Workload("burst", prompts, primed, at_once=scale.at_once, room=room)


def _known_and_new(
    first: int, kinds: Sequence[str]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """What is shown before, two prompts, and prompts of these kinds."""
    numbers = itertools.count(first)
    primed = [[next(numbers) for _ in range(IMAGES)] for _ in range(2)]
    known = itertools.cycle(primed)
    orders = [
        next(known) if kind == "known images" else [next(numbers) for _ in range(IMAGES)]
        for kind in kinds
        if kind != "text"
    ]
    made = shifted([*primed, *orders])
    with_images = iter(made[len(primed) :])
    prompts = (
        Prompt((), TEXT_FILLERS, kind) if kind == "text" else replace(next(with_images), kind=kind)
        for kind in kinds
    )
    return made[: len(primed)], tuple(prompts)


def _repeats(rate: int, scale: Scale, first: int) -> Workload:
    """Prompts with known images, evenly spread; the pool has those of two prompts."""
    size = scale.images
    known = [[first + 2 * i + half for i in range(size)] for half in (0, 1)]
    pool = itertools.cycle(known[0] + known[1])
    new = itertools.count(first + 2 * size)
    slots = scale.requests * size
    repeats = round(rate * slots / 100)
    orders = []
    for number in range(scale.requests):
        images = []
        for slot in range(number * size, (number + 1) * size):
            is_known = (slot + 1) * repeats // slots > slot * repeats // slots
            images.append(next(pool) if is_known else next(new))
        random.Random(f"{rate} {number}").shuffle(images)
        orders.append(images)
    primed, prompts = (p := shifted([*known, *orders]))[: len(known)], p[len(known) :]
    return Workload(f"repeat {rate} %", prompts, primed, rate)


def content(prompt: Prompt, number: int, show: Callable[[int], Part]) -> list[Part]:
    """A prompt as content of a chat; `show` makes that of an image."""
    return list(_parts(prompt, number, show))


def _parts(prompt: Prompt, number: int, show: Callable[[int], Part]) -> Iterator[Part]:
    begin = f"Request {number:06}." if prompt.chat is None else f"Chat {prompt.chat:06}."
    front = f"{begin} {FILLER * prompt.fillers}"
    yield text_part(front + IN_FRONT if prompt.images else front)
    for slot, image in enumerate(prompt.images):
        if slot:
            yield text_part(BETWEEN)
        yield show(image)
    yield text_part(f"{BEHIND} {FILLER * prompt.behind}" if prompt.behind else BEHIND)


def write_dataset(workload: Workload, folder: Path, image_px: int) -> Path:
    """Write images, and a JSONL file for `--dataset-name custom_image`; returns its path."""

    def show(seed: int) -> Part:
        path = folder / f"{seed}.png"
        if not path.exists():
            make_image(seed, image_px).save(path)
        return {"type": "image", "image": str(path)}

    first = len(workload.primed)
    rows = [{"content": content(p, i, show)} for i, p in enumerate(workload.prompts, first)]
    path = folder / f"{workload.name.replace(' ', '_').replace('%', 'percent')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
