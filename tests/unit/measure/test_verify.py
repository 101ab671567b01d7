"""Verification: what passes, how sure one can be, and the verdict."""

from __future__ import annotations

import pytest

from tests.helpers.fake_runner import FakeRunner
from vlcache_connector.calibration import RELATIONS, Relation, Sample, Thresholds, Verdict
from vlcache_connector.measure.cases import Comparison, SyntheticImages
from vlcache_connector.measure.verify import (
    VERDICTS,
    measure,
    result_of,
    upper_bounds,
    verification_of,
)

THRESHOLDS = Thresholds(kl=0.1, flip_rate=0.25)


def comparisons(kl: float, flips: int, count: int = 4) -> list[Comparison]:
    return [Comparison(kl, index < flips, 0) for index in range(count)]


@pytest.mark.parametrize(
    ("kl", "flips", "passed"),
    [(0.0, 0, True), (0.1, 1, True), (0.11, 0, False), (0.0, 2, False)],
)
def test_both_thresholds_must_be_kept(kl: float, flips: int, passed: bool) -> None:
    result = result_of(comparisons(kl, flips), THRESHOLDS)
    assert result.passed is passed
    assert result.kl == pytest.approx(kl)
    assert result.flip_rate == flips / 4
    assert result.requests == 4


@pytest.mark.parametrize(
    ("good", "verdict"),
    [
        (set(RELATIONS), "any"),
        ({"single_image", "same_ordinal", "lone_donor"}, "same_ordinal"),
        ({"single_image", "lone_donor", "other_ordinal"}, "single_image"),
        ({"same_ordinal", "lone_donor", "other_ordinal"}, "none"),
    ],
)
def test_the_verdict_follows_from_the_relations(good: set[Relation], verdict: Verdict) -> None:
    verification = verification_of(
        {r: comparisons(0.0 if r in good else 1.0, 0) for r in RELATIONS},
        THRESHOLDS,
        selector="first_k",
        recompute_ratio=0.05,
        sample=Sample(images="synthetic", requests=4, seed=0),
    )
    assert verification.verdict == verdict
    assert {r for r, result in verification.relations.items() if result.passed} == good


def test_verdicts_are_in_order() -> None:
    assert VERDICTS == ("none", "single_image", "same_ordinal", "any")


def test_no_flip_is_no_proof_of_none() -> None:
    kl, flips = upper_bounds(comparisons(0.03, 0, 64))
    assert kl == pytest.approx(0.03)
    assert flips == pytest.approx(0.0406, abs=1e-4)
    assert upper_bounds(comparisons(0.0, 0, 133))[1] < 0.02


def test_bounds_are_above_the_means() -> None:
    sample = [*comparisons(0.0, 0, 8), *comparisons(0.2, 8, 8)]
    kl, flips = upper_bounds(sample)
    assert kl == pytest.approx(0.1 + 1.645 * 0.1033 / 4, abs=1e-3)
    assert 0.5 < flips < 0.75


def test_one_request_bounds_nothing() -> None:
    kl, flips = upper_bounds(comparisons(0.0, 0, 1))
    assert kl == float("inf")
    assert flips < 1


def test_every_relation_is_measured_with_the_engines_own_settings() -> None:
    runner = FakeRunner(lambda options: 0.25, flips=True)
    advanced: list[int] = []
    measured = measure(
        runner,  # type: ignore[arg-type]
        3,
        SyntheticImages(56),
        lambda system, leads, question: system + "".join(leads) + question,
        0,
        lambda: advanced.append(1),
    )
    assert list(measured) == list(RELATIONS)
    assert len(advanced) == 3 * len(RELATIONS)
    for comparisons in measured.values():
        assert [c.kl for c in comparisons] == pytest.approx([0.25] * 3)
        assert all(c.flipped for c in comparisons)
    assert {tuple(request.options.items()) for request in runner.seen} == {
        (),
        (("enabled", False),),
    }
