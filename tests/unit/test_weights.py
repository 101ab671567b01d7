"""Updates of the weights in place: who notices them, and what tells whether they changed."""

from __future__ import annotations

import pytest
import torch
from vllm.v1.engine.core import EngineCore

from vlcache_connector import weights
from vlcache_connector.worker.checksum import checksum, device_sum


class Listener:
    def __init__(self) -> None:
        self.heard = 0

    def hear(self) -> None:
        self.heard += 1


class Model(torch.nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.wide = torch.nn.Parameter(torch.randn(300, 7, generator=generator).bfloat16())
        self.odd = torch.nn.Parameter(torch.randn(13, generator=generator))

    def load_weights(self, value: float) -> set[str]:
        if value != value:
            raise ArithmeticError
        with torch.no_grad():
            self.odd.data.fill_(value)
        return {"odd"}


def test_listeners_hear_of_each_generation_as_long_as_they_live() -> None:
    first, second = Listener(), Listener()
    weights.listen(first.hear)
    weights.listen(second.hear)
    before = weights.generation()
    weights.may_have_changed()
    del second
    weights.may_have_changed()
    assert first.heard == 2
    assert weights.generation() == before + 2


@pytest.mark.parametrize("method", ["collective_rpc", "set_weight_version"])
def test_what_an_engine_is_told_from_outside_begins_a_generation(method: str) -> None:
    listener = Listener()
    weights.listen(listener.hear)
    weights.listen(listener.hear)  # is patched once
    assert not hasattr(getattr(EngineCore, method)._vlcache_original, "_vlcache_original")
    core = object.__new__(EngineCore)
    with pytest.raises(TypeError):  # it may have done a part of it
        getattr(core, method)()
    assert listener.heard == 2


def test_loading_into_a_served_model_does_also_where_it_fails_halfway() -> None:
    model, before = Model(), weights.generation()
    weights.watch(model)
    assert model.load_weights(2.0) == {"odd"}
    assert weights.generation() == before + 1
    with pytest.raises(ArithmeticError):
        model.load_weights(float("nan"))
    assert weights.generation() == before + 2


def test_a_checksum_changes_with_any_weight_and_back_with_it() -> None:
    model = Model()
    before = checksum(model)
    assert checksum(Model()) == before
    assert checksum(Model(1)) != before
    kept = model.odd.detach().clone()
    model.load_weights(2.0)
    assert checksum(model) != before
    model.odd.data.copy_(kept)
    assert checksum(model) == before
    model.wide.data[299, 6] += 0.25
    assert checksum(model) != before


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1 << 12, (1 << 12) + 5])
def test_the_sum_on_a_device_tells_every_byte_and_the_order(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlcache_connector.worker.checksum._PIECE", 64)
    generator = torch.Generator().manual_seed(size)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    before = device_sum(data)
    assert 0 <= before < 1 << 64
    for at in {0, size // 2, size - 1} if size else ():
        other = data.clone()
        other[at] ^= 1
        assert device_sum(other) != before
    if size > 16:
        assert device_sum(data.flip(0)) != before
        assert device_sum(torch.cat([data[8:16], data[:8], data[16:]])) != before
        shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data])[1:]
        assert device_sum(shifted) == before
