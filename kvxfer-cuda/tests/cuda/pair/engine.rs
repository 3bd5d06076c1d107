//! A model engine with its agent, and two of them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::wire::message::{ClaimStatus, Next};
use kvxfer_core::{BlockId, ClaimId, LoadId, NO_BLOCK, OfferId};
use kvxfer_cuda::driver::{Buffer, Device, EngineStream, Priority, Stream};
use kvxfer_cuda::{Address, Agent, AgentConfig, KvLayer, Loaded, Memory, ObserverHandle, Role};

use crate::harness::{DEADLINE, drain, get, pattern, put};

const BLOCK_TOKENS: u32 = 16;
pub(super) const CHUNK_TOKENS: u32 = 64;
pub(super) const LAYERS: usize = 3;
pub(super) const BLOCK_BYTES: u32 = 1024;
pub(super) const BLOCKS: u32 = 64;

fn layout() -> KvLayout {
    KvLayout {
        model: "model of the tests".into(),
        dtype: "bytes".into(),
        chunk_tokens: CHUNK_TOKENS,
        shard: (0, 1),
        groups: vec![Group { block_tokens: BLOCK_TOKENS, block_bytes: vec![BLOCK_BYTES; LAYERS] }],
        tags: [].into(),
    }
}

pub(super) fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| at.wrapping_mul(2_654_435_761) ^ seed).collect()
}

pub(super) fn blocks(tokens: &[u32], stride: u32) -> Vec<BlockId> {
    let count = (tokens.len() as u32).div_ceil(BLOCK_TOKENS);
    (0..count).map(|at| (at * stride + 3) % BLOCKS).collect()
}

pub(super) fn chunks(tokens: &[u32]) -> u32 {
    (tokens.len() as u32).div_ceil(CHUNK_TOKENS)
}

