"""A claim that takes longer than computing is not made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.helpers.engine import IMAGE, Ask, Engine

KNOWN = (61, 336)


@pytest.mark.parametrize(("speed", "pays"), [(1e9, False), (1.0, True)], ids=["fast", "slow"])
def test_a_known_image_is_computed_where_that_is_faster(
    engines: Callable[..., Engine], speed: float, pays: bool
) -> None:
    engine = engines({"break_even": True, "prefill_tokens_per_second": speed})
    engine.ask(Ask(f"a donor {IMAGE}", (KNOWN,)))
    reused = []
    for number in range(3):
        ask = Ask(f"{number} moved behind other words {IMAGE} and asked", (KNOWN,), max_tokens=4)
        [answer] = engine.ask(ask)
        assert answer.figures is not None
        reused.append(answer.figures["reused_tokens"] > 0)
        if not reused[-1]:
            assert answer.figures["fallback"] == "break_even"
            [expected] = engines(None).ask(ask)
            assert answer.tokens == expected.tokens
            np.testing.assert_allclose(answer.logprobs, expected.logprobs, rtol=0, atol=1e-3)
    # What a claim costs is known after the first one.
    assert reused == [True, pays, pays]
