"""The table of vLLM's seams: complete, true of the installed vLLM, and noticing changes."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched import output
from vllm.v1.request import Request

import vlcache_connector
from vlcache_connector import connector, encoder_connector, off, seams
from vlcache_connector.seams import SEAMS, Seam, check_seams

PACKAGE = Path(vlcache_connector.__file__).parent
PUBLIC = ("cli", "measure")
"""Parts that run no connector, and use what vLLM offers everyone."""


def changed() -> list[str]:
    """Looked at anew."""
    return [str(change) for change in seams.changes.__wrapped__()]


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports of vLLM when it runs: modules and names."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from ((node.module or "", alias.name) for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))


def test_the_installed_vllm_has_all_of_them() -> None:
    assert changed() == []


def test_the_table_has_all_that_is_imported() -> None:
    known = {id(seams._find(root(seam))) for seam in SEAMS if not seam.in_source}
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in PUBLIC:
            continue
        for module, name in imported(path):
            assert id(seams._find(f"{module}:{name}")) in known, f"{path.name}: {module}:{name}"


def root(seam: Seam) -> str:
    """The class, where the seam is one of its methods."""
    module, _, name = seam.where.partition(":")
    return f"{module}:{name.partition('.')[0]}"


@pytest.mark.parametrize(
    ("name", "where"),
    [("request", "vllm.v1.request:Request"), ("vllm_config", "vllm.config:VllmConfig")],
)
def test_the_table_has_all_fields_that_are_used(name: str, where: str) -> None:
    listed = {field for seam in SEAMS if seam.where == where for field in seam.fields}
    for path in PACKAGE.rglob("*.py"):
        used = re.findall(rf"\b_?{name}\.(?!py\b)(\w+)", path.read_text())
        if path.parent.name not in PUBLIC:
            assert set(used) <= listed, path.name


def test_every_file_of_the_table_exists_and_uses_vllm() -> None:
    for user in {seam.user for seam in SEAMS}:
        assert "vllm" in (PACKAGE / user).read_text()


@pytest.mark.parametrize(
    "cls", [connector.VLCacheConnector, encoder_connector.VLCacheEncoderConnector]
)
def test_the_table_has_all_methods_that_stand_in_place_of_vllms(cls: type) -> None:
    exact = [seam for seam in SEAMS if seam.is_exact]
    listed = {seam.where.rpartition(".")[2] for seam in exact}
    inherited = {name for base in cls.__mro__[1:-1] for name in vars(base)}
    inherited |= {seam.where.rpartition(".")[2] for seam in exact if not seam.is_due}
    for name, member in vars(cls).items():
        if callable(member) or isinstance(member, classmethod):
            if name.startswith("_"):
                assert name == "__init__" or name not in inherited
            else:
                assert name in listed & inherited


def without(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.delattr(owner, name)


def instead(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(Request, "update_block_hashes"), "Request has no update_block_hashes"),
        (without(kv_cache_utils, "BlockHash"), "kv_cache_utils:BlockHash is not there"),
        (
            instead(BlockPool, "get_new_blocks", lambda self, count: None),
            "BlockPool.get_new_blocks takes (count), not (num_blocks)",
        ),
        (
            instead(BlockPool, "get_new_blocks", lambda self, num_blocks, group: None),
            "BlockPool.get_new_blocks takes (num_blocks, group), not (num_blocks)",
        ),
        (
            instead(
                connector.KVConnectorBase_V1, "on_new_request", lambda self, request, hint=0: None
            ),
            "KVConnectorBase_V1.on_new_request takes (request, hint), not (request)",
        ),
        (
            instead(output, "SchedulerOutput", make_dataclass("X", ["num_scheduled_tokens"])),
            "SchedulerOutput has no total_num_scheduled_tokens, preempted_req_ids",
        ),
    ],
    ids=["method", "name", "parameter", "more parameters", "override", "field"],
)
def test_a_change_is_found(
    change: Callable[[pytest.MonkeyPatch], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch)
    assert any(expected in text for text in changed()), changed()


def test_a_parameter_more_that_may_be_left_out_is_no_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instead(BlockPool, "get_new_blocks", lambda self, num_blocks, group=0: None)(monkeypatch)
    assert changed() == []


def test_another_behaviour_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "update_block_hashes", lambda self: None)
    [change] = changed()
    assert "Request behaves differently: " in change


def test_a_new_duty_of_connectors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    base = connector.KVConnectorBase_V1
    duties = base.__abstractmethods__ | {"get_colour"}
    monkeypatch.setattr(base, "__abstractmethods__", duties)
    [change] = changed()
    assert "KVConnectorBase_V1 asks for get_colour" in change


@pytest.mark.parametrize(
    ("seam", "expected"),
    [
        (Seam("vllm.nowhere:X", "x.py"), "is not there"),
        (Seam("vllm.v1.attention.backends.nowhere:X.f", "x.py", in_source=True), "is not there"),
        (
            Seam("vllm.v1.attention.backends.flash_attn:X.f", "x.py", in_source=True),
            "is not there",
        ),
        (
            Seam(
                "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.do_kv_cache_update",
                "x.py",
                ("layer", "kv"),
                is_exact=True,
                in_source=True,
            ),
            "takes (layer, key, value, kv_cache, slot_mapping), not (layer, kv)",
        ),
        (
            Seam(
                "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration",
                "x.py",
                fields=("_get_deepstack_input_embeds", "_colour"),
                in_source=True,
            ),
            "has no _colour",
        ),
    ],
    ids=["module", "file", "class", "method", "field"],
)
def test_what_is_missing_is_said(seam: Seam, expected: str) -> None:
    [change] = check_seams([seam])
    assert change.problem == expected
    assert change.seam.where in str(change)


def test_one_line_says_what_has_changed_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.47.1")
    found = check_seams([Seam("vllm.a:X", "x.py"), Seam("vllm.b:Y", "y.py")])
    one, two = seams.explain(found[:1]), seams.explain(found)
    for line in (one, two):
        assert "\n" not in line
        assert line.startswith("vLLM 0.47.1 is not the one that this VLCache was made for (")
        assert str(seams.supported("vllm")) in line
        assert "vllm.a:X is not there (needed by x.py)" in line
    assert "and 1 more (`vlcache doctor` lists them)" in two
    assert "more" not in one


def test_versions_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "0.32.0" in seams.supported("vllm")
    assert "0.33.0" in seams.supported("vllm")
    assert "0.34.0" not in seams.supported("vllm")
    assert seams.untested_version() is None
    monkeypatch.setattr(vllm, "__version__", "0.34.0rc1")
    assert "vLLM 0.34.0rc1 is untested" in (seams.untested_version() or "")


def test_the_connectors_are_handed_out_only_over_intact_seams(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, module in (
        ("VLCacheConnector", connector),
        ("VLCacheEncoderConnector", encoder_connector),
    ):
        assert getattr(vlcache_connector, name) is getattr(module, name)
    monkeypatch.setattr(seams, "changes", lambda: check_seams([Seam("vllm.a:X", "x.py")]))
    for name in ("VLCacheConnector", "VLCacheEncoderConnector"):
        stand_in = getattr(vlcache_connector, name)
        assert stand_in is getattr(off, name)
        assert not inspect.isabstract(stand_in)
    with pytest.raises(AttributeError):
        vlcache_connector.nothing  # noqa: B018


def test_registering_survives_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ProcessorInputs, "get_mm_hashes")
    vlcache_connector.register()
    assert not hasattr(ProcessorInputs, "get_mm_hashes")


def test_the_table_can_be_read_without_vllm() -> None:
    code = "import sys, vlcache_connector.seams; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_file_without_seams_is_never_intact() -> None:
    with pytest.raises(ValueError, match=r"no seams of 'frontend\.pyy'"):
        seams.intact("frontend.pyy")


def test_all_files_that_are_asked_for_have_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    intact = seams.intact
    monkeypatch.setattr(seams, "intact", lambda user: asked.append(user) or intact(user))
    vlcache_connector.register()
    assert {"__init__.py", "frontend.py", "attention/hook.py", "worker/loaded.py"} <= set(asked)


def test_what_a_later_release_brings_is_not_looked_for_in_older_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = Seam("vllm.config:VllmConfig.made_up", "x.py", (), since="0.33")
    monkeypatch.setattr(vllm, "__version__", "0.32.1")
    assert check_seams([later]) == []
    for version in ("0.33.0", "0.33.1+cu130"):
        monkeypatch.setattr(vllm, "__version__", version)
        [change] = check_seams([later])
        assert change.problem == "is not there"
