"""The documents say what the code does: they are compared with what they were made from."""

import textwrap
from pathlib import Path

import pytest

from kvxfer import config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def shown(source: Path) -> str:
    """What an example says the README shows of it."""
    lines = source.read_text().splitlines()
    start = next(at for at, line in enumerate(lines) if "README: from here on." in line)
    end = next(at for at, line in enumerate(lines) if "README: to here." in line)
    return textwrap.dedent("\n".join(lines[start + 1 : end])).strip()


@pytest.mark.parametrize("source", ["examples/examples/hello.rs", "examples/python/hello.py"])
def test_the_readme_shows_the_examples_that_run(source: str) -> None:
    assert shown(ROOT / source) in README, f"copy the marked part of {source} into README.md"


def test_the_table_of_settings_is_the_one_of_the_code() -> None:
    table = (ROOT / "docs" / "configuration.md").read_text()
    assert config.table() in table, (
        "write the output of `python -m kvxfer.config --markdown` into docs/configuration.md"
    )


def test_every_relative_link_of_the_readme_leads_somewhere() -> None:
    targets = [part.split(")")[0] for part in README.split("](")[1:]]
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
