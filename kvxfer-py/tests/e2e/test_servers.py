"""What kvxfer costs whole servers, of which nothing is copied here: the engine's loop, its sleep
and all its processes are vLLM's own."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from engines.harness import Config, free_port
from engines.pair import tiny_prompt, until
from engines.server import Server, servers

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NEW = 12
LOAD_TIMEOUT = 8.0
# For the answer itself, on a machine that is busy with something else.
SLACK = 8.0
# Shares of a core.
IDLE_MORE = 0.005
WAITING_MORE = 0.10
WAITING_STEPS = 250


@dataclass
class Three:
    """No connector; a prefill server that never commits; the decode server it is connected to."""

    stock: Server
    prefill: Server
    decode: Server
    refused: Server
    """A fourth, whose configuration contradicts itself."""


@pytest.fixture(scope="module")
def three(tiny: Path) -> Iterator[Three]:
    port = free_port()
    peer = {"peer_host": "127.0.0.1", "peer_port": port, "allow_insecure": True}
    extra = peer | {"buffer_size": "64MiB", "load_timeout": LOAD_TIMEOUT}
    hold = {"KVXFER_FAULT": "hold-commit"}
    configs = {
        "server-stock": Config(tiny),
        "server-prefill": Config(tiny, role="kv_producer", extra=extra, environment=hold),
        "server-decode": Config(tiny, role="kv_consumer", extra=extra),
        "server-refused": Config(tiny, role="kv_consumer", extra={"role": "producer"}),
    }
    with servers(configs) as started, ThreadPoolExecutor(3) as together:
        *up, refused = started
        list(together.map(Server.ready, up))
        three = Three(*up, refused)
        until(
            lambda: "connected to a consumer" in three.prefill.text(),
            "the prefill server has no connection to the decode server",
        )
        yield three


@dataclass
class Load:
    """What a server did in a second."""

    cpu: float
    steps: float


def loads(measured: Sequence[Server], seconds: float) -> list[Load]:
    """What servers do at the same time, so that whatever disturbs one disturbs the others."""
    began = time.monotonic()
    before = [(server.cpu_seconds(), server.steps()) for server in measured]
    # Not a wait for anything: the length of the measurement.
    time.sleep(seconds)
    after = [(server.cpu_seconds(), server.steps()) for server in measured]
    took = time.monotonic() - began
    return [
        Load((cpu - cpu_before) / took, (steps - steps_before) / took)
        for (cpu_before, steps_before), (cpu, steps) in zip(before, after, strict=True)
    ]


def assert_idle(stock: Server, others: Sequence[Server], seconds: float) -> None:
    """They cost what the stock server costs, in one of three windows: one that always costs more
    is never so lucky. They never step."""
    for _ in range(3):
        alone, *loaded = loads([stock, *others], seconds)
        told = f"without a connector {alone.cpu:.2%} of a core"
        for server, load in zip(others, loaded, strict=True):
            assert load.steps == 0, f"{server.name}: {load.steps:.1f} steps a second"
            told += f", {server.name} {load.cpu:.2%}"
        print(told)
        if all(load.cpu - alone.cpu <= IDLE_MORE for load in loaded):
            return
    raise AssertionError(told)


def assert_at_rest(*resting: Server) -> None:
    """No steps any more, from soon after the last answer on."""

    def rest() -> bool:
        return all(load.steps == 0 for load in loads(resting, 2))

    until(rest, "still stepping", 5)


def wait_in_vain(three: Three, ids: list[int], together: ThreadPoolExecutor) -> Future[list[int]]:
    """A request at the decode server whose KV is on its way, and stays so."""
    three.prefill.complete(ids, 1)
    before = three.decode.steps()
    answer = together.submit(three.decode.complete, ids, NEW)
    until(lambda: three.decode.steps() > before + 1, "the decode server does not take the request")
    return answer


def test_a_request_that_waits_for_its_kv_costs_little(three: Three) -> None:
    ids = tiny_prompt(640, seed=101)
    expected = three.stock.complete(ids, NEW)
    with ThreadPoolExecutor(1) as together:
        answer = wait_in_vain(three, ids, together)
        idle, waiting = loads([three.stock, three.decode], LOAD_TIMEOUT / 2)
        assert not answer.done(), "it did not wait all the time, so this proves nothing"
        assert answer.result(LOAD_TIMEOUT + SLACK) == expected
    print(f"{waiting.steps:.0f} steps a second, {waiting.cpu - idle.cpu:.1%} of a core over idle")
    assert 0 < waiting.steps <= WAITING_STEPS
    assert waiting.cpu - idle.cpu <= WAITING_MORE
    assert_at_rest(three.prefill, three.decode)


def test_idle_costs_nothing(three: Three) -> None:
    assert_idle(three.stock, [three.prefill, three.decode], 10)


def test_prefill_dies_and_decode_comes_to_rest(three: Three) -> None:
    ids = tiny_prompt(640, seed=102)
    expected = three.stock.complete(ids, NEW)
    with ThreadPoolExecutor(1) as together:
        answer = wait_in_vain(three, ids, together)
        three.prefill.kill()
        assert answer.result(LOAD_TIMEOUT + SLACK) == expected
    assert_at_rest(three.decode)
    assert_idle(three.stock, [three.decode], 5)


def test_a_contradicting_role_stops_the_server(three: Three) -> None:
    assert three.refused.ended() != 0
    until(lambda: not three.refused.processes(), "it left processes behind")
    text = three.refused.text()
    assert "role = 'producer' contradicts kv_role kv_consumer" in text
    assert "remove it, or set kv_role to kv_producer" in text
