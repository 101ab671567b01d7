"""Ten thousand damaged values: each is refused, or it is what was stored."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch

from tests.helpers.stored import make_engine, make_layout, put_kv
from vlcache_connector.storage.header import Kind, RefusedObject, SegmentId
from vlcache_connector.storage.layout import check_object, read_objects

TOKENS = 6
SHAPE = (4, 2, 8)
LAYOUT = make_layout(*SHAPE, encoder_width=24, max_object_bytes=4096)  # two objects for the KV
MUTATIONS = 10_000

pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")


@pytest.fixture
def values() -> Iterator[dict[tuple[str, Kind], list[bytes]]]:
    """Objects of stored segments, by key and kind."""
    engine = make_engine(*SHAPE, encoder_width=24, max_object_bytes=4096)
    layers, _, _ = SHAPE
    kv = torch.randn(layers, 2, TOKENS, *SHAPE[1:])
    for key in ("cat/0", "dog/0"):
        positions = torch.arange(3 * TOKENS).view(3, TOKENS)
        assert put_kv(engine, key, positions, [(k, v) for k, v in kv])
    assert engine.put_encoder("cat", torch.randn(TOKENS, 24))
    names: list[tuple[str, Kind]] = [("cat/0", "kv"), ("dog/0", "kv"), ("cat", "encoder")]
    yield {
        name: [bytes(part.numpy()) for part in engine._resident[SegmentId(*name)].buffers]
        for name in names
    }
    engine.close()


def read(name: tuple[str, Kind], objects: Sequence[bytes], num_tokens: int = TOKENS) -> None:
    """Read what lies under the keys of a segment, as a guard and then an engine do.

    Raises:
        RefusedObject: it is not the segment.
    """
    expected = LAYOUT.expected(SegmentId(*name), num_tokens)
    assert expected is not None
    if len(objects) < len(expected.keys):
        raise RefusedObject("shape", "an object is missing")
    buffers = [torch.frombuffer(bytearray(part or b"\0"), dtype=torch.uint8) for part in objects]
    for key, buffer in zip(expected.keys, buffers, strict=False):
        check_object(key, buffer)
    read_objects(expected.headers, buffers[: len(expected.keys)])


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
    rng = random.Random(0)
    outcomes: Counter[str] = Counter()
    for _ in range(MUTATIONS):
        name, objects = rng.choice(list(values.items()))
        mutated = mutate(rng, objects, list(values.values()))
        try:
            read(name, mutated)
        except RefusedObject as refusal:
            outcomes[refusal.reason] += 1
            continue
        assert mutated[: len(objects)] == objects
        outcomes["equal"] += 1
    assert sum(outcomes.values()) == MUTATIONS
    # All ways to be refused were met, and the check does let through what is whole.
    assert set(outcomes) == {"format", "version", "identity", "shape", "checksum", "equal"}


def test_whole_values_pass(values: dict[tuple[str, Kind], list[bytes]]) -> None:
    for name, objects in values.items():
        read(name, objects)


def test_a_whole_value_of_another_size_is_refused(
    values: dict[tuple[str, Kind], list[bytes]],
) -> None:
    for name, objects in values.items():
        with pytest.raises(RefusedObject, match="another form"):
            read(name, objects, TOKENS + 1)
