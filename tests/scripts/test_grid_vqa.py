"""The grid task's generator."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import grid_vqa as task
import numpy as np
import pytest

FAMILIES = tuple(task.FAMILIES)


def _read(image: np.ndarray) -> tuple[list[str], list[str]]:
    """Colour and shape of each cell of an image, by comparison with all cells there can be."""
    side, px = task.SIDE, task.CELL_PX
    cells = image.reshape(side, px, side, px, 3).transpose(0, 2, 1, 3, 4).reshape(-1, px, px, 3)
    colours, shapes = [], []
    for index, cell in enumerate(cells):
        equal = (task.tiles()[:, :, index] == cell).all(axis=(2, 3, 4))
        ((colour, shape),) = np.argwhere(equal)
        colours.append(task.COLOURS[colour])
        shapes.append((*task.SHAPES, task.STAR)[shape])
    return colours, shapes


def _answer(question: task.Question) -> str:
    """The answer, worked out anew from the prompt's text and pixels."""
    colours, shapes = zip(*map(_read, question.images()), strict=True)
    labels = dict(zip(task.LABELS, range(len(colours)), strict=False))
    kinds = [list(zip(*read, strict=True)) for read in zip(colours, shapes, strict=True)]
    match question.query.split():
        case ["colour", label, cell]:
            return colours[labels[label]][task.CELLS.index(cell)]
        case ["shape", label, cell]:
            return shapes[labels[label]][task.CELLS.index(cell)]
        case ["rule", label, cell]:
            before = question.text().split()
            stated = before[before.index("rule") + 1]
            read = {"colour": colours, "shape": shapes}[stated]
            return read[labels[label]][task.CELLS.index(cell)]
        case ["find", label, "star"]:
            return task.CELLS[shapes[labels[label]].index("star")]
        case ["find", source, "star", "in", target]:
            return colours[labels[target]][shapes[labels[source]].index("star")]
        case ["find", label, colour, shape]:
            assert kinds[labels[label]].count((colour, shape)) == 1
            return task.CELLS[kinds[labels[label]].index((colour, shape))]
        case ["find", source, colour, shape, "in", target]:
            assert kinds[labels[source]].count((colour, shape)) == 1
            return colours[labels[target]][kinds[labels[source]].index((colour, shape))]
        case ["has", colour, shape]:
            (label,) = [name for name, i in labels.items() if (colour, shape) in kinds[i]]
            return label
        case ["same", one, other, cell]:
            at = task.CELLS.index(cell)
            return "yes" if colours[labels[one]][at] == colours[labels[other]][at] else "no"
        case ["count", label, colour, shape]:
            return task.NUMBERS[kinds[labels[label]].count((colour, shape))]
    raise AssertionError(question.query)


def _questions(family: str, n: int, n_images: int = 2) -> list[task.Question]:
    rng = np.random.default_rng(7)
    return [task.make_question(rng, family, n_images) for _ in range(n)]


def test_same_seed_gives_same_questions() -> None:
    for family in FAMILIES:
        assert _questions(family, 5) == _questions(family, 5)


@pytest.mark.parametrize("n_images", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_follow_from_text_and_pixels(family: str, n_images: int) -> None:
    if n_images < 2 and family in task.TWO_IMAGE_FAMILIES:
        with pytest.raises(ValueError, match="needs 2 to 3 images"):
            task.make_question(np.random.default_rng(0), family, n_images)
        return
    for question in _questions(family, 30, n_images):
        assert question.answer == _answer(question)


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown family 'colours'"):
        task.make_question(np.random.default_rng(0), "colours")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_dominates(family: str) -> None:
    counts = Counter(question.answer for question in _questions(family, 400))
    answers = {
        "colour": 8,
        "shape": 5,
        "where": 36,
        "find": 36,
        "has": 2,
        "same": 2,
        "chain": 8,
        "relay": 8,
        "rule": 13,
        "count": 4,
    }[family]
    assert len(counts) == answers
    assert max(counts.values()) < 400 / answers * (2.5 if answers > 4 else 1.3)


def test_prompts_consist_of_known_words_and_labelled_images() -> None:
    for family in FAMILIES:
        for question in _questions(family, 20, n_images=3):
            texts = [part for part in question.parts if isinstance(part, str)]
            assert all(word in task.WORDS for text in texts for word in text.split())
            assert [part for part in question.parts if isinstance(part, int)] == [0, 1, 2]
            assert [text.split()[-1] for text in texts[:3]] == list(task.LABELS)
            assert question.text().count(task.IMAGE_PLACEHOLDER) == 3


def test_position_of_images_varies() -> None:
    starts = {task.image_positions(q.parts)[0] for q in _questions("colour", 100)}
    assert len(starts) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_listed_queries_are_different_and_right(family: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = task.make_scene(rng, 3, rule=True)
        listing = task.list_queries(rng, family, scene, 6)
        assert 0 < len(listing.items) <= 6
        assert len({words for words, _ in listing.items}) == len(listing.items)
        prefix = task.make_prefix(rng, scene.rule, 3, 4)
        for words, answer in listing.items:
            parts = (*prefix, " ".join(listing.head + words))
            question = task.Question(scene.grids, parts, family, scene.rule, answer)
            assert question.answer == _answer(question)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown family 'any': must be one of colour, shape"):
        task.make_question(np.random.default_rng(4), "any")


@pytest.mark.parametrize("relation", task.RELATIONS)
def test_donors_stand_in_the_relation(relation: str) -> None:
    rng = np.random.default_rng(5)
    for question in _questions("colour", 30) + _questions("has", 30, n_images=3):
        donors = task.donor_prompts(question, relation, rng)
        assert len(donors) == len(question.grids)
        starts = task.image_positions(question.parts)
        for ordinal, (donor, start) in enumerate(zip(donors, starts, strict=True)):
            grid = question.grids[ordinal]
            assert donor.grids[donor.index] == grid
            assert [part for part in donor.parts if isinstance(part, int)] == list(
                range(len(donor.grids))
            )
            assert all(other not in question.grids for other in donor.grids if other != grid)
            assert task.image_positions(donor.parts)[donor.index] != start
            if relation == "single":
                assert len(donor.grids) == 1
            else:
                assert len(donor.grids) > 1
                assert (donor.index == ordinal) == (relation == "same_ordinal")


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown relation 'alone'"):
        task.donor_prompts(_questions("colour", 1)[0], "alone", np.random.default_rng(0))


def test_image_positions_count_words_and_image_sides() -> None:
    parts = ("one two", 0, "three", 1, "query")
    first, second = task.image_positions(parts)
    assert first == 2 + 1
    assert second == first + task.SIDE + 1 + 1 + 1
    assert all(b - a > task.SIDE for a, b in pairwise((first, second)))


def test_cells_tell_their_place() -> None:
    cells = task.tiles().reshape(-1, task.IMAGE_TOKENS, task.CELL_PX**2 * 3)
    distinct = np.unique(cells.reshape(-1, cells.shape[-1]), axis=0)
    assert len(distinct) == cells.shape[0] * cells.shape[1]
