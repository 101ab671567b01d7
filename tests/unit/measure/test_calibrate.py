"""Schedules: allocation on hand-made surfaces, and measuring with a stand-in engine."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.fake_runner import NUM_LAYERS, FakeRunner
from vlcache_connector.calibration import LayerSchedule
from vlcache_connector.measure.calibrate import (
    BUDGETS,
    RELATIONS_MEASURED,
    Surface,
    allocate,
    cut_layers,
    measure_surface,
    num_grid_points,
    validate,
)
from vlcache_connector.measure.cases import Case, SyntheticImages, make_cases

RANKS = (0.0, 0.1, 0.5, 1.0)


def surface(rows: list[list[float]], depths: tuple[int, ...] = (0, 1, 2)) -> Surface:
    return Surface(depths, RANKS, np.array(rows))


@st.composite
def surfaces(draw: st.DrawFn) -> Surface:
    num_layers = draw(st.integers(1, 40))
    depths, ranks = cut_layers(num_layers), RANKS
    kl = st.floats(0, 10)
    rows = [[draw(kl) for _ in ranks] for _ in depths]
    return Surface(depths, ranks, np.array(rows))


@settings(max_examples=60)
@given(surfaces(), st.floats(0, 1))
def test_schedules_never_rise_and_spend_the_budget(surface: Surface, budget: float) -> None:
    layers = allocate(surface, budget)
    assert len(layers) == surface.depths[-1]
    assert all(below >= above for below, above in pairwise(layers))
    assert np.mean(layers) == pytest.approx(budget, abs=1e-4)
    LayerSchedule(ratio=budget, layers=layers)


def test_the_cell_with_the_larger_drop_comes_first() -> None:
    # The first tokens count in both layers, all others only in the lower one.
    only_low = surface([[9, 9, 9, 9], [9, 5, 3, 1], [9, 5, 3, 1]])
    assert allocate(only_low, 0.05) == [0.1, 0.0]
    assert allocate(only_low, 0.25) == [0.5, 0.0]
    both = surface([[9, 9, 9, 9], [9, 8, 8, 8], [9, 1, 1, 0]])
    assert allocate(both, 0.1) == [0.1, 0.1]


def test_a_layer_that_brings_nothing_itself_is_the_way_to_the_next() -> None:
    way = surface([[9, 9, 9, 9], [9, 9, 9, 9], [9, 2, 1, 0]])
    assert allocate(way, 0.1) == [0.1, 0.1]


def test_the_last_step_is_taken_in_part() -> None:
    only_low = surface([[9, 9, 9, 9], [9, 5, 3, 1], [9, 5, 3, 1]])
    assert allocate(only_low, 0.15) == [0.3, 0.0]
    assert allocate(only_low, 0.02) == [0.04, 0.0]


def test_what_is_left_is_spent_although_it_brings_nothing() -> None:
    flat = surface([[1, 1, 1, 1]] * 3)
    assert np.mean(allocate(flat, 0.3)) == pytest.approx(0.3)
    assert allocate(flat, 0.0) == [0.0, 0.0]
    assert allocate(flat, 1.0) == [1.0, 1.0]


def test_bins_of_several_layers_share_a_number() -> None:
    deep = surface([[9, 9, 9, 9], [9, 1, 1, 1], [9, 1, 1, 0]], depths=(0, 3, 4))
    assert allocate(deep, 0.075) == [0.1, 0.1, 0.1, 0.0]


@pytest.mark.parametrize("num_layers", [1, 2, 4, 8, 28, 36, 80])
def test_depths_reach_from_nothing_to_all_layers(num_layers: int) -> None:
    depths = cut_layers(num_layers)
    assert depths[0] == 0
    assert depths[-1] == num_layers
    assert len(depths) == min(num_layers + 1, 8)


# -- with a stand-in engine ---------------------------------------------------------------------


def some_cases(count: int = 2) -> list[Case]:
    return list(
        make_cases(
            RELATIONS_MEASURED,
            count,
            SyntheticImages(56),
            lambda system, leads, question: system + "".join(leads) + question,
            seed=0,
            label="test",
        )
    )


def by_layers(options: Mapping[str, Any]) -> float:
    """Only the lower half of the layers matters, and there the first half of the tokens."""
    if "layer_ratios" in options:
        shares = options["layer_ratios"]
    else:
        shares = [options.get("recompute_ratio", 0.0)] * NUM_LAYERS
    lower = sum(min(0.5, share) for share in shares[: NUM_LAYERS // 2])
    return 1.0 - lower / (NUM_LAYERS // 2)


def test_the_surface_is_what_the_engine_answers() -> None:
    runner = FakeRunner(by_layers)
    advanced: list[int] = []
    measured = measure_surface(
        runner,  # type: ignore[arg-type]
        some_cases(),
        NUM_LAYERS,
        lambda: advanced.append(1),
    )
    assert len(advanced) == 2 * num_grid_points(NUM_LAYERS)
    for i, depth in enumerate(measured.depths):
        for j, rank in enumerate(measured.ranks):
            shares = [rank] * depth + [0.0] * (NUM_LAYERS - depth)
            is_full = depth == NUM_LAYERS and rank == 1
            expected = 0.0 if is_full else by_layers({"layer_ratios": shares})
            assert measured.kl[i, j] == pytest.approx(expected)


def test_the_measured_surface_leads_to_the_layers_that_matter() -> None:
    runner = FakeRunner(by_layers)
    measured = measure_surface(runner, some_cases(), NUM_LAYERS, lambda: None)  # type: ignore[arg-type]
    layers = allocate(measured, 0.1)
    assert sum(layers[:2]) == pytest.approx(0.4)
    assert layers[0] <= 0.5
    assert layers[2:] == [0.0, 0.0]


def test_a_better_schedule_is_kept() -> None:
    runner = FakeRunner(by_layers)
    allocated = [[2 * b, 2 * b, 0.0, 0.0] for b in BUDGETS]
    validated = validate(runner, some_cases(), allocated, lambda: None)  # type: ignore[arg-type]
    for budget, entry in zip(BUDGETS, validated, strict=True):
        low = min(0.5, 2 * budget)
        assert not entry.is_uniform
        assert entry.schedule.layers == [2 * budget, 2 * budget, 0.0, 0.0]
        assert entry.schedule.kl == pytest.approx(1 - low, rel=1e-3)
        assert entry.schedule.first_k_kl == pytest.approx(1 - budget, rel=1e-3)


def test_a_worse_schedule_gives_way_to_first_k() -> None:
    runner = FakeRunner(lambda options: 0.5 if "layer_ratios" in options else 0.2)
    allocated = [[2 * b, 2 * b, 0.0, 0.0] for b in BUDGETS]
    validated = validate(runner, some_cases(), allocated, lambda: None)  # type: ignore[arg-type]
    for budget, entry in zip(BUDGETS, validated, strict=True):
        assert entry.is_uniform
        assert entry.schedule.layers == [budget] * NUM_LAYERS
        assert entry.schedule.kl == entry.schedule.first_k_kl == pytest.approx(0.2)
        assert entry.allocated_kl == pytest.approx(0.5)
