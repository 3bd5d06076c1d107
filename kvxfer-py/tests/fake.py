"""A stand-in for kvxfer's native half: one process, no threads, nothing happens by itself.

It has the same contract (`_kvxfer.pyi`) and really copies bytes: a push reads the producer's
blocks when `World.pump` runs, not when they are handed over, so that a block that was given to
somebody else meanwhile shows.
"""

import ctypes
import hashlib
import itertools
import struct
from dataclasses import dataclass, field

__version__ = "0.0.0"
NO_BLOCK = 0xFFFF_FFFF


try:
    # The real ones, where the native module is built: the package catches those.
    from kvxfer._kvxfer import (
        Closed,
        ConfigError,
        Corrupt,
        IoError,
        KvxferError,
        LayoutMismatch,
        NoPath,
        NotFound,
        OutOfBounds,
        PeerLost,
        PoolFull,
        ProtocolError,
        Timeout,
        VersionMismatch,
    )
except ImportError:

    class KvxferError(Exception): ...

    class ConfigError(KvxferError, ValueError): ...

    class LayoutMismatch(KvxferError): ...

    class VersionMismatch(KvxferError): ...

    class ProtocolError(KvxferError): ...

    class PeerLost(KvxferError): ...

    class Timeout(KvxferError): ...

    class PoolFull(KvxferError): ...

    class Corrupt(KvxferError): ...

    class NoPath(KvxferError): ...

    class OutOfBounds(KvxferError): ...

    class NotFound(KvxferError): ...

    class Closed(KvxferError): ...

    class IoError(KvxferError): ...


def build_info():
    return {"version": __version__}


class Layout:
    def __init__(self, *, model, dtype, chunk_tokens, groups, shard=(0, 1), tags=None):
        self.chunk_tokens, self.groups, self.shard = chunk_tokens, groups, shard
        self.page_bytes = max(sum(layers) for _, layers in groups)
        text = repr((model, dtype, chunk_tokens, groups, sorted((tags or {}).items())))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()


class Keys:
    def __init__(self, names, tokens, chunk_tokens):
        self.names, self.tokens, self.chunk_tokens = names, tokens, chunk_tokens

    def __len__(self):
        return len(self.names)

    def tokens_of(self, chunk):
        return min(self.chunk_tokens, self.tokens - chunk * self.chunk_tokens)


