"""Calibration files: what they say, how bad ones are refused, and which one a model gets."""

from __future__ import annotations

import itertools
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlcache_connector import calibration as calibration_module
from vlcache_connector.calibration import (
    RELATIONS,
    Calibration,
    LayerSchedule,
    ModelIdentity,
    Relation,
    RelationResult,
    Sample,
    Thresholds,
    Verdict,
    Verification,
    find,
    known_names,
    load_for,
    name_of,
    relation_of,
    verdict_of,
)
from vlcache_connector.config import ConfigError

FINGERPRINT = "0123456789abcdef" * 4

VALID: dict[str, Any] = {
    "format": 1,
    "model": {"name": "org/Model-3B", "fingerprint": FINGERPRINT, "num_layers": 3},
    "sample": {"images": "synthetic", "requests": 40, "seed": 0},
    "schedules": [
        {"ratio": 0.1, "layers": [0.2, 0.1, 0.0], "kl": 0.01, "first_k_kl": 0.02},
        {"ratio": 0.5, "layers": [1.0, 0.3, 0.2]},
    ],
    "verification": {
        "selector": "layer_aware",
        "recompute_ratio": 0.1,
        "sample": {"images": "/data/images", "requests": 20, "seed": 7},
        "thresholds": {"kl": 0.05, "flip_rate": 0.1},
        "relations": {
            "single_image": {"requests": 10, "kl": 0.0, "flip_rate": 0.0, "passed": True},
            "same_ordinal": {"requests": 10, "kl": 1e-05, "flip_rate": 0.1, "passed": True},
            "lone_donor": {"requests": 10, "kl": 2.5, "flip_rate": 0.9, "passed": False},
        },
        "verdict": "same_ordinal",
    },
}


def write(path: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """`VALID` with other values at places such as `model__name`; ... removes one."""
    content = deepcopy(VALID)
    for place, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in place.split("__")]
        node: Any = content
        for part in parents:
            node = node[part]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return content


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        Calibration.load(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    return message


def result(passed: bool) -> RelationResult:
    return RelationResult(requests=1, kl=0.0, flip_rate=0.0, passed=passed)


def results(**passed: bool) -> dict[Relation, RelationResult]:
    return {relation: result(passed[relation]) for relation in RELATIONS if relation in passed}


# -- what a file says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("donor", "target", "expected"),
    [
        (0, 0, "single_image"),
        (1, 1, "same_ordinal"),
        (7, 7, "same_ordinal"),
        (0, 1, "lone_donor"),
        (0, 9, "lone_donor"),
        (1, 0, "other_ordinal"),
        (1, 2, "other_ordinal"),
        (3, 2, "other_ordinal"),
    ],
)
def test_relations_by_example(donor: int, target: int, expected: Relation) -> None:
    assert relation_of(donor, target) == expected


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ({}, "none"),
        ({"single_image": False}, "none"),
        ({"single_image": True}, "single_image"),
        ({"single_image": True, "same_ordinal": False}, "single_image"),
        ({"single_image": True, "same_ordinal": True}, "same_ordinal"),
        (
            {"single_image": True, "same_ordinal": True, "lone_donor": True},
            "same_ordinal",
        ),
        (dict.fromkeys(RELATIONS, True), "any"),
        (dict.fromkeys(RELATIONS, False), "none"),
        ({"same_ordinal": True, "lone_donor": True, "other_ordinal": True}, "none"),
    ],
)
def test_the_verdict_is_the_widest_one_of_which_everything_passed(
    passed: dict[str, bool], expected: Verdict
) -> None:
    assert verdict_of(results(**passed)) == expected


def verification(relations: dict[Relation, RelationResult]) -> Verification:
    return Verification(
        selector="first_k",
        recompute_ratio=0.1,
        sample=Sample(images="synthetic", requests=1, seed=0),
        thresholds=Thresholds(kl=0.1, flip_rate=0.1),
        relations=relations,
        verdict=verdict_of(relations),
    )


@pytest.mark.parametrize("passed", list(itertools.product([None, False, True], repeat=4)), ids=str)
def test_only_relations_that_were_measured_and_passed_are_allowed(
    passed: tuple[bool | None, ...],
) -> None:
    measured = {
        relation: result(ok)
        for relation, ok in zip(RELATIONS, passed, strict=True)
        if ok is not None
    }
    ok = {relation for relation, outcome in measured.items() if outcome.passed}
    allowed = verification(measured).allowed
    assert allowed <= ok
    assert ("single_image" in allowed) == ("single_image" in ok)
    assert ("same_ordinal" in allowed) == ({"single_image", "same_ordinal"} <= ok)
    assert ("lone_donor" in allowed) == ({"single_image", "same_ordinal", "lone_donor"} <= ok)
    assert ("other_ordinal" in allowed) == (len(ok) == 4)


