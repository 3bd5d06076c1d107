//! One layer of one chunk as pieces: from where in the pool to where in the engine's memory.

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::{LayerMemory, Load, layer_loads};
use kvxfer_core::transport::RegionId;
use kvxfer_core::{BlockId, ErrorKind, NO_BLOCK, Result, SegmentId, sum};

use super::{Job, Part, Target};

/// Bytes of the pool that are one run of a layer.
#[derive(Clone, Copy, Debug)]
pub(in crate::agent) struct Piece {
    pub(in crate::agent) segment: SegmentId,
    /// In the segment.
    pub(in crate::agent) offset: u64,
    /// Region and offset that they are copied to. `None`: not wanted, but of the sum.
    pub(in crate::agent) into: Option<(RegionId, u64)>,
    pub(in crate::agent) len: u64,
    /// Index of the first word in the checksum.
    pub(in crate::agent) word: u64,
}

/// What is to be known of a layer beside its pieces.
#[derive(Clone, Copy, Debug)]
pub(in crate::agent) struct Planned {
    pub(in crate::agent) part: Part,
    pub(in crate::agent) seed: u64,
    /// The checksum as the producer told it.
    pub(in crate::agent) sum: u64,
    /// Bytes that are copied.
    pub(super) bytes: u64,
    /// Tokens whose blocks are copied.
    pub(super) tokens: u64,
}

/// Reused from layer to layer.
#[derive(Debug, Default)]
pub(super) struct Plan {
    loads: Vec<Load>,
    pub(super) pieces: Vec<Piece>,
}

impl Plan {
    /// The pieces of a layer: the wanted blocks, and those that are not wanted where they lie.
    pub(super) fn layer(
        &mut self,
        layout: &KvLayout,
        memory: &[LayerMemory],
        job: &Job,
        target: &Target,
        flat: u32,
    ) -> Result<Planned> {
        let none = || ErrorKind::OutOfBounds.error(format!("there is no layer {flat}"));
        let (group, layer) = layout.layer(flat).ok_or_else(none)?;
        let memory = memory.get(flat as usize).ok_or_else(none)?;
        let sum = *job.sums.get(flat as usize).ok_or_else(none)?;
        let blocks = blocks(layout, job, target, group)?;

        self.loads.clear();
        layer_loads(layout, flat, memory, &job.extents, blocks, &mut self.loads)?;
        self.pieces.clear();
        self.pieces.extend(self.loads.iter().map(|&Load { copy, word }| Piece {
            segment: copy.segment,
            offset: copy.dst,
            into: Some((copy.region, copy.src)),
            len: copy.len,
            word,
        }));
        let bytes = self.pieces.iter().map(|piece| piece.len).sum();
        let block_bytes = u64::from(layout.block_bytes(group, layer).unwrap_or(0));
        let skipped = blocks.iter().filter(|&&id| id == NO_BLOCK).count() as u64;
        if skipped > 0 {
            self.skipped(layout, job, group, layer, blocks)?;
        }
        let group_tokens = layout.groups.get(usize::from(group)).map_or(0, |g| g.block_tokens);
        let tokens = u64::from(job.tokens).saturating_sub(skipped * u64::from(group_tokens));
        let all = block_bytes * blocks.len() as u64;
        let seed = sum::seed(&job.key, layer, group, job.grant, all);
        let &Job { load, chunk, key, grant, .. } = job;
        let part = Part { load, chunk, key, grant, flat };
        Ok(Planned { part, seed, sum, bytes, tokens })
    }

    fn skipped(
        &mut self,
        layout: &KvLayout,
        job: &Job,
        group: u16,
        layer: u32,
        blocks: &[BlockId],
    ) -> Result<()> {
        let len = u64::from(layout.block_bytes(group, layer).unwrap_or(0));
        let mut at = 0;
        for extent in job.extents.iter().filter(|extent| extent.group == group) {
            let (start, _) = layout.layer_span(extent, layer).ok_or_else(|| {
                ErrorKind::OutOfBounds.error(format!("no layer {layer} in group {group}"))
            })?;
            for page in 0..u64::from(extent.pages) {
                if blocks.get(at) == Some(&NO_BLOCK) {
                    let word = at as u64 * sum::words(len);
                    let (segment, offset) = (extent.segment, start + page * len);
                    self.pieces.push(Piece { segment, offset, into: None, len, word });
                }
                at += 1;
            }
        }
        Ok(())
    }
}

/// The engine's blocks for a chunk, of one group.
fn blocks<'a>(
    layout: &KvLayout,
    job: &Job,
    target: &'a Target,
    group: u16,
) -> Result<&'a [BlockId]> {
    let per_chunk = super::chunk_blocks(layout, group.into());
    let count = layout.blocks(group, job.tokens) as usize;
    let start = job.chunk.saturating_sub(target.first_chunk) as usize * per_chunk;
    let table = target.blocks.get(usize::from(group)).map_or(&[][..], Vec::as_slice);
    table.get(start..start + count).ok_or_else(|| {
        ErrorKind::OutOfBounds.error(format!(
            "chunk {} needs blocks {start}..{} of {}",
            job.chunk,
            start + count,
            table.len()
        ))
    })
}
