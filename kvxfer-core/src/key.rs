//! The content name of a chunk of tokens.

use serde::{Deserialize, Serialize};

/// A chunk's content name: a chained 256-bit hash over everything that determines its KV.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct ChunkKey(pub [u8; 32]);
