//! Whole requests, from the offer to the loaded blocks, through agents and observers of two processes.
//!
//! This process is the prefill engine, the child is the decode engine. The shape is Llama-3.1-8B's: 32 layers of 64 KiB
//! for 16 tokens, chunks of 256 tokens. The prompt is computed already, so what is timed is only the hand-over: offer,
//! grants, push, commits, claim, load. Both processes read the same clock.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::path::PathName;
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::wire::message::{Chunk, Next};
use kvxfer_core::{LoadId, SegmentId};
use kvxfer_cuda::memory::HostPool;
use kvxfer_cuda::{Address, Agent, AgentConfig, KvLayer, ObserverHandle, Role};
use rustix::time::{ClockId, clock_gettime};

use crate::child::{Child, Words};
use crate::random::{Random, mix};
use crate::stats::{Ratio, median, percentile, speedup};
use crate::{Result, copies};

/// The only path allowed here.
pub const PATH: PathName = PathName::Shm;
const FOLDER: &str = "KVXFER_BENCH_FOLDER";
const PATIENCE: Duration = Duration::from_secs(30);
const LAYERS: u32 = 32;
const BLOCK_BYTES: u32 = 64 << 10;
const BLOCK_TOKENS: u32 = 16;
/// Blocks that each engine has.
const BLOCKS: u32 = 160;

/// Figures for one size of requests.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Blocks of a request.
    pub blocks: u32,
    /// Its bytes.
    pub bytes: u64,
    /// Timed requests.
    pub rounds: usize,
    /// From the offer until the claim is done, median, ms.
    pub claimed_ms: f64,
    /// From the offer until all is loaded, median, ms.
    pub loaded_ms: f64,
    /// The same, 90th percentile.
    pub loaded_p90_ms: f64,
    /// Two bare `memcpy` of the same blocks in turn with it, median, ms: what moving them twice by one thread takes.
    pub two_copies_ms: f64,
    /// Times as fast as those.
    pub two_copies: Ratio,
}

struct Engine {
    agent: Agent,
    observer: ObserverHandle,
    keys: Keyspace,
    layout: KvLayout,
    /// One segment a layer. Dropped after the agent, which reads and writes it.
    memory: HostPool,
}

impl Engine {
    fn start(role: Role, folder: &Path) -> Result<Self> {
        let group =
            Group { block_tokens: BLOCK_TOKENS, block_bytes: vec![BLOCK_BYTES; LAYERS as usize] };
        let layout = KvLayout::one_group("benchmark", "bfloat16", 256, group);
        let decode = Address::Unix(folder.join("decode.sock"));
        let mut config = AgentConfig::new(role, layout.clone());
        config.socket_dir = folder.into();
        config.buffer_size = 512 << 20;
        config.require_path = Some(PATH);
        match role {
            Role::Producer => config.peers = vec![decode],
            _ => config.listen = Some(decode),
        }
        let agent = Agent::start(config)?;
        let stride = u64::from(BLOCK_BYTES);
        let memory = HostPool::new(LAYERS, u64::from(BLOCKS) * stride)?;
        let layers = (0..LAYERS).map(|layer| {
            let address = memory.segment(SegmentId(layer))?.as_mut_ptr().addr();
            Ok(KvLayer { address, blocks: BLOCKS, stride })
        });
        // SAFETY: `memory` is dropped after the agent; loads and looks at the result take turns.
        unsafe { agent.register(layers.collect::<Result<_>>()?) }?;
        let own = agent.observer_address().ok_or("the agent has no socket")?.clone();
        let observer = ObserverHandle::connect(vec![own], "benchmark")?;
        Ok(Self { agent, observer, keys: Keyspace::new(b"", &layout), layout, memory })
    }

