"""vLLM's KV connector: `{"kv_connector": "KvxferConnector", "kv_role": "kv_producer"}`.

It translates ids and carries no data. vLLM makes two instances of the class, in two processes:
one in the scheduler (`SchedulerHalf`), one in every worker (`WorkerHalf`).
"""

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvxfer.config import Config
from kvxfer.vllm.layout import check_supported, chunk_tokens
from kvxfer.vllm.metadata import StepMetadata
from kvxfer.vllm.scheduler import SchedulerHalf
from kvxfer.vllm.worker import WorkerHalf

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

__all__ = ["KvxferConnector"]


class KvxferConnector(KVConnectorBase_V1, SupportsHMA):
    """Hands each call to the half that it is for."""

    _cache_hit_source = CacheHitSource.P2P

    # An instance has one of them, by its role.
    _scheduler: SchedulerHalf
    _worker: WorkerHalf

    def __init__(
        self,
        vllm_config: "VllmConfig",
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config = Config.load(transfer.kv_role, transfer.kv_connector_extra_config)
        check_supported(vllm_config, kv_cache_config)
        chunk_tokens(config, kv_cache_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(config, vllm_config)
        else:
            self._worker = WorkerHalf(config, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        # Chunks handed over before a preemption stay pinned and are delivered; the others are
        # offered as long as the request lives. No finish has to be undone for them.
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # vLLM does not say for which role it asks, and decoding would lose its full graphs. So
        # only when it is asked for: without hooks, pushes just start at the end of the step.
        return str(extra_config.get("layerwise", "")).lower() in ("1", "true", "yes", "on")

    def shutdown(self) -> None:
        half = self._scheduler if self.role is KVConnectorRole.SCHEDULER else self._worker
        half.close()

    # ---- worker half ----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        self._worker.register(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.handshake()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        # Here and not in a later call: the next thing that happens may be a layer's hook.
        self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are asynchronous: vLLM does not run a request before its load is reported."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: "torch.Tensor",
        attn_metadata: "AttentionMetadata",
        **kwargs: Any,
    ) -> None:
        self._worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        self._worker.end()

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        return self._worker.results()

    # ---- scheduler half -------------------------------------------------------------------------

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._scheduler.bind_pool(gpu_block_pool)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        self._scheduler.connect(metadata)

    def on_new_request(self, request: "Request") -> None:
        self._scheduler.new_request(request)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self._scheduler.match(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        # All of them are loaded; one left out might be zeroed while the load writes to it.
        return tuple(range(len(self._kv_cache_config.kv_cache_groups)))

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        self._scheduler.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self._scheduler.build_step(scheduler_output)

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.step_done(connector_output)

    def has_pending_push_work(self) -> bool:
        return self._scheduler.pinned

    def has_pending_block_frees(self) -> bool:
        return self._scheduler.may_free_blocks()

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._scheduler.finished(request)
        # Nothing is delayed: what is still to be read has pins of its own.
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])
