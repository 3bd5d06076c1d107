//! The geometry of one rank's KV cache.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Geometry of one rank's KV: what two sides must agree on before a byte moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLayout {
    /// Model id, revision and weight version, in one string each side builds alike.
    pub model: String,
    /// Element type of the cache: "bfloat16", "float32", "fp8_e4m3", …
    pub dtype: String,
    /// Tokens in a chunk; a multiple of every group's `block_tokens`.
    pub chunk_tokens: u32,
    /// Which shard of the model this rank holds: (rank, of how many).
    pub shard: (u32, u32),
    /// The KV-cache groups. The same block number means different memory in different groups.
    pub groups: Vec<Group>,
    /// Anything else that must be equal, by name: "attention backend", "cache layout", …
    pub tags: BTreeMap<String, String>,
}

/// Layers that share one block table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Tokens in one block.
    pub block_tokens: u32,
    /// Bytes of one block of each layer, in execution order.
    pub block_bytes: Vec<u32>,
}
