"""The native half of kvxfer.

Every call that may block or lock releases the GIL. Every class that owns a thread has an
idempotent `close()`. Errors are subclasses of `KvxferError`.
"""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import final

from typing_extensions import Self

__all__ = [
    "Agent",
    "Closed",
    "ConfigError",
    "Corrupt",
    "DeviceError",
    "IoError",
    "Keys",
    "Keyspace",
    "KvxferError",
    "Layout",
    "LayoutMismatch",
    "Loaded",
    "NoPath",
    "NotFound",
    "Observer",
    "OutOfBounds",
    "Path",
    "PeerLost",
    "PoolFull",
    "ProtocolError",
    "Timeout",
    "VersionMismatch",
    "__version__",
    "build_info",
    "cli",
]

__version__: str

def build_info() -> dict[str, object]:
    """Version, build profile, and which transports and drivers this build and machine have."""

def cli(argv: Sequence[str]) -> int:
    """Runs the command line `kvxfer`, without the program's name; its output goes to the process's
    own, past `sys.stdout`. Answers the exit code."""

@final
class Layout:
    """The geometry of one rank's KV: what two sides must agree on. Frozen."""

    def __new__(
        cls,
        *,
        model: str,
        dtype: str,
        chunk_tokens: int,
        groups: Sequence[tuple[int, Sequence[int]]],
        shard: tuple[int, int] = ...,
        tags: Mapping[str, str] = ...,
    ) -> Self:
        """`groups`: for each KV-cache group, the tokens in a block and the bytes of a block in
        each of its layers, in execution order. "Flat layer" numbers count them through."""
    @property
    def page_bytes(self) -> int:
        """Bytes of a page: one block of every layer of the largest group."""
    @property
    def fingerprint(self) -> str:
        """Hash over everything but the shard."""
    @property
    def chunk_tokens(self) -> int:
        """Tokens in a chunk."""

@final
class Keys:
    """The content names of a prompt's chunks, in order; `len()` counts chunks."""

    def __len__(self) -> int: ...
    @property
    def tokens(self) -> int:
        """Tokens in all chunks together. Only the last chunk may be short."""

@final
class Keyspace:
    """Turns tokens into keys."""

    def __new__(cls, layout: Layout, realm: bytes | None = None) -> Self: ...
    def chain(self, tokens: bytes, extras: Sequence[bytes] | None = None) -> Keys:
        """`tokens`: little-endian u32s. `extras`: for each chunk whatever else determines its KV
        (adapter, images, salt)."""

@final
class Loaded:
    """How a load ended. Frozen."""

    @property
    def load(self) -> int: ...
    @property
    def error(self) -> str | None:
        """Why it failed, or None. After a failure the target blocks hold anything."""
    @property
    def bytes(self) -> int:
        """Bytes copied into the engine's blocks."""
    @property
    def tokens(self) -> int:
        """Tokens in the blocks that were copied into."""
    @property
    def seconds(self) -> float:
        """From `Agent.load` to the end."""
    @property
    def path(self) -> str:
        """How the bytes came to this host's pool: "shm", "tcp", …"""

@final
class Path:
    """How bytes go between an agent and a peer, and why not in a better way. Frozen."""

    @property
    def peer(self) -> str:
        """What the peer calls itself."""
    @property
    def to_peer(self) -> bool:
        """Whether the peer is the side that takes the bytes."""
    @property
    def name(self) -> str:
        """ "shm", "tcp", …"""
    @property
    def lanes(self) -> str | None:
        """Which of its ways the path takes, where it has several: "NVLink"."""
    @property
    def refused(self) -> list[tuple[str, str]]:
        """Each better path, and why it was not taken."""
    @property
    def gbps(self) -> float | None:
        """GB/s of the first bytes that went this way, if nothing else did at the time."""

