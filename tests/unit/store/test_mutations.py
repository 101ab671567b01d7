"""Ten thousand damaged values: each is refused, or it is what was stored."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.helpers.stored import put_kv
from vlcache_connector.storage.header import Kind, RefusedObject, SegmentId
from vlcache_connector.store import LMCacheSegmentStore

LAYERS, HEADS, DIM, TOKENS = 4, 2, 8, 6
MUTATIONS = 10_000

pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")


def make_store() -> LMCacheSegmentStore:
    return LMCacheSegmentStore(
        "model",
        "print",
        0,
        1,
        1 << 20,
        LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        kv_dtype=torch.float32,
        max_object_bytes=4096,  # two objects for the KV
    )


@pytest.fixture
def values() -> Iterator[dict[tuple[str, Kind], list[bytes]]]:
    """Stored segments as a tier has them, by key and kind."""
    store = make_store()
    kv = torch.randn(LAYERS, 2, TOKENS, HEADS, DIM)
    for key in ("cat/0", "dog/0"):
        assert put_kv(store, key, torch.arange(3 * TOKENS).view(3, TOKENS), [(k, v) for k, v in kv])
    assert store.put_encoder("cat", torch.randn(TOKENS, 24))
    stored = {}
    names: list[tuple[str, Kind]] = [("cat/0", "kv"), ("dog/0", "kv"), ("cat", "encoder")]
    for key, kind in names:
        segment = store.get_encoded(SegmentId(key, kind))
        assert segment is not None
        stored[key, kind] = [bytes(part) for part in segment.objects]
        segment.release()
    yield stored
    store.close()


def mutate(rng: random.Random, objects: list[bytes], others: list[list[bytes]]) -> list[bytes]:
    """One of the things that can happen to a value."""
    mutated = list(objects)
    at = rng.randrange(len(mutated))
    data = bytearray(mutated[at])
    match rng.randrange(8):
        case 0:  # a bit
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:  # a bit of the header
            data[rng.randrange(200)] ^= 1 << rng.randrange(8)
        case 2:  # a run of bytes
            start = rng.randrange(len(data))
            data[start : start + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
        case 3:  # the end
            del data[rng.randrange(len(data)) :]
        case 4:  # something in between
            start = rng.randrange(len(data))
            data[start:start] = rng.randbytes(rng.randrange(1, 64))
        case 5:  # a piece of another value
            other = rng.choice(rng.choice(others))
            start = rng.randrange(min(len(data), len(other)))
            end = start + rng.randrange(1, 512)
            data[start:end] = other[start:end]
        case 6:  # objects missing, doubled or in another order
            mutated = rng.choices(mutated, k=rng.randrange(len(mutated) + 2))
            return mutated
        case 7:  # an object of another value
            mutated[at] = rng.choice(rng.choice(others))
            return mutated
    mutated[at] = bytes(data)
    return mutated


def test_ten_thousand_mutated_values_are_refused_or_equal(
    values: dict[tuple[str, Kind], list[bytes]],
) -> None:
    store, rng = make_store(), random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(MUTATIONS):
        (key, kind), objects = rng.choice(list(values.items()))
        mutated = mutate(rng, objects, list(values.values()))
        try:
            store.check_encoded(
                SegmentId(key, kind), [memoryview(bytearray(part)) for part in mutated], TOKENS
            )
        except RefusedObject as refusal:
            outcomes[refusal.reason] += 1
            continue
        assert mutated == objects
        outcomes["equal"] += 1
    store.close()
    assert sum(outcomes.values()) == MUTATIONS
    # All ways to be refused were met, and the check does let through what is whole.
    assert set(outcomes) == {"format", "version", "identity", "shape", "checksum", "equal"}


def test_whole_values_pass(values: dict[tuple[str, Kind], list[bytes]]) -> None:
    store = make_store()
    for (key, kind), objects in values.items():
        parts = [memoryview(bytearray(part)) for part in objects]
        store.check_encoded(SegmentId(key, kind), parts, TOKENS)
    store.close()


def test_a_whole_value_of_another_size_is_refused(
    values: dict[tuple[str, Kind], list[bytes]],
) -> None:
    store = make_store()
    for (key, kind), objects in values.items():
        parts = [memoryview(bytearray(part)) for part in objects]
        with pytest.raises(RefusedObject, match=f"of {TOKENS} tokens, not {TOKENS + 1}"):
            store.check_encoded(SegmentId(key, kind), parts, TOKENS + 1)
    store.close()
