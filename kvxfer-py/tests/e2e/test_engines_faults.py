"""Peers that die, commits that never come, bytes that flip: every request ends, rightly.

A fault is switched on by `KVXFER_FAULT` in the engine's environment.
"""

import signal

import pytest
from engines.harness import Engine, Run
from engines.pair import MakePair, Pair, assert_at_rest, tiny_prompt, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

LOAD_TIMEOUT = 4.0
HOLD_TIMEOUT = 4.0
# For the answer itself, on a machine that is busy with something else.
SLACK = 4.0
NEW = 12
POLICIES = ["recompute", "fail"]


@pytest.fixture(scope="module")
def pair(make_pair: MakePair) -> Pair:
    extra = {"buffer_size": "64MiB", "load_timeout": LOAD_TIMEOUT, "hold_timeout": HOLD_TIMEOUT}
    return make_pair("faults", extra)


def failed_loads(engine: Engine) -> int:
    return engine.log.read_text(errors="replace").count("Retrieved 0 out of")


def ended_by_policy(run: Run, policy: str, expected: list[int]) -> None:
    (answer,) = run.answers
    if policy == "fail":
        assert answer.finished == "error"
    else:
        assert (answer.finished, answer.tokens) == ("length", expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_byte_flipped_in_the_pool_is_caught(pair: Pair, policy: str) -> None:
    pair.ensure(decode_fault="flip-after-commit", policy=policy)
    ids = tiny_prompt(640, seed=61)
    got = pair.through([ids], NEW)
    # Once: a failed load that is tried again and again is a livelock.
    assert failed_loads(pair.decode) == 1
    pair.at_rest()
    ended_by_policy(got.run, policy, *pair.single([ids], NEW)())


@pytest.mark.parametrize("policy", POLICIES)
def test_prefill_dies_before_its_commit(pair: Pair, policy: str) -> None:
    pair.ensure(prefill_fault="hold-commit", policy=policy)
    ids = tiny_prompt(640, seed=62)
    pair.prefill.ask([ids], 1)
    # A router would not send it now; a client that goes around the router does.
    request = pair.decode.submit(ids, NEW)
    pair.prefill.kill()
    run = pair.decode.answers([request])
    assert run.seconds < LOAD_TIMEOUT + SLACK
    pair.decode.rest()
    assert_at_rest(pair.decode)

    # A new prefill engine finds its place, and the same prompt goes through.
    pair.ensure(policy=policy)
    again = pair.through([ids], NEW)
    expected = pair.single([ids], NEW)()
    assert again.tokens == expected
    assert again.external_tokens == len(ids)
    ended_by_policy(run, policy, *expected)
    pair.at_rest()


def test_waiting_for_a_commit_ends_and_costs_little(pair: Pair) -> None:
    pair.ensure(prefill_fault="hold-commit")
    ids = tiny_prompt(640, seed=63)
    pair.prefill.ask([ids], 1)
    run = pair.decode.ask([ids], NEW)
    alone = pair.decode.ask([tiny_prompt(640, seed=64)], NEW)
    assert run.seconds < LOAD_TIMEOUT + SLACK
    waited = run.seconds - alone.seconds
    assert waited > LOAD_TIMEOUT / 2, "there was nothing to wait for, so this proves nothing"
    assert (run.steps - alone.steps) / waited <= 250
    assert (run.cpu_seconds - alone.cpu_seconds) / waited <= 0.10
    pair.decode.rest()
    assert_at_rest(pair.decode)


def test_decode_dies_and_prefill_lets_go(pair: Pair) -> None:
    pair.ensure()
    # Stopped, it grants nothing and acknowledges nothing, and its connection stays open.
    pair.decode.signal(signal.SIGSTOP)
    ids = tiny_prompt(640, seed=65)
    pair.prefill.ask([ids], 1)
    assert pair.prefill.stats()["awake"], "no block is held, so this proves nothing"
    pair.decode.kill()
    pair.prefill.rest(HOLD_TIMEOUT + SLACK + 5)
    assert_at_rest(pair.prefill)

    pair.ensure()
    got = pair.through([ids], NEW)
    assert got.external_tokens == len(ids)
    assert got.tokens == pair.single([ids], NEW)()
    pair.at_rest()


def test_an_aborted_request_leaves_nothing(pair: Pair) -> None:
    pair.ensure()
    ids = tiny_prompt(640, seed=66)
    pair.prefill.ask([ids], 1)
    request = pair.decode.submit(ids, NEW)
    pair.decode.call("abort", request=request)
    pair.decode.rest()
    pair.prefill.rest()
    until(lambda: not pair.decode.stats()["requests"], "the aborted request is still there")
    pair.at_rest()
