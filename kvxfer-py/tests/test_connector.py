"""The connector's edges: how vLLM finds it, what it refuses, what it says."""

import copy
import logging
import pickle

import pytest
import rig
import torch
from rig import Engine, prompt
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole, supports_hma
from vllm.lora.request import LoRARequest
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, SlidingWindowSpec

from kvxfer import ConfigError, plugin
from kvxfer.vllm import KvxferConnector
from kvxfer.vllm.keys import _encode, _extras
from kvxfer.vllm.metadata import Load, StepMetadata


def test_the_plugin_may_run_twice(monkeypatch):
    monkeypatch.setattr(KVConnectorFactory, "_registry", dict(KVConnectorFactory._registry))
    for _ in range(2):
        plugin.register()
    config = KVTransferConfig(kv_connector="KvxferConnector", kv_role="kv_producer")
    assert KVConnectorFactory.get_connector_class(config) is KvxferConnector
    assert supports_hma(KvxferConnector)


def test_graphs_are_cut_only_when_asked_for():
    ask = KvxferConnector.requires_piecewise_for_cudagraph
    assert not ask({})
    assert not ask({"layerwise": False})
    assert ask({"layerwise": True})


def connector(model, kv=None, role="kv_producer", side=KVConnectorRole.WORKER, **options):
    change = options.pop("change", lambda config: None)
    config = rig.vllm_config(model, role, **options)
    change(config)
    return KvxferConnector(config, side, kv or rig.kv_cache_config(8))


def test_what_it_cannot_move_is_refused(world, model):
    kv = rig.kv_cache_config(8)
    window = SlidingWindowSpec(
        block_size=rig.BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32, sliding_window=64
    )
    kv.kv_cache_groups.append(KVCacheGroupSpec(["window"], window))
    for side in KVConnectorRole:
        with pytest.raises(ConfigError, match="layer window keeps its KV as SlidingWindowSpec"):
            connector(model, kv, side=side)
    for name in ("pipeline_parallel_size", "decode_context_parallel_size"):
        with pytest.raises(ConfigError, match=f"cannot be used with {name} = 2"):
            connector(model, change=lambda c, n=name: setattr(c.parallel_config, n, 2))
    with pytest.raises(ConfigError, match=r"chunk_size = 40 .* block size 16; set it to 48"):
        connector(model, extra={"chunk_size": 40})
    with pytest.raises(ConfigError, match="unknown key buffersize"):
        connector(model, extra={"buffersize": 1})
    assert not world.agents


