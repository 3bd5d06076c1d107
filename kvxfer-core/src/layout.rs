//! The geometry of one rank's KV cache.
//!
//! # Pages and extents
//!
//! A page has room for one block of every layer of one group, whichever the group:
//! [`KvLayout::page_bytes`]. Inside an extent of `n` pages the bytes lie `[layer][block]`, so one
//! layer of a run of blocks is one contiguous range. With `base = page * page_bytes`, layer `l` of
//! the group starts at
//!
//! ```text
//! base + n · (block_bytes[0] + … + block_bytes[l-1])          block j: + j · block_bytes[l]
//! ```
//!
//! and what the group leaves of `n * page_bytes` stays unused, at the end.
//!
//! # Numbers of layers
//!
//! A layer is either (group, layer in the group) or *flat*: counted through all groups in order. Sums
//! and hooks use the flat number.
//!
//! Invariant: everything but [`KvLayout::validate`], [`KvLayout::compatible_with`] and
//! [`KvLayout::fingerprint`] is for a layout that `validate` accepts. A peer's layout is compared,
//! never computed with.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};

use crate::pool::Extent;
use crate::{Error, ErrorKind};

/// Most groups in a layout.
pub const MAX_GROUPS: usize = 64;
/// Most layers in a layout, over all groups.
pub const MAX_LAYERS: usize = 4096;
/// Most tags in a layout.
pub const MAX_TAGS: usize = 64;
/// Longest string in a layout or a message, in bytes.
pub const MAX_STRING: usize = 1024;
/// Largest page, in bytes: `(2^32 + 2^16) * MAX_PAGE_BYTES < 2^63`, so no extent's address overflows.
pub const MAX_PAGE_BYTES: u64 = 1 << 30;

/// What [`KvLayout::page_bytes`] is a multiple of, in bytes: a cache line.
const PAGE_ALIGN: u64 = 64;

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
    /// Bytes of one block of each layer, in execution order. Multiples of 8.
    pub block_bytes: Vec<u32>,
}

impl Group {
    /// Bytes of one block of all layers.
    fn bytes(&self) -> u64 {
        self.block_bytes.iter().map(|&bytes| u64::from(bytes)).sum()
    }
}

impl KvLayout {
    /// The layout of an engine that is not sharded and whose layers share one block table; without tags.
    pub fn one_group(model: &str, dtype: &str, chunk_tokens: u32, group: Group) -> Self {
        Self {
            model: model.into(),
            dtype: dtype.into(),
            chunk_tokens,
            shard: (0, 1),
            groups: vec![group],
            tags: BTreeMap::new(),
        }
    }

    /// Checks that the layout makes sense and stays within the caps of this module.
    ///
    /// Block sizes have to be multiples of 8 bytes, so that a checksum ([`crate::sum`]) does not
    /// depend on which blocks happened to be adjacent.
    ///
    /// # Errors
    /// [`ErrorKind::Config`], naming the field and its value.
    pub fn validate(&self) -> Result<(), Error> {
        let bad = |about: String| Err(ErrorKind::Config.error(about));
        let strings = [&self.model, &self.dtype];
        for text in
            strings.into_iter().chain(self.tags.iter().flat_map(|(name, value)| [name, value]))
        {
            if text.len() > MAX_STRING {
                return bad(format!(
                    "layout: a string of {} bytes, at most {MAX_STRING} allowed",
                    text.len()
                ));
            }
        }
        if self.tags.len() > MAX_TAGS {
            return bad(format!("layout: {} tags, at most {MAX_TAGS} allowed", self.tags.len()));
        }
        let (rank, ranks) = self.shard;
        if rank >= ranks {
            return bad(format!("layout: shard {rank} of {ranks}, counted from 0"));
        }
        if self.groups.is_empty() || self.groups.len() > MAX_GROUPS {
            return bad(format!("layout: {} groups, 1 to {MAX_GROUPS} allowed", self.groups.len()));
        }
        let layers: usize = self.groups.iter().map(|group| group.block_bytes.len()).sum();
        if layers > MAX_LAYERS {
            return bad(format!("layout: {layers} layers, at most {MAX_LAYERS} allowed"));
        }
        for (g, group) in self.groups.iter().enumerate() {
            let tokens = group.block_tokens;
            if tokens == 0 || self.chunk_tokens == 0 || !self.chunk_tokens.is_multiple_of(tokens) {
                let chunk = self.chunk_tokens;
                return Err(ErrorKind::Config
                    .error(format!(
                        "layout: a chunk of {chunk} tokens in blocks of {tokens} (group {g})"
                    ))
                    .fix("set chunk_tokens to a multiple of the block size of each group"));
            }
            if group.block_bytes.is_empty() {
                return bad(format!("layout: group {g} has no layers"));
            }
            for (layer, &bytes) in group.block_bytes.iter().enumerate() {
                if bytes == 0 || bytes % 8 != 0 {
                    return bad(format!(
                        "layout: a block of layer {layer} of group {g} is {bytes} bytes, not a multiple of 8"
                    ));
                }
            }
            if group.bytes() > MAX_PAGE_BYTES {
                let bytes = group.bytes();
                return bad(format!(
                    "layout: a page of {bytes} bytes (group {g}), at most {MAX_PAGE_BYTES} allowed"
                ));
            }
        }
        Ok(())
    }

