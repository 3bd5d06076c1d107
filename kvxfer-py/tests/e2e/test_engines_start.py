"""Engines that start alone, beside the wrong model, or with a mistake in their configuration."""

import socket
from pathlib import Path

import pytest
from engines.harness import Config, Engine, Fleet, free_port
from engines.models import tiny_model
from engines.pair import MakePair, Pair, assert_at_rest, tiny_prompt, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

NEW = 4


EXTRA = {"buffer_size": "32MiB", "hold_timeout": 3, "load_timeout": 3}


def test_the_peer_is_not_there_yet(make_pair: MakePair) -> None:
    pair = make_pair("start", EXTRA)
    prefill = pair.start_prefill()
    ids = tiny_prompt(300, seed=81)
    expected = prefill.one(ids, NEW)
    assert_at_rest(prefill)
    pair.ensure()
    got = pair.through([ids], NEW)
    assert got.external_tokens == len(ids)
    assert got.tokens == [expected]
    pair.at_rest()


def test_another_model_on_the_other_side(make_pair: MakePair, tiny: Path) -> None:
    pair = make_pair("models", EXTRA)
    other = tiny_model(tiny.parent, seed=1)
    pair.start_both(decode_model=other)
    ids = tiny_prompt(300, seed=82)
    # Both serve on their own, each its own model, and say why they do not talk.
    pair.prefill.one(ids, NEW)
    before = pair.decode.stats()["prompt_tokens"]
    first = pair.decode.one(ids, NEW)
    after = pair.decode.stats()["prompt_tokens"]
    assert after["external_kv_transfer"] == before["external_kv_transfer"]
    assert after["local_compute"] - before["local_compute"] == len(ids)
    assert len(first) == NEW
    logs = [engine.log for engine in (pair.prefill, pair.decode)]
    until(
        lambda: all("model: the consumer has" in log.read_text(errors="replace") for log in logs),
        "not both logs name the field that differs",
    )
    pair.at_rest()


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: kvxfer\r\n\r\n",
        bytes(range(256)) * 256,
        b"\xff" * 64,
        b"",
    ],
    ids=["http", "garbage", "huge lengths", "nothing"],
)
def test_noise_on_the_control_port(tiny_pair: Pair, noise: bytes) -> None:
    with socket.create_connection(("127.0.0.1", tiny_pair.port), timeout=10) as stranger:
        try:
            stranger.sendall(noise)
            if not noise:
                stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
        except ConnectionError:
            # Closed with a reset, as what was sent is still unread.
            pass
    ids = tiny_prompt(300, seed=len(noise))
    got = tiny_pair.through([ids], NEW)
    assert got.external_tokens == len(ids)
    assert got.tokens == tiny_pair.single([ids], NEW)()
    tiny_pair.at_rest()


MISTAKES = {
    "unknown key": (
        {"bufer_size": "1GiB"},
        "unknown key bufer_size = '1GiB'; did you mean buffer_size?",
    ),
    "unparsable size": (
        {"buffer_size": "1 Gigglebyte"},
        "buffer_size = '1 Gigglebyte' is not a size; write bytes or a unit, as in 1073741824",
    ),
    "contradicting role": (
        {"role": "producer"},
        "role = 'producer' contradicts kv_role kv_consumer; remove it, or set kv_role to "
        "kv_producer",
    ),
}


@pytest.fixture(scope="module")
def mistaken(engines: Fleet, tiny: Path) -> dict[str, Engine]:
    """Engines with a mistake each, which start side by side."""

    def launch(mistake: str, extra: dict[str, str]) -> Engine:
        config = Config(tiny, role="kv_consumer", extra=extra | {"peer_port": free_port()})
        return engines.launch(f"start-{mistake.replace(' ', '-')}", config)

    return {mistake: launch(mistake, extra) for mistake, (extra, _) in MISTAKES.items()}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_configuration_stops_the_start(
    mistaken: dict[str, Engine], mistake: str
) -> None:
    _, error_and_fix = MISTAKES[mistake]
    assert error_and_fix in mistaken[mistake].refused()
