"""The scheduler half of a producer: what is offered, what each step completes, what is pinned.

Invariant: from the moment a chunk is handed to the workers until the observer says that no rank
reads it any more, every block of it has one reference of ours in vLLM's block pool. So nothing
has to be done about preemption, aborts and the end of a request: they free blocks that stay
where they are.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvxfer import Keys, Observer
from kvxfer.vllm.layout import Geometry
from kvxfer.vllm.metadata import Range, pack

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass
class Offer:
    """A request's chunks, as offered."""

    id: int
    request: "Request"
    keys: Keys
    handed: int = 0
    """Chunks before this one were handed to the workers, or turned out not to be wanted."""
    unwanted: set[int] = field(default_factory=set)
    """Chunks that are there already, or whose push was given up, before they were handed over."""


class Producer:
    """All offers of an engine."""

    def __init__(self, observer: Observer, pool: "BlockPool", geometry: Geometry) -> None:
        self._observer = observer
        self._pool = pool
        self._geometry = geometry
        self._by_request: dict[str, Offer] = {}
        self._by_id: dict[int, Offer] = {}
        self._pins: dict[tuple[int, int], list[KVCacheBlock]] = {}
        self._pins_of_block: Counter[int] = Counter()

    @property
    def pinned(self) -> bool:
        """Whether any block is kept for a push."""
        return bool(self._pins)

    def may_free_blocks(self) -> bool:
        """Whether a push that ends will give blocks back: some are kept by our pins alone."""
        blocks = self._pool.blocks
        return any(blocks[b].ref_cnt == n for b, n in self._pins_of_block.items())

    def offer(self, request: "Request", keys: Keys) -> None:
        """Announces the chunks of a request, before any of them is computed."""
        offer = Offer(self._observer.offer(request.request_id, keys), request, keys)
        self._by_request[request.request_id] = self._by_id[offer.id] = offer

    def finished(self, request_id: str) -> None:
        """The request computes no more. What was handed over is still pushed."""
        offer = self._by_request.pop(request_id, None)
        if offer is None:
            return
        del self._by_id[offer.id]
        if offer.handed < len(offer.keys):
            self._observer.withdraw(offer.id)

    def settle(self) -> None:
        """Unpins what is not read any more."""
        for offer_id, chunks in self._observer.pushed():
            for chunk in chunks:
                blocks = self._pins.pop((offer_id, chunk), None)
                if blocks is not None:
                    self._unpin(blocks)
                elif offer := self._by_id.get(offer_id):
                    offer.unwanted.add(chunk)

    def hand_over(self, step: "SchedulerOutput") -> tuple[Range, ...]:
        """Pins and names the chunks that are complete once this step has run.

        By the scheduler's own count of computed tokens, so that prefixes found in the local cache
        are included, even those that another request of the same step is still to write. A
        preempted request starts counting anew; what was handed over before is not repeated."""
        state = step.kv_connector_block_state
        ranges: list[Range] = []
        for request_id, scheduled in step.num_scheduled_tokens.items():
            offer = self._by_request.get(request_id)
            if offer is None:
                continue
            first, offer.handed = offer.handed, self._complete(offer, scheduled)
            if first == offer.handed:
                continue
            # Read anew each time: a resumed request has other blocks.
            block_ids = state.get_block_ids(request_id)
            for start, end in self._runs(offer, first):
                ranges.append((offer.id, start, self._pin(offer, start, end, block_ids)))
        return tuple(ranges)

    def _complete(self, offer: Offer, scheduled: int) -> int:
        """How many leading chunks the step completes; not less than were complete before."""
        computed: int = offer.request.num_computed_tokens + scheduled
        if computed >= offer.keys.tokens:
            return len(offer.keys)
        return max(offer.handed, computed // self._geometry.chunk_tokens)

    def _runs(self, offer: Offer, first: int) -> list[tuple[int, int]]:
        """The chunks from `first` to `handed` without the unwanted ones, as [start, end)."""
        runs: list[tuple[int, int]] = []
        for chunk in range(first, offer.handed):
            if chunk in offer.unwanted:
                continue
            if runs and runs[-1][1] == chunk:
                runs[-1] = (runs[-1][0], chunk + 1)
            else:
                runs.append((chunk, chunk + 1))
        return runs

    def _pin(
        self, offer: Offer, start: int, end: int, block_ids: tuple[list[int], ...]
    ) -> tuple[bytes, ...]:
        per_chunk = self._geometry.chunk_tokens
        for chunk in range(start, end):
            upto = min((chunk + 1) * per_chunk, offer.keys.tokens)
            blocks = [
                self._pool.blocks[block]
                for (size, _), ids in zip(self._geometry.groups, block_ids, strict=True)
                for block in ids[chunk * per_chunk // size : -(-upto // size)]
            ]
            self._pool.touch(blocks)
            self._pins[offer.id, chunk] = blocks
            self._pins_of_block.update(block.block_id for block in blocks)
        upto = min(end * per_chunk, offer.keys.tokens)
        return tuple(
            pack(ids[start * per_chunk // size : -(-upto // size)])
            for (size, _), ids in zip(self._geometry.groups, block_ids, strict=True)
        )

    def _unpin(self, blocks: "list[KVCacheBlock]") -> None:
        for block in blocks:
            self._pins_of_block[block.block_id] -= 1
            if not self._pins_of_block[block.block_id]:
                del self._pins_of_block[block.block_id]
        # A prompt's end is the least likely to be used again: it goes first.
        self._pool.free_blocks(reversed(blocks))
