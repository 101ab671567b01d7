"""The directory of the disk tier: which one is taken, and what its janitor removes."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from lmcache.v1.distributed.api import ObjectKey

from tests.helpers.stored import adapters_of
from tests.helpers.stored_objects import SECONDS, encoder_form, kv_form, sealed, store
from vlcache_connector.config import ConfigError
from vlcache_connector.storage.blocking import BlockingAdapter
from vlcache_connector.storage.disk import Janitor, check_directory
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import Form, Space
from vlcache_connector.storage.names import Namespace, RankSegment, read_file_name

# LMCache's logging sets off a deprecation inside OpenTelemetry.
pytestmark = pytest.mark.filterwarnings("ignore:`LoggingHandler`:DeprecationWarning")

DAY = 86400.0
FORM = kv_form(100)
"""Of three objects in `space()`."""
FOREIGN = (
    "notes.txt",
    ".hidden",
    "meta-llama@0x01000100@0@" + "ab" * 32 + ".data",
    "vlcache1-default-12@0x01000100@0@" + "ab" * 32 + ".data.bak",
    "vlcache1-default-12@0x01000100@ffffffff@" + "ab" * 32 + ".data",
    "vlcache1-default-12.data",
)


def space(deployment: str = "default", rank: int = 0) -> Space:
    namespace = str(Namespace(deployment, "1" * 64))
    return Space(namespace, rank, num_ranks=2, max_object_bytes=10_000)


def put(
    folder: Path,
    key: str,
    *,
    used_ago: float = 0.0,
    written_ago: float = 0.0,
    form: Form = FORM,
    where: Space | None = None,
) -> list[Path]:
    """Store a segment as LMCache's adapter does; its files."""
    objects = sealed(where or space(), SegmentId(key, form.kind), form)
    before = set(folder.iterdir())
    store({"type": "fs", "base_path": str(folder)}, objects)
    written = sorted(set(folder.iterdir()) - before)
    assert len(written) == len(objects) > 1
    now = time.time()
    for path in written:
        os.utime(path, (now - used_ago, now - max(used_ago, written_ago)))
    return written


