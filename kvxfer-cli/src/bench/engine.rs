//! A model engine without a model: KV memory, an agent, an observer.
//!
//! A request is a prompt of random tokens, unlike any before it, whose blocks lie at random places on both sides.

use std::time::{Duration, Instant};

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::wire::message::{Chunk, Next};
use kvxfer_core::{ErrorKind, LoadId, Result};
use kvxfer_cuda::{Agent, AgentConfig, KvLayer, Loaded, ObserverHandle, Role};
use rustix::time::{ClockId, clock_gettime};

use super::wire::Shape;

const BLOCK_TOKENS: u32 = 16;
/// What the pool and the engine's memory hold more than a request, so that blocks scatter.
const ROOM: u32 = 2;
const NAME: &str = "kvxfer bench";

/// A round's request on one side.
struct Request {
    chunks: Vec<Chunk>,
    blocks: Vec<u32>,
}

pub(super) struct Engine {
    pub(super) agent: Agent,
    observer: ObserverHandle,
    shape: Shape,
    requests: Vec<Request>,
    /// One entry a layer.
    memory: Vec<Vec<u64>>,
}

impl Engine {
    /// Bytes that one takes: its own blocks, a consumer's pool, and about 16 bytes for a block of each round's request.
    pub(super) fn takes(shape: Shape, rounds: u32) -> u128 {
        let tables = u128::from(rounds) * u128::from(shape.blocks) * 16;
        shape.bytes() * u128::from(ROOM) * 2 + tables
    }

    /// The settings of both sides for requests like that.
    pub(super) fn config(role: Role, shape: Shape) -> AgentConfig {
        let group = Group {
            block_tokens: BLOCK_TOKENS,
            block_bytes: vec![shape.block_bytes; shape.layers as usize],
        };
        let layout = KvLayout::one_group(NAME, "bytes", 16 * BLOCK_TOKENS, group);
        let mut config = AgentConfig::new(role, layout);
        config.name = NAME.into();
        // The bench measures tcp as well; nothing but random numbers is at stake.
        config.allow_insecure = true;
        config.segments = 1;
        config.buffer_size = config.layout.page_bytes() * u64::from(ROOM) * u64::from(shape.blocks);
        // As much as the pool: what is measured is the path, not the wait for leave.
        config.window = config.window.max(config.buffer_size);
        config
    }

    pub(super) fn start(config: AgentConfig, shape: Shape, rounds: u32) -> Result<Self> {
        let (role, layout) = (config.role, config.layout.clone());
        let agent = Agent::start(config)?;
        let of = shape.blocks * ROOM;
        let words = of as usize * shape.block_bytes as usize / 8;
        // Written once, so that each page is there before anything is timed.
        let mut memory = vec![vec![u64::MAX; words]; shape.layers as usize];
        let layers = memory.iter_mut().map(|layer| KvLayer {
            address: layer.as_mut_ptr().addr(),
            blocks: of,
            stride: shape.block_bytes.into(),
        });
        // SAFETY: `drop` frees `memory` only after the agent is closed. We touch it only between loads, and between
        // the end of a push and the next.
        unsafe { agent.register(layers.collect()) }?;
        let own = agent.observer_address().cloned().ok_or_else(|| {
            ErrorKind::Io.error("the agent has no Unix socket").fix("set --socket-dir")
        })?;
        let observer = ObserverHandle::connect(vec![own], NAME)?;
        let keys = Keyspace::new(b"", &layout);
        let side = u64::from(role.produces());
        let request = |round: u32| {
            let token = |at| mix(u64::from(round) << 32 | u64::from(at)) as u32;
            let tokens: Vec<u32> = (0..shape.blocks * BLOCK_TOKENS).map(token).collect();
            let blocks = scattered(mix(u64::from(round) << 1 | side), shape.blocks, of);
            Request { chunks: keys.chain(&tokens, &[]), blocks }
        };
        let requests = (0..rounds).map(request).collect();
        Ok(Self { agent, observer, shape, requests, memory })
    }