def test_memory_that_is_not_as_announced_is_refused(world, model):
    kv = rig.kv_cache_config(8)
    half = connector(model, kv)
    good = {
        name: torch.zeros(8, 1, rig.BLOCK, rig.WORDS) for name in kv.kv_cache_groups[0].layer_names
    }
    half.register_kv_caches(good)
    # As kernels with smaller blocks see it.
    cut = {name: t.view(16, 1, rig.BLOCK // 2, rig.WORDS) for name, t in good.items()}
    half.register_kv_caches(cut)
    for bad in (
        torch.zeros(7, 1, rig.BLOCK, rig.WORDS),
        torch.zeros(8, 1, rig.BLOCK, rig.WORDS * 2),
        torch.zeros(1, 8, rig.BLOCK, rig.WORDS).transpose(0, 1)[::2],
    ):
        with pytest.raises(ConfigError, match="this KV cache layout is not supported"):
            half.register_kv_caches(dict.fromkeys(good, bad))


def test_the_fingerprint_covers_what_decides_the_kv(world, model):
    def fingerprint(**options):
        worker = connector(model, **options)._worker
        return worker._geometry.native((0, 1)).fingerprint

    base = fingerprint()
    assert fingerprint() == base
    assert fingerprint(role="kv_consumer", policy="fail") == base
    assert fingerprint(extra={"weight_version": "2"}) != base
    assert fingerprint(extra={"model_name": "other"}) != base
    assert fingerprint(extra={"chunk_size": 64}) != base
    assert fingerprint(kv=rig.kv_cache_config(8, groups=2)) != base
    assert fingerprint(change=lambda c: setattr(c.cache_config, "cache_dtype", "fp8")) != base

    def other_content(config):
        config.model_config.hf_config = copy.deepcopy(config.model_config.hf_config)
        config.model_config.hf_config.rope_theta = 7

    assert fingerprint(change=other_content) != base


def test_the_default_pool_holds_two_of_the_longest_prompts(world, model):
    consumer = Engine(model, "kv_consumer")
    assert consumer.ranks[0].agent.capacity == 2 * 4096 // rig.CHUNK
    producer = Engine(model, "kv_producer")
    assert producer.ranks[0].agent.capacity == 0


def test_ranks_with_different_layouts_are_refused(world, model):
    engine = Engine(model, "kv_consumer", tp=2)
    told = {(0, r.rank): r.connector.get_handshake_metadata() for r in engine.ranks}
    other = connector(model, extra={"weight_version": "2"}, role="kv_consumer")
    told[0, 1] = other.get_handshake_metadata()
    with pytest.raises(ConfigError, match="lay out their KV differently"):
        engine.connector.set_xfer_handshake_metadata_pp_aware(told)


def test_what_travels_between_processes_can(world, model):
    engine = Engine(model, "kv_consumer")
    handshake = engine.ranks[0].connector.get_handshake_metadata()
    load = Load(1, "a", 2, 0, 3, (b"1234",), 5, 6)
    for thing in (handshake, StepMetadata(((1, 0, (b"1234",)),), (load,), True)):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_extra_keys_cannot_be_confused():
    values = [None, (), ("ab",), ("a", "b"), (("a",), "b"), (b"ab",), ("1",), (1,), ("a", None)]
    assert len({_encode(value) for value in values}) == len(values)
    with pytest.raises(TypeError, match="float"):
        _encode((1.5,))


def test_adapters_are_part_of_the_keys(world, model):
    engine = Engine(model, "kv_producer")
    plain = engine.add("plain", prompt(100))
    assert _extras(plain, 100, 32) is None
    plain.lora_request = LoRARequest("an adapter", 3, "/adapters/a")
    first = _extras(plain, 100, 32)
    assert len(first) == 4
    # Its number is this engine's own.
    plain.lora_request = LoRARequest("an adapter", 5, "/adapters/a")
    assert _extras(plain, 100, 32) == first
    plain.lora_request = LoRARequest("an adapter", 3, "/adapters/b")
    assert not set(_extras(plain, 100, 32)) & set(first)
    engine.abort("plain")


def test_the_lines_an_operator_looks_for(world, model, caplog, monkeypatch):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    for name in ("scheduler", "worker"):
        monkeypatch.setattr(logging.getLogger(f"vllm.kvxfer.{name}"), "level", logging.INFO)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    producer.add("p", prompt(6))
    producer.run()
    with caplog.at_level(logging.INFO):
        consumer.add("cmpl-7", prompt(6))
        consumer.run()
        consumer.add("cmpl-8", prompt(9, seed=1))
        consumer.run()
        world.fail_loads = 1
        producer.add("q", prompt(50, seed=2))
        producer.run()
        consumer.add("cmpl-9", prompt(50, seed=2))
        consumer.run()
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("vllm.kvxfer")]
    assert "Scheduled to load 6 tokens for request cmpl-7" in lines
    assert (
        "Retrieved 6 out of 6 out of total 6 tokens for request cmpl-7, "
        "path fake, 256 bytes, 1.0 ms" in lines
    )
    assert (
        lines.count(
            "Loading 0 of 9 tokens for request cmpl-8, computing the rest here: no producer has it"
        )
        == 1
    )
    assert (
        "Retrieved 0 out of 50 out of total 50 tokens for request cmpl-9: the checksum differs"
        in lines
    )
    assert "Request cmpl-9 is computed here: its load failed" in lines
