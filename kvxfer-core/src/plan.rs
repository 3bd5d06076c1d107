//! Block ids to contiguous copies, in one linear pass.
//!
//! Both directions are the same runs. A producer writes its blocks into the pages a consumer
//! granted ([`layer_writes`]); a consumer loads them from its pool into its own blocks
//! ([`layer_loads`]). One call handles one layer of one chunk. Adjacent blocks become one copy when
//! they are contiguous on both sides: consecutive ids with nothing between two blocks of the layer,
//! and consecutive places of the same extent.
//!
//! # Places and the checksum
//!
//! A chunk's block number `i` in its group lies on the `i`-th page of the chunk's extents of that
//! group, in order, and its bytes have the checksum's word indices from `i *
//! sum::words(block_bytes)` on, whether or not earlier blocks are copied at the same time. A
//! [`NO_BLOCK`] in the list leaves its place alone. A post's checksum knows nothing of such gaps:
//! it runs on from write to write. So what is posted together must be gap-free, with a seed of
//! [`crate::sum::seed_at`] the word of its first block; [`parts`] finds the gap-free ranges.
//!
//! Invariants: what comes out of a call that succeeds lies within `memory.blocks` blocks of the
//! region and within the extents' pages; in the order of the blocks; without overlap if the extents
//! have none. Extents may come from a peer; that they lie inside their segment is for the transport
//! to check.

use std::ops::Range;

use crate::layout::KvLayout;
use crate::pool::Extent;
use crate::transport::{RegionId, Write};
use crate::{BlockId, Error, ErrorKind, NO_BLOCK, SegmentId, sum};

/// Where an engine keeps one layer: block `b` lies at `base + b * stride`, for the layer's `block_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerMemory {
    /// The registered memory.
    pub region: RegionId,
    /// Offset of block 0 in the region, in bytes.
    pub base: u64,
    /// From one block to the next, in bytes. More than the layer's bytes per block when other
    /// layers lie between.
    pub stride: u64,
    /// How many blocks the engine has.
    pub blocks: u32,
}

/// Blocks of one layer that are contiguous in the engine's memory and in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one's number in the chunk (in the layer's group).
    pub block: u32,
    /// The first one's number in the engine.
    pub id: BlockId,
    /// How many, at least one.
    pub blocks: u32,
    /// The pool's segment.
    pub segment: SegmentId,
    /// Offset in the segment, in bytes.
    pub offset: u64,
}

/// A copy from the consumer's pool into its engine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// The two places, named as for a producer's write: the bytes come *from* `segment` and `dst`, and go
    /// *to* `region` and `src`.
    pub copy: Write,
    /// Index of the copy's first word in the checksum of the chunk's layer; see [`crate::sum::Sum::at`].
    pub word: u64,
}

/// Appends to `out` the writes that move one layer of a chunk from the engine into granted extents.
///
/// `layer` is flat. `extents` are all of the chunk's; those of other groups are passed over.
/// `blocks` are the engine's numbers of the chunk's blocks in the layer's group, in order; it may
/// be shorter than the extents. Allocates only if `out` has to grow.
///
/// # Errors
/// [`ErrorKind::OutOfBounds`]: no such layer, more blocks than pages, an id that the engine does
/// not have, memory that overlaps itself or ends past 2^64. `out` is as before.
pub fn layer_writes(
    layout: &KvLayout,
    layer: u32,
    memory: &LayerMemory,
    extents: &[Extent],
    blocks: &[BlockId],
    out: &mut Vec<Write>,
) -> Result<(), Error> {
    collect(runs(layout, layer, memory, extents, blocks)?, out, |copy, _| copy)
}

/// Appends to `out` the loads that move one layer of a chunk from the pool into the engine's blocks.
///
/// Parameters and errors as for [`layer_writes`].
///
/// # Errors
/// See there.
pub fn layer_loads(
    layout: &KvLayout,
    layer: u32,
    memory: &LayerMemory,
    extents: &[Extent],
    blocks: &[BlockId],
    out: &mut Vec<Load>,
) -> Result<(), Error> {
    collect(runs(layout, layer, memory, extents, blocks)?, out, |copy, word| Load { copy, word })
}

fn collect<T>(
    runs: Runs<'_>,
    out: &mut Vec<T>,
    item: impl Fn(Write, u64) -> T,
) -> Result<(), Error> {
    let before = out.len();
    let (memory, bytes) = (*runs.memory, runs.bytes);
    for run in runs {
        match run {
            Ok(run) => out.push(item(run.write(&memory, bytes), run.word(bytes))),
            Err(error) => {
                out.truncate(before);
                return Err(error);
            }
        }
    }
    Ok(())
}

impl Run {
    /// The run as a copy; `bytes` is what one block of the layer takes.
    fn write(&self, memory: &LayerMemory, bytes: u64) -> Write {
        Write {
            region: memory.region,
            src: memory.base + u64::from(self.id) * memory.stride,
            segment: self.segment,
            dst: self.offset,
            len: u64::from(self.blocks) * bytes,
        }
    }