/// What the model computes for a block.
fn kv(tokens: &[u32], layer: usize, block: usize) -> Vec<u8> {
    let end = tokens.len().min((block + 1) * BLOCK_TOKENS as usize);
    let seed = tokens[..end].iter().fold(layer as u64, |value, &token| {
        (value ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
    });
    pattern(BLOCK_BYTES as usize, seed)
}

pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    pub(super) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("kvxfer-pair-{}-{number}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn config(role: Role, folder: &Path) -> AgentConfig {
    let mut config = AgentConfig::new(role, layout());
    config.memory = Memory::Device(0);
    config.socket_dir = folder.into();
    config.name = format!("{role:?}");
    config.buffer_size = 1 << 20;
    config.segments = 2;
    config.silence = Duration::from_secs(5);
    config.fence_timeout = Duration::from_secs(1);
    if role.consumes() {
        config.listen = Some("127.0.0.1:0".parse().unwrap());
    }
    config
}

pub(super) struct Engine {
    // The agent goes first: then nothing uses the memory.
    pub(super) agent: Agent,
    pub(super) observer: ObserverHandle,
    pub(super) stream: Stream,
    pub(super) memory: Vec<Buffer>,
    pub(super) device: Device,
    keys: Keyspace,
    next_load: u64,
}

impl Engine {
    pub(super) fn start(device: &Device, config: AgentConfig) -> Self {
        let agent = Agent::start(config).unwrap();
        let bytes = u64::from(BLOCKS * BLOCK_BYTES);
        let memory: Vec<Buffer> = (0..LAYERS).map(|_| device.buffer(bytes).unwrap()).collect();
        let layer = |buffer: &Buffer| KvLayer {
            address: buffer.ptr().addr() as usize,
            blocks: BLOCKS,
            stride: BLOCK_BYTES.into(),
        };
        // SAFETY: the memory lives until the agent is closed, by `drop`.
        unsafe { agent.register(memory.iter().map(layer).collect()) }.unwrap();
        let address = agent.observer_address().unwrap().clone();
        let observer = ObserverHandle::connect(vec![address], "observer").unwrap();
        let stream = device.stream(Priority::Default).unwrap();
        let device = device.clone();
        let keys = Keyspace::new(b"", &layout());
        Self { agent, observer, stream, memory, device, keys, next_load: 0 }
    }

    pub(super) fn tcp(&self) -> Address {
        let tcp = |address: &&Address| matches!(address, Address::Tcp { .. });
        self.agent.addresses().iter().find(tcp).unwrap().clone()
    }

    pub(super) fn engine_stream(&self) -> EngineStream {
        // SAFETY: a stream of the same device that lives as long as the engine.
        unsafe { self.agent.engine_stream(self.stream.handle()) }.unwrap()
    }

    pub(super) fn offer(&self, tokens: &[u32]) -> OfferId {
        self.observer.offer("request", &self.keys.chain(tokens, &[]))
    }

    /// Puts a layer's KV into the stream.
    pub(super) fn compute(&self, tokens: &[u32], blocks: &[BlockId], layer: usize) {
        for (at, &block) in blocks.iter().enumerate() {
            let pinned = self.device.pinned(BLOCK_BYTES.into()).unwrap();
            pinned.write(0, &kv(tokens, layer, at)).unwrap();
            let to = self.memory[layer].ptr().offset(u64::from(block * BLOCK_BYTES));
            self.stream.upload(to, &pinned, 0, BLOCK_BYTES.into()).unwrap();
        }
    }

    /// A step, layer by layer. Nothing is waited for.
    pub(super) fn step(&self, offer: OfferId, tokens: &[u32], blocks: &[BlockId]) {
        let range = PushRange::new(self.agent.layout(), offer, 0, &[blocks]).unwrap();
        let stream = self.engine_stream();
        self.agent.begin_step(vec![range]).unwrap();
        for layer in 0..LAYERS {
            self.compute(tokens, blocks, layer);
            self.agent.layer_ready_on(layer as u32, &stream).unwrap();
        }
        self.agent.end_step_on(&stream).unwrap();
    }

    pub(super) fn until<T>(&self, mut what: impl FnMut(&Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(started.elapsed() < DEADLINE, "waited in vain: {:?}", self.agent.stats());
            self.observer.wait(Duration::from_millis(5));
        }
    }

    pub(super) fn until_pushed(&self, offer: OfferId, tokens: &[u32]) {
        let mut left = chunks(tokens) as usize;
        self.until(|engine| {
            for (other, done) in engine.observer.pushed() {
                left -= if other == offer { done.len() } else { 0 };
            }
            (left == 0).then_some(())
        });
    }

    pub(super) fn claim(&self, tokens: &[u32]) -> ClaimId {
        self.observer.claim("request", &self.keys.chain(tokens, &[]), DEADLINE)
    }

    pub(super) fn until_claimed(&self, claim: ClaimId, next: Next) -> ClaimStatus {
        self.until(|engine| engine.observer.status(claim).filter(|status| status.next == next))
    }

    /// Has the claimed chunks loaded, behind what is in the stream now.
    pub(super) fn begin_load(&mut self, claim: ClaimId, tokens: &[u32], blocks: &[BlockId]) {
        self.next_load += 1;
        let load = LoadId(self.next_load);
        let request = LoadRequest { load, claim, first_chunk: 0, chunks: chunks(tokens) };
        let stream = self.engine_stream();
        self.agent.load_on(request, vec![blocks.to_vec()], &stream).unwrap();
    }

    pub(super) fn load(&mut self, claim: ClaimId, tokens: &[u32], blocks: &[BlockId]) -> Loaded {
        self.begin_load(claim, tokens, blocks);
        self.until(Self::loaded)
    }

    /// The load that ended, of those under way.
    pub(super) fn loaded(&self) -> Option<Loaded> {
        let mut loaded = Vec::new();
        self.agent.poll(&mut loaded);
        loaded.pop()
    }

    /// Whether these blocks hold the prompt's KV.
    pub(super) fn holds(&self, tokens: &[u32], blocks: &[BlockId]) -> bool {
        (0..LAYERS).all(|layer| {
            let ptr = self.memory[layer].ptr();
            let all = get(&self.device, ptr, (BLOCKS * BLOCK_BYTES) as usize);
            blocks.iter().enumerate().filter(|&(_, &block)| block != NO_BLOCK).all(
                |(at, &block)| {
                    let start = (block * BLOCK_BYTES) as usize;
                    all[start..start + BLOCK_BYTES as usize] == kv(tokens, layer, at)
                },
            )
        })
    }

    pub(super) fn poison(&self) {
        for buffer in &self.memory {
            put(&self.device, buffer.ptr(), &vec![0xEE; (BLOCKS * BLOCK_BYTES) as usize]);
        }
    }

    pub(super) fn until_empty(&self) {
        self.until(|engine| {
            let stats = engine.agent.stats().unwrap();
            (stats.pool.free == stats.pool.pages && stats.pages_leaked == 0).then_some(())
        });
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The test has failed, and its memory with it.
            return std::mem::forget(std::mem::take(&mut self.memory));
        }
        drain(&self.stream);
        self.agent.close().unwrap();
    }
}

pub(super) struct Pair {
    pub(super) prefill: Engine,
    pub(super) decode: Engine,
    pub(super) folder: Folder,
}

pub(super) fn pair(device: &Device, change: impl Fn(&mut AgentConfig)) -> Pair {
    let folder = Folder::new();
    let mut consumer = config(Role::Consumer, &folder.0);
    change(&mut consumer);
    let decode = Engine::start(device, consumer);
    let mut producer = config(Role::Producer, &folder.0);
    producer.peers = vec![decode.tcp()];
    change(&mut producer);
    Pair { prefill: Engine::start(device, producer), decode, folder }
}

impl Pair {
    /// Pushes the KV of a prompt, of all its chunks, and claims it.
    pub(super) fn pushed_and_claimed(&self, tokens: &[u32]) -> ClaimId {
        let offer = self.prefill.offer(tokens);
        self.prefill.step(offer, tokens, &blocks(tokens, 7));
        let claim = self.decode.claim(tokens);
        let status = self.decode.until_claimed(claim, Next::Done);
        assert_eq!(status.ready, chunks(tokens));
        self.prefill.until_pushed(offer, tokens);
        claim
    }
}
