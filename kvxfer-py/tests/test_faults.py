"""What can go wrong between two engines, and that each ends, once, with nothing held."""

import time

import pytest
from rig import BLOCK, CHUNK, Engine, Rank, assert_clean, prompt

import kvxfer.vllm.consumer
import kvxfer.vllm.worker
from kvxfer import KvxferError

POLICIES = ["recompute", "fail"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told to."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    it = Clock()
    monkeypatch.setattr(kvxfer.vllm.consumer, "time", it)
    monkeypatch.setattr(kvxfer.vllm.worker, "time", it)
    return it


def prefilled(model, tokens, **options):
    producer = Engine(model, "kv_producer", **options)
    producer.add("p", tokens)
    return producer


# ---- failed loads


@pytest.mark.parametrize("policy", POLICIES)
def test_a_failed_load_is_tried_once(world, model, policy):
    """Under recompute vLLM asks again for a match: the answer must be none (it used to loop)."""
    consumer = Engine(model, "kv_consumer", policy=policy)
    producer = prefilled(model, prompt(100))
    producer.run()
    world.fail_loads = 1
    consumer.add("a", prompt(100), max_tokens=2)
    consumer.run()
    assert consumer.reports == ["a"]
    if policy == "recompute":
        assert consumer.computed["a"] == 101
        assert consumer.finish_reasons == {"a": "length"}
    else:
        assert consumer.finish_reasons == {"a": "error"}
    assert_clean(producer, consumer)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_rank_that_fails_fails_the_request(world, model, policy):
    consumer = Engine(model, "kv_consumer", policy=policy, tp=2)
    producer = prefilled(model, prompt(100), tp=2)
    producer.run()
    world.fail_loads = 1
    consumer.add("a", prompt(100))
    consumer.run()
    assert consumer.finish_reasons == {"a": "length" if policy == "recompute" else "error"}
    assert_clean(producer, consumer)


def test_a_refused_load_is_a_failed_one(world, model, monkeypatch):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    producer.run()
    consumer.ranks[0].agent.closed = True
    world.agents.pop(consumer.ranks[0].agent.address)
    consumer.add("a", prompt(100))
    consumer.run()
    assert consumer.finish_reasons == {"a": "length"}
    assert consumer.reports == ["a"]


def test_a_silent_agent_is_closed_before_its_blocks_are_given_back(
    world, model, clock, monkeypatch
):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    producer.run()
    world.silent_loads = True
    consumer.add("a", prompt(100))
    consumer.step()
    consumer.step()
    assert not consumer.reports
    clock.now += 30 + kvxfer.vllm.worker.GRACE
    agent = consumer.ranks[0].agent
    closed, close = [], agent.close
    monkeypatch.setattr(agent, "close", lambda: (closed.append(list(consumer.reports)), close()))
    consumer.run()
    assert closed == [[]]
    assert consumer.reports == ["a"]
    assert consumer.finish_reasons == {"a": "length"}
    assert consumer.free_blocks == consumer.baseline


def test_an_agent_that_cannot_be_ended_keeps_the_blocks(world, model, clock, monkeypatch):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    producer.run()
    world.silent_loads = True
    consumer.add("a", prompt(100))
    consumer.step()

    def stuck():
        raise KvxferError("the thread did not end")

    agent, close = consumer.ranks[0].agent, consumer.ranks[0].agent.close
    monkeypatch.setattr(agent, "close", stuck)
    clock.now += 30 + kvxfer.vllm.worker.GRACE
    for _ in range(3):
        consumer.step()
    assert not consumer.reports
    assert consumer.baseline - consumer.free_blocks == 7
    consumer.ranks[0].connector.shutdown()
    monkeypatch.setattr(agent, "close", close)
    clock.now += kvxfer.vllm.worker.GRACE
    consumer.run()
    assert consumer.reports == ["a"]
    assert consumer.free_blocks == consumer.baseline


def test_a_producer_whose_agent_is_gone_computes_on(world, model, monkeypatch):
    producer = prefilled(model, prompt(100))

    def closed(*args):
        raise KvxferError("the agent is closed")

    monkeypatch.setattr(producer.ranks[0].agent, "begin_step", closed)
    producer.step()
    assert producer.finish_reasons == {"p": "length"}
    assert not any(entry[0] == "end" for entry in world.log)


# ---- nothing to load, or not in time


@pytest.mark.parametrize("policy", POLICIES)
def test_what_nobody_offers_is_computed(world, model, policy):
    consumer = Engine(model, "kv_consumer", policy=policy)
    consumer.add("a", prompt(100))
    consumer.run()
    assert consumer.finish_reasons == {"a": "length"}
    assert consumer.computed["a"] == 100
    assert_clean(consumer)


@pytest.mark.parametrize("what", ["no producer", "lost", "deadline", "no answer"])
@pytest.mark.parametrize("policy", POLICIES)
def test_kv_that_does_not_come_ends_by_policy(world, model, clock, policy, what):
    consumer = Engine(model, "kv_consumer", policy=policy)
    producer = prefilled(model, prompt(100))
    world.connected = what != "no producer"
    world.lost = what == "lost"
    world.answers = what != "no answer"
    world.auto = False
    producer.step()
    consumer.add("a", prompt(100))
    if what in ("deadline", "no answer"):
        for _ in range(5):
            consumer.step()
        assert consumer.scheduler.requests["a"].num_computed_tokens == 0
        assert not consumer.finish_reasons
        clock.now += 30
    consumer.run()
    assert consumer.finish_reasons == {"a": "length" if policy == "recompute" else "error"}
    assert consumer.steps < 12
    world.give_up()
    producer.run()
    assert_clean(producer, consumer)


def test_what_came_before_the_producer_was_lost_is_loaded(world, model):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100), max_tokens=2 * CHUNK)
    producer.step()
    world.lost = True
    consumer.add("a", prompt(100))
    consumer.run()
    assert consumer.computed["a"] == 100 - 2 * CHUNK
    producer.run()


