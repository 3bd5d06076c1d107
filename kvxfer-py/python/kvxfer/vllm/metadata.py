"""What the halves of the connector tell each other; all of it is pickled between processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
)

from kvxfer.vllm.layout import Geometry

NO_BLOCK = 0xFFFF_FFFF

BlockIds = tuple[bytes, ...]
"""For each KV-cache group, block ids as little-endian u32s."""

Range = tuple[int, int, BlockIds]
"""(offer, first chunk, ids of all blocks of the chunks that this step completes)"""


def pack(ids: Sequence[int]) -> bytes:
    """Block ids as the native half takes them."""
    return np.asarray(ids, dtype="<u4").tobytes()


@dataclass(frozen=True)
class Load:
    """One load, for every rank."""

    id: int
    request: str
    claim: int
    first_chunk: int
    chunks: int
    blocks: BlockIds
    tokens: int
    """Tokens that vLLM counts on: the blocks that are not NO_BLOCK hold them."""
    prompt_tokens: int
    failed: str | None = None
    """Set when it is known beforehand that there is nothing to load, and the policy is that the
    request fails: only a worker can report that."""


@dataclass(frozen=True)
class StepMetadata(KVConnectorMetadata):
    """One step, from the scheduler half to the workers."""

    ranges: tuple[Range, ...] = ()
    loads: tuple[Load, ...] = ()
    layerwise: bool = False


@dataclass(frozen=True)
class Handshake(KVConnectorHandshakeMetadata):
    """Once, from each worker to the scheduler half."""

    address: str
    geometry: Geometry = field(repr=False)
