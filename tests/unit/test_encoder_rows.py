"""Encoder rows on both sides, with the halves called in every order that vLLM may choose."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.multimodal.inputs import PlaceholderRange

from tests.helpers.made_requests import content
from tests.helpers.stored import make_engine
from vlcache_connector import weights
from vlcache_connector.config import VLCacheConfig
from vlcache_connector.keys import encoder_key
from vlcache_connector.protocol import EncoderPlan, EncoderReport
from vlcache_connector.scheduler.encoder import EncoderRows
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.storage.engine import SegmentEngine
from vlcache_connector.storage.tier import Tier
from vlcache_connector.worker import encoder as worker
from vlcache_connector.worker.storage import Storage

WIDTH, ROWS = 8, 4
ROW_BYTES = WIDTH * 4
IMAGES = [content(f"{ROWS}:{ROWS}:{number:064x}") for number in range(6)]
"""Identifiers of items that were hashed here."""


def make_index(num_images: int, num_ranks: int) -> ResidencyIndex:
    return ResidencyIndex(num_images * ROWS * ROW_BYTES, num_ranks)


def make_rows(index: ResidencyIndex, *, can_store: bool = True) -> EncoderRows:
    return EncoderRows(
        VLCacheConfig(), fingerprint="print", row_bytes=ROW_BYTES, index=index, can_store=can_store
    )


def request_for(image: str) -> Any:
    place = PlaceholderRange(offset=0, length=ROWS)
    return SimpleNamespace(
        mm_features=[
            SimpleNamespace(identifier=image, mm_position=place, modality="image", data=None)
        ]
    )


def no_encoder(modality: str, data: Any) -> torch.Tensor:
    raise AssertionError("promised rows are there")


def output(num_tokens: int) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=num_tokens)


@pytest.fixture(scope="module")
def stores() -> Iterator[list[SegmentEngine]]:
    """Host memory of two ranks."""
    made = [
        make_engine(1, 1, 4, rank=rank, num_ranks=2)
        for rank in range(2)
    ]  # fmt: skip
    yield made
    for store in made:
        store.close()


@dataclass
class World:
    """Scheduler and workers of one engine.

    Attributes:
        kv: whether the KV half runs.
        encoder: whether the encoder half does.
    """

    stores: list[SegmentEngine]
    kv: bool
    encoder: bool
    rng: random.Random

    def __post_init__(self) -> None:
        self.index = make_index(3, len(self.stores))
        self.rows = make_rows(self.index)
        for store in self.stores:
            store.clear()
        self.ranks = [worker.EncoderRows(Storage(s, 1), torch.device("cpu")) for s in self.stores]
        self.encoder_cache: dict[str, torch.Tensor] = {}

    def resident(self) -> list[set[str]]:
        return [{key for key, _ in store._resident} for store in self.stores]

    def ready(self) -> set[str]:
        return {key for key in self.index._entries if self.index.is_ready(key)}

    def step(self, images: list[str], fails_on: int | None) -> None:
        """One of vLLM's steps: some images are encoded or loaded, or there is nothing to do."""
        loaded, encoded = set(), set()
        for image in images:
            if self.encoder and self.rows.has_cache_item(image):
                loaded.add(image)
            else:
                encoded.add(image)
            if self.encoder:
                self.rows.update_state_after_alloc(request_for(image), 0)
            else:
                self.rows.keep(request_for(image).mm_features[0])
        step = output(len(images))
        plans = [("kv", self.rows.plan(step))] if self.kv else []
        if self.encoder and images:
            plans.append(("encoder", self.rows.plan(step)))
        self.rng.shuffle(plans)
        reports = [
            self.run_rank(number, rank, plans, loaded, encoded, fails=number == fails_on)
            for number, rank in enumerate(self.ranks)
        ]
        self.rows.update_from_report(reduce(EncoderReport.aggregate, reports))
        if fails_on is None:
            for _, plan in plans:
                assert all(map(self.index.is_ready, plan.saves.values()))

    def run_rank(
        self,
        number: int,
        rank: worker.EncoderRows,
        plans: list[tuple[str, EncoderPlan]],
        loaded: set[str],
        encoded: set[str],
        *,
        fails: bool,
    ) -> EncoderReport:
        if not plans:
            return EncoderReport()
        waiting = set(encoded)
        for _, plan in plans:
            rank.begin_step(plan)
            cache: dict[str, torch.Tensor] = {}
            rank.load(plan, cache, no_encoder)
            assert cache.keys() == loaded, "Encoder cache miss"
            for image, rows in cache.items():
                assert (rows == IMAGES.index(image)).all()
            # Either half may compute what is to be stored, whichever plan came first.
            for image in list(waiting):
                if plan is plans[-1][1] or self.rng.random() < 0.5:
                    waiting.remove(image)
                    key = encoder_key(image, fingerprint="print")
                    if not fails:
                        rank.put(key, torch.full((ROWS, WIDTH), float(IMAGES.index(image))))
        return rank.take_report()