def used_bytes(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # a janitor is at work
            total += path.stat().st_size
    return total


def size_of(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def janitor(folder: Path, budget: int = 1 << 30, ttl: float = DAY) -> Janitor:
    return Janitor(folder, budget, ttl, can_store=True)


def segments(folder: Path) -> dict[RankSegment, int]:
    """Segments with how many objects each has."""
    found: dict[RankSegment, int] = {}
    for path in folder.iterdir():
        named = read_file_name(path.name)
        assert named is not None
        found[named[0].segment] = found.get(named[0].segment, 0) + 1
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "segments"
    check_directory(path, can_store=True)
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes small file systems, where that is allowed."""
    made: list[Path] = []

    def mount(options: str) -> Path:
        path = tmp_path / f"mounted{len(made)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "vlcache", str(path)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("file systems can't be mounted here")
        made.append(path)
        return path

    yield mount
    for path in made:
        subprocess.run(["umount", str(path)], check=True)


# -- the directory ------------------------------------------------------------------------------


def test_it_is_made_for_us_alone_and_shared_by_our_processes(tmp_path: Path) -> None:
    path = tmp_path / "segments"
    mask = os.umask(0)
    try:
        check_directory(path, can_store=True)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o700
    for deployment in ("default", "a@b".replace("@", "-SEP-"), "v1.2_x"):
        put(path, "key", where=space(deployment))
        put(path, "key", where=space(deployment, rank=1))
        put(path, "rows", form=encoder_form(400), where=space(deployment))
    first = next(path.iterdir())
    first.rename(first.with_suffix(".tmp"))
    for can_store in (True, False):
        check_directory(path, can_store=can_store)
        check_directory(f"{path}/", can_store=can_store)


def refusal(path: Path | str, *, can_store: bool = True) -> str:
    with pytest.raises(ConfigError) as refused:
        check_directory(path, can_store=can_store)
    message = str(refused.value)
    assert message.startswith(f"kv_connector_extra_config: disk_path={str(Path(path))!r}: ")
    assert "; " in message
    return message


@pytest.mark.parametrize("can_store", [True, False])
def test_a_symbolic_link_is_refused(folder: Path, can_store: bool) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert "a symbolic link" in refusal(link, can_store=can_store)
    assert "a symbolic link" in refusal(f"{link}/", can_store=can_store)
    link.unlink()
    link.symlink_to(folder.parent / "nowhere")
    assert "a symbolic link" in refusal(link, can_store=can_store)
    assert not (folder.parent / "nowhere").exists()


@pytest.mark.parametrize("can_store", [True, False])
def test_what_is_no_directory_is_refused(tmp_path: Path, can_store: bool) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file", can_store=can_store)
    assert "No such file" in refusal(tmp_path / "no" / "parent", can_store=can_store)
    assert not (tmp_path / "no").exists()


def test_a_consumer_makes_none(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "absent", can_store=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FOREIGN)
def test_one_that_holds_what_is_not_ours_is_refused(folder: Path, name: str) -> None:
    put(folder, "key")
    (folder / name).write_text("precious")
    for can_store in (True, False):
        assert f"it holds {name!r}, which is not ours" in refusal(folder, can_store=can_store)
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o1777])
def test_one_that_others_can_write_to_is_refused(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert f"others can write to it (mode {mode:o}); chmod 700 it" in refusal(folder)
    folder.chmod(0o755)  # whom its owner lets read is the owner's choice
    check_directory(folder, can_store=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_one_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder, 12345, -1)
    assert "it belongs to user 12345, and we are 0; change its owner" in refusal(folder)


def test_one_that_is_read_only_is_for_consumers(mounted: Callable[..., Path]) -> None:
    path = mounted("ro")
    assert "this process can't write to it" in refusal(path)
    check_directory(path, can_store=False)


# -- budget -------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first_and_as_a_whole(folder: Path) -> None:
    files = {name: put(folder, name, used_ago=ago) for name, ago in [("b", 50), ("a", 90)]}
    files |= {name: put(folder, name, used_ago=ago) for name, ago in [("d", 10), ("c", 30)]}
    # One of its objects was read lately.
    os.utime(files["a"][1], (time.time(), files["a"][1].stat().st_mtime))
    size = size_of(files["a"])
    janitor(folder, budget=3 * size).clean()  # a part of it is for what is written meanwhile
    assert set(folder.iterdir()) == {*files["a"], *files["d"]}
    janitor(folder, budget=1 << 30).clean()
    assert len(segments(folder)) == 2


def test_ranks_go_by_themselves(folder: Path) -> None:
    put(folder, "key", used_ago=50, where=space(rank=0))
    kept = put(folder, "key", used_ago=10, where=space(rank=1))
    janitor(folder, budget=size_of(kept) * 3 // 2).clean()
    assert set(folder.iterdir()) == set(kept)


def test_the_budget_holds_what_was_there_before(folder: Path) -> None:
    for number in range(6):
        put(folder, f"key{number}", used_ago=100 - number)
    newest = put(folder, "newest")
    budget = used_bytes(folder) // 2
    cleaner = janitor(folder, budget)
    cleaner.start()
    try:
        wait_until(lambda: used_bytes(folder) <= budget)
    finally:
        cleaner.close()
    assert set(newest) < set(folder.iterdir())
    assert set(segments(folder).values()) == {3}


def wait_until(is_so: Callable[[], bool], seconds: float = 8.0) -> None:
    """For less than a janitor's round."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_much_that_is_written_is_noticed_before_the_next_round(folder: Path) -> None:
    size = size_of(put(folder, "first"))
    budget = 4 * size
    cleaner = janitor(folder, budget)
    [config] = adapters_of({"type": "fs", "base_path": str(folder)})
    with BlockingAdapter(config.inner_config, size, SECONDS) as adapter:
        adapter._adapter.register_listener(cleaner)
        cleaner.start()
        for number in range(10):
            assert adapter.store(loaded_into(adapter, f"key{number}"))
        wait_until(lambda: used_bytes(folder) <= budget)
        cleaner.close()
    assert segments(folder)


def loaded_into(adapter: BlockingAdapter, key: str) -> dict[ObjectKey, Any]:
    """A segment's objects in the adapter's memory."""
    objects = sealed(space(), SegmentId(key, "kv"), FORM)
    views = adapter.memory.split([value.numel() for value in objects.values()])
    for view, value in zip(views, objects.values(), strict=True):
        view.copy_(value)
    return dict(zip(objects, views, strict=True))


@pytest.mark.parametrize("kind", ["fs", "fs_native"])
def test_what_is_read_stays(folder: Path, kind: str) -> None:
    old = put(folder, "old", used_ago=90)
    put(folder, "newer", used_ago=10)
    written_at = [path.stat().st_mtime for path in old]
    cleaner = Janitor(folder, size_of(old) * 3 // 2, DAY, can_store=True)
    [config] = adapters_of({"type": kind, "base_path": str(folder)})
    with BlockingAdapter(config.inner_config, size_of(old), SECONDS) as adapter:
        adapter._adapter.register_listener(cleaner)
        assert all(adapter.load({key: view}) for key, view in loaded_into(adapter, "old").items())
    cleaner.clean()
    assert set(folder.iterdir()) == set(old)
    assert [path.stat().st_mtime for path in old] == written_at


def _write_in_a_process(folder: Path, name: str, budget: int, is_done: Any) -> None:
    """A server: stores segments, and looks after the directory."""
    check_directory(folder, can_store=True)
    cleaner = janitor(folder, budget)
    cleaner.start()
    for number in range(8):
        store(
            {"type": "fs", "base_path": str(folder)},
            sealed(space(), SegmentId(f"{name}{number}", "kv"), FORM),
        )
    is_done.wait(60)
    cleaner.clean()
    cleaner.close()


def test_processes_share_the_budget(tmp_path: Path) -> None:
    folder = tmp_path / "segments"
    context = multiprocessing.get_context("spawn")
    budget = 5 * sum(
        value.numel() for value in sealed(space(), SegmentId("a", "kv"), FORM).values()
    )
    is_done = context.Barrier(2)
    servers = [
        context.Process(target=_write_in_a_process, args=(folder, name, budget, is_done))
        for name in ("a", "b")
    ]
    for server in servers:
        server.start()
    for server in servers:
        server.join(120)
    assert [server.exitcode for server in servers] == [0, 0]
    assert 3 <= len(segments(folder)) <= 5
    assert set(segments(folder).values()) == {3}
    assert used_bytes(folder) <= budget


def test_a_file_system_smaller_than_the_budget_is_the_budget(mounted: Callable[..., Path]) -> None:
    folder = mounted("size=1m")
    check_directory(folder, can_store=True)
    spec = {"type": "fs", "base_path": str(folder)}
    for number in count():
        objects = sealed(space(), SegmentId(f"key{number}", "kv"), FORM)
        try:
            store(spec, objects)
        except AssertionError:
            break
    janitor(folder).clean()
    check_directory(folder, can_store=True)
    store(spec, objects)
    assert len(segments(folder)) > number // 2


# -- age ----------------------------------------------------------------------------------------


def test_what_is_too_old_goes_whether_it_is_used_or_not(folder: Path) -> None:
    kept = put(folder, "young", written_ago=50, used_ago=50)
    put(folder, "old", written_ago=70, used_ago=1)
    older = put(folder, "partly old", used_ago=1)
    os.utime(older[1], (time.time(), time.time() - 70))
    janitor(folder, ttl=60).clean()
    assert set(folder.iterdir()) == set(kept)


def test_what_was_left_half_written_goes_after_a_while(folder: Path) -> None:
    files = put(folder, "key")
    stale, young = (path.with_suffix(".tmp") for path in files[:2])
    for path, ago in ((stale, 700), (young, 500)):
        path.write_bytes(bytes(1000))
        os.utime(path, (time.time() - ago, time.time() - ago))
    janitor(folder).clean()
    assert set(folder.iterdir()) == {*files, young}
    janitor(folder, budget=1).clean()
    assert set(folder.iterdir()) == {young}


# -- what is not ours ---------------------------------------------------------------------------


def test_nothing_that_is_not_ours_is_touched(folder: Path) -> None:
    ours = put(folder, "key")
    for name in FOREIGN:
        (folder / name).write_text("precious")
    elsewhere = folder.parent / "elsewhere.data"
    elsewhere.write_text("precious")
    link = folder / ours[0].name.replace("default", "other")
    link.symlink_to(elsewhere)
    subfolder = folder / ours[0].name.replace("default", "third")
    subfolder.mkdir()
    (subfolder / ours[0].name).write_text("precious")
    ancient = time.time() - 100 * DAY
    for path in (*folder.iterdir(), elsewhere):
        os.utime(path, (ancient, ancient))
    janitor(folder, budget=1, ttl=1).clean()
    assert {path.name for path in folder.iterdir()} == {*FOREIGN, link.name, subfolder.name}
    assert elsewhere.read_text() == (subfolder / ours[0].name).read_text() == "precious"


def test_a_directory_that_is_no_longer_the_same_is_left_alone(folder: Path) -> None:
    put(folder, "key")
    other = folder.rename(folder.parent / "other")
    folder.symlink_to(other)
    cleaner = janitor(folder, budget=1, ttl=0.0)
    with pytest.raises(ConfigError, match="a symbolic link"):
        cleaner.clean()
    folder.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        cleaner.clean()
    assert len(segments(other)) == 1
    other.rename(folder)
    cleaner.clean()
    assert not segments(folder)


def test_a_janitor_lives_through_failures(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(folder, "key")
    folder.chmod(0o777)
    cleaner = janitor(folder, budget=1)
    cleaner.start()
    wait_until(lambda: "is not cleaned up" in caplog.text)
    assert re.search("others can write to it", caplog.text)
    folder.chmod(0o700)
    cleaner.on_l2_keys_stored([], [1])
    wait_until(lambda: not segments(folder))
    cleaner.close()


def test_a_consumer_removes_nothing_and_notes_what_it_reads(folder: Path) -> None:
    files = put(folder, "key", written_ago=100, used_ago=100)
    cleaner = Janitor(folder, 1, 1.0, can_store=False)
    cleaner.start()
    cleaner.on_l2_keys_stored([], [1 << 20])
    named = [read_file_name(path.name) for path in files]
    cleaner.on_l2_keys_accessed([each[0].key for each in named if each is not None])
    time.sleep(0.3)
    cleaner.close()
    assert len(segments(folder)) == 1
    assert all(time.time() - path.stat().st_atime < 50 for path in files)
