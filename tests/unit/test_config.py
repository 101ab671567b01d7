"""Every key of both configurations: what is accepted, and how the rest is refused."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vlcache_connector.config import (
    ConfigError,
    RequestOptions,
    SelectorName,
    VLCacheConfig,
)

_NUMBER = "valid number"
_INTEGER = "valid integer"
_BOOLEAN = "valid boolean"
_BYTES = [
    (0, "greater than 0"),
    (-1, "greater than 0"),
    (1.5, _INTEGER),
    (True, _INTEGER),
    (None, _INTEGER),
    ([], _INTEGER),
    ("", "value and unit"),
    ("lots", "value and unit"),
    ("-1GiB", "value and unit"),
    ("4 parsecs", "byte unit"),
]
_RATIO = [
    (-0.01, "greater than or equal to 0"),
    (1.01, "less than or equal to 1"),
    (1.5, "less than or equal to 1"),
    (2, "less than or equal to 1"),
    (math.inf, "less than or equal to 1"),
    (math.nan, "less than or equal to 1"),
    ("0.5", _NUMBER),
    (True, _NUMBER),
    ([0.5], _NUMBER),
]
_SWITCH = [
    ("true", _BOOLEAN),
    ("False", _BOOLEAN),
    (1, _BOOLEAN),
    (0.0, _BOOLEAN),
    (None, _BOOLEAN),
]

# Key -> values that are refused, each with what the message has to say about the allowed ones.
REFUSED: dict[str, list[tuple[Any, str]]] = {
    "enabled": _SWITCH,
    "selector": [
        (value, "'first_k', 'layer_aware', 'cacheblend', 'random_k', 'none' or 'full'")
        for value in ("last_k", "First_K", "layer-aware", "", 0, None)
    ],
    "recompute_ratio": [*_RATIO, (None, _NUMBER)],
    "min_recompute_tokens": [
        (-1, "greater than or equal to 0"),
        (2.5, _INTEGER),
        ("8", _INTEGER),
        (True, _INTEGER),
        (None, _INTEGER),
    ],
    "calibration": [(value, "valid string") for value in (0, True, ["model"], {"a": 1})],
    "gate": [(value, "'require', 'warn' or 'off'") for value in ("on", "Warn", "", False, None)],
    "donor": [(value, "'first_seen' or 'canonical'") for value in ("last_seen", "", True, 0, None)],
    "donor_variants": [
        (0, "greater than or equal to 1"),
        (-1, "greater than or equal to 1"),
        (1.5, _INTEGER),
        ("2", _INTEGER),
        (True, _INTEGER),
        (None, _INTEGER),
    ],
    "min_segment_tokens": [
        (0, "greater than or equal to 1"),
        (-3, "greater than or equal to 1"),
        (16.5, _INTEGER),
        ("16", _INTEGER),
        (False, _INTEGER),
    ],
    "cpu_bytes": _BYTES,
    "encoder_cpu_bytes": _BYTES,
    "device_bytes": [(-1, "greater than or equal to 0"), (1.5, _INTEGER), (None, _INTEGER)],
    "disk_path": [(value, "valid string") for value in (0, True, ["/tmp"])],
    "disk_bytes": _BYTES,
    "l2_adapters": [(value, "valid list") for value in (None, "fs", {"type": "fs"}, True)],
    "lmcache_config_file": [(value, "valid string") for value in (0, True, ["lmcache.yaml"])],
    "redis_url": [(value, "valid string") for value in (6379, True, ["redis://a"])],
    "encryption_key_file": [(value, "valid string") for value in (0, True, ["key"])],
    "redis_tls_ca_file": [(value, "valid string") for value in (0, True, ["ca.pem"])],
    "deployment": [
        *((value, "should match pattern") for value in ("", "a/b", "a b", "a*", "x" * 65)),
        (None, "valid string"),
    ],
    "ttl_seconds": [(0, "greater than 0"), (-1, "greater than 0"), (1.5, _INTEGER)],
    "fetch_deadline_seconds": [(0, "greater than 0"), (-0.1, "greater than 0"), ("1", _NUMBER)],
    "require_tiers": _SWITCH,
    "write_queue_bytes": _BYTES,
    "store_at_sight": [
        (0, "greater than or equal to 1"),
        (3, "less than or equal to 2"),
        (1.5, _INTEGER),
    ],
    "salt_quota_bytes": [(0, "greater than 0"), (1.5, _INTEGER)],
    "break_even": _SWITCH,
    "prefill_tokens_per_second": [(0, "greater than 0"), (-1.0, "greater than 0"), ("9", _NUMBER)],
    "share_unsalted": _SWITCH,
    "trust_client_names": _SWITCH,
    "lazy_decoding": _SWITCH,
}
ACCEPTED: dict[str, list[Any]] = {
    "enabled": [False, True],
    "selector": list(get_args(SelectorName)),
    "recompute_ratio": [0, 0.0, 0.05, 1, 1.0],
    "min_recompute_tokens": [0, 1, 4096],
    "calibration": [None, "qwen2.5-vl-3b-instruct", "/path/to/file.yaml"],
    "gate": ["require", "warn", "off"],
    "donor": ["first_seen", "canonical"],
    "donor_variants": [1, 2, 64],
    "min_segment_tokens": [1, 4096],
    "cpu_bytes": [1, 1 << 44],
    "encoder_cpu_bytes": [1, 1 << 44],
    "device_bytes": [0, 1 << 40],
    "disk_path": [None, "/var/cache/vlcache"],
    "disk_bytes": [1, 1 << 44],
    "l2_adapters": [[], [{"type": "fs", "base_path": "/x"}], [{"type": "tape"}, {}]],
    "lmcache_config_file": [None, "/etc/lmcache.yaml"],
    "redis_url": [None, "redis://127.0.0.1:6379"],
    "encryption_key_file": [None, "/run/secrets/key"],
    "redis_tls_ca_file": [None, "/etc/ssl/ca.pem"],
    "deployment": ["default", "prod-2.eu_west"],
    "ttl_seconds": [1, 10**9],
    "fetch_deadline_seconds": [0.001, 1, 60.0],
    "require_tiers": [False, True],
    "write_queue_bytes": [1, 1 << 44],
    "store_at_sight": [1, 2],
    "salt_quota_bytes": [None, 1, 1 << 44],
    "break_even": [False, True],
    "prefill_tokens_per_second": [None, 0.5, 10_000],
    "share_unsalted": [False, True],
    "trust_client_names": [True, False],
    "lazy_decoding": [False, True],
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(key, value, id=f"{key}-{value}")
        for key, values in table.items()
        for value in values
    ]


def refusal(extra: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        VLCacheConfig.from_extra_config(extra)
    return str(refused.value)


def request_refusal(params: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        RequestOptions.from_params(params)
    return str(refused.value)


def test_every_key_has_refused_and_accepted_values_here() -> None:
    assert set(REFUSED) == set(ACCEPTED) == set(VLCacheConfig.model_fields)


def test_no_options_give_the_defaults() -> None:
    assert VLCacheConfig.from_extra_config({}) == VLCacheConfig()


@pytest.mark.parametrize(("key", "value"), cases(ACCEPTED))
def test_allowed_values_are_kept(key: str, value: Any) -> None:
    config = VLCacheConfig.from_extra_config({key: value})
    assert getattr(config, key) == value
    assert config.model_dump(exclude={key}) == VLCacheConfig().model_dump(exclude={key})


@pytest.mark.parametrize(("key", "case"), cases(REFUSED))
def test_refusals_name_key_value_and_what_is_allowed(key: str, case: tuple[Any, str]) -> None:
    value, allowed = case
    message = refusal({key: value})
    assert message.startswith("kv_connector_extra_config: ")
    assert f"{key}={value!r}" in message
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize("text", ["0", "0GiB", "0.5B"])
@pytest.mark.parametrize("key", ["cpu_bytes", "encoder_cpu_bytes"])
def test_byte_strings_that_come_to_nothing_are_refused(key: str, text: str) -> None:
    assert f"{key}=0 is refused: Input should be greater than 0" in refusal({key: text})


@pytest.mark.parametrize("key", ["", "recompute_ration", "Enabled", "recompute_ratio "])
def test_unknown_keys_are_refused_with_the_list_of_keys(key: str) -> None:
    message = refusal({key: 0.05})
    assert f"unknown key {key}=0.05" in message
    assert all(name in message for name in VLCacheConfig.model_fields)


def test_every_bad_key_gets_its_own_line() -> None:
    message = refusal({"selector": "last", "ratio": 1, "cpu_bytes": "x", "enabled": False})
    assert [line.split("=")[0].split()[-1] for line in message.splitlines()] == [
        "selector",
        "cpu_bytes",
        "ratio",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", 1),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        ("64MiB", 64 << 20),
        ("1.5KiB", 1536),
        ("10MB", 10_000_000),
        ("2gb", 2_000_000_000),
        ("2TiB", 2 << 40),
    ],
)
@pytest.mark.parametrize("key", ["cpu_bytes", "encoder_cpu_bytes"])
def test_byte_sizes_take_strings_with_units(key: str, text: str, expected: int) -> None:
    value = getattr(VLCacheConfig.from_extra_config({key: text}), key)
    assert value == expected
    assert type(value) is int


@settings(max_examples=40)
@given(
    number=st.integers(1, 1 << 20),
    unit=st.sampled_from([("", 1), ("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GB", 10**9)]),
    space=st.sampled_from(["", " "]),
)
def test_byte_strings_are_number_times_unit(number: int, unit: tuple[str, int], space: str) -> None:
    config = VLCacheConfig.from_extra_config({"cpu_bytes": f"{number}{space}{unit[0]}"})
    assert config.cpu_bytes == number * unit[1]


@settings(max_examples=40)
@given(
    extra=st.dictionaries(
        st.sampled_from([*VLCacheConfig.model_fields, "other"]) | st.text(max_size=5),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=8)
        | st.lists(st.integers(), max_size=2),
        max_size=4,
    )
)
def test_json_values_are_accepted_or_refused_but_never_anything_else(
    extra: dict[str, Any],
) -> None:
    with suppress(ConfigError):
        config = VLCacheConfig.from_extra_config(extra)
        assert extra.keys() <= config.model_fields_set


@pytest.mark.parametrize("value", ["fs", 1, None, ["fs"]])
def test_adapters_are_objects(value: Any) -> None:
    message = refusal({"l2_adapters": [{"type": "fs"}, value]})
    assert f"l2_adapters.1={value!r} is refused: Input should be a valid dictionary" in message


def test_which_keys_ask_for_tiers() -> None:
    assert VLCacheConfig(l2_adapters=[], disk_bytes=1, require_tiers=True).tier_keys == []
    keys = {"redis_url": "redis://a", "disk_path": "/x", "lmcache_config_file": "/y"}
    config = VLCacheConfig(l2_adapters=[{"type": "fs"}], **keys)
    assert config.tier_keys == ["disk_path", "l2_adapters", "lmcache_config_file", "redis_url"]


def test_a_config_can_not_be_changed() -> None:
    config = VLCacheConfig()
    with pytest.raises(ValidationError):
        config.recompute_ratio = 1.0


@pytest.mark.parametrize(
    "params", [None, {}, {"vlcache": None}, {"vlcache": {}}, {"do_remote_prefill": True}]
)
def test_requests_without_options_get_the_defaults(params: dict[str, Any] | None) -> None:
    assert RequestOptions.from_params(params) == RequestOptions(
        enabled=True, recompute_ratio=None, selector=None, layer_ratios=None
    )


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"enabled": False}, RequestOptions(enabled=False)),
        ({"recompute_ratio": 0}, RequestOptions(recompute_ratio=0.0)),
        ({"recompute_ratio": 1.0}, RequestOptions(recompute_ratio=1.0)),
        ({"recompute_ratio": None}, RequestOptions()),
        (
            {"enabled": True, "recompute_ratio": 0.25},
            RequestOptions(enabled=True, recompute_ratio=0.25),
        ),
        ({"selector": "cacheblend"}, RequestOptions(selector="cacheblend")),
        ({"selector": None, "layer_ratios": None}, RequestOptions()),
        ({"layer_ratios": [1, 0.5, 0.0]}, RequestOptions(layer_ratios=[1.0, 0.5, 0.0])),
    ],
)
def test_requests_choose_their_own_options(entry: dict[str, Any], expected: RequestOptions) -> None:
    assert RequestOptions.from_params({"vlcache": entry, "other": 1}) == expected


@pytest.mark.parametrize("entry", [False, 0, 0.5, "", "off", [], [["enabled", False]]])
def test_request_options_that_are_no_object_are_refused(entry: Any) -> None:
    message = request_refusal({"vlcache": entry})
    assert f"kv_transfer_params.vlcache={entry!r}" in message
    assert all(name in message for name in RequestOptions.model_fields)


REFUSED_OF_REQUESTS: dict[str, list[tuple[Any, str]]] = {
    "enabled": _SWITCH,
    "recompute_ratio": _RATIO,
    "selector": [case for case in REFUSED["selector"] if case[0] is not None],
    "layer_ratios": [
        (0.5, "valid list"),
        ("0.5", "valid list"),
        (True, "valid list"),
        ({"0": 0.5}, "valid list"),
    ],
}


def test_every_request_option_has_refused_values_here() -> None:
    assert set(REFUSED_OF_REQUESTS) == set(RequestOptions.model_fields)


@pytest.mark.parametrize(("value", "allowed"), [*_RATIO, (None, _NUMBER)], ids=str)
def test_a_bad_share_of_a_layer_is_refused_with_its_place(value: Any, allowed: str) -> None:
    message = request_refusal({"vlcache": {"layer_ratios": [0.5, value]}})
    assert f"layer_ratios.1={value!r}" in message
    assert allowed in message


@pytest.mark.parametrize(("key", "case"), cases(REFUSED_OF_REQUESTS))
def test_request_refusals_name_key_value_and_what_is_allowed(
    key: str, case: tuple[Any, str]
) -> None:
    value, allowed = case
    message = request_refusal({"vlcache": {key: value}})
    assert message.startswith("kv_transfer_params.vlcache: ")
    assert f"{key}={value!r}" in message
    assert allowed in message


@pytest.mark.parametrize("key", ["ratio", "calibration", "cpu_bytes"])
def test_unknown_request_options_are_refused_with_the_list_of_keys(key: str) -> None:
    message = request_refusal({"vlcache": {key: 1}})
    assert f"unknown key {key}=1; allowed keys: {', '.join(RequestOptions.model_fields)}" in message