    /// Visits each word of a block of all layers.
    fn words(&self, block: u32, mut each: impl FnMut(u32, u32, *mut u64)) -> Result<()> {
        for layer in 0..LAYERS {
            let offset = u64::from(block) * u64::from(BLOCK_BYTES);
            let start = self.memory.segment(SegmentId(layer))?.at(offset, BLOCK_BYTES.into())?;
            for word in 0..BLOCK_BYTES / 8 {
                each(layer, word, start.cast::<u64>().wrapping_add(word as usize));
            }
        }
        Ok(())
    }

    fn chunks(&self, round: u64, blocks: u32) -> Vec<Chunk> {
        let mut random = Random(round);
        let tokens: Vec<u32> = (0..blocks * BLOCK_TOKENS).map(|_| random.below(128_000)).collect();
        self.keys.chain(&tokens, &[])
    }
}

/// The blocks of a round's request: the producer's and the consumer's.
fn tables(round: u64, blocks: u32) -> (Vec<u32>, Vec<u32>) {
    let mut random = Random(round);
    (random.pick(blocks, BLOCKS), random.pick(blocks, BLOCKS))
}

fn content(layer: u32, block: u32, word: u32) -> u64 {
    mix(u64::from(layer) << 48 | u64::from(block) << 32 | u64::from(word))
}

/// Nanoseconds, the same in both processes.
fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The child: the decode engine.
///
/// # Errors
/// Something did not come in time.
pub fn decode(mut socket: Words) -> Result<()> {
    let folder = PathBuf::from(std::env::var_os(FOLDER).ok_or("no folder was given")?);
    let engine = Engine::start(Role::Consumer, &folder)?;
    socket.send(&[0])?;
    while let Some([round, blocks, check]) = socket.command()? {
        if check == 1 {
            for block in 0..BLOCKS {
                // SAFETY: a word of a block, and no load is under way.
                engine.words(block, |_, _, word| unsafe { word.write(u64::MAX) })?;
            }
        }
        let blocks = u32::try_from(blocks)?;
        let (from, to) = tables(round, blocks);
        let chunks = engine.chunks(round, blocks);
        // Prepared: the parent may offer.
        socket.send(&[0])?;
        let [_] = socket.receive()?;
        let claim = engine.observer.claim("benchmark", &chunks, PATIENCE);
        let status = engine.observer.settled(claim, PATIENCE).ok_or("the claim does not settle")?;
        let claimed = now();
        if status.next != Next::Done {
            return Err(format!("the claim ended with {status:?}").into());
        }
        let load = LoadId(round);
        let request = LoadRequest { load, claim, first_chunk: 0, chunks: status.ready };
        engine.agent.load(request, vec![to.clone()])?;
        if !engine.agent.wait(PATIENCE) {
            return Err("the load does not end".into());
        }
        let loaded_at = now();
        let mut loaded = Vec::new();
        engine.agent.poll(&mut loaded);
        let loaded = loaded.pop().ok_or("no load ended")?;
        loaded.result?;
        if loaded.path != PATH.as_str() {
            return Err(format!("the bytes came by {:?}", loaded.path).into());
        }
        let mut wrong = 0_u64;
        if check == 1 {
            for (&from, &to) in from.iter().zip(&to) {
                engine.words(to, |layer, at, word| {
                    // SAFETY: a word of a block, and the load has ended.
                    wrong += u64::from(unsafe { word.read() } != content(layer, from, at));
                })?;
            }
        }
        socket.send(&[claimed, loaded_at, loaded.bytes, wrong])?;
    }
    engine.observer.close()?;
    Ok(engine.agent.close()?)
}

/// The prefill engine, and the child.
pub struct Prefill {
    child: Child,
    engine: Engine,
    scratch: HostPool,
    round: u64,
    _folder: Folder,
}

struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Prefill {
    /// Starts both engines.
    ///
    /// # Errors
    /// No memory, no process, no connection.
    pub fn start() -> Result<Self> {
        let folder =
            Folder(std::env::temp_dir().join(format!("kvxfer-bench-{}", std::process::id())));
        let mut child = Child::start("decode", &[(FOLDER, folder.0.as_os_str())])?;
        let [_] = child.socket.receive()?;
        let engine = Engine::start(Role::Producer, &folder.0)?;
        for block in 0..BLOCKS {
            engine.words(block, |layer, at, word| {
                // SAFETY: a word of a block; nothing is pushed yet.
                unsafe { word.write(content(layer, block, at)) };
            })?;
        }
        if !engine.agent.wait_connected(PATIENCE) {
            return Err("the two engines do not connect".into());
        }
        let scratch = HostPool::new(LAYERS, engine.memory.segment_bytes())?;
        Ok(Self { child, engine, scratch, round: 0, _folder: folder })
    }

    /// Measures one size of requests.
    ///
    /// # Errors
    /// The data is not what was sent; something did not come in time.
    pub fn measure(&mut self, blocks: u32, rounds: usize) -> Result<Figures> {
        let bytes = u64::from(blocks) * u64::from(BLOCK_BYTES) * u64::from(LAYERS);
        self.request(blocks, bytes, true)?;
        let (mut claimed, mut loaded, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            let (claim, load) = self.request(blocks, bytes, false)?;
            claimed.push(claim);
            loaded.push(load);
            copies.push(self.two_copies(blocks)?);
        }
        self.request(blocks, bytes, true)?;
        Ok(Figures {
            blocks,
            bytes,
            rounds,
            claimed_ms: median(&claimed),
            loaded_ms: median(&loaded),
            loaded_p90_ms: percentile(&loaded, 0.9),
            two_copies_ms: median(&copies),
            two_copies: speedup(&loaded, &copies),
        })
    }

    /// One request: milliseconds until it is claimed, and until it is loaded.
    fn request(&mut self, blocks: u32, bytes: u64, check: bool) -> Result<(f64, f64)> {
        self.round += 1;
        let (from, _) = tables(self.round, blocks);
        let chunks = self.engine.chunks(self.round, blocks);
        let [_] = self.child.socket.ask(&[self.round, blocks.into(), check.into()])?;
        let start = now();
        self.child.socket.send(&[0])?;
        let Engine { agent, observer, layout, .. } = &self.engine;
        let offer = observer.offer("benchmark", &chunks);
        agent.begin_step(vec![PushRange::new(layout, offer, 0, &[from])?])?;
        agent.end_step()?;
        let [claimed, loaded, came, wrong] = self.child.socket.receive()?;
        if came != bytes || wrong != 0 {
            return Err(format!("{came} of {bytes} bytes came, {wrong} words are wrong").into());
        }
        let mut left = chunks.len();
        while left > 0 {
            left -= observer.pushed().iter().map(|(_, chunks)| chunks.len()).sum::<usize>();
            if left > 0 && !observer.wait(PATIENCE) {
                return Err("the blocks are not let go".into());
            }
        }
        let ms = |end: u64| end.saturating_sub(start) as f64 / 1e6;
        Ok((ms(claimed), ms(loaded)))
    }

    fn two_copies(&self, blocks: u32) -> Result<f64> {
        let (from, to) = tables(self.round, blocks);
        let start = now();
        for _ in 0..2 {
            for layer in (0..LAYERS).map(SegmentId) {
                let (source, target) =
                    (self.engine.memory.segment(layer)?, self.scratch.segment(layer)?);
                for (&from, &to) in from.iter().zip(&to) {
                    let offset = |block: u32| u64::from(block) * u64::from(BLOCK_BYTES);
                    let (to, from) = (
                        target.at(offset(to), BLOCK_BYTES.into())?,
                        source.at(offset(from), BLOCK_BYTES.into())?,
                    );
                    // SAFETY: `at` checked both.
                    unsafe { copies::memcpy(to, from, BLOCK_BYTES as usize) };
                }
            }
        }
        Ok((now() - start) as f64 / 1e6)
    }
}

impl std::fmt::Debug for Prefill {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prefill").field("round", &self.round).finish_non_exhaustive()
    }
}
