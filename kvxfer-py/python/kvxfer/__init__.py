"""KV caches from the engine that prefilled them to the engine that decodes them.

Importing this package imports neither torch nor vLLM. vLLM's connector is `kvxfer.vllm`.
"""

from kvxfer._kvxfer import (
    Agent,
    Closed,
    ConfigError,
    Corrupt,
    IoError,
    Keys,
    Keyspace,
    KvxferError,
    Layout,
    LayoutMismatch,
    Loaded,
    NoPath,
    NotFound,
    Observer,
    OutOfBounds,
    PeerLost,
    PoolFull,
    ProtocolError,
    Timeout,
    VersionMismatch,
    __version__,
    build_info,
)

__all__ = [
    "Agent",
    "Closed",
    "ConfigError",
    "Corrupt",
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
    "PeerLost",
    "PoolFull",
    "ProtocolError",
    "Timeout",
    "VersionMismatch",
    "__version__",
    "build_info",
]
