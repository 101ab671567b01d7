"""`vlcache calibrate` and `vlcache verify --model`: what they write, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.fake_runner import NUM_LAYERS, Error, FakeRunner
from vlcache_connector import __version__, cli, identity, support
from vlcache_connector.calibration import (
    Calibration,
    LayerSchedule,
    ModelIdentity,
    RelationResult,
    Sample,
    Thresholds,
    Verification,
)
from vlcache_connector.measure.calibrate import BUDGETS

FINGERPRINT = "f" * 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a supported model."""
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Lets commands run with a stand-in; returns a list of (runner, connector, arguments)."""

    def install(error: Error = lambda options: 0.01, fails: Exception | None = None) -> list[Any]:
        started: list[Any] = []

        def start(model: str, connector: Mapping[str, Any], **arguments: Any) -> FakeRunner:
            if fails is not None:
                raise fails
            runner = FakeRunner(error)
            started.append((runner, connector, arguments))
            return runner

        monkeypatch.setattr(cli.calibration, "Runner", start)
        monkeypatch.setattr(identity, "weights_fingerprint", lambda config: FINGERPRINT)
        shape = SimpleNamespace(num_layers=NUM_LAYERS)
        monkeypatch.setattr(support, "kv_shape", lambda config: shape)
        monkeypatch.setattr(cli.calibration, "_ENVIRONMENT", {})
        return started

    return install


def verification() -> Verification:
    return Verification(
        selector="first_k",
        recompute_ratio=0.05,
        sample=Sample(images="synthetic", requests=8, seed=0),
        thresholds=Thresholds(kl=0.05, flip_rate=0.02),
        relations={"single_image": RelationResult(requests=8, kl=0.0, flip_rate=0.0, passed=True)},
        verdict="single_image",
    )


def calibration(**changes: Any) -> Calibration:
    model = {"name": "Some-Model", "fingerprint": FINGERPRINT, "num_layers": NUM_LAYERS}
    return Calibration(
        model=ModelIdentity(**{**model, **changes}),
        schedules=[LayerSchedule(ratio=0.5, layers=[0.5] * NUM_LAYERS)],
        verification=verification(),
    )


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


SMALL = ("--requests", 2, "--image-size", 56)


# -- what is written ----------------------------------------------------------------------------


def test_calibrate_writes_schedules(
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = engine()
    output = tmp_path / "deep" / "er.yaml"
    assert run("calibrate", "--model", model, "--output", output, *SMALL, "--seed", 5) == 0
    [(runner, connector, arguments)] = started
    assert runner.is_closed
    assert connector["min_recompute_tokens"] == 0
    assert arguments["enable_prefix_caching"] is False
    written = Calibration.load(output)
    written.check_model(FINGERPRINT, NUM_LAYERS, output)
    assert written.model.name == "Some-Model"
    assert [schedule.ratio for schedule in written.schedules] == list(BUDGETS)
    assert written.sample == Sample(images="synthetic", requests=2, seed=5)
    assert written.verification is None
    assert "Written to" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["er.yaml"]


def test_calibrate_keeps_a_verification_of_this_model(
    model: Path, tmp_path: Path, engine: Callable[..., list[Any]]
) -> None:
    engine()
    output = tmp_path / "file.yaml"
    calibration(name="moved").save(output)
    assert run("calibrate", "--model", model, "--output", output, *SMALL) == 0
    assert Calibration.load(output).verification == verification()
    assert len(Calibration.load(output).schedules) == len(BUDGETS)


def test_calibrate_drops_a_verification_of_other_weights(
    model: Path, tmp_path: Path, engine: Callable[..., list[Any]]
) -> None:
    engine()
    output = tmp_path / "file.yaml"
    calibration(fingerprint="0" * 64).save(output)
    assert run("calibrate", "--model", model, "--output", output, *SMALL) == 0
    written = Calibration.load(output)
    assert written.verification is None
    assert written.model.fingerprint == FINGERPRINT


def test_calibrate_without_output_writes_where_the_connector_looks(
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlcache_connector import calibration as module

    engine()
    folders = [tmp_path / "checkout" / "configs" / "schedules", tmp_path / "share"]
    monkeypatch.setattr(module, "_folders", lambda: iter(folders))
    assert run("verify", "--model", model, *SMALL) == 0
    assert module.find("some-model") == folders[1] / "some-model.yaml"
    (tmp_path / "checkout" / "configs").mkdir(parents=True)
    assert run("verify", "--model", model, *SMALL) == 0
    assert module.find("some-model") == folders[0] / "some-model.yaml"


def test_verify_writes_a_verdict_and_keeps_schedules(
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = engine()
    output = tmp_path / "file.yaml"
    calibration().save(output)
    status = run(
        *("verify", "--model", model, "--output", output, *SMALL),
        *("--selector", "layer_aware", "--recompute-ratio", 0.3, "--at-least", "any"),
    )
    assert status == 0
    [(_, connector, _)] = started
    assert connector["selector"] == "layer_aware"
    assert connector["recompute_ratio"] == 0.3
    assert connector["calibration"] == str(output)
    written = Calibration.load(output)
    assert written.schedules == calibration().schedules
    assert written.verification is not None
    assert written.verification.verdict == "any"
    assert written.verification.selector == "layer_aware"
    assert written.verification.recompute_ratio == 0.3
    assert written.verification.relations["lone_donor"].kl == pytest.approx(0.01)
    assert "Verdict: any" in capsys.readouterr().out


def test_verify_needs_no_file_before(
    model: Path, tmp_path: Path, engine: Callable[..., list[Any]]
) -> None:
    engine()
    output = tmp_path / "file.yaml"
    assert run("verify", "--model", model, "--output", output, *SMALL) == 0
    assert Calibration.load(output).schedules == []


@pytest.mark.parametrize(("wanted", "status"), [((), 0), (("--at-least", "single_image"), 1)])
def test_verify_fails_only_where_a_verdict_was_asked_for(
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    wanted: tuple[str, ...],
    status: int,
) -> None:
    engine(lambda options: 0.3)
    output = tmp_path / "file.yaml"
    assert run("verify", "--model", model, "--output", output, *SMALL, *wanted) == status
    written = Calibration.load(output).verification
    assert written is not None
    assert written.verdict == "none"


def test_thresholds_can_be_chosen(
    model: Path, tmp_path: Path, engine: Callable[..., list[Any]]
) -> None:
    engine(lambda options: 0.3)
    output = tmp_path / "file.yaml"
    assert run("verify", "--model", model, "--output", output, *SMALL, "--max-kl", 0.31) == 0
    written = Calibration.load(output).verification
    assert written is not None
    assert written.verdict == "any"
    assert written.thresholds.kl == 0.31


def test_engine_arguments_reach_vllm(
    model: Path, tmp_path: Path, engine: Callable[..., list[Any]]
) -> None:
    started = engine()
    given = ("--engine-args", '{"dtype": "float32", "max_model_len": 4096}')
    assert run("verify", "--model", model, "--output", tmp_path / "f.yaml", *SMALL, *given) == 0
    [(_, _, arguments)] = started
    assert arguments["dtype"] == "float32"
    assert arguments["max_model_len"] == 4096
    assert arguments["enforce_eager"] is True


# -- bad input ----------------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], status: int) -> str:
    """The one line on stderr, without progress."""
    assert status == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


@pytest.mark.parametrize("command", ["calibrate", "verify"])
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--model", "{tmp}/missing"), "--model={tmp}/missing: no such folder"),
        (("--model", "{tmp}/empty"), "--model={tmp}/empty: there is no config.json"),
        (("--model", "{tmp}/odd"), "names no architectures"),
        (("--model", "{tmp}/text"), "its architecture LlamaForCausalLM is not supported"),
        (("--images", "{tmp}/missing"), "--images={tmp}/missing: no such folder"),
        (("--images", "{tmp}/empty"), "that Pillow can read are needed, there are 0"),
        (("--output", "{tmp}/empty"), "--output={tmp}/empty: can't be written: it is a folder"),
        (("--output", "{tmp}/bad.yaml/x.yaml"), "can't be written: Not a directory"),
        (("--output", "{tmp}/bad.yaml"), "{tmp}/bad.yaml: model: Field required"),
        (("--output", "{tmp}/foreign.yaml"), "the calibration of another model, Other"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    command: str,
    arguments: tuple[str, str],
    problem: str,
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = engine()
    for name, config in (("empty", None), ("odd", "[]"), ("text", '["LlamaForCausalLM"]')):
        (tmp_path / name).mkdir()
        if config is not None:
            content = config if name == "odd" else f'{{"architectures": {config}}}'
            (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "bad.yaml").write_text("format: 1\n")
    calibration(name="Other", fingerprint="0" * 64).save(tmp_path / "foreign.yaml")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    given = {"--model": str(model), "--output": str(tmp_path / "new.yaml")}
    given[arguments[0]] = arguments[1].format(tmp=tmp_path)
    status = run(command, *(part for item in given.items() for part in item), *SMALL)
    line = complaint(capsys, status)
    assert line.startswith(f"vlcache {command}: ")
    assert problem.format(tmp=tmp_path) in line
    assert all(runner.is_closed for runner, _, _ in started)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--requests", "0"), "'0' is not allowed, only at least 1"),
        (("--requests", "x"), "--requests"),
        (("--seed", "-1"), "'-1' is not allowed, only at least 0"),
        (("--image-size", "20"), "'20' is not allowed, only from 56 to 4096"),
        (("--recompute-ratio", "1.5"), "'1.5' is not allowed, only from 0 to 1"),
        (("--recompute-ratio", "nan"), "'nan' is not allowed"),
        (("--max-kl", "-1"), "'-1' is not allowed"),
        (("--selector", "best"), "invalid choice: 'best'"),
        (("--at-least", "none"), "invalid choice: 'none'"),
        (("--engine-args", "{"), "'{' is no JSON"),
        (("--engine-args", "[]"), "a JSON object is needed"),
        (("--engine-args", '{"model": "x"}'), "model: set by the measurement itself"),
    ],
)
def test_bad_values_are_refused_by_name(
    arguments: tuple[str, str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("verify", "--model", "x", *arguments)
    assert stop.value.code == 2
    assert problem in capsys.readouterr().err


def test_layer_aware_needs_schedules(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none.yaml"
    status = run("verify", "--model", model, "--output", output, "--selector", "layer_aware")
    assert f"--selector=layer_aware: there are no schedules in {output}" in complaint(
        capsys, status
    )


def test_what_vllm_refuses_is_named(
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine(fails=TypeError("unexpected keyword argument 'speed'"))
    status = run(
        *("verify", "--model", model, "--output", tmp_path / "f.yaml"),
        *("--engine-args", '{"speed": 11}'),
    )
    line = complaint(capsys, status)
    assert "unexpected keyword argument 'speed'" in line
    assert '--engine-args={"speed": 11}' in line


def interrupt(options: Mapping[str, Any]) -> float:
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", ["calibrate", "verify"])
def test_an_interruption_leaves_the_old_file(
    command: str,
    model: Path,
    tmp_path: Path,
    engine: Callable[..., list[Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = engine(interrupt)
    output = tmp_path / "file.yaml"
    calibration().save(output)
    before = output.read_bytes()
    assert run(command, "--model", model, "--output", output, *SMALL) == 130
    assert output.read_bytes() == before
    assert started[0][0].is_closed
    assert "nothing was written" in capsys.readouterr().err


# -- the command itself -------------------------------------------------------------------------


def test_the_version_needs_no_engine() -> None:
    code = (
        "import sys; from vlcache_connector.cli import main\n"
        "try: main(['--version'])\n"
        "finally: assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == f"vlcache {__version__}", done.stderr
    assert done.returncode == 0
