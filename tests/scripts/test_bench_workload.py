"""Tests of scripts/bench_workload.py."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import bench_workload as bench
import pytest
import workloads as made_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.quick_start import QUICK_START
from tests.helpers.script import run_script

small = st.integers(1, 5)
scales = st.fixed_dictionaries(
    {
        "users": small,
        "turns": small,
        "images": st.integers(2, 6),
        "documents": small,
        "pages": small,
        "questions": st.integers(1, 40),
        "rates": st.lists(st.integers(0, 100), min_size=1, max_size=4).map(tuple),
        "requests": small,
        "agent_turns": small,
        "screenshots": st.integers(1, 6),
        "chats": small,
        "chat_turns": small,
        "mixed": st.integers(1, 30),
        "one_offs": st.integers(1, 12),
    }
)


def by_name(scale: made_of.Scale) -> dict[str, made_of.Workload]:
    return {workload.name: workload for workload in made_of.make_workloads(scale)}


@given(scale=scales)
def test_no_image_is_twice_at_the_same_place(scale: dict[str, Any]) -> None:
    elsewhere: set[int] = set()
    for workload in made_of.make_workloads(made_of.Scale(**scale)):
        places: list[tuple[int, int, int]] = []
        for prompt in (*workload.primed, *workload.prompts):
            assert len(set(prompt.images)) == len(prompt.images)
            if workload.name != "chat" or prompt.kind == "first turn":
                places += [
                    (image, slot, prompt.fillers) for slot, image in enumerate(prompt.images)
                ]
        assert len(set(places)) == len(places)
        mine = {image for image, _, _ in places}
        assert not mine & elsewhere
        elsewhere |= mine


@given(scale=scales)
def test_recurring_images(scale: dict[str, Any]) -> None:
    made = made_of.Scale(**scale)
    named = by_name(made)

    window = named["window"]
    assert len(window.prompts) == made.users * made.turns
    for number, prompt in enumerate(window.prompts[made.users :]):
        before = window.prompts[number].images  # the user's turn before
        assert prompt.images[:-1] == before[1:]
        assert prompt.images[-1] not in before

    agent = named["agent"].prompts
    kinds = ["first turn", *["later turns"] * (made.agent_turns - 1)]
    assert [prompt.kind for prompt in agent] == kinds
    for one, two in itertools.pairwise(agent):
        assert len(two.images) == made.screenshots
        assert two.images[:-2] == one.images[2:]
        assert not set(two.images[-2:]) & set(one.images)

    documents = named["documents"]
    assert len(documents.prompts) == made.questions
    for number, prompt in enumerate(documents.prompts):
        same = documents.prompts[number % made.documents].images
        assert sorted(prompt.images) == sorted(same)
        assert len(prompt.images) == made.pages

    repeats = [workload for workload in named.values() if workload.rate is not None]
    assert [workload.rate for workload in repeats] == list(dict.fromkeys(made.rates))
    for workload in repeats:
        slots = made.requests * made.images
        assert len(workload.prompts) == made.requests
        assert round(workload.repeated * slots) == round(workload.rate * slots / 100)


@given(scale=scales)
def test_a_chat_goes_on_where_it_ended(scale: dict[str, Any]) -> None:
    made = made_of.Scale(**scale)
    chat = by_name(made)["chat"]

    def text(prompt: made_of.Prompt) -> str:
        parts = made_of.content(prompt, 0, lambda seed: {"text": f"<{seed}>"})
        return "".join(part["text"] for part in parts)

    shown = {prompt.images for prompt in chat.primed}
    assert len(shown) == made.chats
    assert len(chat.prompts) == made.chats * made.chat_turns
    for number, prompt in enumerate(chat.prompts):
        assert prompt.images in shown
        assert prompt.kind == ("first turn" if number < made.chats else "later turns")
        if number >= made.chats:
            before = text(chat.prompts[number - made.chats])
            assert text(prompt).startswith(before)
            assert len(text(prompt)) > len(before) + 500


@given(scale=scales)
def test_known_images_were_shown_before_and_new_ones_never(scale: dict[str, Any]) -> None:
    made = made_of.Scale(**scale)
    for workload in (by_name(made)["mixed"], by_name(made)["burst"]):
        assert workload.at_once == made.at_once
        shown = {image for prompt in workload.primed for image in prompt.images}
        for prompt in workload.prompts:
            known = [image in shown for image in prompt.images]
            assert (
                known
                == {"text": [], "new images": [False] * 2, "known images": [True] * 2}[prompt.kind]
            )
            shown.update(prompt.images)


def test_shares_of_mixed_traffic() -> None:
    kinds = Counter(prompt.kind for prompt in by_name(made_of.Scale(mixed=40))["mixed"].prompts)
    assert kinds == {"text": 28, "new images": 8, "known images": 4}
    burst = by_name(made_of.Scale(one_offs=8))["burst"]
    kinds = Counter(prompt.kind for prompt in burst.prompts)
    assert kinds == {"new images": 8, "known images": 2}
    assert burst.room is not None
    assert burst.room < burst.num_images


def test_repeated_share() -> None:
    def share(*orders: list[int], primed: int = 0) -> float:
        prompts = made_of.shifted(orders)
        return made_of.Workload("", prompts[primed:], prompts[:primed]).repeated

    assert share([1, 2], [3, 4]) == 0.0
    assert share([1, 2], [2, 3]) == 0.25
    assert share([1, 2], [2, 3], primed=1) == 0.5
    scale = made_of.Scale()
    repeats = [w for w in made_of.make_workloads(scale) if w.rate is not None]
    assert [w.repeated for w in repeats] == [r / 100 for r in scale.rates]


def test_dataset(tmp_path: Path) -> None:
    """The rows are what vLLM's dataset class takes, and it sends them as they are."""
    from vllm.benchmarks.datasets import CustomImageDataset

    prompts = made_of.shifted([[1, 2], [2, 3], [2, 3]])
    workload = made_of.Workload("repeat 50 %", prompts[1:], prompts[:1])
    path = made_of.write_dataset(workload, tmp_path, 112)
    dataset = CustomImageDataset(dataset_path=str(path), disable_shuffle=True)
    requests = dataset.sample(tokenizer=None, num_requests=2, ensure_client_side_data=True)
    sent = [request.prompt for request in requests]
    assert [[part["type"] for part in parts] for parts in sent] == [
        ["text", "image_url", "text", "image_url", "text"]
    ] * 2
    urls = [[p["image_url"]["url"] for p in parts if p["type"] == "image_url"] for parts in sent]
    assert urls[0] == urls[1]
    assert urls[0][0] != urls[0][1]
    assert all(url.startswith("data:image/png;base64,") for url in urls[0])
    fronts = [parts[0]["text"] for parts in sent]
    assert [front[:15] for front in fronts] == ["Request 000001.", "Request 000002."]
    assert len(fronts[0]) != len(fronts[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "0"], "--users 0: must be at least 1"),
        (["--images", "1"], "--images 1: must be at least 2"),
        (["--output-tokens", "0"], "--output-tokens 0: must be at least 1"),
        (["--rates", "50", "101"], "--rates 101: must be between 0 and 100"),
        (["--image-px", "450"], "--image-px 450: must be a multiple of 28, 112 to 1792"),
        (["--systems", "ec"], "--systems ec: plain must be among them"),
        (["--workloads", "talk"], "argument --workloads: invalid choice: 'talk'"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_foreign_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert bench.main(["--plot-only", "--output", str(tmp_path / "other")]) == 1
    assert "was not written by this version of bench_workload.py" in capsys.readouterr().err


def _run(system: str, number: int, ttfts: list[float], **more: Any) -> dict[str, Any]:
    run = {"workload": "mixed", "system": system, "plain": "plain", "round": number}
    return run | {"ttfts": ttfts, "itls": [[ttft / 20, ttft / 20] for ttft in ttfts]} | more


def test_ratios_are_taken_within_rounds() -> None:
    document = {
        "workloads": [
            {"name": "mixed", "kinds": ["text", "new", "text", "text"], "output_tokens": 2}
        ],
        "runs": [
            _run("plain", 0, [1.0, 8.0, 1.0, 3.0]),
            _run("vlcache-cpu", 0, [1.0, 4.0, 1.1, 9.0]),
            _run("vlcache-cpu", 1, [8.0, 4.0, 8.0, 8.0]),
            _run("plain", 1, [4.0, 2.0, 4.0, 4.0]),
            _run("plain", 2, [4.0, 2.0, 4.0, 4.0]),  # interrupted
        ],
    }
    text, new = bench.cells_of(document)
    assert (text.kind, text.system, text.requests) == ("text", "vlcache-cpu", 3)
    assert (text.ttft.low, text.ttft.high) == pytest.approx((1.1, 2.0))
    assert text.plain == 3.5
    assert text.itl is not None
    assert text.plain_itl == pytest.approx(17 / 6 / 10)
    assert (text.itl.low, text.itl.high) == pytest.approx((2.0, 11.1 / 5))
    assert text.verdict == "**above 1.03**"
    assert (new.ttft.low, new.ttft.high) == (0.5, 2.0)
    assert new.verdict == "above 1.03 in some rounds"


def test_groups() -> None:
    groups = bench._groups(bench.SYSTEMS, 2)
    assert groups == {
        "plain": ["ec", "lmcache"],
        **{f"plain-{i + 2}": list(bench.VLCACHE[2 * i : 2 * i + 2]) for i in (0, 1)},
    }
    assert bench._turns("plain", groups["plain"]) == ["plain", "ec", "lmcache", "again"]
    assert bench._turns("plain-2", groups["plain-2"]) == ["plain-2", *groups["plain-2"]]
    runs = [
        {"system": name, "plain": plain}
        for plain, names in groups.items()
        for name in bench._turns(plain, names)
    ]
    assert bench._systems(reversed(runs)) == [run["system"] for run in runs]


def test_agreement() -> None:
    mine = _run("vlcache-cpu", 0, [], texts=["a", "b", "c", "d"])
    plain = _run("plain", 0, [], texts=["a", "b", "c", "x"])
    other = _run("plain", 1, [], texts=["y"] * 4)
    assert bench.agreement([mine, other], mine) is None
    assert bench.agreement([other, plain, mine], mine) == 0.75


def test_reduced_run(tmp_path: Path) -> None:
    output = tmp_path / "results" / "workload"
    arguments = [
        *("--size", "tiny"),
        *("--image-px", "224", "--systems", "plain", "vlcache-fs"),
        *("--workloads", "window", "chat", "mixed", "--users", "2", "--turns", "2"),
        *("--images", "3", "--chats", "1", "--chat-turns", "3", "--mixed", "10"),
        *("--output-tokens", "2", "--rounds", "1"),
        "--always-reuse",
        *("--output", str(output), "--cache-dir", str(tmp_path / "cache")),
    ]
    run_script("bench_workload.py", *arguments, env=QUICK_START)

    document = json.loads(output.with_name("workload.json").read_text())
    assert document["complete"] is True
    assert document["not_run"] == {}
    runs = {(run["workload"], run["system"]): run for run in document["runs"]}
    systems = ["plain", "vlcache-fs", "again"]
    requests = {"window": 4, "chat": 3, "mixed": 10}
    assert set(runs) == set(itertools.product(requests, systems))
    for (workload, system), run in runs.items():
        number = requests[workload]
        assert run["requests"] == len(run["ttfts"]) == len(run["texts"]) == number
        assert all(run["itls"])
        assert run["prompt_tokens"] == runs[workload, "plain"]["prompt_tokens"]
        if workload == "window":
            assert 192 * number < run["prompt_tokens"] < (192 + 256) * number
        if system != "vlcache-fs":
            # Prefix caching alone serves nothing but the later turns of a chat.
            is_whole = run["computed_tokens"] == run["prompt_tokens"]
            assert is_whole == (workload != "chat")
            assert run["reused_tokens"] == {}
            continue
        images = {"window": 4, "chat": 1, "mixed": 2}[workload]
        reused = sum(run["reused_tokens"].values())
        assert 0 < reused <= images * (64 - 8)  # of each image, 8 tokens are recomputed
        assert run["sparse_prefill_tokens"] >= reused / (64 - 8) * 8
        if workload == "chat":
            assert run["computed_tokens"] < runs[workload, "plain"]["computed_tokens"]
        else:
            assert run["computed_tokens"] == run["prompt_tokens"] - reused
    kinds = {(cell.workload, cell.kind): cell.requests for cell in bench.cells_of(document)}
    assert kinds == {
        ("window", ""): 4,
        ("chat", "first turn"): 1,
        ("chat", "later turns"): 2,
        ("mixed", "text"): 7,
        ("mixed", "new images"): 2,
        ("mixed", "known images"): 1,
    }
    page = output.with_name("workload.md").read_text()
    assert "### Window: 4 requests, 33% of the images known" in page
    assert "| mixed | 7 text | vlcache-fs | 0." in page
    with Image.open(output.with_name("workload.png")) as picture:
        assert picture.format == "PNG"
    left = {path.name for path in (tmp_path / "cache").iterdir()}
    assert left == {"models", "logs"}
