//! The consumer's bytes: pool to engine, verified on the way.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::{Load, layer_loads};
use kvxfer_core::pool::Extent;
use kvxfer_core::session::{Copied, LoadRequest};
use kvxfer_core::{BlockId, ChunkKey, Error, ErrorKind, GrantId, LoadId, NO_BLOCK, Result, sum};

use super::Loaded;
use super::register::Registered;
use crate::copy::{Drain, Stores, copy_summed, sum_of};
use crate::memory::HostPool;

/// A chunk to copy, as the state machine ordered it.
pub(super) struct Job {
    pub(super) load: LoadId,
    pub(super) chunk: u32,
    pub(super) key: ChunkKey,
    pub(super) grant: GrantId,
    pub(super) tokens: u32,
    pub(super) extents: Arc<[Extent]>,
    pub(super) sums: Arc<[u64]>,
}

struct Target {
    first_chunk: u32,
    /// Bytes that it loads in all.
    wanted: u64,
    blocks: Vec<Vec<BlockId>>,
    started: Instant,
    bytes: u64,
    tokens: u64,
}

/// The loads under way.
pub(super) struct Loads {
    layout: KvLayout,
    registered: Registered,
    targets: HashMap<LoadId, Target>,
    jobs: VecDeque<Job>,
    plan: Vec<Load>,
    pub(super) bytes: u64,
}

impl Loads {
    pub(super) fn new(layout: KvLayout, registered: Registered) -> Self {
        Self {
            layout,
            registered,
            targets: HashMap::new(),
            jobs: VecDeque::new(),
            plan: Vec::new(),
            bytes: 0,
        }
    }

