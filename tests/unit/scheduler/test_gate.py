"""The gate: mode x verification x configuration -> what may be reused, and what is logged."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from vlcache_connector.calibration import (
    RELATIONS,
    Calibration,
    ModelIdentity,
    Relation,
    RelationResult,
    Sample,
    Thresholds,
    Verification,
    verdict_of,
)
from vlcache_connector.config import GateMode, SelectorName, VLCacheConfig
from vlcache_connector.scheduler.gate import allowed_relations

LOGGER = "vlcache_connector.scheduler.gate"
ALL = frozenset(RELATIONS)
SMALL_RISK: frozenset[Relation] = frozenset({"single_image", "same_ordinal"})
NOTHING: frozenset[Relation] = frozenset()


def calibration(*passed: Relation, selector: str = "first_k", ratio: float = 0.1) -> Calibration:
    """A file whose verification found these relations safe, and the others not."""
    relations = {
        relation: RelationResult(requests=10, kl=0.01, flip_rate=0.0, passed=relation in passed)
        for relation in RELATIONS
    }
    return Calibration(
        model=ModelIdentity(name="org/model", fingerprint="print", num_layers=2),
        verification=Verification(
            selector=selector,
            recompute_ratio=ratio,
            sample=Sample(images="synthetic", requests=10, seed=0),
            thresholds=Thresholds(kl=0.1, flip_rate=0.05),
            relations=relations,
            verdict=verdict_of(relations),
        ),
    )


UNVERIFIED = Calibration(model=ModelIdentity(name="org/model", fingerprint="print", num_layers=2))


def config(gate: GateMode, selector: SelectorName = "first_k", ratio: float = 0.1) -> VLCacheConfig:
    return VLCacheConfig(gate=gate, selector=selector, recompute_ratio=ratio)


def outcome(
    caplog: pytest.LogCaptureFixture, *arguments: Any
) -> tuple[frozenset[Relation], list[tuple[int, str]]]:
    """What is allowed, and what was logged at which level."""
    with caplog.at_level(logging.INFO, logger=LOGGER):
        allowed = allowed_relations(*arguments, "org/model")
    return allowed, [(r.levelno, r.getMessage()) for r in caplog.records if r.name == LOGGER]


@pytest.mark.parametrize(
    "known",
    [None, UNVERIFIED, calibration(), calibration(*RELATIONS), calibration(selector="full")],
    ids=["no file", "no verification", "none passed", "all passed", "other configuration"],
)
def test_a_gate_that_is_off_lets_everything_through_and_says_so(
    caplog: pytest.LogCaptureFixture, known: Calibration | None
) -> None:
    allowed, [(level, message)] = outcome(caplog, config("off"), known)
    assert (allowed, level) == (ALL, logging.WARNING)
    assert "every relation (gate=off)" in message


@pytest.mark.parametrize("known", [None, UNVERIFIED], ids=["no file", "no verification"])
@pytest.mark.parametrize(
    ("gate", "expected", "level"), [("warn", SMALL_RISK, logging.WARNING), ("require", NOTHING, 40)]
)
def test_a_model_without_verification_gets_what_has_a_small_risk_or_nothing(
    caplog: pytest.LogCaptureFixture,
    gate: GateMode,
    expected: frozenset[Relation],
    level: int,
    known: Calibration | None,
) -> None:
    allowed, [(logged, message)] = outcome(caplog, config(gate), known)
    assert allowed == expected
    assert logged == level
    assert "there is no verification of it" in message
    assert "vlcache verify --model org/model" in message
    if gate == "warn":
        assert "here same_ordinal, single_image; to allow more, " in message
        assert "set gate=off" in message


def test_the_default_gets_what_has_a_small_risk(caplog: pytest.LogCaptureFixture) -> None:
    allowed, [_] = outcome(caplog, VLCacheConfig(), None)
    assert allowed == SMALL_RISK


@pytest.mark.parametrize(
    ("passed", "expected"),
    [
        ((), NOTHING),
        (("single_image",), {"single_image"}),
        (("single_image", "same_ordinal"), SMALL_RISK),
        (RELATIONS, SMALL_RISK),
    ],
)
def test_what_failed_with_another_configuration_is_not_taken_for_safe(
    caplog: pytest.LogCaptureFixture, passed: tuple[Relation, ...], expected: set[Relation]
) -> None:
    allowed, _ = outcome(caplog, config("warn", ratio=0.05), calibration(*passed))
    assert allowed == expected


@pytest.mark.parametrize("gate", ["warn", "require"])
@pytest.mark.parametrize(
    ("passed", "verdict", "expected"),
    [
        ((), "none", set()),
        (("same_ordinal", "lone_donor", "other_ordinal"), "none", set()),
        (("single_image",), "single_image", {"single_image"}),
        (("single_image", "lone_donor"), "single_image", {"single_image"}),
        (("single_image", "same_ordinal"), "same_ordinal", {"single_image", "same_ordinal"}),
        (
            ("single_image", "same_ordinal", "lone_donor"),
            "same_ordinal",
            {"single_image", "same_ordinal", "lone_donor"},
        ),
        (
            ("single_image", "same_ordinal", "other_ordinal"),
            "same_ordinal",
            {"single_image", "same_ordinal"},
        ),
        (RELATIONS, "any", set(RELATIONS)),
    ],
)
def test_a_verified_model_gets_what_its_verdict_allows(
    caplog: pytest.LogCaptureFixture,
    gate: GateMode,
    passed: tuple[Relation, ...],
    verdict: str,
    expected: set[Relation],
) -> None:
    allowed, [(level, message)] = outcome(caplog, config(gate), calibration(*passed))
    assert allowed == expected
    assert level == logging.INFO
    assert f"verdict {verdict!r}" in message
    assert message.endswith(", ".join(sorted(expected)) or "none")


# What is configured, on a model that passed with first_k and a ratio of 0.1.
@pytest.mark.parametrize(
    ("selector", "ratio", "is_covered"),
    [
        ("first_k", 0.1, True),
        ("first_k", 0.5, True),
        ("first_k", 1.0, True),
        ("full", 0.1, True),
        ("full", 0.05, True),  # recomputes everything, whatever the ratio
        ("first_k", 0.0999, False),
        ("first_k", 0.0, False),
        ("random_k", 0.1, False),
        ("layer_aware", 0.5, False),
        ("cacheblend", 0.5, False),
        ("none", 0.1, False),
    ],
)
@pytest.mark.parametrize("gate", ["warn", "require"])
def test_a_verification_holds_for_its_own_selector_and_no_lower_ratio(
    caplog: pytest.LogCaptureFixture,
    gate: GateMode,
    selector: SelectorName,
    ratio: float,
    is_covered: bool,
) -> None:
    known = calibration("single_image")
    allowed, [(level, message)] = outcome(caplog, config(gate, selector, ratio), known)
    if is_covered:
        assert (allowed, level) == ({"single_image"}, logging.INFO)
        return
    assert allowed == ({"single_image"} if gate == "warn" else NOTHING)
    assert level == (logging.WARNING if gate == "warn" else logging.ERROR)
    assert f"selector=first_k and recompute_ratio=0.1, not with {selector} and {ratio}" in message
    assert "vlcache verify --model org/model" in message


def test_a_refusal_names_the_mode_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    _, [(_, message)] = outcome(caplog, config("require"), None)
    assert "gate=require" in message
