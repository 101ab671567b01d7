#!/usr/bin/env python
"""Simulate many nodes on one store: what is uploaded, what is read, and what host memory keeps.

A request shows one image to one of the nodes. A share of the images is never shown again; the
others come back as Zipf's law has it. An image that its node has in host memory costs nothing, one
that is in the store is loaded, and any other is computed, and may be uploaded. Nothing is computed
here: time is simulated, keys and sizes of segments are the real ones of Qwen2.5-VL-7B, and so are
the scheduler side's index ("lru") and LMCache's policy ("arc"). The store drops what was not used
for longest.

Two questions:

- "uploads": when does a node upload a segment? At first sight of the image, when it has computed
  it because the store had not got it; or at second sight, of this node or of all of them (nodes
  then leave marks in the store), whether the store has it by then or only if it has not. A router
  sends requests to any node, or those for an image to the same one, nine times out of ten.
- "memory": what has to go from host memory? What was not used for longest ("lru"); what was used
  once before what was used again ("slru"; the latter has up to 80 % of the memory); or what ARC
  says. Of all nodes, and of one node alone without a store.

Results go to PREFIX.json and PREFIX.md.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from results import about_run, timestamp, with_suffix, write_text
from serving import ROOT

from vlcache_connector.keys import segment_key
from vlcache_connector.scheduler.index import ResidencyIndex
from vlcache_connector.storage.header import SegmentId
from vlcache_connector.storage.layout import SegmentLayout, Space

SCHEMA = 1
GIB = 1 << 30
LAYOUT = SegmentLayout(
    Space("simulated", rank=0, num_ranks=1),
    num_layers=28,
    num_kv_heads=4,
    head_dim=128,
    kv_dtype=torch.bfloat16,
    positions_rows=3,
    encoder_width=3584,
    encoder_dtype=torch.bfloat16,
)
TOKENS = (256, 576, 1024, 1600, 2500)
"""Of images; each is of one of these sizes."""
ONE_OFFS = (0.0, 0.5, 0.9)
"""Shares of the requests."""
STICKY = 0.9
"""Of the requests for an image that go to the same node."""


@dataclass(frozen=True)
class Upload:
    """When a node uploads a segment.

    Attributes:
        name: for readers.
        sights: of its image, that there have to be.
        by_all: sights of all nodes count; if not, those of the node itself.
        only_absent: not if the store has it.
    """

    name: str
    sights: int
    by_all: bool = False
    only_absent: bool = True


UPLOADS = (
    Upload("first", 1),
    Upload("second of a node", 2, only_absent=False),
    Upload("second of a node, if absent", 2),
    Upload("second of all nodes, if absent", 2, by_all=True),
)
MEMORY_UPLOAD = UPLOADS[0]
"""With which the policies of host memory are compared."""


# -- host memory --------------------------------------------------------------------------------


class Memory(Protocol):
    """Segments of one node by their keys, with a byte budget."""

    def use(self, key: Any) -> bool:
        """Whether a segment is there, which is now the one used last."""

    def add(self, key: Any, num_bytes: int) -> None:
        """Keep a segment that is not there, and forget others for it."""


class SegmentedLRU:
    """What the scheduler side does: what was used again goes only after what was used once."""

    def __init__(self, budget: int) -> None:
        self._index = ResidencyIndex(budget, num_ranks=1)

    def use(self, key: Any) -> bool:
        if not self._index.is_ready(key):
            return False
        self._index.promise(key)
        self._step()
        return True

    def add(self, key: Any, num_bytes: int) -> None:
        if self._index.reserve(key, num_bytes):
            self._index.stored(key, 1)
        self._step()

    def _step(self) -> None:
        for _ in range(2):  # a promise is kept for the next step, too
            self._index.settle()
        self._index.take_evicted()


class LRU:
    """What was not used for longest goes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._sizes: OrderedDict[Any, int] = OrderedDict()

    def use(self, key: Any) -> bool:
        if key not in self._sizes:
            return False
        self._sizes.move_to_end(key)
        return True

    def add(self, key: Any, num_bytes: int) -> None:
        if num_bytes > self._budget:
            return
        while self._used + num_bytes > self._budget:
            _, size = self._sizes.popitem(last=False)
            self._used -= size
        self._sizes[key] = num_bytes
        self._used += num_bytes


