"""CacheBlend's choice of tokens against a sort of distances that the test computes itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.worker import blend
from vlcache_connector.worker.blend import most_deviating

Patch = Callable[[Callable[[Tensor], Tensor]], None]


@pytest.fixture
def sum_over_ranks(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Sets what stands for the exchange between ranks."""
    return lambda function: monkeypatch.setattr(blend, "sum_over_ranks", function)


@pytest.fixture(autouse=True)
def _one_rank(sum_over_ranks: Patch) -> None:
    sum_over_ranks(lambda values: values)


def random_keys(seed: int, n: int, heads: int = 2, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fresh, donor = torch.randn(2, n, heads, dim, generator=generator)
    return fresh, donor


def distances(fresh: Tensor, donor: Tensor) -> list[float]:
    return [
        sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        for x, y in zip(fresh, donor, strict=True)
    ]


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), part=st.floats(0, 1))
def test_the_farthest_tokens_are_chosen(seed: int, n: int, part: float) -> None:
    fresh, donor = random_keys(seed, n)
    count = round(part * n)
    chosen = most_deviating(fresh, donor, count)
    own = distances(fresh, donor)
    expected = set(sorted(range(n), key=own.__getitem__)[n - count :])
    assert chosen.dtype == torch.bool
    assert chosen.shape == (n,)
    assert set(chosen.nonzero().flatten().tolist()) == expected


def test_a_single_far_token_by_example() -> None:
    fresh = torch.zeros(4, 1, 2)
    donor = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0], [-2.0, -2.0]])[:, None]
    assert most_deviating(fresh, donor, 2).tolist() == [False, True, False, True]


def test_as_many_as_asked_for_are_chosen_among_equals() -> None:
    keys = torch.ones(5, 1, 2)
    assert [int(most_deviating(keys, keys, count).sum()) for count in range(6)] == list(range(6))


def test_half_precision_keys_are_compared_in_float32() -> None:
    """Squares of these differences overflow float16."""
    fresh = torch.full((3, 1, 2), 400.0, dtype=torch.float16)
    donor = torch.tensor([0.0, -100.0, 100.0], dtype=torch.float16)[:, None, None].expand(3, 1, 2)
    assert most_deviating(fresh, donor, 1).tolist() == [False, True, False]


def test_ranks_that_hold_other_heads_choose_the_same_tokens(sum_over_ranks: Patch) -> None:
    fresh, donor = random_keys(3, 30, heads=4)
    whole = most_deviating(fresh, donor, 7)
    halves = [slice(0, 2), slice(2, 4)]
    partial = [torch.tensor(distances(fresh[:, half], donor[:, half])) for half in halves]
    alone = [most_deviating(fresh[:, half], donor[:, half], 7) for half in halves]
    assert not torch.equal(alone[0], alone[1])
    for rank, half in enumerate(halves):
        other = partial[1 - rank]
        sum_over_ranks(lambda values, other=other: values + other)
        assert torch.equal(most_deviating(fresh[:, half], donor[:, half], 7), whole)