def test_waiting_for_a_running_prefill(world, model):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100), max_tokens=CHUNK)
    producer.step()
    consumer.add("a", prompt(100))
    for _ in range(3):
        consumer.step()
    assert "a" not in consumer.computed
    producer.run()
    consumer.run()
    assert consumer.computed["a"] == 1
    assert_clean(producer, consumer)


def test_an_engine_that_waits_does_not_spin(world, model):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    world.auto = False
    producer.step()
    consumer.add("a", prompt(100))
    for _ in range(8):
        consumer.step()
    assert world.waits == [0.001, 0.002, 0.004, 0.008, 0.016, 0.02, 0.02, 0.02]
    # With something to compute there is no waiting.
    world.waits.clear()
    consumer.add("b", [1], max_tokens=5)
    for _ in range(4):
        consumer.step()
    assert not world.waits
    world.auto = True
    world.pump()
    consumer.run()
    producer.run()
    assert_clean(producer, consumer)


def test_no_waiting_with_data_parallelism(world, model, monkeypatch):
    consumer = Engine(model, "kv_consumer")
    consumer.connector._scheduler._may_wait = False
    world.answers = False
    consumer.add("a", prompt(100))
    for _ in range(3):
        consumer.step()
    assert not world.waits


# ---- the pool is small


@pytest.mark.parametrize("policy", POLICIES)
def test_a_prompt_longer_than_the_pool_streams_through_it(world, model, policy):
    chunk = CHUNK * 2 * 4 * 2
    consumer = Engine(model, "kv_consumer", policy=policy, extra={"buffer_size": 2 * chunk})
    producer = prefilled(model, prompt(10 * CHUNK + 5))
    for _ in range(3):
        producer.step()
    assert producer.free_blocks < producer.baseline
    consumer.add("a", prompt(10 * CHUNK + 5), max_tokens=2)
    while "a" not in consumer.computed:
        consumer.step()
    consumer.assert_kv("a", 10 * CHUNK + 5)
    consumer.run()
    producer.run()
    assert consumer.computed["a"] == 2
    assert_clean(producer, consumer)


