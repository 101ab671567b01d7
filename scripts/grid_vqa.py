"""A question task on coloured grids, for a tiny vision-language model that is really trained.

An image is a grid of 6 x 6 cells of 28 px. With patches of 14 px merged 2 x 2, each cell becomes
one token of the language model, 36 per image. Every cell shows one coloured shape; a strip on the
left edge of the cell has the colour of its row, a strip on the top edge that of its column, so
that a cell tells its own name, such as ``BD`` (row B, column D). One cell per image holds a star.

A prompt is a list of parts, text and images in turn, with the label ``first``, ``second`` or
``third`` before each image, filler words of varying number before and between the images,
sometimes a rule, and a query at the end. The answer is always one word. What the query families
need from the images differs: see `FAMILIES`.

Everything comes from a `numpy.random.Generator`; the same seed gives the same questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SHAPES = ("square", "circle", "triangle", "diamond", "cross")
STAR = "star"
LABELS = ("first", "second", "third")
NUMBERS = ("none", "one", "two", "three")
RULES = ("colour", "shape")
ROWS = COLUMNS = "ABCDEF"
CELLS = tuple(row + column for row in ROWS for column in COLUMNS)
# fmt: off
FILLER = (
    "the", "a", "please", "look", "at", "these", "pictures", "and", "then", "answer", "with",
    "word", "now", "here", "are", "some", "notes", "from", "today", "before", "you", "start",
    "take", "your", "time", "it", "was", "sunny", "yesterday", "we", "like", "tea",
)
# fmt: on
_KEYWORDS = ("has", "same", "find", "in", "count", "rule", ".", "yes", "no")
WORDS = tuple(
    dict.fromkeys(
        COLOURS + SHAPES + (STAR,) + LABELS + NUMBERS + RULES + CELLS + _KEYWORDS + FILLER
    )
)
"""All words of the task, each one token."""

SIDE = len(ROWS)
CELL_PX = 28
IMAGE_PX = SIDE * CELL_PX
IMAGE_TOKENS = SIDE * SIDE
MAX_IMAGES = len(LABELS)
MAX_FILLER = 16

_RGB = np.array(
    [
        (220, 40, 40),
        (40, 180, 60),
        (50, 80, 230),
        (235, 220, 50),
        (150, 50, 190),
        (245, 140, 30),
        (60, 210, 220),
        (245, 245, 245),
    ],
    dtype=np.uint8,
)
_STRIP_RGB = np.array(
    [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)],
    dtype=np.uint8,
)
_BACKGROUND = 25
_STRIP_PX = 4
_STAR_INDEX = len(SHAPES)


# --------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """What an image shows, cell by cell in reading order.

    Attributes:
        colours: index into `COLOURS` of each of the 36 cells.
        shapes: index into `SHAPES` of each cell, or ``len(SHAPES)`` for the star.
    """

    colours: tuple[int, ...]
    shapes: tuple[int, ...]

    @cached_property
    def star(self) -> int:
        """The cell that holds the star."""
        return self.shapes.index(_STAR_INDEX)

    @cached_property
    def kinds(self) -> np.ndarray:
        """int64 [36]: index of each cell's (shape, colour) pair, see `kind_words`."""
        return np.array(self.shapes) * len(COLOURS) + np.array(self.colours)

    @cached_property
    def kind_counts(self) -> np.ndarray:
        """int64 [40]: how many cells show each pair of an ordinary shape and a colour."""
        kinds = len(SHAPES) * len(COLOURS)
        return np.bincount(self.kinds, minlength=kinds)[:kinds]


