"""Measurement cases: donors stand where the relation says, and nothing leaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_architectures import ARCHITECTURES

from tests.helpers.fake_runner import FakeRunner, FakeTokenizer
from vlcache_connector.calibration import RELATIONS, Relation, relation_of
from vlcache_connector.config import ConfigError
from vlcache_connector.measure.cases import (
    MAX_IMAGES_PER_CASE,
    MAX_IMAGES_PER_PROMPT,
    Case,
    FolderImages,
    MeasurementError,
    SyntheticImages,
    compare,
    make_cases,
    make_render,
)

HF_CONFIG = SimpleNamespace(image_token_id=7)


def render(system: str, leads: Sequence[str], question: str) -> str:
    return "|".join([system, *leads, question])


def cases(relation: Relation, count: int = 6, seed: int = 0, label: str = "test") -> list[Case]:
    images = SyntheticImages(112)
    return list(make_cases([relation], count, images, render, seed=seed, label=label))


@pytest.mark.parametrize("relation", RELATIONS)
def test_donors_show_the_image_where_the_relation_says(relation: Relation) -> None:
    for case in cases(relation):
        assert case.relation == relation
        assert len(case.target.images) == (1 if relation == "single_image" else 2)
        assert len(case.donors) == len(case.target.images)
        for ordinal, (image, donor) in enumerate(zip(case.target.images, case.donors, strict=True)):
            assert donor.images[-1] is image
            assert len(donor.images) <= MAX_IMAGES_PER_PROMPT
            found = relation_of(len(donor.images) - 1, ordinal)
            first_has_no_other = ordinal == 0 and relation in ("lone_donor", "same_ordinal")
            assert found == ("single_image" if first_has_no_other else relation)


@pytest.mark.parametrize("relation", RELATIONS)
def test_images_in_front_are_in_no_other_request(relation: Relation) -> None:
    for case in cases(relation):
        others = [image for donor in case.donors for image in donor.images[:-1]]
        shown = [*others, *case.target.images]
        assert len({image.tobytes() + bytes(image.width) for image in shown}) == len(shown)
        assert len(shown) <= MAX_IMAGES_PER_CASE


@pytest.mark.parametrize("relation", RELATIONS)
def test_requests_of_a_case_share_no_text_in_front_of_images(relation: Relation) -> None:
    for case in cases(relation, count=12):
        requests = [case.target, *case.donors]
        sentences = [
            set(re.split(r"(?<=[.:]) ", " ".join(request.text.split("|")[:-1])))
            for request in requests
        ]
        for index, own in enumerate(sentences):
            assert own
            assert not any(own & other for other in sentences[index + 1 :])


def test_texts_move_images_by_different_lengths() -> None:
    made = cases("lone_donor", 12)
    distances = {len(c.target.text) - len(c.donors[0].text) for c in made}
    assert len(distances) > 6


def test_salts_are_a_cases_own() -> None:
    made = [
        case
        for relation in RELATIONS
        for seed in (0, 1)
        for label in ("calibrate", "held-out")
        for case in cases(relation, 3, seed, label)
    ]
    assert len({case.target.salt for case in made}) == len(made)
    for case in made:
        assert {donor.salt for donor in case.donors} == {case.target.salt}


def test_cases_depend_on_seed_label_and_number_only() -> None:
    def shape(made: Sequence[Case]) -> list[Any]:
        return [(c.target.text, [i.tobytes() for i in c.target.images]) for c in made]

    assert shape(cases("other_ordinal", 2)) == shape(cases("other_ordinal", 4))[:2]
    assert shape(cases("other_ordinal")) != shape(cases("other_ordinal", seed=1))
    assert shape(cases("other_ordinal")) != shape(cases("other_ordinal", label="held-out"))


def test_relations_take_turns() -> None:
    made = make_cases(
        ["lone_donor", "same_ordinal"], 5, SyntheticImages(112), render, seed=0, label="x"
    )
    assert [case.relation[0] for case in made] == ["l", "s", "l", "s", "l"]


# -- images -------------------------------------------------------------------------------------


def test_synthetic_images_vary_within_the_size() -> None:
    images = SyntheticImages(448).draw(np.random.default_rng(0), 40)
    sides = [side for image in images for side in image.size]
    assert min(sides) >= 224
    assert max(sides) <= 448
    assert len(set(sides)) > 20
    assert all(image.mode == "RGB" for image in images)


def fill(folder: Path, count: int, size: tuple[int, int] = (80, 64)) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        Image.new("RGB", size, (index, 0, 0)).save(folder / f"{index:02}.png")
    return folder


def test_images_of_a_folder_are_drawn_once_each(tmp_path: Path) -> None:
    source = FolderImages(fill(tmp_path, 8), 448)
    images = source.draw(np.random.default_rng(0), 8)
    assert {image.getpixel((0, 0))[0] for image in images} == set(range(8))


def test_large_images_are_scaled_down(tmp_path: Path) -> None:
    source = FolderImages(fill(tmp_path, 5, (640, 320)), 160)
    assert source.draw(np.random.default_rng(0), 1)[0].size == (160, 80)


def test_parts_of_a_folder_share_no_image(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    seen = [
        {
            image.getpixel((0, 0))[0]
            for image in FolderImages(tmp_path, 448, (part, 2)).draw(np.random.default_rng(0), 5)
        }
        for part in (0, 1)
    ]
    assert not seen[0] & seen[1]


def test_a_folder_with_too_few_images_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "damaged.png").write_bytes(b"no image either")
    Image.new("RGB", (400, 20)).save(tmp_path / "narrow.png")
    with pytest.raises(ConfigError, match=r"5 images of at least 56 px .* are needed, there are 3"):
        FolderImages(tmp_path, 448)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        FolderImages(tmp_path / "missing", 448)


def test_files_that_turn_out_to_be_damaged_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, 6)
    path = tmp_path / "00.png"
    path.write_bytes(path.read_bytes()[:60])
    source = FolderImages(tmp_path, 448)
    assert len(source.draw(np.random.default_rng(0), 5)) == 5
    with pytest.raises(ConfigError, match="fewer than 6 images can be decoded"):
        source.draw(np.random.default_rng(0), 6)


# -- prompts ------------------------------------------------------------------------------------


def test_without_a_template_prompts_are_plain() -> None:
    text = make_render(FakeTokenizer(), HF_CONFIG)("Sys.", ["One", "Two"], "Why?")
    assert text == "Sys.\nOne <image> Two <image> Why?\n"


def test_without_a_placeholder_a_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="placeholder"):
        make_render(FakeTokenizer(), SimpleNamespace())


class TemplateTokenizer(FakeTokenizer):
    chat_template = "something"

    def __init__(self, result: str | Exception) -> None:
        self._result = result

    def apply_chat_template(self, messages: Any, **options: Any) -> str:
        if isinstance(self._result, Exception):
            raise self._result
        return self._result


@pytest.mark.parametrize(
    ("result", "problem"),
    [("only <image>", "1 placeholders"), (ValueError("no system role"), "no system role")],
)
def test_templates_that_fail_or_drop_images_are_refused(
    result: str | Exception, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        make_render(TemplateTokenizer(result), HF_CONFIG)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_real_templates_keep_text_and_images_in_order(
    arch: str, tiny_model: Callable[..., Path], image_placeholder: Callable[[str], str]
) -> None:
    from transformers import AutoConfig, AutoTokenizer

    path = tiny_model(arch)
    made = make_render(AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path))
    text = made("System text.", ["First", "Second"], "Which one?")
    image = image_placeholder(arch)
    places = [text.index(part) for part in ("System text.", "First", "Second", "Which one?")]
    assert places == sorted(places)
    assert text.count(image) == 2
    assert "helpful assistant" not in text


# -- comparing ----------------------------------------------------------------------------------


def test_targets_are_compared_with_a_full_recompute() -> None:
    runner = FakeRunner(lambda options: options.get("cost", 0.0))
    [case] = cases("other_ordinal", 1)
    advanced = []
    first, second = compare(
        runner,  # type: ignore[arg-type]
        case,
        [{"cost": 0.25}, {"cost": 0.5}],
        lambda: advanced.append(1),
    )
    assert first.kl == pytest.approx(0.25)
    assert second.kl == pytest.approx(0.5)
    assert not first.flipped
    assert first.token_layers == 40
    assert len(advanced) == 2
    donors, rest = runner.seen[:2], runner.seen[2:]
    assert tuple(donors) == case.donors
    assert [request.options for request in rest] == [
        {"enabled": False},
        {"cost": 0.25},
        {"cost": 0.5},
    ]


def test_a_target_that_reuses_one_of_two_images_is_no_measurement() -> None:
    [case] = cases("same_ordinal", 1)
    runner = FakeRunner(lambda options: 0.0, figures={"reused_tokens": 9})
    with pytest.raises(MeasurementError, match="only 10 of 20 image tokens were known"):
        compare(runner, case, [{}])  # type: ignore[arg-type]


@pytest.mark.parametrize("figures", [{"tier": None}, {"fallback": "gate"}])
def test_a_target_that_reuses_nothing_is_no_measurement(figures: dict[str, Any]) -> None:
    [case] = cases("lone_donor", 1)
    runner = FakeRunner(lambda options: 0.0, figures=figures)
    with pytest.raises(MeasurementError, match="reused nothing"):
        compare(runner, case, [{}])  # type: ignore[arg-type]