def test_a_full_pool_makes_requests_take_turns(world, model):
    chunk = CHUNK * 2 * 4 * 2
    consumer = Engine(model, "kv_consumer", extra={"buffer_size": 3 * chunk}, blocks=128)
    producer = Engine(model, "kv_producer", blocks=128)
    for n in range(8):
        producer.add(f"p{n}", prompt(3 * CHUNK, seed=n))
    producer.step()
    for n in range(8):
        consumer.add(f"a{n}", prompt(3 * CHUNK, seed=n))
    while not producer.idle:
        producer.step()
        consumer.step()
    consumer.run()
    assert consumer.computed == {f"a{n}": 1 for n in range(8)}
    assert_clean(producer, consumer)


# ---- aborts


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_aborts_of_a_request_that_waits(world, model, steps):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    world.auto = False
    producer.step()
    consumer.add("a", prompt(100))
    for _ in range(steps):
        consumer.step()
    consumer.abort("a")
    consumer.run()
    world.pump()
    producer.run()
    assert_clean(producer, consumer)


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_an_abort_during_a_load_keeps_the_blocks_until_its_end(world, model, policy, fails):
    consumer = Engine(model, "kv_consumer", policy=policy)
    producer = prefilled(model, prompt(100))
    producer.run()
    world.silent_loads = True
    consumer.add("a", prompt(100))
    consumer.step()
    held = consumer.baseline - consumer.free_blocks
    assert held == 7
    consumer.abort("a")
    for _ in range(3):
        consumer.step()
    assert consumer.baseline - consumer.free_blocks == held
    world.silent_loads, world.fail_loads = False, fails
    consumer.run()
    assert consumer.reports == ["a"]
    assert_clean(producer, consumer)


def test_an_abort_after_the_load(world, model):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100))
    producer.run()
    consumer.add("a", prompt(100), max_tokens=50)
    for _ in range(4):
        consumer.step()
    consumer.abort("a")
    consumer.run()
    assert consumer.reports == ["a"]
    assert_clean(producer, consumer)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_abort_at_the_producer_withdraws_the_rest(world, model, steps):
    consumer = Engine(model, "kv_consumer")
    producer = prefilled(model, prompt(100), max_tokens=40)
    for _ in range(steps):
        producer.step()
    producer.abort("p")
    producer.run()
    consumer.add("a", prompt(100))
    consumer.run()
    assert consumer.computed["a"] == 100 - steps * CHUNK
    assert_clean(producer, consumer)


