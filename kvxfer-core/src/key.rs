//! The content name of a chunk of tokens.
//!
//! Two chunks have one name exactly when their KV is interchangeable: the same tokens after the
//! same prefix, under the same model and geometry ([`KvLayout::fingerprint`]), with the same extras
//! (LoRA, images, cache salt), among holders of the same realm secret. Names are computed by each
//! side alone; they are compared, never taken apart.
//!
//! # Definition, version 1
//!
//! `H` is BLAKE3 in keyed mode, with the key derived from the realm secret. Numbers are little-endian.
//!
//! ```text
//! root  = H(0x00, version u16, fingerprint [32])
//! key_i = H(0x01, parent [32], tokens u32, token u32 …, extra bytes u64, extra …)
//! parent of key_0 = root, parent of key_i = key_(i-1)
//! ```
//!
//! The first byte keeps the two uses apart; every part is of fixed length or follows its length, so two
//! different inputs are never the same bytes. A prompt's last chunk is named over exactly the tokens
//! it has: its key is not a key of the full chunk.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::layout::KvLayout;
use crate::wire::message::Chunk;

/// Version of the definition of keys, negotiated in the hello.
pub const KEY_VERSION: u16 = 1;

/// BLAKE3's context for the key of `H`; changes with the version.
const CONTEXT: &str = "kvxfer chunk keys, version 1";

/// A chunk's content name: a chained 256-bit hash over everything that determines its KV.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChunkKey(pub [u8; 32]);

impl fmt::Display for ChunkKey {
    /// The first eight bytes in hex: enough to tell keys apart in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Names chunks for one realm and layout. Holds what the realm secret turns into: whoever has that can
/// compute names, so it is not printed.
#[derive(Clone)]
pub struct Keyspace {
    secret: [u8; 32],
    root: [u8; 32],
    chunk_tokens: u32,
}

impl fmt::Debug for Keyspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyspace").field("chunk_tokens", &self.chunk_tokens).finish_non_exhaustive()
    }
}

impl Keyspace {
    /// The names of that realm (any bytes; empty is a realm too, everybody's) under a layout that
    /// [`KvLayout::validate`] accepts. The shard does not matter: all ranks of a model share their names.
    pub fn new(realm: &[u8], layout: &KvLayout) -> Self {
        let secret = blake3::derive_key(CONTEXT, realm);
        let mut hash = blake3::Hasher::new_keyed(&secret);
        hash.update(&[0]).update(&KEY_VERSION.to_le_bytes()).update(&layout.fingerprint());
        Self { secret, root: hash.finalize().into(), chunk_tokens: layout.chunk_tokens }
    }

    /// The chunks of a prompt, in order; none for an empty one. The last may be partial.
    ///
    /// `extras[i]` is whatever else determines the KV from chunk `i` on, in bytes that both sides
    /// build alike; nothing where it is empty or the list ends. What lies past the last chunk has
    /// no tokens to belong to and is not used.
    pub fn chain(&self, tokens: &[u32], extras: &[&[u8]]) -> Vec<Chunk> {
        // At least 1, so that a layout nobody validated does not panic here.
        let chunks = tokens.chunks(self.chunk_tokens.max(1) as usize);
        let mut parent = self.root;
        let mut bytes = Vec::new();
        let extras = extras.iter().copied().chain(std::iter::repeat(&[][..]));
        chunks
            .zip(extras)
            .map(|(tokens, extra)| {
                bytes.clear();
                bytes.push(1);
                bytes.extend_from_slice(&parent);
                // A chunk has at most `chunk_tokens` tokens, a u32.
                let count = tokens.len() as u32;
                bytes.extend_from_slice(&count.to_le_bytes());
                bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
                bytes.extend_from_slice(&(extra.len() as u64).to_le_bytes());
                bytes.extend_from_slice(extra);
                parent = blake3::keyed_hash(&self.secret, &bytes).into();
                Chunk { key: ChunkKey(parent), tokens: count }
            })
            .collect()
    }
}