class Keyspace:
    def __init__(self, layout, realm=b""):
        self.root = hashlib.sha256(realm + layout.fingerprint.encode()).digest()
        self.chunk_tokens = layout.chunk_tokens

    def chain(self, tokens, extras=None):
        size, names, name = 4 * self.chunk_tokens, [], self.root
        for n, start in enumerate(range(0, len(tokens), size)):
            extra = extras[n] if extras else b""
            part = tokens[start : start + size]
            name = hashlib.sha256(name + struct.pack("<I", len(extra)) + extra + part).digest()
            names.append(name)
        return Keys(names, len(tokens) // 4, self.chunk_tokens)


@dataclass(frozen=True)
class Loaded:
    load: int
    error: str | None
    bytes: int = 0
    tokens: int = 0
    seconds: float = 0.001
    path: str = "fake"


@dataclass
class Offer:
    keys: Keys
    unnamed: set
    handed: dict = field(default_factory=dict)  # chunk -> ids per group; readable after end_step
    withdrawn: bool = False


@dataclass
class Claim:
    keys: Keys
    keep: range
    pinned: set = field(default_factory=set)
    load: "Load | None" = None


@dataclass
class Load:
    id: int
    claim: int
    chunks: list
    blocks: tuple
    first: int
    copied: int = 0
    tokens: int = 0


class World:
    """All agents and observers of a test, and what goes wrong between them."""

    def __init__(self):
        self.agents = {}
        self.connected = True
        self.fail_loads = 0
        self.silent_loads = False
        self.answers = True  # whether consumers answer claims
        self.auto = True  # whether pushes happen by themselves at the end of a step
        self.lost = False  # whether offers that did not arrive count as lost
        self.waits = []
        self.log = []
        self.ids = itertools.count(1)

    def consumers(self):
        return [a for a in self.agents.values() if a.role != "producer" and not a.closed]

    def producers(self):
        return [a for a in self.agents.values() if a.role != "consumer" and not a.closed]

    def pump(self):
        """Everything that can happen, happens."""
        moved = True
        while moved:
            moved = False
            for agent in self.producers():
                moved |= agent.push()
            for agent in self.consumers():
                moved |= agent.progress()

    def give_up(self):
        """The producers' hold timeout has passed."""
        for producer in self.producers():
            for offer_id, offer in producer.offers.items():
                for chunk in list(offer.handed):
                    producer.done(offer_id, chunk)


world = World()


class Agent:
    def __init__(self, *, role, layout, name, buffer_size, **config):
        self.role, self.layout, self.name, self.config = role, layout, name, config
        self.rank = layout.shard[0]
        chunk = sum(layout.chunk_tokens // t * sum(b) for t, b in layout.groups)
        self.capacity = buffer_size // chunk
        self.address = f"/fake/{next(world.ids)}"
        self.layers, self.offers, self.step, self.reported = [], {}, [], []
        self.store, self.claims, self.ended, self.lost = {}, {}, [], set()
        self.early = []
        self.closed = False
        world.agents[self.address] = self

    # ---- memory

    def register(self, layers):
        self.layers = layers

    def _spots(self, ids_per_group, chunk_blocks):
        """(address, bytes) of every layer of every block of some chunk."""
        flat = 0
        for (_, sizes), ids, (start, end) in zip(
            self.layout.groups, ids_per_group, chunk_blocks, strict=True
        ):
            for n, size in enumerate(sizes):
                base, blocks, stride = self.layers[flat + n]
                for block in ids[start:end]:
                    assert block == NO_BLOCK or block < blocks
                    yield (None if block == NO_BLOCK else base + block * stride), size
            flat += len(sizes)

    # ---- producer

    def begin_step(self, ranges):
        assert not self.step
        per = self.layout.chunk_tokens
        for offer_id, first, packed in ranges:
            ids = [struct.unpack(f"<{len(p) // 4}I", p) for p in packed]
            offer = self.offers[offer_id]
            tokens = len(ids[0]) * self.layout.groups[0][0]
            chunks = -(-tokens // per)
            for n in range(chunks):
                chunk = first + n
                left = offer.keys.tokens_of(chunk)
                spans = [(n * per // t, n * per // t - (-left // t)) for t, _ in self.layout.groups]
                assert all(e <= len(i) for (_, e), i in zip(spans, ids, strict=True))
                if chunk not in offer.unnamed:
                    raise AssertionError(f"chunk {chunk} of offer {offer_id} was named twice")
                offer.unnamed.discard(chunk)
                self.step.append((offer_id, chunk, ids, spans))
        world.log.append(("begin", self.rank, len(self.step)))

    def layer_ready(self, layer, stream):
        """Looks at what it was told is ready: tests compare it with what is pushed."""
        assert self.step
        for _, _, ids, spans in self.step:
            self.early.append((layer, ids, spans))
        world.log.append(("layer", self.rank, layer))

    def end_step(self, stream):
        for offer_id, chunk, ids, spans in self.step:
            offer = self.offers[offer_id]
            offer.handed[chunk] = (ids, spans)
            if offer.withdrawn:
                self.done(offer_id, chunk)
        self.step = []
        world.log.append(("end", self.rank))
        if world.auto:
            world.pump()

    def push(self):
        moved = False
        for offer_id, offer in self.offers.items():
            for chunk in sorted(offer.handed):
                takers = [c for c in world.consumers() if c.rank == self.rank and c is not self]
                if not world.connected or not takers:
                    continue
                ids, spans = offer.handed[chunk]
                if all(c.take(offer.keys, chunk, self, ids, spans) for c in takers):
                    self.done(offer_id, chunk)
                    moved = True
        return moved

    def done(self, offer_id, chunk):
        self.offers[offer_id].handed.pop(chunk, None)
        self.reported.append((offer_id, chunk))

    # ---- consumer

    def take(self, keys, chunk, producer, ids, spans):
        name = keys.names[chunk]
        if name in self.store:
            return True
        if len(self.store) >= self.capacity:
            return False
        spots = producer._spots(ids, spans)
        self.store[name] = [ctypes.string_at(address, size) for address, size in spots]
        return True

    def coming(self, name):
        for producer in world.producers():
            for offer in producer.offers.values():
                if producer is not self and producer.rank == self.rank and world.connected:
                    unnamed = set() if offer.withdrawn else offer.unnamed
                    for chunk in unnamed | set(offer.handed):
                        if offer.keys.names[chunk] == name:
                            return True
        return False

    def refresh(self, claim):
        for chunk in claim.keep:
            if claim.keys.names[chunk] in self.store:
                claim.pinned.add(chunk)

    def status(self, claim_id):
        claim = self.claims.get(claim_id)
        if claim is None or not world.answers:
            return 0, 0, "waiting"
        self.refresh(claim)
        names = claim.keys.names
        ready = next((n for n in range(len(names)) if names[n] not in self.store), len(names))
        coming = ready
        while coming < len(names) and (names[coming] in self.store or self.coming(names[coming])):
            coming += 1
        if ready == len(names):
            return ready, coming, "done"
        if world.lost:
            return ready, ready, "lost"
        if coming > ready:
            full = len(self.store) >= self.capacity
            return ready, coming, "stalled" if full else "writing"
        return ready, coming, "missing" if world.connected else "no-producer"

    def load(self, load, claim, first_chunk, chunks, blocks, stream):
        if self.closed:
            raise Closed("the agent is closed")
        ids = [struct.unpack(f"<{len(b) // 4}I", b) for b in blocks]
        wanted = list(range(first_chunk, first_chunk + chunks))
        self.claims[claim].load = Load(load, claim, wanted, ids, first_chunk)

    def progress(self):
        moved = False
        for claim in list(self.claims.values()):
            load = claim.load
            if load is None or world.silent_loads:
                continue
            self.refresh(claim)
            while load.chunks and load.chunks[0] in claim.pinned:
                self._copy(claim, load, load.chunks.pop(0))
                moved = True
            if not load.chunks:
                claim.load = None
                error = None
                if world.fail_loads:
                    world.fail_loads -= 1
                    error = "the checksum differs"
                self.ended.append(Loaded(load.id, error, load.copied, load.tokens))
                moved = True
        return moved

    def _copy(self, claim, load, chunk):
        per, n = self.layout.chunk_tokens, chunk - load.first
        left = claim.keys.tokens_of(chunk)
        spans = [(n * per // t, n * per // t - (-left // t)) for t, _ in self.layout.groups]
        data = self.store[claim.keys.names[chunk]]
        for (address, size), content in zip(self._spots(load.blocks, spans), data, strict=True):
            if address is not None:
                assert len(content) == size
                ctypes.memmove(address, content, size)
                load.copied += size
        block_tokens, (start, end) = self.layout.groups[0][0], spans[0]
        load.tokens += left - block_tokens * load.blocks[0][start:end].count(NO_BLOCK)
        self.unpin(claim, chunk)

    def unpin(self, claim, chunk):
        claim.pinned.discard(chunk)
        name = claim.keys.names[chunk]
        for other in self.claims.values():
            if any(other.keys.names[c] == name for c in other.pinned):
                return
        if self.config["gc_policy"] == "drop":
            self.store.pop(name, None)

    def release(self, claim_id, keep):
        claim = self.claims.get(claim_id)
        if claim is None:
            return
        for chunk in [c for c in claim.pinned if c not in keep]:
            self.unpin(claim, chunk)
        claim.keep = keep
        if not keep:
            assert claim.load is None or self.closed, "a claim was released under its load"
            del self.claims[claim_id]
        if world.auto:
            world.pump()

    def poll(self):
        if world.auto:
            world.pump()
        ended, self.ended = self.ended, []
        return ended

    def stats(self):
        return {"pages_used": len(self.store)}

    def close(self):
        self.closed = True


class Observer:
    def __init__(self, addresses, name):
        self.agents = [world.agents[address] for address in addresses]
        self.open = {}
        self.closed = False

    def offer(self, request, keys):
        offer_id = next(world.ids)
        for agent in self.agents:
            agent.offers[offer_id] = Offer(keys, set(range(len(keys))))
        return offer_id

    def withdraw(self, offer_id):
        for agent in self.agents:
            agent.offers[offer_id].withdrawn = True

    def claim(self, request, keys, timeout):
        claim_id = next(world.ids)
        for agent in self.agents:
            agent.claims[claim_id] = Claim(keys, range(len(keys)))
        world.log.append(("claim", request))
        return claim_id

    def status(self, claim_id):
        told = [agent.status(claim_id) for agent in self.agents]
        if any(state == "waiting" for _, _, state in told):
            return 0, 0, "waiting"
        ready, coming = (min(t[n] for t in told) for n in (0, 1))
        return ready, coming, min(told)[2]

    def release(self, claim_id, keep_from=0, keep_to=0):
        for agent in self.agents:
            agent.release(claim_id, range(keep_from, keep_to))

    def pushed(self):
        for agent in self.agents:
            for entry in agent.reported:
                self.open.setdefault(entry, set()).add(agent.rank)
            agent.reported = []
        done = [e for e, ranks in self.open.items() if len(ranks) == len(self.agents)]
        for entry in done:
            del self.open[entry]
        return [(offer, [chunk]) for offer, chunk in done]

    def wait(self, seconds):
        world.waits.append(seconds)
        return False

    def close(self):
        self.closed = True
