"""What requests may ask for, and what is recomputed then."""

from __future__ import annotations

from typing import Any

import pytest

from vlcache_connector.calibration import LayerSchedule
from vlcache_connector.config import ConfigError, RequestOptions, VLCacheConfig
from vlcache_connector.scheduler.options import OptionsPolicy

SCHEDULE = LayerSchedule(ratio=0.25, layers=[0.5, 0.3, 0.2, 0.0])


def policy(*schedules: LayerSchedule, **config: Any) -> OptionsPolicy:
    return OptionsPolicy(VLCacheConfig(min_recompute_tokens=0, **config), 4, schedules)


def counts(made: OptionsPolicy, num_tokens: int = 100, **options: Any) -> list[tuple[int, int]]:
    selection = made.select(RequestOptions(**options), num_tokens)
    return [(layer, len(offsets)) for layer, offsets in selection.stages]


def test_a_requests_own_options_come_first() -> None:
    made = policy(SCHEDULE, recompute_ratio=0.1)
    assert counts(made) == [(0, 10)]
    assert counts(made, recompute_ratio=0.2) == [(0, 20)]
    assert counts(made, selector="none") == [(0, 0)]
    assert counts(made, layer_ratios=[0.4, 0.4, 0.1, 0.0]) == [(0, 40), (2, 10), (3, 0)]
    assert len(counts(made, selector="layer_aware")) > 1


def test_saved_tokens_are_those_that_no_layer_computes() -> None:
    made = policy(recompute_ratio=0.1)
    assert made.saved_tokens(RequestOptions(), 100) == 90
    assert made.saved_tokens(RequestOptions(layer_ratios=[0.4, 0.1, 0.1, 0.1]), 100) == 60
    assert made.saved_tokens(RequestOptions(selector="cacheblend"), 100) <= 90
    assert made.saved_tokens(RequestOptions(selector="full"), 100) == 0


@pytest.mark.parametrize(
    ("config", "entry", "expected"),
    [
        ({}, {"layer_ratios": [0.5, 0.5]}, "has 2 entries, the model 4 layers"),
        ({}, {"selector": "layer_aware"}, "'layer_aware' needs a calibration file; allowed are"),
        ({"gate": "require"}, {"selector": "none"}, "gate=require"),
        ({"gate": "require"}, {"recompute_ratio": 0.01}, "above 0.05"),
        ({"gate": "require"}, {"layer_ratios": [1.0] * 4}, "gate=require"),
    ],
)
def test_what_is_not_allowed_is_refused(
    config: dict[str, Any], entry: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(**config).read({"vlcache": entry})
    assert expected in str(caught.value)


def test_the_gate_lets_requests_be_more_careful() -> None:
    made = policy(gate="require")
    for entry in ({"enabled": False}, {"recompute_ratio": 0.5}, {}):
        assert made.read({"vlcache": entry}) == RequestOptions(**entry)


def test_layer_aware_needs_a_schedule_at_start() -> None:
    assert policy(SCHEDULE, selector="layer_aware").select(RequestOptions(), 100).stages
    with pytest.raises(ConfigError, match="vlcache calibrate"):
        policy(selector="layer_aware")
