"""Configuration: one table of keys, and where their values come from.

Sources, first wins: `kv_connector_extra_config`, the environment (`KVXFER_*`), the names of the
LMCache/NIXL tutorial (as extra-config keys, then as `LMCACHE_*`), the defaults. What is not
understood is an error that names the key, the value and the fix.

`python -m kvxfer.config --markdown` prints the table for the documentation.
"""

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from kvxfer._kvxfer import ConfigError

_ENV = "KVXFER_"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12} | {
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_ROLES = {
    "producer": "producer",
    "kv_producer": "producer",
    "sender": "producer",
    "consumer": "consumer",
    "kv_consumer": "consumer",
    "receiver": "consumer",
    "both": "both",
    "kv_both": "both",
}
# What the tutorial's chart puts beside its own keys. It has no meaning here and does no harm.
_IGNORED = {"discard_partial_chunks", "lmcache_rpc_port"}


def _text(value: Any) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise ValueError("is not a text")
    return str(value)


def _size(value: Any) -> int:
    """Bytes: 1073741824, "1GiB", "1.5 GB"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
    if isinstance(value, bool) or not match:
        raise ValueError('is not a size; write bytes or a unit, as in 1073741824 or "1GiB"')
    return int(float(match[1]) * _UNITS[match[2] or ""]) if match[2] else int(float(match[1]))


def _count(value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]+", str(value).strip()):
        raise ValueError("is not a whole number")
    return int(value)


def _port(value: Any) -> int:
    port = _count(value)
    if not 0 < port < 65536:
        raise ValueError("is not a port (1 to 65535)")
    return port


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError("is not a number of seconds") from None
    if isinstance(value, bool) or not 0 < seconds < 1e6:
        raise ValueError("must be more than 0 seconds")
    return seconds


def _fraction(value: Any) -> float:
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        raise ValueError("is not a number between 0 and 1") from None
    if isinstance(value, bool) or not 0 < fraction <= 1:
        raise ValueError("is not between 0 and 1")
    return fraction


def _flag(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in _TRUE | _FALSE:
        raise ValueError("is neither true nor false")
    return word in _TRUE


def _must_be_true(value: Any) -> bool:
    if not _flag(value):
        raise ValueError("contradicts the connector; remove --kv-transfer-config to turn it off")
    return True


def _list(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
        raise ValueError('is not a list; write ["host:port", …] or "host:port,host:port"')
    return tuple(p.strip() for p in parts if p.strip())


def _role(value: Any) -> str:
    if value not in _ROLES:
        raise ValueError("is not a role; write producer (sender), consumer (receiver) or both")
    return _ROLES[value]


def _choice(*names: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"is not one of {', '.join(names)}")
        return str(value)

    return parse


def _key(
    parse: Callable[[Any], Any],
    default: Any,
    help: str,  # noqa: A002
    tutorial: str = "",
    shown: str | None = None,
) -> Any:
    """A row of the table. `tutorial`: the same key's other names, extra-config ones first."""
    meta = {"parse": parse, "help": help, "tutorial": tuple(tutorial.split()), "shown": shown}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    """What the operator decided. The fields are the table."""

    role: str | None = _key(
        _role,
        None,
        "producer, consumer or both; only to be checked against `kv_role`.",
        "nixlRole nixl_role LMCACHE_NIXL_ROLE",
        "from `kv_role`",
    )
    peer_host: str = _key(
        _text,
        "127.0.0.1",
        "Where the consumer is, on both sides: it listens there, producers dial it.",
        "nixlPeerHost nixl_peer_host LMCACHE_NIXL_PEER_HOST LMCACHE_NIXL_RECEIVER_HOST",
    )
    peer_port: int = _key(
        _port,
        55555,
        "The consumer's port; rank r uses this one plus r.",
        "nixlPeerPort nixl_peer_port LMCACHE_NIXL_PEER_PORT LMCACHE_NIXL_RECEIVER_PORT",
    )
    peers: tuple[str, ...] = _key(
        _list,
        (),
        "Producer: all consumers, as `host:port` or `unix:/path`, instead of one "
        "`peer_host:peer_port`. Rank r dials port plus r.",
    )
    listen: str | None = _key(
        _text,
        None,
        "Consumer: where to listen instead of `peer_host:peer_port`.",
    )
    socket_dir: str | None = _key(
        _text,
        None,
        "Folder of the Unix sockets. It must belong to this user with mode 0700; the engines of "
        "one host must share it.",
        shown="per user",
    )
    buffer_size: int | None = _key(
        _size,
        None,
        "Consumer: bytes of the pool of each rank.",
        "nixlBufferSize nixl_buffer_size LMCACHE_NIXL_BUFFER_SIZE",
        "two prompts of `max_model_len`, at most a quarter of the memory",
    )
    segments: int = _key(
        _count,
        8,
        "Consumer: into how many equal parts the pool is cut. One producer writes to a part at a "
        "time, so take at least as many as there are producers.",
    )
    buffer_device: str | None = _key(
        _choice("cpu", "cuda"),
        None,
        "Where the pool is: where the engine keeps its KV, so cuda on a GPU and cpu otherwise. "
        "Only to be checked, as is vLLM's own `kv_buffer_device`.",
        "nixlBufferDevice nixl_buffer_device LMCACHE_NIXL_BUFFER_DEVICE",
        "where the KV is",
    )
    sharing: str = _key(
        _choice("posix_fd", "fabric", "legacy"),
        "posix_fd",
        "Consumer, on a GPU: how producers reach the pool. posix_fd: on one host. fabric: also on "
        "other hosts of one NVLink domain (MNNVL, with IMEX); between hosts it takes "
        "`allow_insecure`. legacy: on one host whose driver or container cannot share memory as "
        "file descriptors; memory that had to be replaced under a producer stays allocated until "
        "that producer's process ends.",
    )
    enable_gc: bool = _key(
        _flag,
        True,
        "Whether pages are given up by themselves; without, only explicit releases free.",
        "nixlEnableGc nixl_enable_gc LMCACHE_NIXL_ENABLE_GC",
    )
    gc_policy: str = _key(
        _choice("drop", "keep"),
        "drop",
        "drop: a chunk goes when it was loaded. keep: it stays as a prefix cache until room is "
        "needed.",
    )
    high_watermark: float = _key(_fraction, 0.9, "keep: collect when the pool is that full …")
    low_watermark: float = _key(_fraction, 0.7, "… until it is only that full.")
    unclaimed_ttl: float = _key(
        _seconds,
        60.0,
        "Seconds after which a chunk that nobody claimed goes. After 10 it gives way to a prompt "
        "that finds no room.",
    )
    chunk_size: int | None = _key(
        _count,
        None,
        "Tokens in a chunk: the unit of keys, grants and reclaim. A multiple of vLLM's block "
        "size, equal on both sides.",
        shown="256, rounded up to blocks",
    )
    load_timeout: float = _key(
        _seconds,
        30.0,
        "Consumer: seconds a request waits for KV that is on its way, from its arrival; and that "
        "the load itself may take.",
    )
    hold_timeout: float = _key(
        _seconds,
        30.0,
        "Producer: seconds that computed blocks are kept for a consumer that has no room or is "
        "away. Then they are not sent.",
    )
    lease: float = _key(_seconds, 10.0, "Seconds a grant to write lasts unless renewed.")
    realm: str = _key(
        _text,
        "",
        "Secret that keys are rooted in: only engines with the same one can name each other's KV.",
        shown="empty",
    )
    model_name: str | None = _key(
        _text,
        None,
        "The model's name for both sides, where its path differs between them.",
        shown="the model's id or path",
    )
    weight_version: str = _key(
        _text, "0", "Part of the keys: KV computed with other weights is never matched."
    )
    require_path: str | None = _key(
        _choice("local", "shm", "cuda_ipc", "ucx", "tcp"),
        None,
        "Refuse a peer rather than reach it by another path.",
        shown="the best there is",
    )
    failover: bool = _key(
        _flag,
        False,
        "Whether a peer whose path failed twice in a row may be reached by the next best one. The "
        "log says so; after a minute the better one gets another chance with the next connection.",
    )
    data_port: int = _key(
        _count,
        0,
        "Consumer: the port for the data of the tcp path; rank r uses this one plus r.",
        shown="any free one",
    )
    tcp_streams: int = _key(
        _count, 2, "Consumer: how many data connections each producer opens for the tcp path."
    )
    ucx_library: str | None = _key(
        _text,
        None,
        "The file libucp.so.0, or its folder, that the ucx path uses.",
        shown="what the process has loaded, the system's, or the wheel libucx",
    )
    ucx_devices: str | None = _key(
        _text, None, "The network devices that UCX may use (UCX_NET_DEVICES).", shown="UCX chooses"
    )
    trust_ucx_peers: bool = _key(
        _flag,
        False,
        "Also take the ucx path where it has no RDMA. Its bytes then go where the sender says: "
        "every peer is trusted with this process's memory.",
    )
    allow_insecure: bool = _key(
        _flag, False, "Accept peers over TCP without proof of who they are."
    )
    layerwise: bool = _key(
        _flag,
        True,
        "Producer: send each layer while the next ones are computed. Written out as true, it also "
        "makes vLLM use piecewise CUDA graphs, without which the hooks do not run on a GPU.",
    )
    layerwise_min_tokens: int = _key(
        _count, 512, "Steps with fewer tokens are sent when they are complete."
    )
    enable_pd: bool = _key(
        _must_be_true,
        True,
        "Accepted from the tutorial; cannot be false.",
        "enablePD LMCACHE_ENABLE_PD",
    )
    enable_nixl: bool = _key(
        _must_be_true,
        True,
        "Accepted from the tutorial; cannot be false.",
        "enableNixl LMCACHE_ENABLE_NIXL",
    )

    @classmethod
    def load(
        cls,
        kv_role: str,
        extra: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> "Config":
        """The configuration of an engine with that `kv_role`, checked."""
        extra = {} if extra is None else extra
        environ = os.environ if environ is None else environ
        _refuse_unknown(extra, environ)
        values: dict[str, Any] = {}
        for key in fields(cls):
            for source, given in _sources(key.name, key.metadata["tutorial"], extra, environ):
                try:
                    values[key.name] = key.metadata["parse"](given)
                except ValueError as error:
                    raise ConfigError(f"{source} = {given!r} {error}") from None
                if key.name == "role" and values["role"] != _ROLES[kv_role]:
                    fix = f"remove it, or set kv_role to kv_{values['role']}"
                    raise ConfigError(f"{source} = {given!r} contradicts kv_role {kv_role}; {fix}")
                break
        config = cls(**{**values, "role": _ROLES[kv_role]})
        config._check()
        return config

    def _check(self) -> None:
        if self.low_watermark >= self.high_watermark:
            raise ConfigError(
                f"low_watermark = {self.low_watermark} is not below high_watermark = "
                f"{self.high_watermark}; lower it"
            )
        for name in ("chunk_size", "buffer_size", "segments"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} = 0 holds nothing; remove it to use the default")
        for name, address in [("listen", self.listen), *(("peers", p) for p in self.peers)]:
            if address is not None:
                _for_rank(address, 0, name)

    @property
    def produces(self) -> bool:
        """Whether this engine sends."""
        return self.role != "consumer"

    @property
    def consumes(self) -> bool:
        """Whether this engine receives."""
        return self.role != "producer"

    @property
    def _peer(self) -> str:
        ipv6 = ":" in self.peer_host and not self.peer_host.startswith("[")
        host = f"[{self.peer_host}]" if ipv6 else self.peer_host
        return f"{host}:{self.peer_port}"

    def listen_at(self, rank: int) -> str | None:
        """Where a rank listens; None for a producer."""
        if not self.consumes:
            return None
        return _for_rank(self.listen or self._peer, rank, "listen")

    def peers_of(self, rank: int) -> list[str]:
        """Whom a rank dials; nobody for a consumer. With `both`, only who is listed."""
        if not self.produces:
            return []
        default = (self._peer,) if self.role == "producer" else ()
        return [_for_rank(peer, rank, "peers") for peer in self.peers or default]


def _for_rank(address: str, rank: int, name: str) -> str:
    """One setting serves all ranks of an engine: the port, or the socket's name, counts them."""
    if address.startswith("unix:/"):
        return f"{address}.{rank}" if rank else address
    host, colon, port = address.rpartition(":")
    try:
        if not (host and colon):
            raise ValueError("is neither host:port nor unix:/path")
        return f"{host}:{_port(_port(port) + rank)}"
    except ValueError as error:
        raise ConfigError(f"{name} = {address!r} (rank {rank}) {error}") from None


def _sources(
    name: str, tutorial: tuple[str, ...], extra: Mapping[str, Any], environ: Mapping[str, str]
) -> list[tuple[str, Any]]:
    """Where a key is given, with the value, best source first. An empty variable is not given."""
    env = _ENV + name.upper()
    found = [(f"kv_connector_extra_config.{name}", extra[name])] if name in extra else []
    found += [(env, environ[env])] if environ.get(env) else []
    found += [(f"kv_connector_extra_config.{n}", extra[n]) for n in tutorial if n in extra]
    return found + [(n, environ[n]) for n in tutorial if environ.get(n)]


def _refuse_unknown(extra: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    known = {key.name for key in fields(Config)} | _IGNORED
    tutorial = [n for key in fields(Config) for n in key.metadata["tutorial"]]
    known.update(n for n in tutorial if not n.startswith("LMCACHE_"))
    for name in extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            fix = f"did you mean {near[0]}?" if near else "`python -m kvxfer.config` lists the keys"
            raise ConfigError(
                f"kv_connector_extra_config has an unknown key {name} = {extra[name]!r}; {fix}"
            )
    # Other parts of kvxfer read variables of their own, so only what looks like a slip is one.
    ours = [_ENV + key.name.upper() for key in fields(Config)]
    for name, value in environ.items():
        if name.startswith(_ENV) and name not in ours:
            near = difflib.get_close_matches(name, ours, 1, 0.85)
            if near:
                raise ConfigError(f"{name} = {value!r} is unknown; did you mean {near[0]}?")


def table() -> str:
    """The keys as a Markdown table."""
    rows = ["| key | default | meaning | also accepted |", "|---|---|---|---|"]
    for key in fields(Config):
        meta = key.metadata
        default = meta["shown"] or f"`{key.default}`"
        also = ", ".join(f"`{name}`" for name in (_ENV + key.name.upper(), *meta["tutorial"]))
        rows.append(f"| `{key.name}` | {default} | {meta['help']} | {also} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--markdown"]):
        sys.exit("usage: python -m kvxfer.config [--markdown]")
    print(table())