class ARC:
    """LMCache's policy, which is asked for one segment at a time."""

    def __init__(self, budget: int) -> None:
        from lmcache.v1.distributed.eviction_policy.arc import ARCEvictionPolicy

        self._policy = ARCEvictionPolicy()
        self._budget = budget
        self._sizes: dict[Any, int] = {}
        self._used = 0

    def use(self, key: Any) -> bool:
        if key not in self._sizes:
            return False
        self._policy.on_keys_touched([key])
        return True

    def add(self, key: Any, num_bytes: int) -> None:
        while self._used + num_bytes > self._budget:
            [action] = self._policy.get_eviction_actions(1e-9)  # at least one
            for victim in action.keys:
                self._used -= self._sizes.pop(victim)
            self._policy.on_keys_removed(action.keys)
        self._sizes[key] = num_bytes
        self._used += num_bytes
        self._policy.on_keys_created([key])


MEMORIES: Mapping[str, Any] = {"lru": LRU, "slru": SegmentedLRU, "arc": ARC}


# -- requests -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        times: of the requests, seconds, rising.
        images: their numbers.
        nodes: that are asked.
    """

    times: np.ndarray
    images: np.ndarray
    nodes: np.ndarray


def make_load(args: argparse.Namespace, nodes: int, one_offs: float, sticky: float) -> Load:
    """As many requests as the arguments say for each node.

    Args:
        one_offs: share of them with an image that never comes back.
        sticky: share of them that go to their image's own node.
    """
    rng = np.random.default_rng(args.seed)
    requests, rate = (value * nodes / args.nodes for value in (args.requests, args.rate))
    popularity = np.arange(1, args.images + 1) ** -args.exponent
    images = rng.choice(args.images, int(requests), p=popularity / popularity.sum())
    is_new = rng.random(len(images)) < one_offs
    images[is_new] = args.images + np.arange(is_new.sum())
    is_sticky = rng.random(len(images)) < sticky
    return Load(
        np.cumsum(rng.exponential(1 / rate, len(images))),
        images,
        np.where(is_sticky, images % nodes, rng.integers(nodes, size=len(images))),
    )


class Segments:
    """Keys and sizes of images' segments."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}

    def __getitem__(self, image: int) -> tuple[Any, int]:
        if image not in self._known:
            key = segment_key(f"image {image}", fingerprint="7b", donor="first_seen", salt=None)
            tokens = TOKENS[int(key[:8], 16) % len(TOKENS)]
            objects = LAYOUT.expected(SegmentId(key, "kv"), tokens)
            assert objects is not None
            self._known[image] = objects.keys[-1], objects.num_bytes
        return self._known[image]


# -- the store ----------------------------------------------------------------------------------


@dataclass
class Store:
    """Of all nodes.

    Attributes:
        budget: bytes; what was not used for longest goes.
        bytes_per_second: of one upload.
        uploads: by key.
        reads: by key.
    """

    budget: int
    bytes_per_second: float
    uploads: Counter[Any] = field(default_factory=Counter)
    reads: Counter[Any] = field(default_factory=Counter)
    written_bytes: int = 0
    read_bytes: int = 0
    _stored: OrderedDict[Any, int] = field(default_factory=OrderedDict)
    _used: int = 0
    _arriving: list[tuple[float, int, Any, int]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=itertools.count)
    _second: Counter[tuple[Any, int]] = field(default_factory=Counter)

    def has(self, key: Any, now: float) -> bool:
        """Whether a segment is there by now."""
        while self._arriving and self._arriving[0][0] <= now:
            _, _, arrived, num_bytes = heapq.heappop(self._arriving)
            if arrived not in self._stored:
                self._used += num_bytes
            self._stored[arrived] = num_bytes
            self._stored.move_to_end(arrived)
            while self._used > self.budget:
                self._used -= self._stored.popitem(last=False)[1]
        return key in self._stored

    def read(self, key: Any, num_bytes: int, now: float) -> None:
        """Load what is there."""
        self._stored.move_to_end(key)
        self.reads[key] += 1
        self.read_bytes += num_bytes
        self._second[key, int(now)] += 1

    def write(self, key: Any, num_bytes: int, now: float) -> None:
        """Begin to upload."""
        self.uploads[key] += 1
        self.written_bytes += num_bytes
        ends = now + num_bytes / self.bytes_per_second
        heapq.heappush(self._arriving, (ends, next(self._order), key, num_bytes))

    @property
    def most_reads_in_a_second(self) -> int:
        """Of one key."""
        return max(self._second.values(), default=0)


