"""CacheBlend's choice of tokens against a sort of distances that the test computes itself."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlcache_connector.worker.blend import distances, farthest


def random_keys(seed: int, n: int, heads: int = 2, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    fresh, donor = torch.randn(2, n, heads, dim, generator=generator)
    return fresh, donor


def squared(fresh: Tensor, donor: Tensor) -> list[float]:
    return [
        sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))
        for x, y in zip(fresh, donor, strict=True)
    ]


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), part=st.floats(0, 1))
def test_the_farthest_tokens_are_chosen(seed: int, n: int, part: float) -> None:
    fresh, donor = random_keys(seed, n)
    count = round(part * n)
    chosen = farthest(distances(fresh, donor), count)
    own = squared(fresh, donor)
    expected = set(sorted(range(n), key=own.__getitem__)[n - count :])
    assert chosen.dtype == torch.bool
    assert chosen.shape == (n,)
    assert set(chosen.nonzero().flatten().tolist()) == expected


def test_a_single_far_token_by_example() -> None:
    fresh = torch.zeros(4, 1, 2)
    donor = torch.tensor([[0.0, 1.0], [3.0, 0.0], [0.0, 0.0], [-2.0, -2.0]])[:, None]
    assert farthest(distances(fresh, donor), 2).tolist() == [False, True, False, True]


def test_as_many_as_asked_for_are_chosen_among_equals() -> None:
    keys = torch.ones(5, 1, 2)
    assert [int(farthest(distances(keys, keys), count).sum()) for count in range(6)] == list(
        range(6)
    )


def test_half_precision_keys_are_compared_in_float32() -> None:
    """Squares of these differences overflow float16."""
    fresh = torch.full((3, 1, 2), 400.0, dtype=torch.float16)
    donor = torch.tensor([0.0, -100.0, 100.0], dtype=torch.float16)[:, None, None].expand(3, 1, 2)
    assert farthest(distances(fresh, donor), 1).tolist() == [False, True, False]


def test_ranks_that_hold_other_heads_choose_by_the_sum() -> None:
    fresh, donor = random_keys(3, 30, heads=4)
    own = [distances(fresh[:, half], donor[:, half]) for half in (slice(0, 2), slice(2, 4))]
    assert not torch.equal(farthest(own[0], 7), farthest(own[1], 7))
    assert torch.equal(farthest(own[0] + own[1], 7), farthest(distances(fresh, donor), 7))
