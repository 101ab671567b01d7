"""Tests of scripts/results.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from results import CpuTimes, Spread, duration, git_state, timestamp, with_range, write_text


def test_files_are_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_that_was_interrupted_has_no_duration() -> None:
    document = {"complete": True, "started": timestamp(), "finished": timestamp()}
    assert duration(document) == "0 minutes"
    assert "interrupted" in duration({**document, "complete": False})


def test_the_commit_is_told_where_there_is_one() -> None:
    commit = git_state()["commit"]
    assert commit is None or len(commit) == 40


def test_numbers_with_their_range() -> None:
    assert with_range(Spread.of([3, 1, 2]), ".1f") == "2.0 (1.0-3.0)"


def test_cpu_time_of_a_group_is_not_that_of_others() -> None:
    busy = "import time\ninput()\nwhile time.process_time() < 1: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", busy],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        before = CpuTimes.now([child.pid])
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        after = CpuTimes.now([child.pid])
        child.stdin.close()
    assert after.groups[0] - before.groups[0] > 0.5
