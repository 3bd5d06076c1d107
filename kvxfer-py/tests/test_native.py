"""The real native half between two real schedulers: threads, sockets and shared memory included.

What can go wrong is in `test_faults.py`, with the fake; this is that the two fit together.
"""

import shutil
import tempfile
import time

import pytest
from rig import CHUNK, Engine, prompt

import kvxfer

pytestmark = pytest.mark.skipif(
    kvxfer.Agent.__module__ == "fake", reason="the native module is not built"
)

LONG = prompt(40 * CHUNK)


@pytest.fixture
def pair(model):
    """A producer and a consumer that share a socket folder; closed at the end."""
    engines = []
    # pytest's own folders have names too long for a Unix socket.
    folder = tempfile.mkdtemp(prefix="kvxfer-")

    def start(tp=1, groups=1, **extra):
        extra = {"socket_dir": folder, "load_timeout": 5, "hold_timeout": 5, **extra}
        where = f"unix:{folder}/decode.sock"
        options = {"tp": tp, "groups": groups, "policy": "fail", "blocks": 128}
        consumer = Engine(model, "kv_consumer", extra={**extra, "listen": where}, **options)
        engines.append(consumer)
        producer = Engine(model, "kv_producer", extra={**extra, "peers": [where]}, **options)
        engines.append(producer)
        return producer, consumer

    yield start
    for engine in engines:
        engine.connector.shutdown()
        for rank in engine.ranks:
            rank.connector.shutdown()
    shutil.rmtree(folder)


def until(condition, *engines, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        for engine in engines:
            if not engine.idle:
                engine.step()
        time.sleep(0.001)


def connected(consumer):
    """Every rank has its observer and its producer: before, a producer offers to nobody."""
    until(lambda: all(rank.agent.stats()["links"] >= 2 for rank in consumer.ranks))


def clean(engine):
    until(lambda: engine.idle, engine)
    for rank in engine.ranks:
        stats = rank.agent.stats()
        assert stats["pages_leaked"] == 0
    assert engine.free_blocks == engine.baseline


@pytest.mark.parametrize(("tp", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_prompts_arrive_whole(pair, tp, groups):
    producer, consumer = pair(tp, groups)
    connected(consumer)
    for n, length in enumerate([1, 2, 17, CHUNK, CHUNK + 1, 100, 640]):
        tokens = prompt(length, seed=n)
        producer.add(f"p{n}", tokens)
        until(lambda: producer.idle, producer)
        consumer.add(f"a{n}", tokens, max_tokens=2)
        until(lambda request=f"a{n}": request in consumer.computed, consumer)
        consumer.assert_kv(f"a{n}", length)
        until(lambda: consumer.idle, consumer)
        assert consumer.computed[f"a{n}"] == 2
        assert consumer.finish_reasons[f"a{n}"] == "length"
    assert len(consumer.reports) == 6
    clean(producer)
    clean(consumer)


def test_a_prompt_longer_than_the_pool(pair):
    chunk = CHUNK * 2 * 4 * 2
    producer, consumer = pair(buffer_size=8 * chunk)
    connected(consumer)
    producer.add("p", LONG)
    consumer.add("a", LONG, max_tokens=2)
    until(lambda: "a" in consumer.computed, producer, consumer)
    consumer.assert_kv("a", len(LONG))
    clean(producer)
    clean(consumer)


def test_a_producer_that_goes_away(pair):
    producer, consumer = pair()
    connected(consumer)
    leave_midway(producer)
    consumer.add("a", LONG, max_tokens=2)
    until(lambda: consumer.idle, consumer)
    assert consumer.finish_reasons == {"a": "error"}
    clean(consumer)
    # Its engine computes on.
    until(lambda: "p" in producer.finish_reasons, producer)


def test_nothing_stays_pinned_for_an_agent_that_is_gone(pair):
    producer, consumer = pair()
    connected(consumer)
    leave_midway(producer)
    until(lambda: producer.idle, producer, seconds=2)
    assert producer.free_blocks == producer.baseline


def leave_midway(producer):
    """The agents end when part of a prompt is computed."""
    producer.add("p", LONG)
    producer.step()
    for rank in producer.ranks:
        rank.connector.shutdown()