    /// Index of its first word in the checksum of the chunk's layer, where a block of the layer
    /// takes `bytes`.
    pub fn word(&self, bytes: u64) -> u64 {
        u64::from(self.block) * sum::words(bytes)
    }
}

/// The gap-free ranges of a list of blocks, in order: what lies between [`NO_BLOCK`]s.
pub fn parts(blocks: &[BlockId]) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next + blocks[next..].iter().position(|&id| id != NO_BLOCK)?;
        let rest = &blocks[start..];
        next = start + rest.iter().position(|&id| id == NO_BLOCK).unwrap_or(rest.len());
        Some(start..next)
    })
}

/// The runs of one layer of a chunk. Parameters as for [`layer_writes`].
///
/// # Errors
/// As for [`layer_writes`], except that ids are checked as the iterator reaches them; it ends after
/// an `Err`.
pub fn runs<'a>(
    layout: &KvLayout,
    layer: u32,
    memory: &'a LayerMemory,
    extents: &'a [Extent],
    blocks: &'a [BlockId],
) -> Result<Runs<'a>, Error> {
    let bad = |about: String| ErrorKind::OutOfBounds.error(about);
    let place = layout.layer(layer).and_then(|(group, layer)| {
        Some((group, layout.block_bytes(group, layer)?, layout.layer_offset(group, layer)?))
    });
    let Some((group, bytes, layer_offset)) = place else {
        return Err(bad(format!("layer {layer} of a layout of {} layers", layout.layers())));
    };
    let (bytes, stride) = (u64::from(bytes), memory.stride);
    if stride < bytes {
        return Err(bad(format!("layer {layer}: blocks of {bytes} bytes every {stride} bytes")));
    }
    let end =
        u64::from(memory.blocks).checked_mul(stride).and_then(|all| all.checked_add(memory.base));
    if end.is_none() {
        let LayerMemory { base, blocks, .. } = memory;
        return Err(bad(format!(
            "layer {layer}: {blocks} blocks, {stride} bytes apart, from {base} on"
        )));
    }
    let pages = extents.iter().filter(|extent| extent.group == group);
    let pages: u64 = pages.map(|extent| u64::from(extent.pages)).sum();
    if blocks.len() as u64 > pages {
        return Err(bad(format!(
            "layer {layer}: {} blocks for {pages} granted pages",
            blocks.len()
        )));
    }
    let page_bytes = layout.page_bytes();
    Ok(Runs { memory, group, bytes, layer_offset, page_bytes, extents, page: 0, blocks, block: 0 })
}

/// Iterator of [`runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    memory: &'a LayerMemory,
    group: u16,
    /// Of one block of the layer.
    bytes: u64,
    /// Bytes of one block of the group's earlier layers.
    layer_offset: u64,
    page_bytes: u64,
    /// From the current one on, of all groups.
    extents: &'a [Extent],
    /// In the current extent.
    page: u64,
    /// From the current one on.
    blocks: &'a [BlockId],
    /// Number of the current block.
    block: u32,
}

impl Runs<'_> {
    fn check(&self, id: BlockId) -> Result<BlockId, Error> {
        if id < self.memory.blocks {
            return Ok(id);
        }
        let about = format!("block {id}, the engine has {}", self.memory.blocks);
        Err(ErrorKind::OutOfBounds.error(about))
    }

    /// Passes `count` blocks of the current extent.
    fn advance(&mut self, count: usize) {
        self.blocks = &self.blocks[count..];
        self.block += count as u32;
        self.page += count as u64;
    }
}

impl Iterator for Runs<'_> {
    type Item = Result<Run, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let &first = self.blocks.first()?;
            let (&extent, later) = self.extents.split_first()?;
            let room = u64::from(extent.pages) - self.page;
            if extent.group != self.group || room == 0 {
                (self.extents, self.page) = (later, 0);
                continue;
            }
            if first == NO_BLOCK {
                self.advance(1);
                continue;
            }
            let id = match self.check(first) {
                Ok(id) => id,
                Err(error) => {
                    self.blocks = &[];
                    return Some(Err(error));
                }
            };
            // Ids are below `memory.blocks`, so none of a run reaches NO_BLOCK.
            let joins = self.memory.stride == self.bytes;
            let most = if joins { room.min(u64::from(self.memory.blocks - id)) } else { 1 };
            let ids = self.blocks.iter().zip(u64::from(id)..);
            let count =
                ids.take(most as usize).take_while(|&(&id, next)| u64::from(id) == next).count();
            let base = u64::from(extent.page) * self.page_bytes;
            let layer = u64::from(extent.pages) * self.layer_offset;
            let run = Run {
                block: self.block,
                id,
                blocks: count as u32,
                segment: extent.segment,
                offset: base + layer + self.page * self.bytes,
            };
            self.advance(count);
            return Some(Ok(run));
        }
    }
}