# -- a run --------------------------------------------------------------------------------------


def simulate(
    load: Load,
    segments: Segments,
    *,
    memory: str,
    memory_bytes: int,
    store: Store,
    upload: Upload,
) -> dict[str, float | None]:
    """Serve a load; what came of it. Hits are shares of the requests whose image some node was
    shown before."""
    memories: dict[int, Memory] = {}
    sights: Counter[tuple[int, int]] = Counter()
    shown: set[int] = set()
    of_host = of_store = possible = 0
    entries = (array.tolist() for array in (load.times, load.images, load.nodes))
    for now, image, node in zip(*entries, strict=True):
        key, num_bytes = segments[image]
        mine = memories.setdefault(node, MEMORIES[memory](memory_bytes))
        possible += image in shown
        shown.add(image)
        sight = (0 if upload.by_all else node), image
        sights[sight] += 1
        is_here = mine.use(key)
        of_host += is_here
        is_stored = store.has(key, now)
        if not is_here:
            mine.add(key, num_bytes)
            if is_stored:
                of_store += 1
                store.read(key, num_bytes, now)
                continue
        # What is found in host memory was uploaded before, unless this is the sight.
        is_due = sights[sight] == upload.sights
        is_due |= sights[sight] > upload.sights and not is_here
        if is_due and not (upload.only_absent and is_stored):
            store.write(key, num_bytes, now)
    return {
        "host_hits": of_host / max(1, possible),
        "store_hits": of_store / max(1, possible),
        "uploads_per_image": store.uploads.total() / len(shown),
        "most_uploads": max(store.uploads.values(), default=0),
        "written_bytes": store.written_bytes,
        "read_bytes": store.read_bytes,
        "hottest_share": max(store.reads.values(), default=0) / max(1, store.reads.total()),
        "hottest_per_second": store.most_reads_in_a_second,
    }


