"""KV in GPU memory, from `save_kv_layer` to the peer: vLLM's schedulers, the real native half, the
real transport, and a stand-in for the driver (`make python` puts it in the way). None of it is
fast.
"""

import os
import shutil
import tempfile

import gpu
import pytest
import torch
from rig import CHUNK, Engine, prompt
from test_native import clean, connected, until

import kvxfer
import kvxfer.vllm.device
import kvxfer.vllm.worker
from kvxfer import ConfigError


@pytest.fixture
def device(monkeypatch):
    try:
        found = gpu.Gpu()
    except OSError as error:
        if "KVXFER_REQUIRE_CUDA" in os.environ:
            raise
        pytest.skip(f"no CUDA driver: {error}")
    monkeypatch.setattr(gpu.DeviceRank, "gpu", found, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kvxfer.vllm.worker, "current_stream", lambda _: found.stream)
    monkeypatch.setattr(kvxfer.vllm.worker, "memory_bytes", lambda _: 1 << 30)
    return found


@pytest.fixture
def pair(model, device):
    engines = []
    folder = tempfile.mkdtemp(prefix="kvxfer-")

    def start(**extra):
        extra = {
            "socket_dir": folder,
            "load_timeout": 30,
            "buffer_size": "1MiB",
            "segments": 2,
            "layerwise_min_tokens": 1,
            **extra,
        }
        where = f"unix:{folder}/decode.sock"
        options = {"policy": "fail", "blocks": 128, "device": "cuda", "rank_type": gpu.DeviceRank}
        consumer = Engine(model, "kv_consumer", extra={**extra, "listen": where}, **options)
        engines.append(consumer)
        producer = Engine(model, "kv_producer", extra={**extra, "peers": [where]}, **options)
        engines.append(producer)
        return producer, consumer

    yield start
    device.synchronize()
    for engine in engines:
        engine.connector.shutdown()
        for rank in engine.ranks:
            rank.connector.shutdown()
            # Not before: the agent may read and write there until it is closed.
            for address in rank.addresses.values():
                device.free(address)
    shutil.rmtree(folder)


@pytest.mark.parametrize("layerwise", [True, False])
def test_prompts_arrive_whole(pair, layerwise):
    producer, consumer = pair(layerwise=layerwise, require_path="cuda_ipc")
    connected(consumer)
    for n, length in enumerate([1, 17, CHUNK, CHUNK + 1, 300]):
        tokens = prompt(length, seed=n)
        producer.add(f"p{n}", tokens)
        until(lambda: producer.idle, producer, seconds=60)
        consumer.add(f"a{n}", tokens, max_tokens=2)
        until(lambda request=f"a{n}": request in consumer.computed, consumer, seconds=60)
        consumer.assert_kv(f"a{n}", length)
        until(lambda: consumer.idle, consumer, seconds=60)
        assert consumer.computed[f"a{n}"] == 2
    stats = producer.ranks[0].agent.stats()
    assert stats["pushed_bytes"] > 0
    clean(producer)
    clean(consumer)


def test_the_pool_is_where_the_kv_is(model):
    for options, message in [
        ({"extra": {"buffer_device": "cuda"}}, "buffer_device = 'cuda', but .* on cpu"),
        ({"extra": {"nixlBufferDevice": "cuda"}}, "buffer_device = 'cuda', but .* on cpu"),
        ({"device": "cuda", "extra": {"buffer_device": "cpu"}}, "'cpu', but .* on cuda"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Engine(model, "kv_consumer", **options)


@pytest.mark.skipif(kvxfer.Agent.__module__ == "fake", reason="the native module is not built")
def test_a_gpu_that_is_not_there(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    monkeypatch.setattr(kvxfer.vllm.worker, "memory_bytes", lambda _: 1 << 30)
    with pytest.raises(kvxfer.DeviceError):
        Engine(model, "kv_consumer", device="cuda", extra={"buffer_size": "1MiB"})
