"""vLLM's real scheduler and block pool, driven step by step, with a model that is a formula.

The "model" writes, for every token it is given, a value that only that token at that position
after that prefix has, so that blocks that went to the wrong place, or were read too late, show.
"""

import hashlib
import json
from collections import deque

import torch
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    KVTransferConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
)
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from kvxfer.vllm import KvxferConnector

BLOCK = 16
CHUNK = 32
LAYERS = ("model.layers.0", "model.layers.1")
WORDS = 2  # per token and layer
EOS = 99_999


def model_dir(path):
    """A model that is only looked at."""
    path.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_hidden_layers": len(LAYERS),
        "vocab_size": 100_000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def kv_cache_config(blocks, groups=1):
    # One KV head of size 1 in float32: K and V are two words per token.
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    page = spec.page_size_bytes
    assert page == BLOCK * WORDS * 4
    names = [[f"{layer}.{g}" for layer in LAYERS] for g in range(groups)]
    every = [name for group in names for name in group]
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=page * blocks * len(every),
                layers=every,
                layer_stride=page * blocks,
                block_stride=page,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(group, spec) for group in names],
        kv_cache_layout="LBHNC",
        hash_block_size=BLOCK,
    )


def vllm_config(
    model,
    role,
    policy="recompute",
    extra=None,
    max_tokens=512,
    caching=True,
    is_async=False,
    tp=1,
    device="cpu",
):
    model_config = ModelConfig(
        model=model, skip_tokenizer_init=True, dtype="float32", seed=0, max_model_len=4096
    )
    config = VllmConfig(
        model_config=model_config,
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=max_tokens,
            max_model_len=4096,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=is_async,
        ),
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvxferConnector",
            kv_connector_module_path="kvxfer.vllm",
            kv_role=role,
            kv_buffer_device=device,
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"chunk_size": CHUNK, **(extra or {})},
        ),
    )
    # vLLM's CPU build accepts no other device, and asks no more.
    config.device_config.device_type = device
    # No worker processes here: the ranks live side by side.
    config.parallel_config.tensor_parallel_size = tp
    return config


def fingerprint(tokens):
    """What the model writes for the last of these tokens, in each layer and word."""
    digest = hashlib.sha256(repr(list(tokens)).encode()).digest()
    return int.from_bytes(digest[:3], "big")


class Rank:
    """A worker: its connector and its KV memory."""

    def __init__(self, config, kv, rank):
        config.parallel_config.rank = rank
        self.rank = rank
        self.connector = KvxferConnector(config, KVConnectorRole.WORKER, kv)
        names = [name for group in kv.kv_cache_groups for name in group.layer_names]
        self.caches = self.tensors(names, kv)
        self.connector.register_kv_caches(self.caches)
        self.layers = names

    def tensors(self, names, kv):
        self.memory = torch.full((len(names), kv.num_blocks, 1, BLOCK, WORDS), -1.0)
        return {name: self.memory[n] for n, name in enumerate(names)}

    def before_layer(self, name):
        """`memory` is about to be written."""

    def after_layer(self, name):
        """It was."""

    def fetch(self):
        """`memory` is about to be read by a test."""

    @property
    def agent(self):
        return self.connector._worker._agent