def run(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Both questions."""
    segments = Segments()

    def cell(
        nodes: int, one_offs: float, sticky: float, memory: str, upload: Upload
    ) -> dict[str, Any]:
        load = make_load(args, nodes, one_offs, sticky)
        store_bytes = args.store_gib * GIB if nodes > 1 else 0
        figures = simulate(
            load,
            segments,
            memory=memory,
            memory_bytes=args.memory_gib * GIB,
            store=Store(store_bytes, args.upload_mib_per_second << 20),
            upload=upload,
        )
        about = {"nodes": nodes, "one_offs": one_offs, "sticky": sticky, "memory": memory}
        return about | {"upload": upload.name, **figures}

    routers = (0.0, STICKY)
    return {
        "uploads": [
            cell(args.nodes, one_offs, sticky, "lru", upload)
            for sticky, one_offs, upload in itertools.product(routers, ONE_OFFS, UPLOADS)
        ],
        "memory": [
            cell(nodes, one_offs, sticky, memory, MEMORY_UPLOAD)
            for nodes, sticky in (*((args.nodes, sticky) for sticky in routers), (1, 0.0))
            for one_offs, memory in itertools.product(ONE_OFFS, MEMORIES)
        ],
    }


# -- what is shown ------------------------------------------------------------------------------


def markdown(document: Mapping[str, Any]) -> str:
    """Two tables."""
    settings = document["settings"]

    def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * 3 + " ---: |" * (len(heads) - 3)]
        return ["", *lines, *(f"| {' | '.join(row)} |" for row in rows)]

    def router(cell: Mapping[str, Any]) -> str:
        if cell["nodes"] == 1:
            return "one node alone"
        return f"{cell['sticky']:.0%} to the same node" if cell["sticky"] else "to any node"

    def hits(cell: Mapping[str, Any]) -> list[str]:
        host, store = cell["host_hits"], cell["store_hits"]
        return [f"{host:.1%}", f"{store:.1%}", f"{host + store:.1%}"]

    def written_per_read(cell: Mapping[str, Any]) -> str:
        if not cell["read_bytes"]:
            return "nothing read"
        return f"{cell['written_bytes'] / cell['read_bytes']:.2f}"

    uploads = [
        [
            router(cell),
            f"{cell['one_offs']:.0%}",
            cell["upload"],
            f"{cell['uploads_per_image']:.2f}",
            str(cell["most_uploads"]),
            f"{cell['written_bytes'] / GIB:,.0f}",
            written_per_read(cell),
            *hits(cell),
            f"{cell['hottest_share']:.1%}, {cell['hottest_per_second']} in a second",
        ]
        for cell in document["uploads"]
    ]
    memory = [
        [router(cell), f"{cell['one_offs']:.0%}", cell["memory"], *hits(cell)]
        for cell in document["memory"]
    ]
    lines = [
        "# Many nodes on one store, simulated",
        "",
        f"{settings['nodes']} nodes, {settings['requests']:,} requests at {settings['rate']:g}/s, "
        f"{settings['images']:,} images that come back (Zipf, exponent {settings['exponent']:g}); "
        f"{settings['memory_gib']} GiB of host memory per node, {settings['store_gib']:,} GiB in "
        f"the store, uploads of {settings['upload_mib_per_second']} MiB/s each. Segments of "
        f"Qwen2.5-VL-7B, {min(TOKENS)} to {max(TOKENS):,} tokens.",
        "",
        f"`{document['command']}`",
        "",
        "Hits are shares of the requests whose image some node was shown before. One-offs are the",
        "requests whose image never comes back.",
        "",
        "## When to upload",
        *table(
            [
                *("Requests go", "One-offs", "Upload at sight", "Uploads / image", "Most of one"),
                *("Written, GiB", "Written / read", "Host hits", "Store hits", "Hits"),
                "Hottest key, of all reads",
            ],
            uploads,
        ),
        "",
        "## What host memory keeps",
        "",
        f"Upload at sight: {MEMORY_UPLOAD.name}. One node alone has no store.",
        *table(["Requests go", "One-offs", "Policy", "Host hits", "Store hits", "Hits"], memory),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--nodes", type=int, default=100, metavar="N", help="(%(default)s)")
    add("--requests", type=int, default=50_000, metavar="N", help="(%(default)s)")
    add("--images", type=int, default=5_000, metavar="N", help="that come back (%(default)s)")
    add("--rate", type=float, default=200.0, help="requests/s of all nodes (%(default)s)")
    add("--exponent", type=float, default=1.0, help="of Zipf's law (%(default)s)")
    add("--memory-gib", type=int, default=4, metavar="GIB", help="of a node (%(default)s)")
    add("--store-gib", type=int, default=1024, metavar="GIB", help="of the store (%(default)s)")
    add("--upload-mib-per-second", type=int, default=200, metavar="MIB", help="(%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    default = ROOT / "configs" / "results" / "nodes"
    add("--output", type=Path, default=default, metavar="PREFIX", help="(%(default)s)")
    args = parser.parse_args(arguments)
    if args.nodes < 2 or min(args.requests, args.images, args.memory_gib, args.store_gib) < 1:
        parser.error("at least two nodes, one request, one image, 1 GiB each")
    if min(args.rate, args.exponent, args.upload_mib_per_second) <= 0:
        parser.error("rate, exponent and speed must be above 0")
    settings = {k: v for k, v in vars(args).items() if k != "output"}
    document: dict[str, Any] = {"schema": SCHEMA, **about_run(__file__, arguments)}
    document |= {"settings": settings, **run(args), "finished": timestamp()}
    text = markdown(document)
    write_text(with_suffix(args.output, ".json"), json.dumps(document, indent=1) + "\n")
    write_text(with_suffix(args.output, ".md"), text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
