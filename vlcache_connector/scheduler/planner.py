"""Which tokens of a prompt are reused and which are computed: pure planning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from ..protocol import Item, ItemReuse, Layout, Span, Stage
from ..selection import Selection


def plan_reuse(
    items: Sequence[Item],
    *,
    num_computed: int,
    num_tokens: int,
    donors: Mapping[int, str],
    select: Callable[[int], Selection],
) -> Layout | None:
    """Plan a request whose first `num_computed` tokens already have exact KV.

    The claim reaches to the end of the last known item. Inside it, tokens of known items are
    reused but for their recompute sets; all others (text, unknown items in front of a known
    one) are computed by the sparse prefill. vLLM needs at least one token of its own to compute,
    so the claim ends before the last token.

    Args:
        items: the request's items in prompt order, spans not overlapping.
        num_tokens: length of the prompt (plus outputs, when the request resumes).
        donors: index of a known item -> content key of the stored segment to reuse.
        select: what to recompute of a segment of so many tokens.

    Returns:
        None when no known item ends behind `num_computed`.
    """
    left = (item for item in items if item.span.end > num_computed)
    known = [(item, donors[item.index]) for item in left if item.index in donors]
    if not known:
        return None
    claim = Span(num_computed, min(known[-1][0].span.end, num_tokens - 1))
    if not claim:
        return None
    return Layout(
        claim=claim,
        reused=tuple(_reuse(item, donor, claim, select(len(item.span))) for item, donor in known),
    )


def _reuse(item: Item, donor: str, claim: Span, selection: Selection) -> ItemReuse:
    part = item.span.clip(claim.start, claim.end)
    return ItemReuse(
        item=item.index,
        donor=donor,
        span=part,
        stages=tuple(
            Stage(
                first_layer,
                tuple(
                    clipped
                    for span in _spans(offsets)
                    if (
                        clipped := Span(
                            item.span.start + span.start, item.span.start + span.end
                        ).clip(part.start, part.end)
                    )
                ),
            )
            for first_layer, offsets in selection.stages
        ),
        blend=selection.blend,
    )


def _spans(offsets: Sequence[int]) -> list[Span]:
    """Maximal stretches of ascending `offsets`."""
    if isinstance(offsets, range) and offsets.step == 1:
        return [Span(offsets.start, offsets.stop)] if offsets else []
    stretches = [
        [offset for _, offset in group]
        for _, group in groupby(enumerate(offsets), key=lambda pair: pair[1] - pair[0])
    ]
    return [Span(stretch[0], stretch[-1] + 1) for stretch in stretches]