    /// Bytes of a page: the largest group's, over its layers, rounded up to 64.
    pub fn page_bytes(&self) -> u64 {
        self.groups.iter().map(Group::bytes).max().unwrap_or(0).next_multiple_of(PAGE_ALIGN)
    }

    /// Layers over all groups.
    pub fn layers(&self) -> u32 {
        self.groups.iter().map(|group| group.block_bytes.len() as u32).sum()
    }

    /// (group, layer in the group) of a flat layer; `None` when there are not that many.
    pub fn layer(&self, flat: u32) -> Option<(u16, u32)> {
        let mut layer = flat;
        for (g, group) in self.groups.iter().enumerate() {
            let layers = group.block_bytes.len() as u32;
            if layer < layers {
                return Some((g as u16, layer));
            }
            layer -= layers;
        }
        None
    }

    /// The flat number of a group's layer; `None` when there is no such.
    pub fn flat_layer(&self, group: u16, layer: u32) -> Option<u32> {
        self.block_bytes(group, layer)?;
        let before = &self.groups[..usize::from(group)];
        Some(before.iter().map(|group| group.block_bytes.len() as u32).sum::<u32>() + layer)
    }

    /// Bytes of one block of that layer; `None` when there is no such.
    pub fn block_bytes(&self, group: u16, layer: u32) -> Option<u32> {
        self.groups.get(usize::from(group))?.block_bytes.get(layer as usize).copied()
    }

    /// Bytes of one block of all earlier layers of that group; `None` when there is no such layer.
    pub fn layer_offset(&self, group: u16, layer: u32) -> Option<u64> {
        let sizes = &self.groups.get(usize::from(group))?.block_bytes;
        let earlier = sizes.get(..layer as usize).filter(|earlier| earlier.len() < sizes.len())?;
        Some(earlier.iter().map(|&bytes| u64::from(bytes)).sum())
    }

    /// Where one layer of an extent lies in its segment: (offset, length) in bytes, for all of the
    /// extent's blocks. `None` when the layout has no such group or layer.
    pub fn layer_span(&self, extent: &Extent, layer: u32) -> Option<(u64, u64)> {
        let pages = u64::from(extent.pages);
        let base = u64::from(extent.page) * self.page_bytes();
        let start = base + pages * self.layer_offset(extent.group, layer)?;
        Some((start, pages * u64::from(self.block_bytes(extent.group, layer)?)))
    }

    /// Blocks, and so pages, that a group needs for that many tokens: rounded up. 0 for a group
    /// that there is not.
    pub fn blocks(&self, group: u16, tokens: u32) -> u32 {
        self.groups.get(usize::from(group)).map_or(0, |group| tokens.div_ceil(group.block_tokens))
    }

