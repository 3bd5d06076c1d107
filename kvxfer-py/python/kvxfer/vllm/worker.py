"""The worker half: one per rank. Moves nothing itself; the agent's thread does.

Nothing has to be done when requests are preempted: the blocks being read are pinned in the
scheduler's block pool, so they are not given to anybody else.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.logger import init_logger

from kvxfer import Agent, KvxferError
from kvxfer.config import Config
from kvxfer.ucx import ucx_wheel
from kvxfer.vllm.device import HOST, current_stream, memory_bytes, place
from kvxfer.vllm.layout import describe, layer_names, memory_of
from kvxfer.vllm.metadata import Handshake, Load, StepMetadata

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = init_logger("vllm.kvxfer.worker")

# The agent ends every load within load_timeout. This is for an agent that does not.
GRACE = 10.0


class WorkerHalf:
    """One rank's agent, and the ledger of its loads.

    The ledger's rule: each load is reported exactly once, by every rank, failed or not, aborted
    or not. Twice kills the engine, never leaks the request and its blocks.
    """

    def __init__(
        self, config: Config, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig"
    ) -> None:
        self._kv_cache_config = kv_cache_config
        self._timeout = config.load_timeout
        self._caches: dict[str, torch.Tensor] = {}
        self._layers = {name: n for n, name in enumerate(layer_names(kv_cache_config))}
        # With two micro-batches a layer's hook runs when half of its KV is written.
        self._hooks = not vllm_config.parallel_config.use_ubatching
        self._loads: tuple[Load, ...] = ()
        self._step_open = False
        self._layerwise = False
        self._open: dict[int, tuple[Load, float]] = {}
        self._ended: dict[str, bool] = {}
        """Request: whether its load failed. Not reported yet."""

        self._geometry = describe(config, vllm_config, kv_cache_config)
        parallel = vllm_config.parallel_config
        rank = parallel.rank
        # Data-parallel engines have the same configuration and must not share a port.
        port_offset = rank + parallel.data_parallel_index * parallel.world_size
        self._memory = place(config, vllm_config)
        buffer_size = 0
        if config.consumes:
            buffer_size = config.buffer_size or self._geometry.default_buffer(
                vllm_config.model_config.max_model_len,
                config.segments,
                memory_bytes(self._memory),
            )
            chunks = buffer_size // self._geometry.chunk_bytes
            logger.info(
                "kvxfer pool of rank %d: %d bytes, room for %d tokens in chunks of %d",
                rank,
                buffer_size,
                chunks * self._geometry.chunk_tokens,
                self._geometry.chunk_tokens,
            )
        self._agent = Agent(
            role=str(config.role),
            layout=self._geometry.native((rank, parallel.tensor_parallel_size)),
            name=f"{vllm_config.kv_transfer_config.engine_id} rank {rank}",
            listen=config.listen_at(port_offset),
            peers=config.peers_of(port_offset),
            socket_dir=config.socket_dir,
            memory=self._memory,
            sharing=config.sharing,
            buffer_size=buffer_size,
            segments=config.segments,
            gc=config.enable_gc,
            gc_policy=config.gc_policy,
            high_watermark=config.high_watermark,
            low_watermark=config.low_watermark,
            unclaimed_ttl=config.unclaimed_ttl,
            load_timeout=config.load_timeout,
            hold_timeout=config.hold_timeout,
            lease=config.lease,
            allow_insecure=config.allow_insecure,
            require_path=config.require_path,
            failover=config.failover,
            data_port=config.data_port and config.data_port + port_offset,
            tcp_streams=config.tcp_streams,
            ucx_library=config.ucx_library,
            ucx_wheel=ucx_wheel(),
            ucx_devices=config.ucx_devices,
            trust_ucx_peers=config.trust_ucx_peers,
        )

    def register(self, caches: "Mapping[str, torch.Tensor]") -> None:
        """The KV caches are allocated."""
        device = "cpu" if self._memory == HOST else self._memory
        self._agent.register(memory_of(self._kv_cache_config, caches, device))
        # The agent has bare addresses: the memory must not go before it.
        self._caches = dict(caches)

    def handshake(self) -> Handshake:
        """For the scheduler half."""
        return Handshake(self._agent.address, self._geometry)

    def begin(self, step: StepMetadata) -> None:
        """A step starts, before its forward."""
        self._loads = step.loads
        self._layerwise = step.layerwise and self._hooks
        self._step_open = bool(step.ranges) and self._tell(self._agent.begin_step, step.ranges)

    def layer_done(self, name: str) -> None:
        """A layer's hook: its KV is written for everything in the step."""
        if self._step_open and self._layerwise:
            layer = self._layers.get(name)
            # None: the layer shares the KV of another one.
            if layer is not None:
                self._tell(self._agent.layer_ready, layer, self._stream())

    def end(self) -> None:
        """The forward is over: what the hooks did not name is ready as well."""
        if not self._step_open:
            return
        self._step_open = False
        # vLLM's runner calls this in a `finally`. KV of a forward that raised is not KV.
        if sys.exc_info()[0] is None:
            self._tell(self._agent.end_step, self._stream())

    def _stream(self) -> int | None:
        """What the engine has queued there is done before its KV is read, or written over."""
        return current_stream(self._memory)

    def _tell(self, call: Callable[..., None], *args: object) -> bool:
        """Whether the agent took it. One that does not is gone or stuck: it reads nothing more,
        the observer finds its link dead and gives up the pins, and the engine goes on."""
        try:
            call(*args)
        except KvxferError as error:
            logger.error("The kvxfer agent does not take this step's KV: %s", error)
            return False
        return True

    def start_loads(self) -> None:
        """Submits this step's loads."""
        loads, self._loads = self._loads, ()
        for load in loads:
            failure = load.failed
            if failure is None:
                try:
                    self._agent.load(
                        load.id,
                        load.claim,
                        load.first_chunk,
                        load.chunks,
                        load.blocks,
                        self._stream(),
                    )
                except KvxferError as error:
                    failure = str(error)
            if failure is None:
                deadline = time.monotonic() + self._timeout + GRACE
                self._open[load.id] = (load, deadline)
            else:
                self._fail(load, failure)

    def results(self) -> KVConnectorTransferResults:
        """What ended since the last call. A failure is also an end."""
        for done in self._agent.poll() if self._open else ():
            entry = self._open.pop(done.load, None)
            if entry is None:
                continue
            load, _ = entry
            if done.error is not None:
                self._fail(load, done.error)
                continue
            self._ended[load.request] = False
            logger.info(
                "Retrieved %d out of %d out of total %d tokens for request %s, "
                "path %s, %d bytes, %.1f ms",
                done.tokens,
                load.tokens,
                load.prompt_tokens,
                load.request,
                done.path,
                done.bytes,
                done.seconds * 1000,
            )
        self._expire()
        ended, self._ended = self._ended, {}
        return KVConnectorTransferResults(
            finished_recving=set(ended),
            failed_recving={request for request, failed in ended.items() if failed},
        )

    def _expire(self) -> None:
        now = time.monotonic()
        if all(now < deadline for _, deadline in self._open.values()):
            return
        # Reporting frees the blocks, and the agent may still write to them: it has to end first.
        logger.error("The kvxfer agent did not end its loads in time and is closed")
        try:
            self._agent.close()
        except KvxferError as error:
            logger.error("The kvxfer agent does not end, so its blocks are kept: %s", error)
            self._open = {n: (load, now + GRACE) for n, (load, _) in self._open.items()}
            return
        for load, _ in self._open.values():
            self._fail(load, "the agent did not answer")
        self._open.clear()

    def _fail(self, load: Load, why: str) -> None:
        self._ended[load.request] = True
        logger.warning(
            "Retrieved 0 out of %d out of total %d tokens for request %s: %s",
            load.tokens,
            load.prompt_tokens,
            load.request,
            why,
        )

    def close(self) -> None:
        """Ends the agent. May be called again."""
        try:
            self._agent.close()
        except KvxferError as error:
            logger.error("The kvxfer agent does not end: %s", error)
