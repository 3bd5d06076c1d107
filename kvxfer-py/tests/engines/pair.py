"""A prefill engine and a decode engine that kvxfer connects."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .harness import CALL_SECONDS, Config, Engine, EngineFailed, Fleet, Run, free_port

Prompts = list[list[int]]
# What a fixture gives: a pair of the tiny model by its name and the connector's configuration.
MakePair = Callable[[str, dict[str, Any]], "Pair"]


@dataclass(frozen=True)
class Through:
    """What prompts got by way of prefill engine, kvxfer and decode engine."""

    run: Run
    # vLLM's counter on the decode engine, set when a request is admitted.
    external_tokens: int
    # The consumer's own counter, of bytes it copied into the engine's blocks.
    copied_bytes: int

    @property
    def tokens(self) -> list[list[int]]:
        return [answer.tokens for answer in self.run.answers]


class Pair:
    """Two engines, each of which a test may replace."""

    def __init__(self, fleet: Fleet, reference: Engine, name: str, base: Config) -> None:
        self.fleet = fleet
        self.reference = reference
        self.name = name
        self.port = free_port()
        self._serial = 0
        peer = {"peer_host": "127.0.0.1", "peer_port": self.port, "allow_insecure": True}
        base = replace(base, extra=peer | base.extra)
        self._base_prefill = replace(base, role="kv_producer")
        self._base_decode = replace(base, role="kv_consumer")
        self._prefill: Engine | None = None
        self._decode: Engine | None = None

    # Life

    def ensure(
        self, *, prefill_fault: str = "", decode_fault: str = "", policy: str = "recompute"
    ) -> "Pair":
        """Both engines up as asked, connected and empty. What already fits is kept."""
        prefill = self._with(self._base_prefill, prefill_fault, "recompute")
        decode = self._with(self._base_decode, decode_fault, policy)
        for engine in (self._prefill, self._decode):
            if engine is not None and engine.alive:
                engine.settle()
        started = []
        if not _fits(self._prefill, prefill):
            self._prefill = self._replace(self._prefill, "prefill", prefill)
            started.append(self._prefill)
        if not _fits(self._decode, decode):
            self._decode = self._replace(self._decode, "decode", decode)
            started.append(self._decode)
        for engine in started:
            engine.ready()
        self.connected()
        self.forget()
        return self

    def end(self) -> None:
        """Ends what is up."""
        engines = [engine for engine in (self._prefill, self._decode) if engine is not None]
        for engine in engines:
            engine.ask_to_end()
        for engine in engines:
            engine.stop()

    def start_prefill(self) -> Engine:
        """The prefill engine alone, without anybody to send to."""
        self._prefill = self._replace(self._prefill, "prefill", self._base_prefill).ready()
        return self._prefill

    def start_both(self, *, decode_model: Path) -> None:
        """Both engines, with another model on the decode side; they will not connect."""
        config = replace(self._base_decode, model=decode_model)
        self._prefill = self._replace(self._prefill, "prefill", self._base_prefill)
        self._decode = self._replace(self._decode, "decode", config)
        self._prefill.ready()
        self._decode.ready()

    @property
    def prefill(self) -> Engine:
        assert self._prefill is not None, "`ensure` comes first"
        return self._prefill

    @property
    def decode(self) -> Engine:
        assert self._decode is not None, "`ensure` comes first"
        return self._decode

    def _with(self, base: Config, fault: str, policy: str) -> Config:
        environment = base.environment | ({"KVXFER_FAULT": fault} if fault else {})
        return replace(base, environment=environment, policy=policy)

    def _replace(self, before: Engine | None, side: str, config: Config) -> Engine:
        # Killed: an engine that another one takes over from seldom had the time to say goodbye.
        if before is not None:
            before.kill()
            before.stop()
        self._serial += 1
        return self.fleet.launch(f"{self.name}-{self._serial}-{side}", config)

    def connected(self) -> None:
        """Until the producer's link to the consumer is up."""
        until(
            # The engine's own observer is the other link.
            lambda: self.prefill.stats()["connector"]["links"] == 2,
            "the prefill engine has no connection to the decode engine",
        )

    # Requests

    def single(self, prompts: Prompts, max_tokens: int) -> Callable[[], list[list[int]]]:
        """What a single engine without any connector answers, one prompt at a time.

        Starts it and returns how to get it, so that prefill is computed on both at once.
        """
        # A decode engine loads all KV and computes the last prompt token alone. In bfloat16 a
        # product of one row rounds otherwise than the same row among others: of 12 prompts, 6
        # got other tokens before the 40th, with any connector. So the last token is alone here
        # too; the rows of all others are equal to the bit. In float32 nothing of this shows.
        alone = self.reference.config.dtype == "bfloat16"
        args = {"prompts": prompts, "max_tokens": max_tokens, "last_alone": alone}
        self.reference.settle()
        self.reference.start("ask_each", **args, seconds=CALL_SECONDS - 5)
        return self.reference.finish

    def single_batch(self, prompts: Prompts, max_tokens: int, like: Run) -> list[list[int]]:
        """What a single engine answers to prompts that ran together, in the very same batches.

        In bfloat16 two rows round otherwise than one, too: see `single`.
        """
        self.reference.settle()
        assert self.reference.call("reset_prefix_cache")
        run = self.reference.ask(prompts, max_tokens, batches=like.batches)
        return [answer.tokens for answer in run.answers]

    def through(self, prompts: Prompts, max_tokens: int) -> Through:
        """As a router does it: all to the prefill engine for one token, then all to decode.

        The prefill engine keeps stepping meanwhile, as a server does: with a full pool it comes
        to rest only after decode made room.
        """
        before = self.decode.stats()
        self.prefill.ask(prompts, 1)
        self.prefill.start_rest()
        run = self.decode.ask(prompts, max_tokens)
        self.decode.rest()
        self.prefill.finish()
        after = self.decode.stats()
        external = "external_kv_transfer"
        return Through(
            run=run,
            external_tokens=after["prompt_tokens"][external] - before["prompt_tokens"][external],
            copied_bytes=copied(after) - copied(before),
        )

    def forget(self) -> None:
        """Empties both local prefix caches."""
        for engine in (self.prefill, self.decode):
            assert engine.call("reset_prefix_cache"), f"{engine.name} still holds blocks"

    def block_bytes(self, tokens: int) -> int:
        """Bytes of the blocks of so many tokens."""
        stats = self.decode.baseline
        blocks = -(-tokens // stats["block_size"])
        return int(blocks * stats["block_bytes"])

    def at_rest(self) -> None:
        """Nothing is held, nothing is left, and neither engine would take another step."""
        for engine in (self.prefill, self.decode):
            assert_at_rest(engine)


def _fits(engine: Engine | None, config: Config) -> bool:
    """Whether an engine can go on as it is. One that never came up will not do so next time."""
    if engine is None or engine.config != config:
        return False
    if not engine.alive and not engine.baseline:
        raise EngineFailed(f"{engine.name} did not start before; see {engine.log.name}")
    return engine.alive


def copied(stats: dict[str, Any]) -> int:
    """Bytes the consumer copied so far."""
    return int(stats["connector"]["loaded_bytes"])


def assert_at_rest(engine: Engine) -> None:
    """An engine is where it was before its first request."""
    now = engine.stats()
    assert now["requests"] == {}, engine.name
    assert not now["awake"], f"{engine.name} would go on stepping"
    assert now["free_blocks"] == engine.baseline["free_blocks"], engine.name
    assert now["connector"]["pages_leaked"] == 0, engine.name


def until(condition: Callable[[], bool], otherwise: str, seconds: float = 30.0) -> None:
    """Polls another process's state; that process has nothing to wake us with."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {otherwise}"
        time.sleep(0.02)


def tiny_prompt(tokens: int, seed: int = 0) -> list[int]:
    """Token ids for the tiny model: any will do, so long as no two prompts share a prefix."""
    state = seed * 7919 + tokens
    ids = []
    for _ in range(tokens):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append(3 + (state >> 33) % 4000)
    return ids


def real_prompts(model: Path) -> Callable[[int, int], list[int]]:
    """Token ids of English text for a real model: (tokens, seed) to a piece of it."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    text = "\n".join(topics[name] for name in sorted(topics))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = list(tokenizer.encode(text[:400_000], add_special_tokens=False).ids)

    def prompt(tokens: int, seed: int) -> list[int]:
        start = (seed * 5003) % (len(ids) - tokens)
        return ids[start : start + tokens]

    return prompt
