//! The consumer's bytes: pool to engine, verified on the way.
//!
//! What is loaded is kept here; what moves the bytes is the [`Store`]: this thread for host memory, a GPU for its own.

mod plan;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::layout::KvLayout;
use kvxfer_core::pool::Extent;
use kvxfer_core::session::{Copied, LoadRequest};
use kvxfer_core::{BlockId, ChunkKey, Error, ErrorKind, GrantId, LoadId, NO_BLOCK, Result};

use super::Loaded;
use super::register::Registered;
use super::store::{Ended, Store};
use plan::Plan;
pub(super) use plan::{Piece, Planned};

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

/// A layer of a chunk, by what an error names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) load: LoadId,
    pub(super) chunk: u32,
    key: ChunkKey,
    grant: GrantId,
    flat: u32,
}

impl Part {
    /// Its bytes are not those whose checksum came with them.
    pub(super) fn corrupt(self) -> Error {
        let Self { load, chunk, key, grant, flat } = self;
        ErrorKind::Corrupt.error(format!(
            "chunk {chunk} of load {load} (key {key}, grant {grant}): layer {flat} is not what was sent"
        ))
    }
}

struct Target {
    first_chunk: u32,
    /// Bytes that are copied in all.
    wanted: u64,
    blocks: Vec<Vec<BlockId>>,
    started: Instant,
    bytes: u64,
    tokens: u64,
}

/// A job whose layers are handed over one after the other.
struct Begun {
    layer: u32,
    bytes: u64,
    tokens: u64,
}

const NOT_BEGUN: Begun = Begun { layer: 0, bytes: 0, tokens: u64::MAX };

/// The loads under way.
pub(super) struct Loads {
    layout: KvLayout,
    registered: Registered,
    targets: HashMap<LoadId, Target>,
    jobs: VecDeque<Job>,
    /// How far the first job is.
    begun: Begun,
    plan: Plan,
    pub(super) bytes: u64,
}

impl Loads {
    pub(super) fn new(layout: KvLayout, registered: Registered) -> Self {
        Self {
            layout,
            registered,
            targets: HashMap::new(),
            jobs: VecDeque::new(),
            begun: NOT_BEGUN,
            plan: Plan::default(),
            bytes: 0,
        }
    }

    /// Takes a load's blocks.
    ///
    /// # Errors
    /// `OutOfBounds`: they are not the blocks of that many chunks.
    pub(super) fn begin(&mut self, request: &LoadRequest, blocks: Vec<Vec<BlockId>>) -> Result<()> {
        let groups = self.layout.groups.len();
        if blocks.len() != groups {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "load {}: block tables of {} groups, there are {groups}",
                request.load,
                blocks.len()
            )));
        }
        let chunks = request.chunks as usize;
        for (group, ids) in blocks.iter().enumerate() {
            let per_chunk = chunk_blocks(&self.layout, group);
            let most = chunks * per_chunk;
            let least = chunks.saturating_sub(1) * per_chunk;
            if ids.len() > most || ids.len() < least {
                return Err(ErrorKind::OutOfBounds.error(format!(
                    "load {}: {} blocks of group {group} for {chunks} chunks",
                    request.load,
                    ids.len()
                )));
            }
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

    pub(super) fn enqueue(&mut self, job: Job) {
        self.jobs.push_back(job);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Hands jobs over, as far as the store takes them at once.
    pub(super) fn progress(&mut self, store: &mut Store, ended: &mut Vec<Ended>) {
        while let Some(job) = self.jobs.front() {
            let place = (job.load, job.chunk);
            let result = match self.hand_over(store) {
                Ok(true) => Ok(()),
                Ok(false) => return,
                Err(error) => Err(error),
            };
            self.jobs.pop_front();
            let begun = std::mem::replace(&mut self.begun, NOT_BEGUN);
            if let (Ok(()), Some(target)) = (&result, self.targets.get_mut(&place.0)) {
                target.bytes += begun.bytes;
                target.tokens += begun.tokens;
                self.bytes += begun.bytes;
            }
            store.whole(place, result, ended);
            if store.moves_now() {
                // One chunk, then a look at the sockets.
                return;
            }
        }
    }

    /// The layers of the first job that are left. Whether that was all.
    fn hand_over(&mut self, store: &mut Store) -> Result<bool> {
        let Some(job) = self.jobs.front() else { return Ok(true) };
        let target = self
            .targets
            .get(&job.load)
            .ok_or_else(|| ErrorKind::NotFound.error(format!("load {} is unknown", job.load)))?;
        while self.begun.layer < self.layout.layers() {
            let layers = &self.registered.layers;
            let planned = self.plan.layer(&self.layout, layers, job, target, self.begun.layer)?;
            let memory = &self.registered.memory;
            match store.copy(&planned, &self.plan.pieces, memory, target.wanted) {
                Ok(()) => {}
                Err(error) if error.retryable() => return Ok(false),
                Err(error) => return Err(error),
            }
            self.begun.layer += 1;
            self.begun.bytes += planned.bytes;
            self.begun.tokens = self.begun.tokens.min(planned.tokens);
        }
        Ok(true)
    }

    /// What was not handed over will not be.
    pub(super) fn close(&mut self, store: &mut Store, ended: &mut Vec<Ended>) {
        let error = super::closed();
        if let Some(job) = self.jobs.front()
            && self.begun.layer > 0
        {
            store.whole((job.load, job.chunk), Err(error), ended);
        }
        self.begun = NOT_BEGUN;
        self.jobs.clear();
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

fn chunk_blocks(layout: &KvLayout, group: usize) -> usize {
    let tokens = layout.groups.get(group).map_or(1, |group| group.block_tokens);
    (layout.chunk_tokens / tokens) as usize
}

/// The end of a chunk's copy, as the state machine hears of it.
pub(super) fn copied((load, chunk): (LoadId, u32), result: Result<()>) -> Ended {
    Ended::Copied(Copied { load, chunk, result })
}