class Engine:
    """An engine without processes: one scheduler, some ranks, steps when the test says so."""

    def __init__(
        self, model, role, blocks=64, groups=1, tp=1, is_async=False, rank_type=Rank, **options
    ):
        self.config = vllm_config(model, role, is_async=is_async, tp=tp, **options)
        self.config.cache_config.num_gpu_blocks = blocks
        self.kv = kv_cache_config(blocks, groups)
        self.ranks = [rank_type(self.config, self.kv, rank) for rank in range(tp)]
        self.config.parallel_config.rank = 0
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = (AsyncScheduler if is_async else Scheduler)(
            vllm_config=self.config,
            kv_cache_config=self.kv,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=BLOCK,
            log_stats=True,
        )
        self.connector = self.scheduler.connector
        self.connector.set_xfer_handshake_metadata_pp_aware(
            {(0, r.rank): r.connector.get_handshake_metadata() for r in self.ranks}
        )
        self.aggregator = KVOutputAggregator(tp)
        self.outputs = {}
        self.finish_reasons = {}
        self.steps = 0
        self.reports = []  # finished_recving, over all steps
        self.computed = {}  # request -> tokens that the forward was given
        self.pending = deque()
        self.baseline = self.free_blocks
        self.hook = None  # called with (rank, layer) after each layer
        self.fail_forward = False

    # ---- what tests ask

    @property
    def pool(self):
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def free_blocks(self):
        return self.pool.get_num_free_blocks()

    @property
    def idle(self):
        return not self.scheduler.has_requests()

    def kv_of(self, rank, block_ids, tokens):
        """The values stored for the first `tokens` tokens, layer by layer."""
        memory, at = self.ranks[rank].memory, 0
        rows = []
        for group, ids in zip(self.kv.kv_cache_groups, block_ids, strict=True):
            for _ in group.layer_names:
                flat = torch.cat([memory[at, b, 0] for b in ids])[:tokens]
                rows.append(flat)
                at += 1
        return rows

    def assert_kv(self, request_id, tokens, start=0):
        """The engine's blocks hold what the model would have written for [start, tokens)."""
        request = self.scheduler.requests[request_id]
        block_ids = self.scheduler.kv_cache_manager.get_block_ids(request_id)
        expected = expected_kv(request.all_token_ids[:tokens])
        for rank in self.ranks:
            rank.fetch()
            for row in self.kv_of(rank.rank, block_ids, tokens):
                assert torch.equal(row[start:], expected[start:]), f"rank {rank.rank} has wrong KV"

    # ---- driving

    def add(self, request_id, tokens, max_tokens=1, **options):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **options)
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(tokens),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request_id):
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self):
        """Schedules, executes, and processes the output."""
        self.launch()
        self.collect()

    def launch(self):
        """Schedules. The workers lag behind: they run the step when it is collected."""
        output = self.scheduler.schedule()
        self.steps += 1
        assert output.kv_connector_block_state is None
        plan = {}
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = self.scheduler.requests[request_id]
            ids = self.scheduler.kv_cache_manager.get_block_ids(request_id)
            # It was advanced when the step was scheduled.
            end = request.num_computed_tokens
            done = end >= request.num_tokens
            plan[request_id] = (request, end - scheduled, end, [list(i) for i in ids], done)
            self.computed[request_id] = self.computed.get(request_id, 0) + scheduled
        self.pending.append((output, plan))

    def collect(self):
        output, plan = self.pending.popleft()
        ranks = [self._execute(rank, output, plan) for rank in self.ranks]
        result = self.aggregator.aggregate(ranks)
        updates = self.scheduler.update_from_output(output, result)
        for core in updates.values():
            for item in core.outputs:
                self.outputs.setdefault(item.request_id, []).extend(item.new_token_ids)
                if item.finish_reason is not None:
                    self.finish_reasons[item.request_id] = str(item.finish_reason)

    def run(self, limit=200):
        """Until there is nothing to do."""
        while not self.idle:
            assert limit, f"still busy: {list(self.scheduler.requests.values())}"
            limit -= 1
            self.step()

    def _execute(self, rank, output, plan):
        connector = rank.connector
        connector.handle_preemptions(output.kv_connector_metadata)
        connector.bind_connector_metadata(output.kv_connector_metadata)
        try:
            for n, name in enumerate(rank.layers if plan else ()):
                rank.before_layer(name)
                self._layer(rank, n, plan)
                rank.after_layer(name)
                connector.save_kv_layer(name, rank.caches[name], None)
                if self.fail_forward:
                    raise RuntimeError("the forward failed")
        finally:
            # As vLLM's runner does it, also after an exception.
            connector.start_load_kv(None)
            connector.wait_for_save()
            results = connector.get_transfer_results(output.finished_req_ids)
            connector.clear_connector_metadata()
        if rank.rank == 0:
            self.reports.extend(results.finished_recving)
        told = KVConnectorOutput(
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
        )
        return self._result(plan, told)

    def _layer(self, rank, layer, plan):
        """Writes one layer's KV for everything scheduled."""
        group = layer // len(LAYERS)
        for request, start, end, block_ids, _ in plan.values():
            for position in range(start, end):
                prefix = request.all_token_ids[: position + 1]
                block, row = block_ids[group][position // BLOCK], position % BLOCK
                rank.memory[layer, block, 0, row] = fingerprint(prefix)

    def _result(self, plan, told):
        if not plan:
            result = ModelRunnerOutput(**vars(EMPTY_MODEL_RUNNER_OUTPUT))
            result.kv_connector_output = told
            return result
        return ModelRunnerOutput(
            req_ids=list(plan),
            req_id_to_index={request_id: n for n, request_id in enumerate(plan)},
            sampled_token_ids=[
                [1000 + request.num_tokens] if done else [] for request, *_, done in plan.values()
            ],
            kv_connector_output=told,
        )


def expected_kv(tokens):
    values = [fingerprint(tokens[: n + 1]) for n in range(len(tokens))]
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, WORDS)


def prompt(length, seed=0):
    return [(seed * 7919 + n * 31) % 50_000 for n in range(length)]


def assert_clean(*engines):
    """Nothing is held, nothing is left to do, nothing is remembered."""
    for engine in engines:
        assert engine.idle
        assert not engine.scheduler.requests
        assert engine.free_blocks == engine.baseline
        half = engine.connector._scheduler
        if half._producer:
            assert not half._producer.pinned
            assert not half._producer._pins_of_block
            assert not half._producer._by_request
            assert not half._producer._by_id
        if half._consumer:
            assert not half._consumer._by_request
            assert not half._consumer.busy
        for rank in engine.ranks:
            assert not rank.connector._worker._open
            assert not rank.agent.claims