    /// Takes a load's blocks.
    ///
    /// # Errors
    /// `OutOfBounds`: they are not the blocks of that many chunks.
    pub(super) fn begin(&mut self, request: &LoadRequest, blocks: Vec<Vec<BlockId>>) -> Result<()> {
        let groups = self.layout.groups.len();
        let chunks = request.chunks as usize;
        for (group, ids) in blocks.iter().enumerate() {
            let most = chunks * self.chunk_blocks(group);
            let least = chunks.saturating_sub(1) * self.chunk_blocks(group);
            if ids.len() > most || ids.len() < least {
                return Err(ErrorKind::OutOfBounds.error(format!(
                    "load {}: {} blocks of group {group} for {chunks} chunks",
                    request.load,
                    ids.len()
                )));
            }
        }
        if blocks.len() != groups {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "load {}: block tables of {} groups, there are {groups}",
                request.load,
                blocks.len()
            )));
        }
        let wanted = blocks.iter().flatten().filter(|&&id| id != NO_BLOCK).count() as u64;
        let target = Target {
            first_chunk: request.first_chunk,
            wanted: self.layout.page_bytes() * wanted,
            blocks,
            started: Instant::now(),
            bytes: 0,
            tokens: 0,
        };
        self.targets.insert(request.load, target);
        Ok(())
    }

    fn chunk_blocks(&self, group: usize) -> usize {
        (self.layout.chunk_tokens / self.layout.groups[group].block_tokens) as usize
    }

    pub(super) fn enqueue(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Copies one chunk.
    pub(super) fn progress(&mut self, pool: &HostPool) -> Option<Copied> {
        let job = self.jobs.pop_front()?;
        let (load, chunk) = (job.load, job.chunk);
        let result = self.copy(pool, &job);
        Some(Copied { load, chunk, result })
    }

    fn copy(&mut self, pool: &HostPool, job: &Job) -> Result<()> {
        let mut target = self
            .targets
            .remove(&job.load)
            .ok_or_else(|| ErrorKind::NotFound.error(format!("load {} is unknown", job.load)))?;
        let copied = self.copy_into(pool, job, &target);
        if let Ok((bytes, tokens)) = copied {
            target.bytes += bytes;
            target.tokens += tokens;
            self.bytes += bytes;
        }
        self.targets.insert(job.load, target);
        copied.map(|_| ())
    }

    fn copy_into(&mut self, pool: &HostPool, job: &Job, target: &Target) -> Result<(u64, u64)> {
        let mut bytes = 0;
        let mut tokens = u64::MAX;
        for flat in 0..self.layout.layers() {
            let (group, _) = self.place(flat)?;
            let per_chunk = self.chunk_blocks(group.into());
            let count = self.layout.blocks(group, job.tokens) as usize;
            let start = (job.chunk - target.first_chunk) as usize * per_chunk;
            let table = &target.blocks[usize::from(group)];
            let blocks = table.get(start..start + count).ok_or_else(|| {
                ErrorKind::OutOfBounds.error(format!(
                    "chunk {} needs blocks {start}..{} of {}",
                    job.chunk,
                    start + count,
                    table.len()
                ))
            })?;
            let (copied, value) = self.copy_layer(pool, job, target, flat, blocks)?;
            bytes += copied;
            if value != job.sums[flat as usize] {
                return Err(ErrorKind::Corrupt.error(format!(
                    "chunk {} of load {} (key {}, grant {}): layer {flat} is not what was sent",
                    job.chunk, job.load, job.key, job.grant
                )));
            }
            let block_tokens = u64::from(self.layout.groups[usize::from(group)].block_tokens);
            let skipped = blocks.iter().filter(|&&id| id == NO_BLOCK).count() as u64;
            tokens = tokens.min(u64::from(job.tokens).saturating_sub(skipped * block_tokens));
        }
        Ok((bytes, tokens))
    }

    fn place(&self, flat: u32) -> Result<(u16, u32)> {
        let none = || ErrorKind::OutOfBounds.error(format!("there is no layer {flat}"));
        self.layout.layer(flat).ok_or_else(none)
    }

    /// Copies the wanted blocks of one layer, and sums all of them: those that are not wanted, where they lie.
    fn copy_layer(
        &mut self,
        pool: &HostPool,
        job: &Job,
        target: &Target,
        flat: u32,
        blocks: &[BlockId],
    ) -> Result<(u64, u64)> {
        let (group, layer) = self.place(flat)?;
        let memory = &self.registered.layers[flat as usize];
        self.plan.clear();
        layer_loads(&self.layout, flat, memory, &job.extents, blocks, &mut self.plan)?;
        let block_bytes = u64::from(self.layout.block_bytes(group, layer).unwrap_or(0));
        let seed = sum::seed(&job.key, layer, group, job.grant, block_bytes * blocks.len() as u64);
        let (mut bytes, mut value) = (0, 0u64);
        // Gone before anybody is told that the blocks are filled.
        let drain = Drain::new();
        let stores = Stores::for_load(target.wanted, &drain);
        for Load { copy, word } in &self.plan {
            let src = pool.segment(copy.segment)?.at(copy.dst, copy.len)?;
            let dst = self.registered.regions.at(copy.region, copy.src, copy.len)?;
            // SAFETY: `at` checked both ranges; the engine gave these blocks to this load alone, so the pool
            // and they do not overlap and nobody else writes to them.
            let part = unsafe { copy_summed(dst, src, copy.len as usize, seed, *word, stores) };
            value = value.wrapping_add(part);
            bytes += copy.len;
        }
        if blocks.contains(&NO_BLOCK) {
            value = value.wrapping_add(self.sum_skipped(pool, job, group, layer, blocks, seed)?);
        }
        Ok((bytes, value))
    }

    fn sum_skipped(
        &self,
        pool: &HostPool,
        job: &Job,
        group: u16,
        layer: u32,
        blocks: &[BlockId],
        seed: u64,
    ) -> Result<u64> {
        let block_bytes = u64::from(self.layout.block_bytes(group, layer).unwrap_or(0));
        let mut value = 0u64;
        let mut at = 0;
        for extent in job.extents.iter().filter(|extent| extent.group == group) {
            let (offset, _) = self.layout.layer_span(extent, layer).ok_or_else(|| {
                ErrorKind::OutOfBounds.error(format!("no layer {layer} in group {group}"))
            })?;
            for page in 0..u64::from(extent.pages) {
                if blocks.get(at) == Some(&NO_BLOCK) {
                    let src = pool
                        .segment(extent.segment)?
                        .at(offset + page * block_bytes, block_bytes)?;
                    let word = at as u64 * sum::words(block_bytes);
                    // SAFETY: `at` checked the range.
                    value = value
                        .wrapping_add(unsafe { sum_of(src, block_bytes as usize, seed, word) });
                }
                at += 1;
            }
        }
        Ok(value)
    }

    /// A load ended: what is to be said of it.
    pub(super) fn end(&mut self, load: LoadId, result: Result<()>, path: &str) -> Loaded {
        let target = self.targets.remove(&load);
        let (bytes, tokens, seconds) = target.map_or((0, 0, 0.0), |target| {
            (target.bytes, target.tokens, target.started.elapsed().as_secs_f64())
        });
        Loaded { load, result, bytes, tokens, seconds, path: path.into() }
    }

    /// Everything under way fails.
    pub(super) fn fail_all(&mut self, error: &Error) -> Vec<Loaded> {
        self.jobs.clear();
        let mut loads: Vec<LoadId> = self.targets.keys().copied().collect();
        loads.sort_unstable();
        loads.into_iter().map(|load| self.end(load, Err(error.clone()), "")).collect()
    }
}
