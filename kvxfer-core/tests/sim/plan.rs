//! What a seed decides before anything runs: the fleet, the configuration, how rough it gets.

use std::collections::BTreeMap;
use std::time::Duration;

use kvxfer_core::ChunkKey;
use kvxfer_core::gc::{AfterRetrieve, GcConfig};
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::pool::Geometry;
use kvxfer_core::session::{ConsumerConfig, ProducerConfig};
use kvxfer_core::wire::message::Chunk;

use crate::rng::{Rng, mix};

pub(crate) const MS: u64 = 1000;
pub(crate) const SECOND: u64 = 1000 * MS;
pub(crate) const CHUNK_TOKENS: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// No faults, room enough: everything must succeed.
    Calm,
    /// No faults, prompts larger than the pool: everything must succeed, by streaming.
    Tight,
    /// Everything that can go wrong.
    Rough,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) mode: Mode,
    pub(crate) prefills: usize,
    pub(crate) decodes: usize,
    pub(crate) ranks: usize,
    pub(crate) requests: u64,
    /// Faults and requests come until then.
    pub(crate) trouble: u64,
    /// Microseconds between two faults, on average.
    pub(crate) fault_every: u64,
    pub(crate) duplicates: u64,
    pub(crate) failing_posts: u64,
    pub(crate) blocks: u32,
    pub(crate) hooks: bool,
    pub(crate) longest: u64,
    /// How long a request waits for its KV.
    pub(crate) patience: u64,
    geometry: Geometry,
    gc: GcConfig,
    window: u32,
    grant_ttl: u64,
    fence: u64,
    hold: u64,
    seed: u64,
}

impl Plan {
    pub(crate) fn new(seed: u64, rng: &mut Rng) -> Self {
        let mode = match seed % 8 {
            0 => Mode::Calm,
            1 => Mode::Tight,
            _ => Mode::Rough,
        };
        let rough = mode == Mode::Rough;
        let prefills = rng.range(1, 4) as usize;
        let decodes = if mode == Mode::Tight { 1 } else { rng.range(1, 4) as usize };
        let longest = rng.range(3, 9);
        let pages = match mode {
            Mode::Calm => 400,
            Mode::Tight => 3 * rng.range(2, longest + 2),
            // Now and then not even one chunk fits.
            Mode::Rough if rng.permille(40) => 2,
            Mode::Rough => 3 * rng.range(2, 30),
        };
        let segments = match mode {
            // One writer a segment: every producer needs one.
            Mode::Calm => 8,
            _ => rng.range(1, 6).min(pages / 3).max(1),
        };
        // Whoever waits without faults waits long enough for everyone before it.
        let slow = if rough { 1 } else { 20 };
        let ttl = Duration::from_millis(if rough { rng.range(150, 3000) } else { 60_000 });
        let keep = rng.permille(if mode == Mode::Tight { 0 } else { 300 });
        // Without faults every claim comes sooner.
        let overdue_after = if rough { 20 + mix(seed, 1) % 1500 } else { 2000 };
        Self {
            mode,
            prefills,
            decodes,
            ranks: if rng.permille(300) { 2 } else { 1 },
            requests: rng.range(5, if rough { 40 } else { 25 }),
            trouble: 3 * SECOND,
            fault_every: rng.range(20, 400) * MS,
            duplicates: if rough && rng.permille(500) { rng.range(0, 200) } else { 0 },
            failing_posts: if rough && rng.permille(300) { rng.range(0, 40) } else { 0 },
            blocks: rng.range(20, 60) as u32,
            hooks: rng.permille(700),
            longest,
            patience: rng.range(200, 2000) * MS * slow,
            geometry: Geometry {
                segments: segments as u32,
                pages_per_segment: pages.div_ceil(segments) as u32,
            },
            gc: GcConfig {
                enabled: true,
                after_retrieve: if keep { AfterRetrieve::Keep } else { AfterRetrieve::Drop },
                high_watermark: 0.9,
                low_watermark: 0.7,
                unclaimed_ttl: ttl,
                overdue_after: Duration::from_millis(overdue_after),
                batch: rng.range(1, 20) as usize,
            },
            window: rng.range(3, 40) as u32,
            grant_ttl: if rough { rng.range(40, 800) } else { 2000 },
            fence: rng.range(50, 500),
            hold: if rough { rng.range(100, 3000) } else { 60_000 },
            seed,
        }
    }

