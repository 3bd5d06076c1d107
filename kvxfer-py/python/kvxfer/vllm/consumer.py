"""The scheduler half of a consumer: what is claimed, and what vLLM is told about it.

A request makes one attempt to load, recorded when vLLM allocates its blocks; from then on the
answer is 0, whatever becomes of the load. Without that, a failed load is repeated for ever, and
so is a successful one of which vLLM has to recompute everything.
"""

import enum
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvxfer import Keys, Observer
from kvxfer.vllm.layout import Geometry
from kvxfer.vllm.metadata import NO_BLOCK, Load, pack

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.request import Request

# A child of vLLM's logger: its handlers and VLLM_LOGGING_LEVEL apply.
logger = init_logger("vllm.kvxfer.scheduler")

# vLLM computes the last token of a full hit again, so loading one token saves nothing. For a
# prompt of one token it would even repeat itself: 0 computed tokens ask for a match again.
WORTH_LOADING = 2


class Stage(enum.Enum):
    """Where a request is in its only attempt."""

    WAITING = enum.auto()
    LOADING = enum.auto()
    DONE = enum.auto()


@dataclass
class Wanted:
    """A request's claim."""

    request_id: str
    keys: Keys
    claim: int
    deadline: float
    stage: Stage = Stage.WAITING
    local: int = 0
    """Tokens found in the local cache, when the match was last asked for."""
    failed: str | None = None
    """Why the request is to fail, when the match was last asked for."""
    told: bool = False
    """Whether the log says that there is nothing to load."""
    finished: bool = False
    """Whether vLLM is done with the request, while its load still runs."""


class Consumer:
    """All claims of an engine."""

    def __init__(
        self, observer: Observer, geometry: Geometry, timeout: float, recompute: bool
    ) -> None:
        self._observer = observer
        self._geometry = geometry
        self._timeout = timeout
        self._recompute = recompute
        self._by_request: dict[str, Wanted] = {}
        self._loads: list[Load] = []
        self._next_load = 1

    @property
    def busy(self) -> bool:
        """Whether a request waits for KV, or for a load."""
        return any(wanted.stage is not Stage.DONE for wanted in self._by_request.values())

    def claim(self, request: "Request", keys: Keys) -> None:
        """Pins what is there and what is coming, from the request's arrival on."""
        request_id = request.request_id
        claim = self._observer.claim(request_id, keys, self._timeout)
        deadline = time.monotonic() + self._timeout
        self._by_request[request_id] = Wanted(request_id, keys, claim, deadline)

    def match(self, request_id: str, computed: int) -> tuple[int | None, bool]:
        """How many tokens beyond `computed` can be loaded; None while that is open.

        May be asked any number of times: it only notes what it said last."""
        wanted = self._by_request.get(request_id)
        if wanted is None or wanted.stage is not Stage.WAITING:
            return 0, False
        wanted.local, wanted.failed = computed, None
        tokens = self._usable(wanted)
        if tokens is None:
            return None, False
        return (tokens, True) if tokens >= WORTH_LOADING else (0, False)

    def _usable(self, wanted: Wanted) -> int | None:
        everything = wanted.keys.tokens - wanted.local
        if everything < WORTH_LOADING:
            return 0
        ready, coming, state = self._observer.status(wanted.claim)
        usable = self._tokens(wanted, ready) - wanted.local
        if state == "done":
            return usable
        if state == "stalled" and ready:
            # The pool is full of what this claim pins: only loading it makes room for the rest,
            # so the load takes on the rest as well.
            return self._tokens(wanted, coming) - wanted.local
        if state in ("waiting", "asking", "writing", "stalled"):
            if time.monotonic() < wanted.deadline:
                return None
            state = f"not complete after {self._timeout:g} s ({state})"
        elif state == "missing":
            # Nobody was asked to compute it: neither policy makes that a failure.
            self._tell(wanted, "no producer has it", usable)
            return usable
        if self._recompute:
            self._tell(wanted, state, usable)
            return usable
        wanted.failed = state
        return everything

    def _tell(self, wanted: Wanted, why: str, usable: int) -> None:
        if wanted.told:
            return
        wanted.told = True
        logger.info(
            "Loading %d of %d tokens for request %s, computing the rest here: %s",
            usable if usable >= WORTH_LOADING else 0,
            wanted.keys.tokens,
            wanted.request_id,
            why,
        )

    def _tokens(self, wanted: Wanted, chunks: int) -> int:
        return min(chunks * self._geometry.chunk_tokens, wanted.keys.tokens)

    def allocated(self, request_id: str, blocks: "KVCacheBlocks", tokens: int) -> None:
        """vLLM has given the request blocks and counts on `tokens` to be loaded into them: as
        many as were matched, fewer, or none. This ends the attempt, or starts its load."""
        wanted = self._by_request.get(request_id)
        if wanted is None or wanted.stage is not Stage.WAITING:
            return
        if tokens == 0:
            self._done(wanted)
            return
        wanted.stage = Stage.LOADING
        first = wanted.local // self._geometry.chunk_tokens
        end = wanted.local + tokens
        last = -(-end // self._geometry.chunk_tokens)
        if wanted.failed is None:
            # The pins on what the local cache has, or vLLM does not want, would only take room.
            self._observer.release(wanted.claim, first, last)
        self._loads.append(
            Load(
                id=self._next_load,
                request=request_id,
                claim=wanted.claim,
                first_chunk=first,
                chunks=last - first,
                blocks=self._targets(wanted, blocks.get_block_ids(), first, last, end),
                tokens=tokens,
                prompt_tokens=wanted.keys.tokens,
                failed=wanted.failed,
            )
        )
        self._next_load += 1
        if wanted.failed is None:
            logger.info("Scheduled to load %d tokens for request %s", tokens, request_id)

    def _targets(
        self, wanted: Wanted, block_ids: tuple[list[int], ...], first: int, last: int, end: int
    ) -> tuple[bytes, ...]:
        """The blocks of the chunks [first, last); those outside [local, end) are left alone: the
        ones below are shared with whoever computed them."""
        start, stop = first * self._geometry.chunk_tokens, self._tokens(wanted, last)
        targets = []
        for (size, _), ids in zip(self._geometry.groups, block_ids, strict=True):
            numbers = range(start // size, -(-stop // size))
            targets.append(
                pack(
                    [
                        ids[n] if wanted.local <= n * size < end and n < len(ids) else NO_BLOCK
                        for n in numbers
                    ]
                )
            )
        return tuple(targets)

    def take_loads(self) -> tuple[Load, ...]:
        """The loads that start in this step."""
        loads, self._loads = tuple(self._loads), []
        return loads

    def loaded(self, request_id: str, failed: bool) -> None:
        """All ranks have reported."""
        wanted = self._by_request.get(request_id)
        if wanted is None or wanted.stage is not Stage.LOADING:
            return
        if failed and self._recompute and not wanted.finished:
            logger.warning("Request %s is computed here: its load failed", request_id)
        self._done(wanted)
        if wanted.finished:
            del self._by_request[request_id]

    def finished(self, request_id: str) -> None:
        """vLLM is done with the request. A running load goes on, and keeps its blocks and its
        pins: it is over when all ranks have said so."""
        wanted = self._by_request.get(request_id)
        if wanted is None:
            return
        if wanted.stage is Stage.LOADING:
            wanted.finished = True
            return
        if wanted.stage is Stage.WAITING:
            self._done(wanted)
        del self._by_request[request_id]

    def _done(self, wanted: Wanted) -> None:
        wanted.stage = Stage.DONE
        self._observer.release(wanted.claim)
