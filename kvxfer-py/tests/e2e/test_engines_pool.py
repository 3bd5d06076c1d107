"""A pool that is too small, full, or full of what nobody wants: back-pressure, never a loss."""

import pytest
from engines.pair import MakePair, Pair, tiny_prompt, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# The smallest pool there is for the tiny model: 8 pages, each a block of 128 tokens.
PAGES = 8
PAGE_BYTES = 1 << 20
BLOCK = 128
NEW = 4


@pytest.fixture(scope="module")
def small_pair(make_pair: MakePair) -> Pair:
    return make_pair("pool", {"buffer_size": PAGES * PAGE_BYTES, "unclaimed_ttl": 2})


@pytest.fixture
def pair(small_pair: Pair) -> Pair:
    return small_pair.ensure()


def test_a_prompt_larger_than_the_pool_comes_in_windows(pair: Pair) -> None:
    ids = tiny_prompt(2000, seed=71)
    assert len(ids) > 1.5 * PAGES * BLOCK
    got = pair.through([ids], NEW)
    assert got.external_tokens == len(ids)
    assert got.copied_bytes == pair.block_bytes(len(ids))
    assert got.tokens == pair.single([ids], NEW)()
    pair.at_rest()


def test_eight_at_once_through_a_full_pool(pair: Pair) -> None:
    prompts = [tiny_prompt(600 + n, seed=72) for n in range(8)]
    got = pair.through(prompts, NEW)
    assert got.external_tokens == sum(map(len, prompts))
    assert got.copied_bytes == sum(pair.block_bytes(len(ids)) for ids in prompts)
    assert got.tokens == pair.single(prompts, NEW)()
    pair.at_rest()


def test_200_requests_leak_nothing(pair: Pair) -> None:
    # Three blocks each, so the pool does not even hold three requests.
    for batch in range(25):
        prompts = [tiny_prompt(3 * BLOCK, seed=1000 + 8 * batch + n) for n in range(8)]
        got = pair.through(prompts, 1)
        assert got.copied_bytes == 8 * 3 * PAGE_BYTES, f"batch {batch}"
        pair.forget()
    pair.at_rest()
    free(pair)


def test_what_nobody_claims_is_collected(pair: Pair) -> None:
    pair.prefill.one(tiny_prompt(3 * BLOCK, seed=73), 1)
    free(pair)


def free(pair: Pair) -> None:
    """All pages are free again, in time."""

    def all_free() -> bool:
        stats = pair.decode.stats()["connector"]
        return bool(stats["pages_free"] == stats["pages"] and stats["pages_leaked"] == 0)

    until(all_free, f"pages are missing: {pair.decode.stats()['connector']}")


def test_a_chunk_larger_than_the_pool_is_refused(make_pair: MakePair) -> None:
    chunk = 2 * PAGES * BLOCK
    pair = make_pair("chunk", {"buffer_size": PAGES * PAGE_BYTES, "chunk_size": chunk}).ensure()
    large, small = tiny_prompt(1500, seed=74), tiny_prompt(300, seed=75)
    got = pair.through([large], NEW)
    assert (got.external_tokens, got.copied_bytes) == (0, 0)
    assert got.tokens == pair.single([large], NEW)()
    assert pair.decode.stats()["connector"]["refused_chunks"] == 1
    # A prompt's last chunk is only as long as the prompt.
    assert pair.through([small], NEW).external_tokens == len(small)
    pair.at_rest()
    free(pair)
