"""What kvxfer costs when there is nothing to do."""

import time

import pytest
from engines.harness import Engine
from engines.pair import Pair, tiny_prompt
from engines.processes import cpu_seconds

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

WINDOW = 8.0
MORE = 0.005


def test_idle_costs_nothing(tiny_pair: Pair, tiny_reference: Engine) -> None:
    # Connected, and with a transfer behind them.
    tiny_pair.through([tiny_prompt(300, seed=91)], 4)
    tiny_pair.at_rest()
    tiny_reference.settle()
    engines = [tiny_reference, tiny_pair.prefill, tiny_pair.decode]
    before = [cpu_seconds(engine.pid) for engine in engines]
    # Not a wait for anything: the length of the measurement.
    time.sleep(WINDOW)
    alone, *both = (
        (cpu_seconds(engine.pid) - start) / WINDOW
        for engine, start in zip(engines, before, strict=True)
    )
    for engine, load in zip(engines[1:], both, strict=True):
        assert load - alone <= MORE, f"{engine.name}: {load:.2%} of a core, {alone:.2%} without"
