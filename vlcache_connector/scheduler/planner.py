"""Which tokens of a prompt are reused and which are computed: pure planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..protocol import Item, ReusedSpan, ReusePlan, Span, uncovered
from ..selection import Budget, RecomputeSelector


def plan_reuse(
    req_id: str,
    items: Sequence[Item],
    *,
    num_computed: int,
    num_tokens: int,
    is_stored: Callable[[Item], bool],
    selector: RecomputeSelector,
    budget: Budget,
) -> ReusePlan | None:
    """Plan a request whose first `num_computed` tokens already have exact KV.

    The claim reaches to the end of the last stored item. Inside it, tokens of stored items are
    reused but for their recompute sets; all others (text, unknown items in front of a known
    one) are runs of the sparse prefill. vLLM needs at least one token of its own to compute,
    so the claim ends before the last token.

    Args:
        items: the request's items in prompt order, spans not overlapping.
        num_tokens: length of the prompt (plus outputs, when the request resumes).

    Returns:
        None when no stored item ends behind `num_computed`.
    """
    stored = [item for item in items if item.span.end > num_computed and is_stored(item)]
    if not stored:
        return None
    claim = Span(num_computed, min(stored[-1].span.end, num_tokens - 1))
    if not claim:
        return None
    reused: list[ReusedSpan] = []
    recomputed = 0
    for item in stored:
        span = item.span.clip(claim.start, claim.end)
        offsets = selector.select(len(item.span), budget)
        if offsets.step != 1:
            raise ValueError(f"selectors must give contiguous offsets, not {offsets}")
        again = Span(item.span.start + offsets.start, item.span.start + offsets.stop)
        again = again.clip(span.start, span.end)
        recomputed += len(again)
        for part in (Span(span.start, again.start), Span(again.end, span.end)):
            if part:
                reused.append(ReusedSpan(item.index, part))
    return ReusePlan(
        req_id=req_id,
        claim=claim,
        runs=tuple(uncovered(claim, [part.span for part in reused])),
        reused=tuple(reused),
        recomputed=recomputed,
    )
