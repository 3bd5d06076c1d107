"""Engines shared by as many tests as possible: a start costs more than most tests."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engines.harness import TREE, Config, Engine, Fleet, fleet
from engines.models import tiny_model
from engines.pair import MakePair, Pair


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny random model."""
    return tiny_model(TREE / "target" / "models")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M, which env/setup made."""
    return Path(Path(sys.prefix, "made-from").read_text().strip(), "smollm2-135m")


@pytest.fixture(scope="session")
def engines() -> Iterator[Fleet]:
    with fleet() as all_of_them:
        yield all_of_them


@pytest.fixture(scope="session")
def tiny_reference(engines: Fleet, tiny: Path) -> Engine:
    """The tiny model without a connector."""
    return engines.launch("tiny-reference", Config(tiny)).ready()


@pytest.fixture(scope="module")
def make_pair(engines: Fleet, tiny: Path, tiny_reference: Engine) -> Iterator[MakePair]:
    """Makes pairs of the tiny model that end with the module; `ensure` starts them."""
    pairs = []

    def make(name: str, extra: dict[str, Any]) -> Pair:
        pairs.append(Pair(engines, tiny_reference, name, Config(tiny, extra=extra)))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.end()


@pytest.fixture(scope="session")
def shared_pair(engines: Fleet, tiny: Path, tiny_reference: Engine) -> Pair:
    config = Config(tiny, extra={"buffer_size": "64MiB"})
    return Pair(engines, tiny_reference, "tiny", config)


@pytest.fixture
def tiny_pair(shared_pair: Pair) -> Pair:
    """The tiny model in float32, both engines up and empty."""
    return shared_pair.ensure()