# -- round trip -----------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
samples = st.builds(
    Sample, images=names, requests=st.integers(1, 1 << 40), seed=st.integers(-(1 << 62), 1 << 62)
)
shares = st.floats(0, 1)
divergences = st.floats(0, 1e300)


@st.composite
def calibrations(draw: st.DrawFn) -> Calibration:
    num_layers = draw(st.integers(1, 5))
    drawn = draw(st.lists(st.lists(shares, min_size=num_layers, max_size=num_layers), max_size=3))
    by_ratio = {min(1.0, sum(layers) / num_layers): layers for layers in drawn}
    relations = draw(
        st.dictionaries(
            st.sampled_from(RELATIONS),
            st.builds(
                RelationResult,
                requests=st.integers(1, 9),
                kl=divergences,
                flip_rate=shares,
                passed=st.booleans(),
            ),
        )
    )
    verified = Verification(
        selector=draw(names),
        recompute_ratio=draw(shares),
        sample=draw(samples),
        thresholds=Thresholds(kl=draw(divergences), flip_rate=draw(shares)),
        relations=relations,
        verdict=verdict_of(relations),
    )
    return Calibration(
        model=ModelIdentity(name=draw(names), fingerprint=draw(names), num_layers=num_layers),
        sample=draw(st.none() | samples),
        schedules=[
            LayerSchedule(
                ratio=ratio,
                layers=sorted(by_ratio[ratio], reverse=True),
                kl=draw(st.none() | divergences),
                first_k_kl=draw(st.none() | divergences),
            )
            for ratio in sorted(by_ratio)
        ],
        verification=draw(st.none() | st.just(verified)),
    )


@settings(max_examples=60)
@given(written=calibrations())
def test_what_was_saved_is_loaded(
    written: Calibration, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("calibration") / "new" / "file.yaml"
    written.save(path)
    assert Calibration.load(path) == written
    assert list(path.parent.iterdir()) == [path]


def test_a_file_by_example(tmp_path: Path) -> None:
    loaded = Calibration.load(write(tmp_path / "file.yaml", VALID))
    assert loaded.model == ModelIdentity(name="org/Model-3B", fingerprint=FINGERPRINT, num_layers=3)
    assert [schedule.ratio for schedule in loaded.schedules] == [0.1, 0.5]
    assert loaded.schedules[1].kl is None
    assert loaded.verification is not None
    assert loaded.verification.allowed == {"single_image", "same_ordinal"}


def test_a_file_needs_no_more_than_the_model(tmp_path: Path) -> None:
    path = write(tmp_path / "file.yaml", {"model": VALID["model"]})
    loaded = Calibration.load(path)
    assert (loaded.format, loaded.sample, loaded.schedules, loaded.verification) == (
        1,
        None,
        [],
        None,
    )


def test_saved_files_are_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    Calibration.model_validate(VALID).save(path)
    content = yaml.safe_load(path.read_text())
    assert content == VALID
    assert list(content) == list(VALID)


def test_saving_replaces_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    Calibration.model_validate(changed(verification=...)).save(path)
    Calibration.model_validate(VALID).save(path)
    assert Calibration.load(path) == Calibration.model_validate(VALID)


@pytest.mark.parametrize("step", ["write_text", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file.yaml"
    Calibration.model_validate(VALID).save(path)
    before = path.read_bytes()
    original = Path.write_text

    def fail(self: Path, *arguments: Any, **options: Any) -> None:
        if step == "write_text":
            original(self, "half a file", encoding="utf-8")
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Path, step, fail)
        with pytest.raises(OSError, match="no space left"):
            Calibration.model_validate(changed(model__name="other")).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# -- bad files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (changed(schedules__0__layers=[0.1, 0.2, 0.0]), ["schedules.0", "layer 1 has 0.2"]),
        (changed(schedules__1__layers=[0.5, 0.5]), ["ratio 0.5 has 2 layers", "model 3"]),
        (changed(schedules__1__layers=[1.0, 0.3, 0.1]), ["schedules.1", "mean", "0.4667"]),
        (changed(schedules__0__ratio=0.102), ["schedules.0", "mean", "0.1000"]),
        (changed(schedules=VALID["schedules"][::-1]), ["must rise", "[0.5, 0.1]"]),
        (changed(schedules=VALID["schedules"][:1] * 2), ["must rise", "[0.1, 0.1]"]),
        (changed(verification__verdict="any"), ["verdict 'any'", "does not follow"]),
        (changed(verification__verdict="none"), ["verdict 'none'", "does not follow"]),
        (changed(verification__verdict="safe"), ["verification.verdict", "'same_ordinal'"]),
        (
            changed(verification__relations__single_image__passed=False),
            ["verdict 'same_ordinal'", "does not follow"],
        ),
        (changed(verification__relations__far={}), ["verification.relations.far"]),
        (changed(schedules__0__layers=[1.2, 0.0, 0.0]), ["schedules.0.layers.0", "to 1"]),
        (changed(schedules__0__layers=[0.2, 0.1, -0.1]), ["schedules.0.layers.2", "to 0"]),
        (changed(schedules__0__layers=[0.2, 0.1, float("nan")]), ["schedules.0.layers.2"]),
        (changed(schedules__0__layers=[]), ["schedules.0.layers", "at least 1"]),
        (changed(schedules__0__layers=0.1), ["schedules.0.layers", "list"]),
        (changed(schedules__0__ratio=5), ["schedules.0.ratio", "to 1"]),
        (changed(schedules__0__kl=-0.1), ["schedules.0.kl", "to 0"]),
        (changed(schedules__0__kl=float("inf")), ["schedules.0.kl", "finite"]),
        (changed(verification__recompute_ratio=-1), ["verification.recompute_ratio"]),
        (changed(verification__thresholds__flip_rate=2), ["verification.thresholds.flip_rate"]),
        (changed(verification__sample__requests=0), ["verification.sample.requests"]),
        (changed(verification__sample=...), ["verification.sample", "required"]),
        (changed(model__num_layers=0), ["model.num_layers", "to 1"]),
        (changed(model__fingerprint=...), ["model.fingerprint", "required"]),
        (changed(model=...), ["model", "required"]),
        (changed(format=2), ["format", "1"]),
        (changed(schedule=[]), ["schedule: Extra"]),
        (changed(model__layers=3), ["model.layers: Extra"]),
        (changed(schedules__0__note="x"), ["schedules.0.note: Extra"]),
        ([VALID], ["file: ", "dictionary"]),
        ("", ["file: ", "dictionary"]),
        ("just text", ["file: ", "dictionary"]),
        ("1", ["file: ", "dictionary"]),
        ("model: {name: [", ["can't be read as YAML"]),
        ("model: {name: a\nformat: 1", ["can't be read as YAML"]),
        ("a: b: c", ["can't be read as YAML"]),
        ("model: !!python/object:os.system {}", ["can't be read as YAML"]),
        ("model: *unknown", ["can't be read as YAML"]),
        ("{[a]: 1}", ["can't be read as YAML"]),
        ("model: 2024-13-45", ["can't be read as YAML"]),  # looks like a date
        pytest.param("[" * 2000, ["can't be read as YAML"], id="nested"),
        pytest.param("#" * ((1 << 20) + 1), ["larger than 1048576 bytes"], id="large"),
    ],
)
def test_bad_files_are_refused_with_file_and_place(
    tmp_path: Path, content: Any, expected: list[str]
) -> None:
    message = refusal(write(tmp_path / "file.yaml", content))
    assert all(part in message for part in expected)