    /// What a chunk of that many tokens takes: (group, pages) for each group.
    pub fn chunk_pieces(&self, tokens: u32) -> impl Iterator<Item = (u16, u32)> + '_ {
        (0..self.groups.len() as u16).map(move |group| (group, self.blocks(group, tokens)))
    }

    /// Chunks of a prompt, the last one perhaps partial.
    pub fn chunk_count(&self, total_tokens: u32) -> u32 {
        total_tokens.div_ceil(self.chunk_tokens)
    }

    /// Tokens in chunk `i` of a prompt; 0 past its end.
    pub fn chunk_tokens_at(&self, total_tokens: u32, i: u32) -> u32 {
        let before = u64::from(i) * u64::from(self.chunk_tokens);
        let rest = u64::from(total_tokens).saturating_sub(before);
        rest.min(u64::from(self.chunk_tokens)) as u32
    }

    /// A BLAKE3 hash of everything but the shard: what determines whether two ranks' bytes could
    /// mean the same. Every string and list is preceded by its length as a u64, numbers are
    /// little-endian: model, dtype, chunk_tokens, groups (block_tokens, block_bytes), tags (name,
    /// value; sorted).
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new_derive_key("kvxfer layout fingerprint, version 1");
        let length = |hash: &mut blake3::Hasher, items: usize| {
            hash.update(&(items as u64).to_le_bytes());
        };
        let text = |hash: &mut blake3::Hasher, text: &str| {
            length(hash, text.len());
            hash.update(text.as_bytes());
        };
        text(&mut hash, &self.model);
        text(&mut hash, &self.dtype);
        hash.update(&self.chunk_tokens.to_le_bytes());
        hash.update(&(self.groups.len() as u64).to_le_bytes());
        for group in &self.groups {
            hash.update(&group.block_tokens.to_le_bytes());
            hash.update(&(group.block_bytes.len() as u64).to_le_bytes());
            for bytes in &group.block_bytes {
                hash.update(&bytes.to_le_bytes());
            }
        }
        hash.update(&(self.tags.len() as u64).to_le_bytes());
        for (name, value) in &self.tags {
            text(&mut hash, name);
            text(&mut hash, value);
        }
        hash.finalize().into()
    }

    /// Whether a consumer of this layout can use the bytes of a producer of that one as they are: both name the
    /// same shard of the same model and have equal geometry.
    ///
    /// # Errors
    /// [`ErrorKind::LayoutMismatch`], naming the first field that differs, both values, and the fix. It reads the
    /// same on both sides.
    pub fn compatible_with(&self, producer: &Self) -> Result<(), Error> {
        let model = "serve one model, revision and weight_version; if only its path differs, set \
                     model_name on both sides";
        let engines = "start both engines with the same model, release and settings";
        same("model", &self.model, &producer.model, model)?;
        same("dtype", &self.dtype, &producer.dtype, engines)?;
        let ((rank, ranks), (their_rank, their_ranks)) = (self.shard, producer.shard);
        let tensor_parallel =
            "give both sides one tensor-parallel size; unlike sizes are not supported";
        same("shards of the model", &ranks, &their_ranks, tensor_parallel)?;
        same("rank", &rank, &their_rank, "connect the ranks of equal number")?;
        let chunk = "set chunk_size to the same on both sides";
        same("chunk_tokens", &self.chunk_tokens, &producer.chunk_tokens, chunk)?;
        let groups = "number of KV-cache groups";
        same(groups, &self.groups.len(), &producer.groups.len(), engines)?;
        for (g, (ours, theirs)) in self.groups.iter().zip(&producer.groups).enumerate() {
            let field = format!("tokens per block of group {g}");
            let block = "start both engines with the same block size";
            same(&field, &ours.block_tokens, &theirs.block_tokens, block)?;
            let (sizes, their_sizes) = (&ours.block_bytes, &theirs.block_bytes);
            same(&format!("layers of group {g}"), &sizes.len(), &their_sizes.len(), engines)?;
            for (layer, (ours, theirs)) in sizes.iter().zip(their_sizes).enumerate() {
                let field = format!("bytes per block of layer {layer} of group {g}");
                same(&field, ours, theirs, engines)?;
            }
        }
        for name in self.tags.keys().chain(producer.tags.keys()) {
            let (ours, theirs) = (self.tags.get(name), producer.tags.get(name));
            if ours != theirs {
                let text = |value: Option<&String>| value.map_or("none".into(), brief);
                return Err(differ(&brief(name), &text(ours), &text(theirs), engines));
            }
        }
        Ok(())
    }
}

fn same<T: PartialEq + Debug>(field: &str, ours: &T, theirs: &T, fix: &str) -> Result<(), Error> {
    match ours == theirs {
        true => Ok(()),
        false => Err(differ(field, &brief(ours), &brief(theirs), fix)),
    }
}

fn differ(field: &str, ours: &str, theirs: &str, fix: &str) -> Error {
    ErrorKind::LayoutMismatch
        .error(format!("{field}: the consumer has {ours}, the producer {theirs}"))
        .fix(fix)
}

/// A value as an error names it: escaped, for a peer chose it, and short enough that three of them
/// fit into the reason of a [`crate::wire::Message::Bye`].
fn brief(value: impl Debug) -> String {
    let text = format!("{value:?}");
    match text.char_indices().nth(140) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
