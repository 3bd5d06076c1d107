"""The scheduler half: one per engine, in vLLM's scheduler process."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvxfer import ConfigError, Keyspace, KvxferError, Observer
from kvxfer.config import Config
from kvxfer.vllm.consumer import WORTH_LOADING, Consumer
from kvxfer.vllm.keys import prompt_keys
from kvxfer.vllm.metadata import Handshake, Range, StepMetadata
from kvxfer.vllm.producer import Producer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.kvxfer.scheduler")

# An engine that waits for KV steps on, and each step is a round through the workers. The waits
# grow from the first to the longest, so that they add no more than has been waited already.
FIRST_WAIT = 0.001
LONGEST_WAIT = 0.02


class SchedulerHalf:
    """Dispatches vLLM's calls to the producer and the consumer that this engine is."""

    def __init__(self, config: Config, vllm_config: "VllmConfig") -> None:
        self._config = config
        self._name = str(vllm_config.kv_transfer_config.engine_id)
        self._recompute = vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"
        # With data parallelism the ranks step in lockstep: a wait of one is a wait of all.
        self._may_wait = vllm_config.parallel_config.data_parallel_size == 1
        self._batches = vllm_config.max_concurrent_batches
        self._empty_steps = 0
        self._pool: BlockPool | None = None
        self._observer: Observer | None = None
        self._keyspace: Keyspace | None = None
        self._chunk_tokens = 0
        self._producer: Producer | None = None
        self._consumer: Consumer | None = None

    def bind_pool(self, pool: "BlockPool") -> None:
        """vLLM's block pool, before the handshake."""
        self._pool = pool

    def connect(self, workers: Mapping[tuple[int, int], Handshake]) -> None:
        """All workers are up: their addresses, and the geometry from which keys are computed."""
        ranks = [workers[rank] for rank in sorted(workers)]
        geometry = ranks[0].geometry
        if any(rank.geometry != geometry for rank in ranks):
            raise ConfigError("the ranks of this engine lay out their KV differently")
        if self._pool is None:
            raise KvxferError("vLLM did not bind its block pool before the handshake")
        self._keyspace = Keyspace(geometry.native((0, len(ranks))), self._config.realm.encode())
        self._chunk_tokens = geometry.chunk_tokens
        self._observer = Observer([rank.address for rank in ranks], self._name)
        if self._config.produces:
            self._producer = Producer(self._observer, self._pool, geometry)
        if self._config.consumes:
            self._consumer = Consumer(
                self._observer, geometry, self._config.load_timeout, self._recompute
            )

    def new_request(self, request: "Request") -> None:
        """Computes the keys, once, and says that the request is here."""
        if self._keyspace is None:
            raise KvxferError("a request came before the handshake with the workers")
        if request.num_prompt_tokens < WORTH_LOADING:
            return
        keys = prompt_keys(self._keyspace, self._chunk_tokens, request)
        if self._producer is not None:
            self._producer.offer(request, keys)
        # vLLM discards the match of a request that may not read caches: it would be pinned in vain.
        if self._consumer is not None and not request.skip_reading_prefix_cache:
            self._consumer.claim(request, keys)

    def match(self, request: "Request", computed: int) -> tuple[int | None, bool]:
        """See `Consumer.match`."""
        if self._consumer is None:
            return 0, False
        return self._consumer.match(request.request_id, computed)

    def allocated(self, request: "Request", blocks: "KVCacheBlocks", tokens: int) -> None:
        """See `Consumer.allocated`."""
        if self._consumer is not None:
            self._consumer.allocated(request.request_id, blocks, tokens)

    def build_step(self, step: "SchedulerOutput") -> StepMetadata:
        """What the workers are to do in this step."""
        loads = self._consumer.take_loads() if self._consumer else ()
        self._pause(idle=not step.total_num_scheduled_tokens and not loads)
        ranges: tuple[Range, ...] = ()
        if self._producer is not None:
            self._producer.settle()
            ranges = self._producer.hand_over(step)
        tokens = step.total_num_scheduled_tokens
        layerwise = self._config.layerwise and tokens >= self._config.layerwise_min_tokens
        return StepMetadata(ranges, loads, bool(ranges) and layerwise)

    def _pause(self, idle: bool) -> None:
        """Lets time pass in a step that has nothing to compute, when the reason is ours.

        Otherwise the engine spins: it cannot be woken from outside, so it is told to step on.
        While outputs of earlier steps are outstanding it does not wait: they come first."""
        if not idle:
            self._empty_steps = 0
            return
        self._empty_steps += 1
        waits = self._empty_steps - self._batches
        if waits >= 0 and self._may_wait and self._observer is not None and self.has_work:
            longest = min(FIRST_WAIT * 2 ** min(waits, 10), LONGEST_WAIT)
            if self._observer.wait(longest):
                self._empty_steps = self._batches - 1

    @property
    def has_work(self) -> bool:
        """Whether anything of ours is open."""
        pinned = self._producer is not None and self._producer.pinned
        return pinned or (self._consumer is not None and self._consumer.busy)

    @property
    def pinned(self) -> bool:
        """Whether blocks are kept for a push: the engine has to step until they are not."""
        return self._producer is not None and self._producer.pinned

    def may_free_blocks(self) -> bool:
        """See `Producer.may_free_blocks`."""
        return self._producer is not None and self._producer.may_free_blocks()

    def step_done(self, output: "KVConnectorOutput") -> None:
        """What the workers reported."""
        if self._consumer is not None:
            for request_id in output.finished_recving or ():
                self._consumer.loaded(request_id, request_id in output.failed_recving)
        if self._producer is not None:
            self._producer.settle()

    def finished(self, request: "Request") -> None:
        """vLLM is done with a request, whatever the reason."""
        if self._producer is not None:
            self._producer.finished(request.request_id)
        if self._consumer is not None:
            self._consumer.finished(request.request_id)

    def close(self) -> None:
        """Ends the observer's thread. May be called again."""
        if self._observer is None:
            return
        try:
            self._observer.close()
        except KvxferError as error:
            logger.error("The kvxfer observer does not end: %s", error)
