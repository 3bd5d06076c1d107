"""Proof that the other tests can fail: equal answers are also what a local prefill gives."""

import pytest
from engines.harness import Engine
from engines.pair import Pair, tiny_prompt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# Whole blocks and one token. That one is recomputed from the rest in every case, so the engine
# that was perturbed and the one that loaded compute the same from there on.
IDS = tiny_prompt(6 * 128 + 1, seed=5)
NEW = 12
DELTA = 0.25
GARBAGE = 77.0


def test_a_perturbed_producer_gives_the_perturbed_answer(tiny_pair: Pair) -> None:
    prefill, decode = tiny_pair.prefill, tiny_pair.decode
    prefill.call("perturb", delta=DELTA)
    decode.call("fill", value=GARBAGE)
    got = tiny_pair.through([IDS], NEW)
    # From its own cache, which holds what was perturbed: all but the last token.
    perturbed = prefill.one(IDS, NEW)

    assert got.tokens == [perturbed]
    assert got.external_tokens == len(IDS)
    assert tiny_pair.single([IDS], NEW)() != [perturbed]


def test_poison_that_is_not_overwritten_shows(tiny_reference: Engine) -> None:
    # The same garbage in a cache that nothing is loaded into changes the answer.
    tiny_reference.settle()
    clean = tiny_reference.one(IDS, NEW)
    assert tiny_reference.one(IDS, NEW) == clean
    tiny_reference.call("fill", value=GARBAGE)
    assert tiny_reference.one(IDS, NEW) != clean