    pub(crate) fn layout(&self, rank: usize) -> KvLayout {
        KvLayout {
            model: "simulated".into(),
            dtype: "u64".into(),
            chunk_tokens: CHUNK_TOKENS,
            shard: (rank as u32, self.ranks as u32),
            groups: vec![
                Group { block_tokens: 4, block_bytes: vec![16, 16] },
                Group { block_tokens: 8, block_bytes: vec![16] },
            ],
            tags: BTreeMap::new(),
        }
    }

    pub(crate) fn consumer(&self, rank: usize) -> ConsumerConfig {
        ConsumerConfig {
            layout: self.layout(rank),
            geometry: self.geometry,
            gc: self.gc,
            grant_ttl: Duration::from_millis(self.grant_ttl),
            grant_cap: Duration::from_millis(self.grant_ttl * 6),
            fence_timeout: Duration::from_millis(self.fence),
            ask_timeout: Duration::from_millis(200),
            window_pages: self.window,
            overtakes: 3,
            lost_ttl: Duration::from_millis(700),
        }
    }

    pub(crate) fn producer(&self, rank: usize) -> ProducerConfig {
        ProducerConfig {
            layout: self.layout(rank),
            consumers: self.decodes,
            hold: Duration::from_millis(self.hold),
            memory: kvxfer_core::wire::message::Memory::Host,
        }
    }

    pub(crate) fn keeps(&self) -> bool {
        self.gc.after_retrieve == AfterRetrieve::Keep
    }

    /// How long a chunk that a claim is expected for stays, whatever else wants room.
    pub(crate) fn firm(&self) -> Duration {
        self.gc.overdue_after.min(self.gc.unclaimed_ttl)
    }

    /// Whether a life of a process is one in which no segment is ever let go of, though its links are alive: what
    /// its GPU copies is stuck.
    pub(crate) fn clings(&self, proc: usize, epoch: u32) -> bool {
        let life = (proc as u64) << 32 | u64::from(epoch);
        self.mode == Mode::Rough && mix(self.seed, life).is_multiple_of(8)
    }

    pub(crate) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// A prompt: a few families, which share prefixes.
    pub(crate) fn prompt(&self, rng: &mut Rng) -> Vec<Chunk> {
        let family = rng.range(0, 3);
        let shared = rng.range(0, 4);
        let variant = rng.range(0, if self.mode == Mode::Rough { 12 } else { u64::MAX });
        let length = rng.range(1, self.longest + 1);
        let partial = rng.permille(500);
        let mut parent = mix(family, 77);
        (0..length)
            .map(|at| {
                let tokens = if partial && at + 1 == length { 3 } else { CHUNK_TOKENS };
                let token = if at < shared { family } else { variant };
                parent = mix(mix(parent, token), u64::from(tokens));
                let mut key = [0; 32];
                key[..8].copy_from_slice(&parent.to_le_bytes());
                Chunk { key: ChunkKey(key), tokens }
            })
            .collect()
    }
}

/// The one right content: a word of a chunk's block. Producers compute it, consumers must load it.
pub(crate) fn content(key: &ChunkKey, rank: usize, layer: u32, block: usize, word: usize) -> u64 {
    let tag = u64::from_le_bytes([
        key.0[0], key.0[1], key.0[2], key.0[3], key.0[4], key.0[5], key.0[6], key.0[7],
    ]);
    mix(tag, (rank as u64) << 48 | u64::from(layer) << 32 | (block as u64) << 16 | word as u64)
}