@pytest.mark.parametrize("tokens", [100, 600])
def test_an_abort_while_its_step_is_in_flight(world, model, tokens):
    """Handed over, then perhaps withdrawn, then named by the step: reported, so the pins go."""
    producer, consumer = Engine(model, "kv_producer", is_async=True), Engine(model, "kv_consumer")
    producer.add("p", prompt(tokens))
    producer.launch()
    producer.abort("p")
    assert producer.baseline - producer.free_blocks == min(-(-tokens // BLOCK), 512 // BLOCK)
    producer.collect()
    producer.run()
    consumer.add("a", prompt(tokens))
    consumer.run()
    assert_clean(producer, consumer)


# ---- pins


def test_blocks_stay_pinned_until_nobody_reads_them(world, model):
    producer = prefilled(model, prompt(100))
    consumer = Engine(model, "kv_consumer")
    world.auto = False
    producer.step()
    assert "p" not in producer.scheduler.requests
    assert producer.baseline - producer.free_blocks == 7
    assert not producer.idle
    assert producer.connector.has_pending_push_work()
    # Others cannot have them: a second prompt that would need them waits.
    producer.add("big", prompt(58 * BLOCK, seed=1))
    for _ in range(3):
        producer.step()
    assert "big" not in producer.computed
    world.auto = True
    world.pump()
    producer.run()
    consumer.add("a", prompt(100))
    while "a" not in consumer.computed:
        consumer.step()
    assert_clean(producer)
    consumer.run()
    assert_clean(consumer)


def test_a_preempted_request_leaves_what_was_handed_over(world, model):
    """Preemption frees blocks that are being read; resumed, it computes into others."""
    producer = Engine(model, "kv_producer", blocks=20, max_tokens=64, caching=False)
    consumer = Engine(model, "kv_consumer")
    world.auto = False
    producer.add("p", prompt(160))
    producer.step()
    request = producer.scheduler.requests["p"]
    old = producer.scheduler.kv_cache_manager.get_block_ids("p")[0][:4]
    producer.scheduler.running.remove(request)
    producer.scheduler._preempt_request(request, time.monotonic())
    assert all(producer.pool.blocks[block].ref_cnt == 1 for block in old)
    # Whoever gets the other blocks now writes all over them.
    producer.add("other", prompt(100, seed=9))
    for _ in range(6):
        producer.step()
    world.auto = True
    world.pump()
    producer.run()
    consumer.add("a", prompt(160), max_tokens=2)
    while "a" not in consumer.computed:
        consumer.step()
    consumer.assert_kv("a", 160)
    consumer.run()
    consumer.add("b", prompt(100, seed=9))
    consumer.run()
    assert consumer.computed == {"a": 2, "b": 1}
    assert_clean(producer, consumer)


def test_preemption_waits_for_pins_that_free_blocks(world, model):
    producer = Engine(model, "kv_producer", blocks=12, caching=False)
    world.auto = False
    producer.add("p", prompt(100))
    producer.step()
    assert producer.connector.has_pending_block_frees()
    world.give_up()
    producer.run()
    assert not producer.connector.has_pending_block_frees()
    # Pins on blocks that a running request holds as well free nothing.
    producer.add("q", prompt(60), max_tokens=3)
    producer.step()
    assert producer.connector._scheduler.pinned
    assert not producer.connector.has_pending_block_frees()
    world.give_up()
    producer.run()
    assert_clean(producer)


def test_what_the_consumer_has_already_is_not_pinned(world, model):
    producer = prefilled(model, prompt(100), max_tokens=CHUNK)
    world.auto = False
    (offer_id,) = producer.ranks[0].agent.offers
    producer.ranks[0].agent.reported += [(offer_id, 1), (offer_id, 3)]
    producer.step()
    half = producer.connector._scheduler
    for _ in range(3):
        producer.step()
    assert {chunk for _, chunk in half._producer._pins} == {0, 2}
    world.give_up()
    producer.run()
    assert_clean(producer)


def test_a_forward_that_raised_completes_nothing(world, model):
    producer = prefilled(model, prompt(100))
    producer.fail_forward = True
    with pytest.raises(RuntimeError, match="the forward failed"):
        producer.step()
    assert not any(entry[0] == "end" for entry in world.log)


# ---- many


def test_many_requests_in_disorder_leave_nothing(world, model):
    extra = {"buffer_size": 4 * CHUNK * 2 * 4 * 2}
    producer = Engine(model, "kv_producer", max_tokens=96, blocks=40)
    consumer = Engine(model, "kv_consumer", max_tokens=96, blocks=40, extra=extra)
    for n in range(60):
        tokens = prompt(3 + n * 29 % 150, seed=n % 7)
        producer.add(f"p{n}", tokens, max_tokens=1 + n % 3)
        consumer.add(f"a{n}", tokens, max_tokens=1 + n % 5)
        if n % 5 == 3:
            producer.abort(f"p{n - 1}")
        if n % 7 == 2:
            consumer.abort(f"a{n - 2}")
        world.fail_loads += n % 11 == 5
        producer.step()
        consumer.step()
    for _ in range(2):
        for _ in range(40):
            producer.step()
            consumer.step()
    world.give_up()
    producer.run()
    consumer.run(400)
    assert len(consumer.reports) == len(set(consumer.reports))
    assert_clean(producer, consumer)


def test_shutdown_twice(world, model):
    consumer = Engine(model, "kv_consumer")
    for _ in range(2):
        consumer.connector.shutdown()
        consumer.ranks[0].connector.shutdown()
    assert consumer.ranks[0].agent.closed
    assert isinstance(consumer.ranks[0], Rank)
