"""A prompt's KV from one real scheduler to another, when nothing goes wrong."""

import pytest
import rig
from rig import BLOCK, CHUNK, LAYERS, Engine, assert_clean, prompt

LENGTHS = [2, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 100, 640]


def transfer(producer, consumer, request_id, tokens, max_tokens=2):
    producer.add(f"{request_id}-p", tokens)
    producer.run()
    consumer.add(request_id, tokens, max_tokens=max_tokens)
    while request_id not in consumer.computed:
        consumer.step()
    if consumer.scheduler.requests.get(request_id):
        consumer.assert_kv(request_id, len(tokens))
    consumer.run()


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_arrives_whole(world, model, length):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    transfer(producer, consumer, "a", prompt(length))
    # The last token is computed again, to sample from; then one more for the second output.
    assert consumer.computed["a"] == 2
    assert len(consumer.outputs["a"]) == 2
    assert_clean(producer, consumer)


def test_a_prompt_of_one_token_loads_nothing(world, model):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer", policy="fail")
    transfer(producer, consumer, "a", [5], max_tokens=3)
    assert not consumer.reports
    assert ("claim", "a") not in world.log
    assert len(consumer.outputs["a"]) == 3
    assert_clean(producer, consumer)


def test_chunked_prefill_pushes_each_chunk_once_when_it_is_complete(world, model):
    producer = Engine(model, "kv_producer", max_tokens=40)
    consumer = Engine(model, "kv_consumer")
    transfer(producer, consumer, "a", prompt(130))
    # 40, 80, 120 and 130 computed tokens complete 1, 2, 3 and 5 chunks of 32.
    assert [entry[2] for entry in world.log if entry[0] == "begin"] == [1, 1, 1, 2]
    assert_clean(producer, consumer)


def test_two_equal_prompts_in_one_step(world, model):
    """The second finds in the cache what the first of the same step is still to write."""
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    producer.add("one", prompt(100))
    producer.add("two", prompt(100))
    producer.run()
    assert producer.computed == {"one": 100, "two": 100 - 6 * BLOCK}
    for request_id in ("a", "b"):
        consumer.add(request_id, prompt(100))
        consumer.run()
    assert_clean(producer, consumer)


def test_prefixes_cached_at_the_producer_are_pushed_too(world, model):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    world.connected = False
    producer.add("first", prompt(100))
    producer.step()
    world.give_up()
    producer.run()
    world.connected = True
    transfer(producer, consumer, "a", prompt(100))
    assert producer.computed["a-p"] == 100 - 6 * BLOCK
    assert consumer.computed["a"] == 2
    assert_clean(producer, consumer)


@pytest.mark.parametrize("shared", [BLOCK, CHUNK, 3 * BLOCK, 80])
def test_prefixes_cached_at_the_consumer_are_not_loaded(world, model, shared):
    """Also when the local hit ends inside a chunk: its blocks are shared and stay untouched."""
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    consumer.add("warm", prompt(shared + 1))
    consumer.run()
    local = shared // BLOCK * BLOCK
    world.log.clear()
    producer.add("p", prompt(100))
    producer.run()
    hit = consumer.pool.cached_block_hash_to_block
    before = {block.block_id for block in hit._cache.values()}
    # Nobody computes them again, so what is written over here shows a load that goes too far.
    consumer.ranks[0].memory[:, sorted(before)] = -7.0
    consumer.add("a", prompt(100), max_tokens=2)
    while "a" not in consumer.computed:
        consumer.step()
    consumer.assert_kv("a", 100, start=local)
    assert (consumer.ranks[0].memory[:, sorted(before)] == -7.0).all()
    stats = consumer.scheduler.connector_prefix_cache_stats
    assert stats.hits in (0, 100 - local)
    consumer.run()
    assert_clean(producer, consumer)


def test_a_pair_that_shares_a_prefix(world, model):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    base = prompt(64)
    transfer(producer, consumer, "a", base + prompt(40, seed=1))
    transfer(producer, consumer, "b", base + prompt(40, seed=2))
    assert_clean(producer, consumer)


def test_groups_and_ranks(world, model):
    producer = Engine(model, "kv_producer", groups=2, tp=2)
    consumer = Engine(model, "kv_consumer", groups=2, tp=2)
    transfer(producer, consumer, "a", prompt(100))
    assert consumer.computed["a"] == 2
    assert consumer.connector.get_loaded_kv_cache_group_ids(None) == (0, 1)
    assert_clean(producer, consumer)


def test_layers_are_pushed_behind_their_hooks_in_long_steps(world, model):
    extra = {"layerwise_min_tokens": 64}
    producer, _ = Engine(model, "kv_producer", extra=extra), Engine(model, "kv_consumer")
    producer.add("short", prompt(63))
    producer.run()
    assert not any(entry[0] == "layer" for entry in world.log)
    producer.add("long", prompt(64, seed=1))
    producer.run()
    assert [entry[2] for entry in world.log if entry[0] == "layer"] == list(range(len(LAYERS)))


def test_async_scheduling_with_two_outstanding_outputs(world, model):
    producer = Engine(model, "kv_producer", is_async=True, max_tokens=40)
    consumer = Engine(model, "kv_consumer", is_async=True)
    producer.add("p", prompt(100))
    for _ in range(2):
        producer.launch()
    while not producer.idle or producer.pending:
        if not producer.idle:
            producer.launch()
        producer.collect()
    transfer(producer, consumer, "a", prompt(100))
    assert_clean(producer, consumer)


def test_a_request_that_may_not_read_caches_claims_nothing(world, model):
    consumer = Engine(model, "kv_consumer")
    consumer.add("a", prompt(50), skip_reading_prefix_cache=True)
    consumer.run()
    assert ("claim", "a") not in world.log
    assert_clean(consumer)


def test_the_salt_keeps_equal_prompts_apart(world, model):
    producer, consumer = Engine(model, "kv_producer"), Engine(model, "kv_consumer")
    request = rig.Request(
        request_id="p",
        prompt_token_ids=prompt(50),
        sampling_params=rig.SamplingParams(max_tokens=1, ignore_eos=True),
        pooling_params=None,
        block_hasher=producer.hasher,
        cache_salt="a tenant",
    )
    producer.scheduler.add_request(request)
    producer.run()
    consumer.add("a", prompt(50))
    consumer.run()
    assert not consumer.reports
    assert consumer.computed["a"] == 50
    assert_clean(producer, consumer)


def test_two_engines_that_are_both(world, model):
    one, two = (Engine(model, "kv_both", extra={"peers": "x:1"}) for _ in range(2))
    one.add("first", prompt(100), max_tokens=2)
    one.run()
    two.add("second", prompt(100), max_tokens=2)
    two.run()
    assert one.computed["first"] == 101
    assert two.computed["second"] == 2
    # It offers what it loaded as well; nobody wants it.
    one.add("third", prompt(100), max_tokens=2)
    one.run()
    world.give_up()
    one.run()
    two.run()
    assert_clean(one, two)