@final
class Agent:
    """One engine rank's memory, peers and transfers; one progress thread inside."""

    def __new__(
        cls,
        *,
        role: str,
        layout: Layout,
        name: str = ...,
        listen: str | None = None,
        peers: Sequence[str] = ...,
        socket_dir: str | None = None,
        buffer_size: int = ...,
        segments: int = 8,
        gc: bool = True,
        gc_policy: str = "drop",
        high_watermark: float = 0.9,
        low_watermark: float = 0.7,
        unclaimed_ttl: float = 60.0,
        load_timeout: float = 30.0,
        hold_timeout: float = 30.0,
        lease: float = 10.0,
        allow_insecure: bool = False,
        require_path: str | None = None,
        failover: bool = False,
        data_port: int = 0,
        tcp_streams: int = 2,
        ucx_library: str | os.PathLike[str] | None = None,
        ucx_wheel: str | os.PathLike[str] | None = None,
        ucx_devices: str | None = None,
        trust_ucx_peers: bool = False,
        memory: str = "host",
        sharing: str = "posix_fd",
    ) -> Self:
        """`role`: "producer", "consumer" or "both". `listen` and `peers`: "host:port" or
        "unix:/path". `gc_policy`: "drop" (after retrieve) or "keep". `memory`: where the
        engine's KV is, and so the pool: "host", or "cuda:N". `sharing`: how a pool on a GPU is
        shared, "posix_fd", "fabric" or "legacy". Times are seconds.

        With `memory` on a GPU, addresses are the GPU's, and `layer_ready`, `end_step` and `load`
        need the handle of the `stream` that the engine computes on (`torch.cuda.Stream`'s
        `cuda_stream`; it has to live during the call): what is queued there by then is done
        before its blocks are read or written. The calls wait for nothing. While the stream is
        captured into a graph they are refused."""
    @property
    def address(self) -> str:
        """The Unix address at which observers of this engine connect."""
    @property
    def addresses(self) -> list[str]:
        """Everywhere it listens."""
    def register(self, layers: Sequence[tuple[int, int, int]]) -> None:
        """The engine's KV memory, one entry per flat layer: the address of block 0, the number
        of blocks, and the bytes between the starts of two blocks. It has to stay until `close`
        has returned."""
    def begin_step(self, ranges: Sequence[tuple[int, int, Sequence[bytes]]]) -> None:
        """What this step completes: (offer, first chunk, for each group the little-endian u32
        ids of all blocks of these chunks, 0xFFFFFFFF where there is none).

        The offer may still be on its way from the observer. A chunk that is not wanted, or was
        withdrawn meanwhile, is not read, and is reported as pushed like any other."""
    def layer_ready(self, layer: int, stream: int | None = None) -> None:
        """That flat layer of this step's ranges may be read. An optimisation: may be skipped."""
    def end_step(self, stream: int | None = None) -> None:
        """All layers of this step's ranges may be read, until they are reported as pushed."""
    def reads_done(self, stream: int) -> None:
        """For engines that write to blocks again before they are reported as pushed: what comes
        into the stream from now on runs after all reads that have begun, and those that have not
        are given up, with their chunks."""
    def load(
        self,
        load: int,
        claim: int,
        first_chunk: int,
        chunks: int,
        blocks: Sequence[bytes],
        stream: int | None = None,
    ) -> None:
        """Copies claimed chunks into the engine's blocks, those still on their way as they come.

        `blocks`: for each group the ids of all blocks of these chunks, 0xFFFFFFFF where nothing
        is to be loaded. Once it returned, `poll` reports the load exactly once, within
        `load_timeout`; when it raised, never."""
    def poll(self) -> list[Loaded]:
        """The loads that ended since the last call. Nothing is written to their blocks any more."""
    def wait(self, seconds: float) -> bool:
        """Blocks until `poll` has something to tell; False when time was up."""
    def wait_connected(self, seconds: float) -> bool:
        """Blocks until all `peers` are connected; False when time was up. What a producer offers
        before then goes to those that are."""
    def paths(self) -> list[Path]:
        """How bytes go between this agent and each connected peer."""
    def stats(self) -> dict[str, int | float | str]: ...
    def close(self) -> None:
        """Ends the thread. When it returns, no engine memory is read or written any more; when it
        raises, some may be."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None: ...

@final
class Observer:
    """What an engine's scheduler half sees and says, over all ranks of its engine; one thread."""

    def __new__(cls, addresses: Sequence[str], name: str) -> Self:
        """`addresses`: `Agent.address` of every rank."""
    def offer(self, request: str, keys: Keys) -> int:
        """Announces chunks that this engine is going to compute."""
    def withdraw(self, offer: int) -> None:
        """The chunks that no `begin_step` named yet will not come."""
    def claim(self, request: str, keys: Keys, timeout: float) -> int:
        """Pins chunks on all ranks, now or as they come; those on their way for `timeout`."""
    def status(self, claim: int) -> tuple[int, int, str]:
        """Over all ranks: how many leading chunks are ready (pinned), how many are ready or
        coming, and what holds up the first that is not ready: "done", "asking", "writing",
        "stalled" (loading what is ready makes room), "missing", "lost", "no-producer", or
        "waiting" (not all ranks answered yet). Local, does not block."""
    def settled(self, claim: int, seconds: float) -> tuple[int, int, str] | None:
        """Blocks until all of the claim is ready, or stalled or lost, and returns its status then
        or when time is up; None if some rank has not answered even then. What nobody has offered
        yet is waited for as well."""
    def release(self, claim: int, keep_from: int = 0, keep_to: int = 0) -> None:
        """Unpins all but the chunks [keep_from, keep_to). Releasing what is gone does nothing."""
    def pushed(self) -> list[tuple[int, list[int]]]:
        """(offer, chunks) that no rank reads any more, each once, whatever became of them. A rank
        whose agent is gone reads nothing."""
    def wait(self, seconds: float) -> bool:
        """Blocks until a claim's status changed or a chunk was pushed, since the last wait;
        False when time was up."""
    def close(self) -> None: ...

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
class DeviceError(KvxferError): ...
