"""What kvxfer costs when there is nothing to do."""

import time
from pathlib import Path

import pytest
from engines.harness import Engine
from engines.pair import Pair, tiny_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

WINDOW = 8.0
MORE = 0.005


def busy_seconds(engine: Engine) -> float:
    """CPU time of all threads of an engine so far."""
    threads = Path(f"/proc/{engine.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


def test_idle_costs_nothing(tiny_pair: Pair, tiny_reference: Engine) -> None:
    # Connected, and with a transfer behind them.
    tiny_pair.through([tiny_prompt(300, seed=91)], 4)
    tiny_pair.at_rest()
    tiny_reference.settle()
    engines = [tiny_reference, tiny_pair.prefill, tiny_pair.decode]
    before = [busy_seconds(engine) for engine in engines]
    # Not a wait for anything: the length of the measurement.
    time.sleep(WINDOW)
    alone, *both = (
        (busy_seconds(engine) - start) / WINDOW
        for engine, start in zip(engines, before, strict=True)
    )
    for engine, load in zip(engines[1:], both, strict=True):
        assert load - alone <= MORE, f"{engine.name}: {load:.2%} of a core, {alone:.2%} without"
