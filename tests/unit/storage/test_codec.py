"""The object format: exact round trips, and nothing damaged or foreign gets through."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import replace

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.storage import codec
from vlcache_connector.storage.codec import ObjectHeader, RefusedObject

POSITIONS = torch.arange(15).view(3, 5) - 2


def kv_header(**changes: object) -> ObjectHeader:
    header = ObjectHeader(
        format_version=codec.FORMAT_VERSION,
        kind="kv",
        key="content-key",
        fingerprint="model",
        group=1,
        num_groups=3,
        first_layer=2,
        shape=(2, 2, 5, 3, 4),
        dtype="float32",
        positions=codec.pack_positions(POSITIONS),
        positions_rows=3,
        num_tokens=5,
    )
    return replace(header, **changes)


def encoded(header: ObjectHeader, tensor: Tensor | None = None) -> Tensor:
    buffer = torch.zeros(codec.encoded_size(header), dtype=torch.uint8)
    codec.encode_into(buffer, header, random_tensor(header) if tensor is None else tensor)
    return buffer


def random_tensor(header: ObjectHeader) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (header.payload_bytes,), dtype=torch.uint8, generator=generator)
    return raw.view(codec.DTYPES[header.dtype]).view(header.shape)


def decoded(
    buffer: Tensor, key: str = "content-key", fingerprint: str = "model", verify: bool = True
) -> tuple[ObjectHeader, Tensor]:
    return codec.decode(buffer, expect_key=key, expect_fingerprint=fingerprint, verify=verify)


def refusal(buffer: Tensor, **how: str | bool) -> str:
    with pytest.raises(RefusedObject) as refused:
        decoded(buffer, **how)
    return refused.value.reason


def raw_object(wire: object, payload: bytes = b"") -> Tensor:
    """An object with any header, well-formed or not."""
    packed = msgpack.packb(wire)
    head = struct.pack("<4sI", b"VLCS", len(packed)) + packed
    data = head.ljust(-(-len(head) // 64) * 64, b"\0") + payload
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def wire_of(buffer: Tensor) -> dict[str, object]:
    data = buffer.numpy().tobytes()
    (length,) = struct.unpack_from("<I", data, 4)
    return msgpack.unpackb(data[8 : 8 + length])


GOOD = encoded(kv_header())


@pytest.mark.parametrize("dtype", sorted(codec.DTYPES))
def test_round_trip_is_bit_exact(dtype: str) -> None:
    header = kv_header(dtype=dtype)
    tensor = random_tensor(header)
    read, payload = decoded(encoded(header, tensor))
    assert replace(read, checksum=0) == header
    assert payload.dtype == codec.DTYPES[dtype]
    assert torch.equal(payload.view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(codec.unpack_positions(read), POSITIONS)


def test_round_trip_of_encoder_rows_and_of_a_strided_tensor() -> None:
    header = kv_header(
        kind="encoder", shape=(5, 6), positions=b"", positions_rows=0, group=0, first_layer=0
    )
    tensor = random_tensor(header).t().contiguous().t()
    read, payload = decoded(encoded(header, tensor))
    assert torch.equal(payload.view(torch.int32), tensor.view(torch.int32))
    assert codec.unpack_positions(read) is None


def test_payload_is_aligned_and_a_view() -> None:
    buffer = encoded(kv_header())
    _, payload = decoded(buffer)
    start = payload.data_ptr() - buffer.data_ptr()
    assert start % 64 == 0
    assert start + payload.nbytes == buffer.numel()


def test_every_flipped_bit_of_the_header_and_of_some_payload_is_refused() -> None:
    buffer = GOOD.clone()
    payload = buffer.numel() - kv_header().payload_bytes
    for at in (*range(payload), *range(payload, buffer.numel(), 29), buffer.numel() - 1):
        for bit in range(8):
            buffer[at] ^= 1 << bit
            with pytest.raises(RefusedObject):
                decoded(buffer)
            buffer[at] ^= 1 << bit
    decoded(buffer)


@settings(max_examples=100)
@given(data=st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    buffer = GOOD.clone()
    buffer[data.draw(st.integers(0, buffer.numel() - 1))] ^= data.draw(st.integers(1, 255))
    assert refusal(buffer) in codec.REFUSAL_REASONS


@settings(max_examples=100)
@given(data=st.data())
def test_without_verification_a_changed_byte_never_breaks_the_reader(data: st.DataObject) -> None:
    buffer = GOOD.clone()
    buffer[data.draw(st.integers(0, buffer.numel() - 1))] ^= data.draw(st.integers(1, 255))
    try:
        header, payload = decoded(buffer, verify=False)
    except RefusedObject:
        return
    assert payload.shape == header.shape
    assert header.key == "content-key"


@settings(max_examples=100)
@given(data=st.data())
def test_a_truncated_or_longer_object_is_refused(data: st.DataObject) -> None:
    buffer = GOOD.clone()
    assert refusal(buffer[: data.draw(st.integers(0, buffer.numel() - 1))]) in ("format", "shape")
    longer = torch.cat([buffer, torch.zeros(data.draw(st.integers(1, 200)), dtype=torch.uint8)])
    assert refusal(longer) == "shape"


@settings(max_examples=100)
@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    for data in (content, struct.pack("<4sI", b"VLCS", len(content)) + content + bytes(64)):
        if data:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            assert refusal(buffer) == "format"


@settings(max_examples=50)
@given(name=st.text(max_size=20))
def test_foreign_key_and_fingerprint_are_refused(name: str) -> None:
    buffer = GOOD.clone()
    for how in ({"key": name}, {"fingerprint": name}):
        if name not in ("content-key", "model"):
            assert refusal(buffer, verify=False, **how) == "identity"
    assert decoded(buffer)[0].key == "content-key"


@pytest.mark.parametrize("version", [0, 2, 2**40])
def test_another_version_is_refused_whatever_its_fields(version: int) -> None:
    wire = wire_of(encoded(kv_header()))
    assert refusal(raw_object({**wire, "format_version": version})) == "version"
    assert refusal(raw_object({"format_version": version, "new": 1})) == "version"


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": True},
        {"num_tokens": 5.0},
        {"key": b"content-key"},
        {"shape": [2, 2, 5, 3, "4"]},
        {"shape": 60},
        {"checksum": bytes(7)},
        {"extra": 1},
        {"kind": msgpack.ExtType(1, b"")},
    ],
)
def test_a_header_off_the_schema_is_refused(change: dict[str, object]) -> None:
    assert refusal(raw_object({**wire_of(encoded(kv_header())), **change})) == "format"


def test_only_the_canonical_encoding_is_accepted() -> None:
    buffer = encoded(kv_header())
    wire = wire_of(buffer)
    assert refusal(raw_object(dict(reversed(wire.items())))) == "format"
    assert refusal(raw_object(list(wire.items()))) == "format"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "weights"},
        {"dtype": "object"},
        {"shape": (2, 2, 5, 3, 0)},
        {"shape": (2, 2, 5, 3, -4)},
        {"shape": (2, 2, 6, 3, 4)},
        {"shape": (2, 3, 5, 3, 4)},
        {"shape": (5, 3)},
        {"shape": (2**40, 2, 5, 2**40, 2**40)},
        {"positions_rows": 1},
        {"positions_rows": 2},
        {"positions": b""},
        {"num_tokens": 4},
        {"group": 3},
        {"group": -1},
        {"first_layer": -1},
    ],
)
def test_sizes_that_contradict_each_other_are_refused_both_ways(change: dict[str, object]) -> None:
    good = kv_header()
    wire = {**wire_of(encoded(good)), **change}
    assert refusal(raw_object(wire, bytes(good.payload_bytes)), verify=False) == "shape"
    if change != {"shape": (2**40, 2, 5, 2**40, 2**40)}:  # consistent, only absurd
        with pytest.raises(ValueError, match=r"shape|kind|group|tokens"):
            codec.encoded_size(kv_header(**change))


def test_absurd_lengths_are_refused_without_allocation() -> None:
    good = encoded(kv_header())
    tracemalloc.start()
    try:
        for length in (codec.MAX_HEADER_BYTES, codec.MAX_HEADER_BYTES + 1, 2**31, 2**32 - 1):
            buffer = good.clone()
            buffer[4:8] = torch.tensor(list(struct.pack("<I", length)), dtype=torch.uint8)
            assert refusal(buffer) == "format"
        for claim in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"):  # array, map, str, bin, ext
            packed = claim + b"\xff\xff\xff\xff" + bytes(200)
            head = struct.pack("<4sI", b"VLCS", len(packed)) + packed + bytes(64)
            assert refusal(torch.frombuffer(bytearray(head), dtype=torch.uint8)) == "format"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_too_long_is_not_written() -> None:
    num_tokens = codec.MAX_HEADER_BYTES // 12 + 1
    with pytest.raises(ValueError, match="bytes; at most"):
        codec.encoded_size(
            kv_header(
                shape=(1, 2, num_tokens, 1, 1),
                positions=bytes(12 * num_tokens),
                num_tokens=num_tokens,
            )
        )


@pytest.mark.parametrize(
    "positions",
    [
        torch.zeros(5, dtype=torch.int64),
        torch.zeros(2, 5, dtype=torch.int64),
        torch.zeros(1, 0, dtype=torch.int64),
        torch.zeros(1, 5),
        torch.full((1, 5), 2**31),
    ],
)
def test_positions_that_are_none_are_a_callers_error(positions: Tensor) -> None:
    with pytest.raises(ValueError, match="positions are"):
        codec.pack_positions(positions)


def test_tensors_and_buffers_that_do_not_fit_are_a_callers_error() -> None:
    header = kv_header()
    size = codec.encoded_size(header)
    tensor = random_tensor(header)
    for buffer, source in (
        (torch.zeros(size - 1, dtype=torch.uint8), tensor),
        (torch.zeros(size, dtype=torch.int8), tensor),
        (torch.zeros(2 * size, dtype=torch.uint8)[::2], tensor),
        (torch.zeros(size, dtype=torch.uint8), tensor[:1]),
        (torch.zeros(size, dtype=torch.uint8), tensor.to(torch.bfloat16)),
        (torch.zeros(size, dtype=torch.uint8), tensor.to(torch.float64)),
    ):
        with pytest.raises(ValueError, match=r"bytes|uint8|is not|cannot be stored"):
            codec.encode_into(buffer, header, source)
