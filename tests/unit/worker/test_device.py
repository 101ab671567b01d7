"""Copies of segments in device memory, on whatever device there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.segment import Segment, SegmentInfo
from vlcache_connector.streams import Leaving
from vlcache_connector.worker import device as tier
from vlcache_connector.worker.device import DeviceSegments

CPU = torch.device("cpu")
LAYERS, TOKENS = 3, 4
BYTES = LAYERS * 2 * TOKENS * 2 * 8 * 4


def segment(key: str, released: list[str]) -> Segment:
    """A host segment in two objects, with values of its own."""
    kv = torch.arange(LAYERS * 2 * TOKENS * 2 * 8, dtype=torch.float32) + len(key)
    kv = kv.view(LAYERS, 2, TOKENS, 2, 8)
    info = SegmentInfo(SegmentId(key, "kv"), TOKENS, torch.zeros(3, TOKENS, dtype=torch.int64))
    return Segment(info, [kv[:1], kv[1:]], lambda it: released.append(it.info.id.key))


def make(budget: int) -> DeviceSegments:
    return DeviceSegments(budget, CPU, None, Leaving(None, CPU))


def test_a_copy_equals_its_segment_and_lets_go_of_the_hosts_memory() -> None:
    device, released = make(BYTES), []
    host = segment("a", released)
    expected = [tuple(part.clone() for part in host.layer(layer)) for layer in range(LAYERS)]
    copy = device.promote(host, LAYERS)
    assert released == ["a"]
    for layer, (k, v) in enumerate(expected):
        assert torch.equal(copy.layer(layer)[0], k)
        assert torch.equal(copy.layer(layer)[1], v)
    assert "a" in device
    assert device.used_bytes == BYTES
    again = device.get("a")
    assert again is not None
    assert torch.equal(again.layer(2)[1], expected[2][1])
    assert torch.equal(again.info.positions, copy.info.positions)


def test_the_one_not_used_for_longest_goes_first() -> None:
    device = make(2 * BYTES)
    for key in "ab":
        device.promote(segment(key, []), LAYERS)
    assert device.get("a") is not None
    device.promote(segment("c", []), LAYERS)
    assert ["a" in device, "b" in device, "c" in device] == [True, False, True]
    assert device.used_bytes == 2 * BYTES


def test_a_copy_in_use_outlives_its_eviction() -> None:
    device = make(BYTES)
    copy = device.promote(segment("a", []), LAYERS)
    before = copy.layer(1)[0].clone()
    device.promote(segment("bb", []), LAYERS)
    assert "a" not in device
    assert torch.equal(copy.layer(1)[0], before)


def test_a_segment_larger_than_the_budget_stays_where_it_is() -> None:
    device, released = make(BYTES - 1), []
    host = segment("a", released)
    assert device.promote(host, LAYERS) is host
    assert released == []
    assert len(device) == device.used_bytes == 0


def test_a_device_without_room_is_one_line_and_the_segment_stays_where_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device, released = make(2 * BYTES), []
    host = segment("a", released)
    with monkeypatch.context() as patched, caplog.at_level("WARNING", logger=tier.__name__):
        patched.setattr(torch, "empty", no_room)
        assert device.promote(host, LAYERS) is host
    [line] = [record.getMessage() for record in caplog.records if record.name == tier.__name__]
    assert f"device_bytes={2 * BYTES}" in line
    assert "--gpu-memory-utilization" in line
    assert released == []
    assert len(device) == device.used_bytes == 0


@pytest.mark.parametrize("forget", [lambda device: device.remove("a"), DeviceSegments.clear])
def test_what_is_removed_takes_no_memory(forget: Callable[[DeviceSegments], None]) -> None:
    device = make(BYTES)
    device.promote(segment("a", []), LAYERS)
    forget(device)
    forget(device)
    assert device.used_bytes == 0
    assert device.get("a") is None
