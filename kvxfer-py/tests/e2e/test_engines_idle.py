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
    # What an engine still does once after a request, and what others do to the machine, only adds;
    # what polls is in each window.
    windows = []
    for _ in range(3):
        alone, *both = loads(engines)
        windows.append(
            [
                f"{engine.name}: {load:.2%} of a core, {alone:.2%} without"
                for engine, load in zip(engines[1:], both, strict=True)
                if load - alone > MORE
            ]
        )
        if not windows[-1]:
            return
    raise AssertionError(windows)


def loads(engines: list[Engine]) -> list[float]:
    """The share of a core that each of them takes, all over the same time."""
    before = [cpu_seconds(engine.pid) for engine in engines]
    # Not a wait for anything: the length of the measurement.
    time.sleep(WINDOW)
    return [
        (cpu_seconds(engine.pid) - start) / WINDOW
        for engine, start in zip(engines, before, strict=True)
    ]