def kind_words(kind: int) -> tuple[str, str]:
    """Colour and shape of a pair, in the order in which a query names them."""
    return COLOURS[kind % len(COLOURS)], SHAPES[kind // len(COLOURS)]


def make_grid(rng: np.random.Generator) -> Grid:
    """A grid of independent, uniformly drawn cells, one of which is the star."""
    colours = rng.integers(len(COLOURS), size=IMAGE_TOKENS)
    shapes = rng.integers(len(SHAPES), size=IMAGE_TOKENS)
    shapes[rng.integers(IMAGE_TOKENS)] = _STAR_INDEX
    return Grid(tuple(colours.tolist()), tuple(shapes.tolist()))


def make_image(rng: np.random.Generator) -> tuple[np.ndarray, Grid]:
    """A random image: uint8 [168, 168, 3], and what it shows."""
    grid = make_grid(rng)
    return render(grid), grid


def render(grid: Grid) -> np.ndarray:
    """The image of a grid: uint8 [168, 168, 3]."""
    cells = tiles()[grid.colours, grid.shapes, np.arange(IMAGE_TOKENS)]
    cells = cells.reshape(SIDE, SIDE, CELL_PX, CELL_PX, 3)
    return cells.transpose(0, 2, 1, 3, 4).reshape(IMAGE_PX, IMAGE_PX, 3)


@cache
def tiles() -> np.ndarray:
    """Every cell that can occur: uint8 [colour, shape, cell, 28, 28, 3]."""
    masks = _shape_masks()
    result = np.full(
        (len(COLOURS), len(masks), IMAGE_TOKENS, CELL_PX, CELL_PX, 3), _BACKGROUND, dtype=np.uint8
    )
    for colour, rgb in enumerate(_RGB):
        for shape, mask in enumerate(masks):
            result[colour, shape][:, mask] = rgb
    for cell in range(IMAGE_TOKENS):
        row, column = divmod(cell, SIDE)
        result[:, :, cell, :_STRIP_PX] = _STRIP_RGB[column]
        result[:, :, cell, :, :_STRIP_PX] = _STRIP_RGB[row]
    return result


def _shape_masks() -> np.ndarray:
    """Where each shape, the star last, covers its cell: bool [shape, 28, 28]."""
    centre = (CELL_PX - 1 + _STRIP_PX) / 2
    y, x = np.mgrid[:CELL_PX, :CELL_PX] - centre
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    point = np.abs((angle / (2 * np.pi) * 5) % 1 - 0.5) * 2  # 1 at the star's points, 0 between
    return np.stack(
        [
            np.maximum(abs(x), abs(y)) < 9,
            radius < 9.5,
            (y < 9) & (2 * abs(x) < y + 10),
            abs(x) + abs(y) < 11,
            (np.minimum(abs(x), abs(y)) < 3) & (radius < 11),
            radius < 4 + 7 * point,
        ]
    )


# --------------------------------------------------------------------------------------------
# Queries
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """What the queries of one prompt are about."""

    grids: tuple[Grid, ...]
    rule: str | None


def make_scene(rng: np.random.Generator, n_images: int, rule: bool) -> Scene:
    """Random images, and a random rule if there is to be one."""
    grids = tuple(make_grid(rng) for _ in range(n_images))
    return Scene(grids, RULES[rng.integers(len(RULES))] if rule else None)


@dataclass(frozen=True)
class Listing:
    """Queries of one family that begin alike.

    Attributes:
        head: words with which each query begins.
        items: the words that complete each query, and its answer.
    """

    head: tuple[str, ...]
    items: tuple[tuple[tuple[str, ...], str], ...]


def _pick(rng: np.random.Generator, values: Sequence[int] | np.ndarray, count: int) -> list[Any]:
    """At most `count` of the values or rows, in random order."""
    return rng.permutation(values)[:count].tolist()


def _colour(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    items = []
    for image, cell in _pick_cells(rng, scene, count):
        colour = COLOURS[scene.grids[image].colours[cell]]
        items.append(((LABELS[image], CELLS[cell]), colour))
    return Listing(("colour",), tuple(items))


def _shape(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    items = []
    for image, cell in _pick_cells(rng, scene, count + len(scene.grids)):
        grid = scene.grids[image]
        if cell != grid.star:
            items.append(((LABELS[image], CELLS[cell]), SHAPES[grid.shapes[cell]]))
    return Listing(("shape",), tuple(items[:count]))


def _pick_cells(rng: np.random.Generator, scene: Scene, count: int) -> list[tuple[int, int]]:
    """At most `count` different (image, cell) pairs."""
    picked = _pick(rng, range(len(scene.grids) * IMAGE_TOKENS), count)
    return [divmod(index, IMAGE_TOKENS) for index in picked]


def _rule(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    listing = (_colour if scene.rule == "colour" else _shape)(rng, scene, count)
    return Listing(("rule",), listing.items if scene.rule else ())


def _where(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    images = _pick(rng, range(len(scene.grids)), count)
    items = tuple(((LABELS[image], STAR), CELLS[scene.grids[image].star]) for image in images)
    return Listing(("find",), items)


def _find(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    items = tuple(
        ((LABELS[image], *kind_words(kind)), CELLS[cell])
        for image, kind, cell in _pick_unique(rng, scene, count)
    )
    return Listing(("find",), items)


def _pick_unique(rng: np.random.Generator, scene: Scene, count: int) -> list[tuple[int, int, int]]:
    """At most `count` (image, pair, cell) such that no other cell of the image shows the pair."""
    unique = np.argwhere([grid.kind_counts == 1 for grid in scene.grids])
    return [
        (image, kind, int(np.argmax(scene.grids[image].kinds == kind)))
        for image, kind in _pick(rng, unique, count)
    ]


def _has(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    present = np.stack([grid.kind_counts > 0 for grid in scene.grids])
    alone = present & (present.sum(axis=0) == 1)
    items = []
    if len(scene.grids) > 1:
        # The image first, then what only it has: labels are balanced.
        queues = [_pick(rng, np.flatnonzero(row), count) for row in alone]
        for image in rng.integers(len(queues), size=count).tolist():
            if queues[image]:
                items.append((kind_words(queues[image].pop()), LABELS[image]))
    return Listing(("has",), tuple(items))


def _same(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    if len(scene.grids) < 2:
        return Listing(("same",), ())
    one, other = sorted(_pick(rng, range(len(scene.grids)), 2))
    equal = np.array(scene.grids[one].colours) == np.array(scene.grids[other].colours)
    queues = [_pick(rng, np.flatnonzero(equal == value), count) for value in (False, True)]
    items = []
    for value in rng.integers(2, size=count).tolist():
        if queues[value]:
            items.append(((CELLS[queues[value].pop()],), ("no", "yes")[value]))
    return Listing(("same", LABELS[one], LABELS[other]), tuple(items))


def _chain(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    source, *targets = _pick(rng, range(len(scene.grids)), 1 + count)
    star = scene.grids[source].star
    items = tuple(
        ((LABELS[target],), COLOURS[scene.grids[target].colours[star]]) for target in targets
    )
    return Listing(("find", LABELS[source], STAR, "in"), items)


def _relay(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    items = []
    if len(scene.grids) > 1:
        for source, kind, cell in _pick_unique(rng, scene, count):
            others = [image for image in range(len(scene.grids)) if image != source]
            target = others[rng.integers(len(others))]
            words = (LABELS[source], *kind_words(kind), "in", LABELS[target])
            items.append((words, COLOURS[scene.grids[target].colours[cell]]))
    return Listing(("find",), tuple(items))


def _count(rng: np.random.Generator, scene: Scene, count: int) -> Listing:
    counts = np.stack([grid.kind_counts for grid in scene.grids])
    # The number first, then a pair that occurs so often: numbers are balanced.
    queues = [_pick(rng, np.argwhere(counts == n), count) for n in range(len(NUMBERS))]
    items = []
    for number in rng.integers(len(NUMBERS), size=count).tolist():
        if queues[number]:
            image, kind = queues[number].pop()
            items.append(((LABELS[image], *kind_words(kind)), NUMBERS[number]))
    return Listing(("count",), tuple(items))


_LISTERS: dict[str, Callable[[np.random.Generator, Scene, int], Listing]] = {
    "colour": _colour,
    "shape": _shape,
    "where": _where,
    "find": _find,
    "has": _has,
    "same": _same,
    "chain": _chain,
    "relay": _relay,
    "rule": _rule,
    "count": _count,
}

FAMILIES: dict[str, str] = {
    "colour": "the colour of a cell of the named image",
    "shape": "the shape in a cell of the named image",
    "where": "the cell of the named image that holds the star",
    "find": "the cell of the named image that holds the only shape of that kind",
    "has": "which image, by its label, has a shape of that kind",
    "same": "whether two images have the same colour in a cell",
    "chain": "the colour, in another image, of the cell that the star marks in the named one",
    "relay": "the same, with the only shape of some kind in place of the star",
    "rule": "colour or shape of a cell, by the rule that stands before the images",
    "count": "how many shapes of that kind the named image has, none to three",
}
"""Query families and what they ask for."""

TWO_IMAGE_FAMILIES = ("has", "same", "chain", "relay")
"""Families that need at least two images."""


def list_queries(rng: np.random.Generator, family: str, scene: Scene, count: int) -> Listing:
    """At most `count` different queries of a family that begin alike.

    There are fewer if the scene does not hold more, and none if it does not support the family
    (a rule without a rule, a comparison with one image).
    """
    return _LISTERS[family](rng, scene, count)


# --------------------------------------------------------------------------------------------
# Prompts
# --------------------------------------------------------------------------------------------

IMAGE_PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"

Part = str | int


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        grids: the images.
        parts: in order, texts (words separated by single spaces) and indices into `grids`.
    """

    grids: tuple[Grid, ...]
    parts: tuple[Part, ...]

    def text(self, placeholder: str = IMAGE_PLACEHOLDER) -> str:
        """The prompt's text, with a placeholder for each image."""
        return " ".join(placeholder if isinstance(part, int) else part for part in self.parts)

    def images(self) -> list[np.ndarray]:
        """Pixels of the images in the order in which the prompt shows them."""
        return [render(self.grids[part]) for part in self.parts if isinstance(part, int)]


@dataclass(frozen=True)
class Question(Prompt):
    """A prompt with an answer. Its images stand in the order of `grids`.

    Attributes:
        family: one of `FAMILIES`.
        rule: one of `RULES` if the prompt states one.
        answer: one word.
    """

    family: str
    rule: str | None
    answer: str

    @property
    def query(self) -> str:
        """The text after the last image."""
        return str(self.parts[-1])


@dataclass(frozen=True)
class Donor(Prompt):
    """A prompt in which one image of some question stands in another context.

    Attributes:
        index: which of `grids` is that image.
    """

    index: int


def make_question(rng: np.random.Generator, family: str, n_images: int = 2) -> Question:
    """A random question of a family.

    The prompt states a rule if the family is ``rule``, and otherwise in half of the cases,
    without meaning.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: must be one of {', '.join(FAMILIES)}")
    least = 2 if family in TWO_IMAGE_FAMILIES else 1
    if not least <= n_images <= MAX_IMAGES:
        raise ValueError(
            f"a {family!r} question needs {least} to {MAX_IMAGES} images, got {n_images}"
        )
    while True:
        scene = make_scene(rng, n_images, rule=family == "rule" or bool(rng.integers(2)))
        listing = list_queries(rng, family, scene, 1)
        if listing.items:  # else the scene holds nothing to ask for
            break
    words, answer = listing.items[0]
    prefix = make_prefix(rng, scene.rule, n_images, int(rng.integers(MAX_FILLER + 1)))
    parts = (*prefix, " ".join(listing.head + words))
    return Question(scene.grids, parts, family, scene.rule, answer)


def make_prefix(
    rng: np.random.Generator, rule: str | None, n_images: int, n_filler: int
) -> tuple[Part, ...]:
    """The parts of a prompt up to its last image.

    Args:
        n_filler: number of filler words, spread at random before the rule, before the first
            image, and between the images. A label directly precedes each image.
    """
    words = np.array(FILLER)[rng.integers(len(FILLER), size=n_filler)].tolist()
    cuts = np.sort(rng.integers(n_filler + 1, size=n_images)).tolist()
    slots = [words[a:b] for a, b in zip([0, *cuts], [*cuts, n_filler], strict=True)]
    stated = [] if rule is None else ["rule", rule, "."]
    slots[:2] = [slots[0] + stated + slots[1]]
    parts: list[Part] = []
    for index, slot in enumerate(slots):
        parts += [" ".join([*slot, LABELS[index]]), index]
    return tuple(parts)


def image_positions(parts: Sequence[Part]) -> list[int]:
    """M-RoPE position at which each image of a prompt starts.

    A word and each of the two tokens around an image take one position, an image as many as its
    longer side has tokens.
    """
    position = 0
    starts = []
    for part in parts:
        if isinstance(part, int):
            starts.append(position + 1)
            position += 1 + SIDE + 1
        else:
            position += len(part.split())
    return starts


# --------------------------------------------------------------------------------------------
# Donors
# --------------------------------------------------------------------------------------------

RELATIONS = ("single", "same_ordinal", "other_ordinal")


def donor_prompts(question: Question, relation: str, rng: np.random.Generator) -> tuple[Donor, ...]:
    """Other prompts in which the images of a question occur, one for each image.

    In every one the image starts at another position than in the question, behind other text.

    Args:
        relation: ``single``: the image alone; ``same_ordinal``: among other images and at the
            same ordinal as in the question; ``other_ordinal``: among other images and not so.
    """
    if relation not in RELATIONS:
        raise ValueError(f"unknown relation {relation!r}: must be one of {', '.join(RELATIONS)}")
    starts = image_positions(question.parts)
    return tuple(
        _donor(grid, ordinal, start, relation, rng)
        for ordinal, (grid, start) in enumerate(zip(question.grids, starts, strict=True))
    )


def _donor(grid: Grid, ordinal: int, start: int, relation: str, rng: np.random.Generator) -> Donor:
    if relation == "single":
        n_images, index = 1, 0
    elif relation == "same_ordinal":
        n_images, index = int(rng.integers(max(2, ordinal + 1), MAX_IMAGES + 1)), ordinal
    else:
        index = int(rng.choice([i for i in range(MAX_IMAGES) if i != ordinal]))
        n_images = int(rng.integers(max(2, index + 1), MAX_IMAGES + 1))
    while True:
        other = make_question(rng, "colour", n_images)
        if image_positions(other.parts)[index] != start:
            grids = (*other.grids[:index], grid, *other.grids[index + 1 :])
            return Donor(grids, other.parts, index)