    /// Each word of a round's blocks, and what it is to be.
    fn words(&mut self, round: u32, mut each: impl FnMut(&mut u64, u64)) -> Result<()> {
        let words = self.shape.block_bytes as usize / 8;
        let request = request(&self.requests, round)?;
        for (layer, memory) in self.memory.iter_mut().enumerate() {
            for (at, &block) in request.blocks.iter().enumerate() {
                let start = mix((u64::from(round) << 48) ^ ((layer as u64) << 32) ^ at as u64);
                for (word, value) in
                    memory[block as usize * words..][..words].iter_mut().enumerate()
                {
                    each(value, mix(start ^ word as u64));
                }
            }
        }
        Ok(())
    }

    /// Producer: computes a round's KV.
    pub(super) fn compute(&mut self, round: u32) -> Result<()> {
        self.words(round, |word, content| *word = content)
    }

    /// Consumer: wipes a round's blocks.
    pub(super) fn wipe(&mut self, round: u32) -> Result<()> {
        self.words(round, |word, content| *word = !content)
    }

    /// Consumer: how many words are not what was computed.
    pub(super) fn wrong(&mut self, round: u32) -> Result<u64> {
        let mut wrong = 0;
        self.words(round, |word, content| wrong += u64::from(*word != content))?;
        Ok(wrong)
    }

    /// Producer: pushes a round's request; seconds from the offer until the last chunk's commit is acknowledged.
    pub(super) fn push(&self, round: u32, patience: Duration) -> Result<f64> {
        let request = request(&self.requests, round)?;
        let start = Instant::now();
        let offer = self.observer.offer(NAME, &request.chunks);
        let range = PushRange::new(self.agent.layout(), offer, 0, &[&request.blocks])?;
        self.agent.begin_step(vec![range])?;
        self.agent.end_step()?;
        let mut left = request.chunks.len();
        loop {
            let pushed = self.observer.pushed();
            left -= pushed.iter().map(|(_, chunks)| chunks.len()).sum::<usize>().min(left);
            if left == 0 {
                return Ok(start.elapsed().as_secs_f64());
            }
            let Some(more) = patience.checked_sub(start.elapsed()) else {
                let about = format!("{left} of {} chunks were not taken", request.chunks.len());
                return Err(ErrorKind::Timeout
                    .error(format!("{about} within {patience:?}"))
                    .fix("look at what kvxfer bench serve says there, or raise --timeout"));
            };
            self.observer.wait(more);
        }
    }

    /// Consumer: loads what was pushed; seconds of the load alone.
    pub(super) fn load(&self, round: u32, patience: Duration) -> Result<(f64, Loaded)> {
        let late = |what: &str| ErrorKind::Timeout.error(format!("{what} within {patience:?}"));
        let request = request(&self.requests, round)?;
        let claim = self.observer.claim(NAME, &request.chunks, patience);
        let status =
            self.observer.settled(claim, patience).ok_or_else(|| late("no claim settled"))?;
        if status.next != Next::Done {
            return Err(
                ErrorKind::PeerLost.error(format!("what was pushed is not here: {status:?}"))
            );
        }
        let start = Instant::now();
        let load = LoadId(round.into());
        let all = LoadRequest { load, claim, first_chunk: 0, chunks: status.ready };
        self.agent.load(all, vec![request.blocks.clone()])?;
        if !self.agent.wait(patience) {
            return Err(late("the load did not end"));
        }
        let seconds = start.elapsed().as_secs_f64();
        let mut loaded = Vec::new();
        self.agent.poll(&mut loaded);
        let loaded = loaded.pop().ok_or_else(|| late("no load ended"))?;
        loaded.result.clone().map(|()| (seconds, loaded))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.agent.close().is_err() {
            // Who may still write to it keeps it.
            std::mem::forget(std::mem::take(&mut self.memory));
        }
    }
}

fn request(requests: &[Request], round: u32) -> Result<&Request> {
    requests
        .get(round as usize)
        .ok_or_else(|| ErrorKind::OutOfBounds.error(format!("there is no round {round}")))
}

/// Seconds of processor time that this process has used.
pub(super) fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// `count` of the numbers below `of`, in random order.
fn scattered(seed: u64, count: u32, of: u32) -> Vec<u32> {
    let mut all: Vec<u32> = (0..of).collect();
    all.sort_by_cached_key(|&id| mix(seed ^ u64::from(id)));
    all.truncate(count as usize);
    all
}

/// The finalizer of SplitMix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(kvxfer_core::sum::STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
