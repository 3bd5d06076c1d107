"""The tests here need neither engines nor the native module, nor that kvxfer is installed."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

# Before vLLM is imported anywhere.
os.environ.update(
    VLLM_TARGET_DEVICE="cpu",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)
for name in [n for n in os.environ if n.startswith(("KVXFER_", "LMCACHE_"))]:
    if name not in ("KVXFER_REQUIRE_CUDA", "KVXFER_STANDIN"):
        del os.environ[name]

try:
    import kvxfer._kvxfer  # noqa: F401
except ImportError:
    # Not built: the package comes from the tree, and the fake stands in for its native half.
    import fake

    sys.path.insert(0, str(HERE.parent / "python"))
    sys.modules["kvxfer._kvxfer"] = fake


def pytest_collection_modifyitems(items):
    """Real engines take their time; everything else has the seconds of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("e2e") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture
def world(monkeypatch):
    """A fresh world of the fake, which the connector uses instead of the native module."""
    import fake

    import kvxfer.vllm.layout
    import kvxfer.vllm.scheduler
    import kvxfer.vllm.worker

    fresh = fake.World()
    monkeypatch.setattr(fake, "world", fresh)
    monkeypatch.setattr(kvxfer.vllm.layout, "Layout", fake.Layout)
    monkeypatch.setattr(kvxfer.vllm.scheduler, "Keyspace", fake.Keyspace)
    monkeypatch.setattr(kvxfer.vllm.scheduler, "Observer", fake.Observer)
    monkeypatch.setattr(kvxfer.vllm.worker, "Agent", fake.Agent)
    return fresh


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The directory of a model that is only looked at."""
    import rig

    return rig.model_dir(tmp_path_factory.mktemp("models") / "tiny")