steps = st.lists(
    st.tuples(
        st.lists(st.sampled_from(IMAGES), max_size=3, unique=True),
        st.sampled_from([None, None, None, 0, 1]),
        st.booleans(),
    ),
    max_size=30,
)


@given(
    steps=steps,
    halves=st.sampled_from([(True, True), (True, False), (False, True)]),
    seed=st.integers(0, 1000),
)
def test_both_sides_hold_the_same_in_every_order(
    stores: list[SegmentEngine],
    steps: list[tuple[list[str], int | None, bool]],
    halves: tuple[bool, bool],
    seed: int,
) -> None:
    world = World(stores, *halves, rng=random.Random(seed))
    for images, fails_on, is_reset in steps:
        if is_reset:
            world.index.clear()
        world.step(images, fails_on)
        world.index.check_integrity()
        for resident in world.resident():
            assert world.ready() <= resident
    # Nothing is left of what was dropped, and nothing is reserved for ever.
    for _ in range(2):
        world.step([IMAGES[0]], None)
    world.step([IMAGES[0]], None)
    assert len(world.index) == len(world.ready())
    for resident in world.resident():
        assert resident == world.ready()


def test_both_halves_get_the_same_plan_of_a_step() -> None:
    rows = make_rows(make_index(3, 1))
    rows.update_state_after_alloc(request_for(IMAGES[0]), 0)
    step = output(1)
    assert rows.plan(step) is rows.plan(step)
    assert list(rows.plan(step).saves) == [IMAGES[0]]
    assert rows.plan(output(1)).saves == {}


def test_what_a_consumer_encodes_is_not_kept() -> None:
    index = make_index(3, 1)
    rows = make_rows(index, can_store=False)
    rows.update_state_after_alloc(request_for(IMAGES[0]), 0)
    assert rows.plan(output(1)).saves == {}
    assert len(index) == 0


def test_a_clients_name_is_neither_kept_nor_found() -> None:
    rows = make_rows(make_index(3, 1))
    rows.update_state_after_alloc(request_for("vlcache-client:cat.png"), 0)
    assert not rows.has_cache_item("vlcache-client:cat.png")


def test_every_image_is_kept_in_turn_after_all_that_is_kept_was_asked_for() -> None:
    rows = make_rows(index := make_index(2, 1))
    for image in IMAGES:
        rows.update_state_after_alloc(request_for(image), 0)
        plan = rows.plan(output(1))
        assert list(plan.saves) == [image]
        rows.update_from_report(EncoderReport(dict.fromkeys(plan.saves.values(), 1)))
        for _ in range(2):
            assert rows.has_cache_item(image)
            rows.plan(output(1))
    assert len(index) == 2


def test_weights_are_compared_once_a_generation_and_only_when_they_are_in_place(
    stores: list[SegmentEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While vLLM sleeps, steps without tokens still run, and the weights may be gone."""
    monkeypatch.setattr("vlcache_connector.worker.storage.all_ranks_have", list)
    tier, is_unchanged = Tier("fs"), Mock(return_value=True)
    monkeypatch.setattr(stores[0], "_tiers", [tier])
    storage = Storage(stores[0], 1, is_unchanged=is_unchanged)
    rank = worker.EncoderRows(storage, torch.device("cpu"))
    rows = make_rows(make_index(3, 1))
    rank.begin_step(rows.plan(output(1)))
    before = is_unchanged.call_count

    weights.may_have_changed()
    is_unchanged.return_value = False
    rank.begin_step(rows.plan(output(0)))
    assert (is_unchanged.call_count, tier.is_open) == (before, True)
    rank.begin_step(rows.plan(output(0), fetches=True))
    assert (is_unchanged.call_count, tier.is_open) == (before + 1, False)
    rank.begin_step(rows.plan(output(1)))
    assert is_unchanged.call_count == before + 1

    weights.may_have_changed()
    is_unchanged.return_value = True
    rank.begin_step(rows.plan(output(1)))
    assert (is_unchanged.call_count, tier.is_open) == (before + 2, True)