def test_every_bad_value_gets_its_own_line(tmp_path: Path) -> None:
    content = changed(model__num_layers=0, verification__verdict="safe", sample__seed="x")
    message = refusal(write(tmp_path / "file.yaml", content))
    assert len(message.splitlines()) == 3
    assert message.count(f"{tmp_path / 'file.yaml'}: ") == 3


@pytest.mark.parametrize("length", range(0, len(yaml.safe_dump(VALID, sort_keys=False)), 37))
def test_a_truncated_file_is_refused_or_lacks_only_what_may_be_missing(
    tmp_path: Path, length: int
) -> None:
    text = yaml.safe_dump(VALID, sort_keys=False)[:length]
    path = write(tmp_path / "file.yaml", text)
    with suppress(ConfigError):
        loaded = Calibration.load(path)
        assert loaded.model == Calibration.model_validate(VALID).model


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"model: \xff\xfe")
    assert "can't be read as YAML" in refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "can't be read" in refusal(tmp_path / "missing.yaml")
    assert "can't be read" in refusal(tmp_path)


def test_the_mean_of_the_layers_may_be_rounded_to_three_decimals() -> None:
    LayerSchedule(ratio=0.333, layers=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="mean"):
        LayerSchedule(ratio=0.33, layers=[1.0, 0.0, 0.0])


# -- whose file it is -----------------------------------------------------------------------


def test_a_file_for_this_very_model_is_accepted() -> None:
    Calibration.model_validate(VALID).check_model(FINGERPRINT, 3, Path("file.yaml"))


def test_a_file_for_other_weights_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Calibration.model_validate(VALID).check_model("f" * 64, 3, Path("/a/file.yaml"))
    for part in ("/a/file.yaml: ", "org/Model-3B", FINGERPRINT[:12], "f" * 12, "vlcache verify"):
        assert part in str(refused.value)


