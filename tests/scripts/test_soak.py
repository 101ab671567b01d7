"""Tests of scripts/soak.py, and of what scripts/stress.py finds to be held."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soak
import stress
import torch
from local_redis import find_server
from stress import Ask, Result

from vlcache_connector.storage.header import SegmentId


def answer(reused: int = 0, shift: float = 0.0) -> Result:
    logprobs = np.full((1, 8), -2.0 + shift, np.float32)
    return Result("done", (1,), logprobs, {"reused_tokens": reused, "tier": "fs"}, 0.01)


def checks(count: int, mib_per_check: float = 0.0, **more: int) -> list[dict[str, Any]]:
    noise = np.random.default_rng(0).normal(0, 0.5, count)
    return [
        {
            "requests": 100 * (n + 1),
            "rss_mib": 900 + mib_per_check * n + noise[n],
            "rss_kept_mib": 1000 + noise[n],
            **{"files": 20, "threads": 9 + n * more.get("threads", 0)},
        }
        for n in range(count)
    ]


# -- what is found ------------------------------------------------------------------------------


def test_the_load_is_mixed_and_the_same_for_the_same_seed() -> None:
    asks = list(soak.make_load(2000))
    assert len(asks) == 2000
    assert asks == list(soak.make_load(2000))
    assert asks != list(soak.make_load(2000, seed=1))
    assert {len(ask.images) for ask in asks} == {0, 1, 2, 3}
    images = Counter(image for ask in asks for image in ask.images)
    assert images.most_common(1)[0][1] > 100
    assert sum(count == 1 for count in images.values()) > 200
    assert 200 < sum(ask.abort_after is not None for ask in asks) < 400
    assert {ask.interruption for ask in asks} == {None, *stress.INTERRUPTIONS}
    assert {ask.salt for ask in asks if not (ask.salt or "").startswith("witness")} == {
        *(None, "ann", "bob")
    }


def test_witnesses_come_behind_their_donors_and_are_known_to_nobody_else() -> None:
    asks = list(soak.make_load(3000))
    witnesses = [(place, ask) for place, ask in enumerate(asks) if ask.donors]
    assert len(witnesses) > 50
    assert {len(ask.donors) for _, ask in witnesses} == {1, 2}
    salts = Counter(ask.salt for ask in asks)
    for place, ask in witnesses:
        assert salts[ask.salt] == 1 + len(ask.donors)
        assert all(asks.index(donor) < place for donor in ask.donors)
        shown = {image for donor in ask.donors for image in donor.images}
        assert shown <= set(ask.images)


def test_growth_beyond_plain_vllm_is_found() -> None:
    for slope, plain_slope, expected in (
        (0.0, 0.0, []),
        (0.5, 0.0, ["memory grows by 5.00 MiB per 1,000 requests more than plain vLLM's"]),
        (0.5, 0.45, []),
        (0.1, 0.5, []),
    ):
        problems: list[str] = []
        with_it, without = checks(100, slope), checks(100, plain_slope)
        figures = soak.growth(with_it, without, 1.0, problems)
        assert problems == expected
        assert figures["plain_slope"][0] == pytest.approx(10 * plain_slope, abs=0.2)
    problems = []
    soak.growth(checks(100, threads=1), checks(100), 1.0, problems)
    assert problems == ["79 more threads are open than after the warm-up"]
    assert soak.growth(checks(10), checks(100), 1.0, problems) == {}  # it died


def test_a_wrong_answer_of_a_witness_is_found() -> None:
    ask = Ask("witness")
    allowed = [[answer(), answer(20, 0.1)]] * 3
    problems: list[str] = []
    right = [(ask, answer()), (ask, answer(20, 0.1)), (ask, answer(shift=5e-4))]
    figures = soak.compare(right, allowed, problems)
    assert (figures, problems) == ({"asked": 3, "from fs": 1, "different": 0}, [])
    wrong = [(ask, answer(shift=0.1)), (ask, answer(20)), (ask, Result("hung"))]
    assert soak.compare(wrong, allowed, problems)["different"] == 3
    assert len(problems) == 3


class FakeEngine:
    """Answers as `stress.EngineProcess` does."""

    leaks_after = 10**9
    spoiled = 0.0
    dies_after = 10**9
    failing = 0
    """The request of each batch that fails."""

    def __init__(self, _: Any, connector: Any, *__: Any, **___: Any) -> None:
        self.is_plain = connector is None
        self.served = 0

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, function: Any, *arguments: Any, on_progress: Any = None) -> Any:
        if function is stress.serve:
            self.served += len(arguments[0])
            if self.served > self.dies_after and not self.is_plain:
                raise stress.EngineCrashedError("it died")
            answers = [answer(20 * bool(ask.donors), self.spoiled) for ask in arguments[0]]
            if self.failing:
                answers[self.failing] = Result("failed")
            return answers
        if function is stress.references:
            return [[answer(), answer(20)] for _ in arguments[0]]
        if function is stress.violations:
            return ["captures: 1 held"] if self.served > self.leaks_after else []
        return {
            stress.usage: {"rss_mib": 900.0, "rss_kept_mib": 1000.0, "files": 20, "threads": 9},
            stress.happened: {"fs.read.bytes": 7},
            stress.count_preemptions: 3,
        }[function]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, []),
        ({"leaks_after": 250}, ["after 300 requests: captures: 1 held"]),
        ({"spoiled": 0.1}, ["answers otherwise: 20 tokens reused"]),
        ({"dies_after": 150}, ["after 100 requests: it died"]),
        ({"failing": 7}, ["6 requests failed"]),
    ],
    ids=["sound", "leak", "wrong answers", "crash", "failures"],
)
def test_the_command_says_what_is_wrong(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    expected: list[str],
) -> None:
    monkeypatch.setattr(soak, "EngineProcess", type("Fake", (FakeEngine,), change))
    monkeypatch.setattr(soak, "make_tiny_model", lambda path: path)
    monkeypatch.setattr(soak, "find_server", lambda: None)
    monkeypatch.setattr(soak, "LEAST_REQUESTS", 600)
    words = ["--requests", "600", "--output", str(tmp_path / "soak"), "--cache-dir", str(tmp_path)]
    assert soak.main(words) == bool(expected)
    document = json.loads((tmp_path / "soak.json").read_text())
    assert len(document["problems"]) >= len(expected)
    for text in expected:
        assert any(text in problem for problem in document["problems"])
    assert (tmp_path / "soak.md").read_text().count("\n- ") >= len(document["problems"])
    assert (tmp_path / "soak.png").stat().st_size > 1000
    shown = capsys.readouterr().out
    assert "that differ" in shown
    assert ("plain vLLM" in shown) == ("dies_after" not in change)


def test_wrong_command_lines_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--requests", "0"], ["--donor", "nobody"], ["--max-slope", "flat"]):
        with pytest.raises(SystemExit) as ended:
            soak.main(words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err


# -- with an engine ------------------------------------------------------------------------------


def leak_a_handle(llm: Any, tell: stress.Tell) -> None:
    _, worker, _ = stress._sides(llm)
    [key, *_] = (key for key, kind in worker._storage.engine._resident if kind == "kv")
    worker.leaked = worker._storage.engine.get(SegmentId(key, "kv"))


def leak_blocks(llm: Any, tell: stress.Tell) -> None:
    _, worker, vllm = stress._sides(llm)
    worker.leaked = vllm.kv_cache_manager.block_pool.get_new_blocks(2)


def lose_a_segment(llm: Any, tell: stress.Tell) -> None:
    _, worker, _ = stress._sides(llm)
    [key, *_] = (key for key, kind in worker._storage.engine._resident if kind == "encoder")
    worker._storage.engine.remove(SegmentId(key, "encoder"))


def spoil_the_accounts(llm: Any, tell: stress.Tell) -> None:
    stress._sides(llm)[0]._segments._used += 1


def spoil_a_byte(llm: Any, tell: stress.Tell) -> None:
    _, worker, _ = stress._sides(llm)
    [name, *_] = (name for name in worker._storage.engine._resident if name[1] == "kv")
    # The engine stores what it computes in inference mode.
    with torch.inference_mode(), worker._storage.engine.get(name) as segment:
        segment.layer(0)[0][0] += 1


def forget_a_fetch(llm: Any, tell: stress.Tell) -> None:
    stress._sides(llm)[0]._staging._tickets["nobody"] = None


def test_what_a_real_engine_leaks_is_found(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    connector = {**stress.AMPLE, "disk_path": str(tmp_path / "disk")}
    with stress.EngineProcess(tiny_model(), connector, tmp_path / "log") as engine:
        engine.call(stress.serve, [Ask(f"this {stress.IMAGE} is kept", ((1, 224),))])
        assert engine.call(stress.violations) == []
        for leak, expected in (
            (leak_a_handle, ["read handles: 1 held"]),
            (leak_blocks, ["KV blocks: 2 held"]),
            (forget_a_fetch, ["tickets of the staging: 1 held"]),
            (lose_a_segment, ["encoder known but not stored: 1 held"]),
            (spoil_the_accounts, ["index of KV segments: the accounts do not add up"]),
        ):
            before = engine.call(stress.violations)
            engine.call(leak)
            assert sorted(engine.call(stress.violations)) == sorted(before + expected)
        engine.call(spoil_a_byte)
        assert any("checksum" in problem for problem in engine.call(stress.violations))


@pytest.mark.parametrize("donor", ["first_seen", "canonical"])
def test_a_short_soak_leaves_nothing_behind(
    tmp_path: Path, donor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "BATCH", 60)
    words = ["--requests", "300", "--donor", donor, "--output", str(tmp_path / "soak")]
    assert soak.main([*words, "--seed", "5"]) == 0
    document = json.loads((tmp_path / "soak.json").read_text())
    assert document["statuses"]["hung"] == document["statuses"]["failed"] == 0
    assert len(document["interruptions"]) > 2
    assert document["statuses"]["aborted"] > 20
    assert document["preemptions"] > 0
    assert len(document["checks"]) == 5
    assert document["witnesses"]["asked"] > 3
    # The nearest tier has what the other one has, until its directory is looked over.
    assert document["counters"]["fs.read.bytes"] > 0
    for tier in ["fs", *(["valkey"] if find_server() else [])]:
        assert document["counters"][f"{tier}.write.bytes"] > 1 << 20
