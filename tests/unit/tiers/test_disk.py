"""The disk tier: what is on disk is all there is, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlcache_connector.tiers import Deadline, DiskTier, Name, TierError
from vlcache_connector.tiers.disk import FRAME_BYTES, pack_frame, unpack_frame

MIB = 1 << 20
NOW = Deadline(86400)  # counted from the import on
NAME = Name("kv", "a1b2/3", 0, 2)
OBJECTS = [b"first" * 1000, b"", b"second"]


def disk(
    path: Path, budget: int = 64 * MIB, ttl: float | None = None, dep: str = "dep"
) -> DiskTier:
    return DiskTier(path, dep, budget, ttl)


def named(number: int) -> Name:
    return Name("kv", f"key{number}", 0, 1)


def stored_file(tier: DiskTier, name: Name = NAME) -> Path:
    return tier._path(name)


def read(tier: DiskTier, name: Name = NAME, max_bytes: int = MIB) -> list[bytes] | None:
    objects = tier.read(name, max_bytes, NOW)
    return None if objects is None else [bytes(obj) for obj in objects]


def files_below(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()]


def set_used(tier: DiskTier, name: Name, ago: float) -> None:
    file = stored_file(tier, name)
    stat = file.stat()
    os.utime(file, ns=(time.time_ns() - int(ago * 1e9), stat.st_mtime_ns))


def test_a_segment_comes_back_after_a_restart(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    assert tier.sizes([NAME], NOW) == [None]
    assert read(tier) is None
    tier.write(NAME, [memoryview(OBJECTS[0]), bytearray(OBJECTS[1]), OBJECTS[2]], NOW)
    tier.close()
    for again in (tier, disk(tmp_path)):
        assert again.sizes([named(1), NAME], NOW) == [None, 5006]
        assert read(again) == OBJECTS
        (entry,) = again.entries(NOW)
        assert (entry.name, entry.num_bytes, entry.ttl_seconds) == (NAME, 5006, None)
        assert 0 <= entry.age_seconds < 60
        usage = again.usage(NOW)
        assert (usage.num_segments, usage.num_bytes, usage.budget_bytes) == (1, 5006, 64 * MIB)


def test_the_beginning_is_no_use_of_a_segment(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    assert tier.beginning(NAME, 7, NOW) is None
    tier.write(NAME, OBJECTS, NOW)
    set_used(tier, NAME, 1000)
    used_ns = stored_file(tier).stat().st_atime_ns
    for num_bytes, expected in ((7, OBJECTS[0][:7]), (MIB, OBJECTS[0])):
        found = tier.beginning(NAME, num_bytes, NOW)
        assert found is not None
        assert bytes(found) == expected
    assert stored_file(tier).stat().st_atime_ns == used_ns
    stored_file(tier).write_bytes(b"nonsense")
    with pytest.raises(TierError, match="too short"):
        tier.beginning(NAME, 7, NOW)


def test_what_is_read_is_writable_and_nobody_elses(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)
    objects = tier.read(NAME, MIB, NOW)
    assert objects is not None
    objects[0][:5] = b"other"
    assert read(tier) == OBJECTS


@pytest.mark.parametrize(
    "other",
    [
        Name("encoder", NAME.key, 0, 2),
        Name("kv", "a1b2/4", 0, 2),
        Name("kv", NAME.key, 1, 2),
        Name("kv", NAME.key, 0, 4),
        Name("kv", "../../../kv/x", 0, 2),
        Name("kv", "ä b.r0of1", 0, 2),
    ],
)
def test_names_do_not_meet_and_can_be_listed(tmp_path: Path, other: Name) -> None:
    tier = disk(tmp_path / "disk")
    tier.write(NAME, OBJECTS, NOW)
    assert tier.sizes([other], NOW) == [None]
    tier.write(other, [b"other"], NOW)
    assert read(tier) == OBJECTS
    assert read(tier, other) == [b"other"]
    assert {entry.name for entry in tier.entries(NOW)} == {NAME, other}
    assert all(tmp_path / "disk" / "dep" in file.parents for file in files_below(tmp_path))
    assert tier.remove([other, named(9)], NOW) == 1
    assert {entry.name for entry in tier.entries(NOW)} == {NAME}


def test_deployments_do_not_meet(tmp_path: Path) -> None:
    disk(tmp_path).write(NAME, OBJECTS, NOW)
    other = disk(tmp_path, dep="other")
    assert read(other) is None
    assert list(other.entries(NOW)) == []


def test_a_write_replaces(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)
    tier.write(NAME, [b"new"], NOW)
    assert read(tier) == [b"new"]
    assert len(files_below(tmp_path)) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_the_least_recently_used_goes_first(tmp_path: Path, restarted: bool) -> None:
    size = 100_000
    budget = 3 * (size + FRAME_BYTES) + 10
    tier = disk(tmp_path, budget)
    for number in range(3):
        tier.write(named(number), [bytes(size)], NOW)
        set_used(tier, named(number), ago=100 - number)
    # Read by a process of its own, as another rank would.
    assert read(disk(tmp_path, budget), named(0)) is not None
    if restarted:
        tier = disk(tmp_path, budget)
    tier.write(named(3), [bytes(size)], NOW)
    assert tier.sizes([named(n) for n in range(4)], NOW) == [size, None, size, size]
    tier.write(named(4), [bytes(size)], NOW)
    assert tier.sizes([named(n) for n in range(5)], NOW) == [size, None, None, size, size]
    assert sum(file.stat().st_size for file in files_below(tmp_path)) <= budget


def test_what_another_process_read_since_the_last_scan_is_not_evicted(tmp_path: Path) -> None:
    tier = disk(tmp_path, 40 * (10_000 + FRAME_BYTES))
    for number in range(40):
        tier.write(named(number), [bytes(10_000)], NOW)
        set_used(tier, named(number), ago=100 - number)
    tier._rebuild_index(NOW)
    set_used(tier, named(0), ago=0)
    tier.write(named(40), [bytes(10_000)], NOW)
    assert tier.sizes([named(0), named(1), named(40)], NOW) == [10_000, None, 10_000]


def test_processes_share_a_budget(tmp_path: Path) -> None:
    budget = 1_000_000
    tiers = [disk(tmp_path, budget) for _ in range(3)]
    for number in range(40):
        tiers[number % 3].write(named(number), [bytes(90_000)], NOW)
        assert sum(file.stat().st_size for file in files_below(tmp_path)) <= budget
    assert tiers[0].usage(NOW).num_segments == 10
    assert tiers[1].sizes([named(39), named(0)], NOW) == [90_000, None]


def test_what_was_removed_makes_room(tmp_path: Path) -> None:
    tier = disk(tmp_path, 250_000)
    tier.write(named(0), [bytes(100_000)], NOW)
    tier.write(named(1), [bytes(100_000)], NOW)
    assert tier.remove([named(0)], NOW) == 1
    tier.write(named(2), [bytes(100_000)], NOW)
    assert tier.sizes([named(1), named(2)], NOW) == [100_000, 100_000]


def test_more_than_the_budget_is_refused_and_evicts_nothing(tmp_path: Path) -> None:
    tier = disk(tmp_path, 200_000)
    tier.write(named(0), [bytes(100_000)], NOW)
    with pytest.raises(TierError, match="the budget is 200000") as caught:
        tier.write(named(1), [bytes(200_000)], NOW)
    assert caught.value.fault == "full"
    assert tier.sizes([named(0)], NOW) == [100_000]


def test_time_to_live_counts_from_writing(tmp_path: Path) -> None:
    tier = disk(tmp_path, ttl=100.0)
    for number, age in ((0, 99.0), (1, 101.0), (2, 101.0)):
        tier.write(named(number), [b"x"], NOW)
        then = time.time() - age
        os.utime(stored_file(tier, named(number)), (then, then))
    assert read(tier, named(0)) == [b"x"]  # being read does not make it younger
    assert tier.sizes([named(n) for n in range(3)], NOW) == [1, None, None]
    assert read(tier, named(1)) is None
    assert not stored_file(tier, named(1)).exists()
    (entry,) = tier.entries(NOW)
    assert entry.name == named(0)
    assert entry.ttl_seconds is not None
    assert 0 < entry.ttl_seconds <= 1
    assert not stored_file(tier, named(2)).exists()


def frame_with(lengths: object, version: int = 1) -> bytes:
    packed = msgpack.packb(lengths)
    return (
        b"VLCT" + version.to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
    ).ljust(FRAME_BYTES, b"\0")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(FRAME_BYTES),
        b"another program's file" * 1000,
        frame_with([5], version=2) + b"hello",
        frame_with([6]) + b"hello",
        frame_with([4]) + b"hello",
        frame_with([1 << 60, 5]) + b"hello",
        frame_with([-1, 6]) + b"hello",
        frame_with([True, 4]) + b"hello",
        frame_with([5.0]) + b"hello",
        frame_with({"a": 5}) + b"hello",
        frame_with(5) + b"hello",
        frame_with([5])[:-1] + b"\1hello",
        b"VLCT\1\0\0\0\xff\xff\xff\xff".ljust(FRAME_BYTES, b"\0"),
    ],
)
def test_foreign_and_damaged_files(tmp_path: Path, content: bytes) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, [b"hello"], NOW)
    assert stored_file(tier).read_bytes() == frame_with([5]) + b"hello"
    stored_file(tier).write_bytes(content)
    with pytest.raises(TierError) as caught:
        tier.read(NAME, MIB, NOW)
    assert caught.value.fault == "damaged"
    assert tier.remove([NAME], NOW) == 1
    assert read(tier) is None


def test_a_truncated_file_is_damaged(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)
    os.truncate(stored_file(tier), FRAME_BYTES + 5000)
    with pytest.raises(TierError) as caught:
        tier.read(NAME, MIB, NOW)
    assert caught.value.fault == "damaged"


def test_more_than_expected_is_refused(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)
    assert read(tier, max_bytes=5006) == OBJECTS
    with pytest.raises(TierError, match="at most 5005") as caught:
        tier.read(NAME, 5005, NOW)
    assert caught.value.fault == "damaged"


@given(st.binary(max_size=200), st.integers(0, 1 << 40))
def test_unknown_bytes_are_damaged(data: bytes, file_bytes: int) -> None:
    for frame in (
        data,
        data.ljust(FRAME_BYTES, b"\0"),
        (b"VLCT\1\0\0\0" + data).ljust(FRAME_BYTES),
    ):
        with pytest.raises(TierError) as caught:
            unpack_frame(frame, file_bytes)
        assert caught.value.fault == "damaged"


@given(
    st.lists(st.integers(0, 1 << 40), max_size=300),
    st.integers(0, FRAME_BYTES - 1),
    st.integers(1, 255),
)
def test_a_frame_with_any_byte_changed_is_damaged_or_means_the_same_size(
    lengths: list[int], position: int, change: int
) -> None:
    frame = pack_frame(lengths)
    total = FRAME_BYTES + sum(lengths)
    assert unpack_frame(frame, total) == lengths
    changed = bytearray(frame)
    changed[position] ^= change
    if position < 12:
        with pytest.raises(TierError) as caught:
            unpack_frame(bytes(changed), total)
        assert caught.value.fault == "damaged"
    else:
        with suppress(TierError):
            assert sum(unpack_frame(bytes(changed), total)) == sum(lengths)


def test_concurrent_writers_of_one_segment(tmp_path: Path) -> None:
    tiers = [disk(tmp_path) for _ in range(3)]
    versions = [[bytes([number]) * 300_000, bytes([number]) * 10] for number in range(3)]
    tiers[0].write(NAME, versions[0], NOW)
    failures: list[object] = []

    def write(number: int) -> None:
        try:
            for _ in range(15):
                tiers[number].write(NAME, versions[number], NOW)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert read(tiers[0]) in versions
        assert tiers[0].sizes([NAME], NOW) == [300_010]
    assert failures == []
    assert len(files_below(tmp_path)) == 1
    for tier in tiers:
        assert tier._writing == {}


def test_left_over_temporary_files_go(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)
    folder = stored_file(tier).parent
    old, young, foreign = folder / "a.123.tmp", folder / "b.123.tmp", folder / "README"
    for file in (old, young, foreign):
        file.write_bytes(b"x")
    an_hour_ago = time.time() - 3600
    for file in (old, foreign):
        os.utime(file, (an_hour_ago, an_hour_ago))
    assert [entry.name for entry in disk(tmp_path).entries(NOW)] == [NAME]
    assert not old.exists()
    assert young.exists()
    assert foreign.exists()


@pytest.mark.parametrize(
    ("code", "fault"),
    [(errno.ENOSPC, "full"), (errno.EDQUOT, "full"), (errno.EACCES, "other"), (errno.EIO, "other")],
)
def test_refusals_of_the_system_leave_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fault: str
) -> None:
    tier = disk(tmp_path)
    tier.write(NAME, OBJECTS, NOW)

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(TierError, match=os.strerror(code)) as caught:
            tier.write(NAME, [b"new"], NOW)
    assert caught.value.fault == fault
    assert read(tier) == OBJECTS
    assert len(files_below(tmp_path)) == 1
    assert tier._writing == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    tier = disk(small_disk)
    tier.write(NAME, OBJECTS, NOW)
    with pytest.raises(TierError) as caught:
        tier.write(named(1), [bytes(2 * MIB)], NOW)
    assert caught.value.fault == "full"
    assert read(tier) == OBJECTS
    assert len(files_below(small_disk)) == 1


def test_a_full_disk_evicts_what_was_used_longest_ago(small_disk: Path) -> None:
    tier = disk(small_disk)
    for number in range(8):
        tier.write(named(number), [bytes(200 << 10)], NOW)
    kept = [number for number in range(8) if tier.sizes([named(number)], NOW) != [None]]
    assert kept == [4, 5, 6, 7]
    (small_disk / "of others").write_bytes(bytes(150 << 10))
    tier.write(named(8), [bytes(200 << 10)], NOW)
    kept = [number for number in range(9) if tier.sizes([named(number)], NOW) != [None]]
    assert kept == [5, 6, 7, 8]


def test_a_passed_deadline_leaves_nothing(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.write(named(1), OBJECTS, NOW)
    passed = Deadline(0)
    for call in (
        lambda: tier.write(NAME, OBJECTS, passed),
        lambda: tier.read(named(1), MIB, passed),
        lambda: tier.sizes([NAME], passed),
        lambda: tier.remove([NAME], passed),
        lambda: list(tier.entries(passed)),
    ):
        with pytest.raises(TierError) as caught:
            call()
        assert caught.value.fault == "timeout"
    assert len(files_below(tmp_path)) == 1


def test_paths_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "x", tmp_path / "no" / "parent"):
        with pytest.raises(ValueError, match=r"disk_path=.*name a directory") as caught:
            disk(path)
        assert str(path) in str(caught.value)
    disk(tmp_path / "new").write(NAME, OBJECTS, NOW)
    for budget in (0, -1):
        with pytest.raises(ValueError, match="disk_bytes"):
            disk(tmp_path, budget)
    for name in ("", "a/b", "..", "a*", "a b", "x" * 65):
        with pytest.raises(ValueError, match="deployment="):
            disk(tmp_path, dep=name)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_unwritable_path(tmp_path: Path) -> None:
    path = tmp_path / "root's"
    path.mkdir(mode=0o755)
    readable = [folder for folder in path.parents if folder != Path("/")]
    modes = [folder.stat().st_mode for folder in readable]
    for folder in readable:
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match=r"disk_path=.*Permission denied"):
            disk(path)
    finally:
        os.seteuid(0)
        for folder, mode in zip(readable, modes, strict=True):
            folder.chmod(mode & 0o7777)


def test_models_are_noted(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    assert tier.models(NOW) == {}
    tier.record_model("abc123", "org/model", NOW)
    tier.record_model("def/456", "other", NOW)
    tier.record_model("abc123", "org/model-2", NOW)
    assert disk(tmp_path).models(NOW) == {"abc123": "org/model-2", "def/456": "other"}
    assert list(tier.entries(NOW)) == []