def test_a_file_for_another_number_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        Calibration.model_validate(VALID).check_model(FINGERPRINT, 28, Path("/a/file.yaml"))
    for part in ("/a/file.yaml: ", "3 layers", "org/Model-3B", "28", "vlcache verify"):
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5-vl-3b-instruct"),
        ("/models/Qwen2.5-VL-3B-Instruct/", "qwen2.5-vl-3b-instruct"),
        ("model", "model"),
    ],
)
def test_a_model_is_named_by_the_last_part_of_its_path(model: str, expected: str) -> None:
    assert name_of(model) == expected


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two folders of files that come with VLCache; the first one counts."""
    made = tmp_path / "source", tmp_path / "installed"
    for folder in made:
        folder.mkdir()
    monkeypatch.setattr(calibration_module, "_folders", lambda: iter(made))
    return made


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return write(tmp_path / "mine.yaml", VALID)


def test_a_name_is_looked_up_in_the_folders_in_order(folders: tuple[Path, Path]) -> None:
    first, second = folders
    write(second / "b.yaml", VALID)
    write(second / "a.yaml", VALID)
    assert find("a") == second / "a.yaml"
    write(first / "a.yaml", VALID)
    assert find("a") == first / "a.yaml"
    assert known_names() == ["a", "b"]
    assert find("c") is None


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_path_is_never_a_name(
    folders: tuple[Path, Path], suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(folders[0] / "mine.yaml", VALID)
    assert find(f"mine{suffix}") is None
    assert find("./mine") is None
    write(tmp_path / f"mine{suffix}", VALID)
    assert find(f"mine{suffix}") == Path(f"mine{suffix}")


def test_a_folder_is_no_file(folders: tuple[Path, Path]) -> None:
    (folders[0] / "a.yaml").mkdir()
    assert find("a") is None
    assert find(str(folders[0])) is None


def load(
    calibration: str | None, *, model: str = "org/Model-3B", fingerprint: str = FINGERPRINT
) -> Calibration | None:
    return load_for(model, calibration, fingerprint, 3)


def test_a_configured_path_is_loaded(folders: tuple[Path, Path], elsewhere: Path) -> None:
    assert load(str(elsewhere), model="anything") == Calibration.model_validate(VALID)


def test_a_configured_name_is_loaded(folders: tuple[Path, Path]) -> None:
    write(folders[1] / "mine.yaml", VALID)
    assert load("mine", model="anything") == Calibration.model_validate(VALID)


@pytest.mark.parametrize("value", ["/no/such/file.yaml", "file.yml", "qwen"])
def test_a_configured_file_that_is_missing_is_refused_with_key_and_value(
    folders: tuple[Path, Path], value: str
) -> None:
    write(folders[0] / "known.yaml", VALID)
    with pytest.raises(ConfigError) as refused:
        load(value)
    message = str(refused.value)
    assert message.startswith(f"kv_connector_extra_config: calibration={value!r}: ")
    assert "known" in message


def test_a_missing_file_is_refused_where_none_come_with_vlcache(
    folders: tuple[Path, Path],
) -> None:
    with pytest.raises(ConfigError, match="none"):
        load("mine")


def test_a_model_gets_the_file_of_its_name(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "model-3b.yaml", VALID)
    assert load(None) == Calibration.model_validate(VALID)
    assert load(None, model="/elsewhere/MODEL-3b/") == Calibration.model_validate(VALID)
    assert load(None, model="org/Model-7B") is None


def test_a_file_of_the_same_name_for_another_model_is_ignored_unless_configured(
    folders: tuple[Path, Path],
) -> None:
    write(folders[0] / "model-3b.yaml", VALID)
    assert load(None, fingerprint="f" * 64) is None
    assert load_for("org/Model-3B", None, "f" * 64, 28) is None
    with pytest.raises(ConfigError, match="made for another model"):
        load("model-3b", fingerprint="f" * 64)


def test_a_configured_file_for_another_number_of_layers_is_refused(
    folders: tuple[Path, Path], elsewhere: Path
) -> None:
    with pytest.raises(ConfigError, match="3 layers"):
        load_for("org/Model-3B", str(elsewhere), FINGERPRINT, 28)


def test_a_malformed_file_is_refused_however_it_was_found(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "model-3b.yaml", changed(format=2))
    for calibration in (None, "model-3b"):
        with pytest.raises(ConfigError, match="format"):
            load(calibration)


def test_a_stray_file_in_the_working_folder_is_not_the_models(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model-3b.yaml", VALID)
    assert load(None) is None


def test_files_that_come_with_vlcache_are_valid() -> None:
    for name in known_names():
        path = find(name)
        assert path is not None
        loaded = Calibration.load(path)
        assert name_of(loaded.model.name) == name
