//! Whole agents on a GPU: an engine's KV from layer to layer into another engine's blocks, in one process and in two.
//!
//! The engines are models: what they compute for a block follows from the prompt's tokens, and is put into device
//! memory by work in a stream of theirs, which a gate can hold back.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::wire::message::{ClaimStatus, Next};
use kvxfer_core::{BlockId, ClaimId, ErrorKind, LoadId, NO_BLOCK, OfferId};
use kvxfer_cuda::driver::{Buffer, Device, EngineStream, Priority, Stream};
use kvxfer_cuda::{Address, Agent, AgentConfig, KvLayer, Loaded, Memory, ObserverHandle, Role};

use crate::harness::{
    DEADLINE, Gate, Peer, assert_nothing_lives, child_device, device, drain, get, on_standin,
    parent, put,
};

const BLOCK_TOKENS: u32 = 16;
const CHUNK_TOKENS: u32 = 64;
const LAYERS: usize = 3;
const BLOCK_BYTES: u32 = 1024;
const BLOCKS: u32 = 64;

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

fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| at.wrapping_mul(2_654_435_761) ^ seed).collect()
}

fn blocks(tokens: &[u32], stride: u32) -> Vec<BlockId> {
    let count = (tokens.len() as u32).div_ceil(BLOCK_TOKENS);
    (0..count).map(|at| (at * stride + 3) % BLOCKS).collect()
}

/// What the model computes for a block.
fn kv(tokens: &[u32], layer: usize, block: usize) -> Vec<u8> {
    let end = tokens.len().min((block + 1) * BLOCK_TOKENS as usize);
    let seed = tokens[..end].iter().fold(layer as u64, |value, &token| {
        (value ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
    });
    crate::harness::pattern(BLOCK_BYTES as usize, seed)
}

struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
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

fn config(role: Role, folder: &Path) -> AgentConfig {
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

struct Engine {
    // The agent goes first: then nothing uses the memory.
    agent: Agent,
    observer: ObserverHandle,
    stream: Stream,
    memory: Vec<Buffer>,
    device: Device,
    keys: Keyspace,
    next_load: u64,
}

impl Engine {
    fn start(device: &Device, config: AgentConfig) -> Self {
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

    fn tcp(&self) -> Address {
        let tcp = |address: &&Address| matches!(address, Address::Tcp { .. });
        self.agent.addresses().iter().find(tcp).unwrap().clone()
    }

    fn engine_stream(&self) -> EngineStream {
        // SAFETY: a stream of the same device that lives as long as the engine.
        unsafe { self.agent.engine_stream(self.stream.handle()) }.unwrap()
    }

    fn offer(&self, tokens: &[u32]) -> OfferId {
        self.observer.offer("request", &self.keys.chain(tokens, &[]))
    }

    /// Puts a layer's KV into the stream.
    fn compute(&self, tokens: &[u32], blocks: &[BlockId], layer: usize) {
        for (at, &block) in blocks.iter().enumerate() {
            let pinned = self.device.pinned(BLOCK_BYTES.into()).unwrap();
            pinned.write(0, &kv(tokens, layer, at)).unwrap();
            let to = self.memory[layer].ptr().offset(u64::from(block * BLOCK_BYTES));
            self.stream.upload(to, &pinned, 0, BLOCK_BYTES.into()).unwrap();
        }
    }

    /// A step, layer by layer. Nothing is waited for.
    fn step(&self, offer: OfferId, tokens: &[u32], blocks: &[BlockId]) {
        let range = PushRange::new(self.agent.layout(), offer, 0, &[blocks]).unwrap();
        let stream = self.engine_stream();
        self.agent.begin_step(vec![range]).unwrap();
        for layer in 0..LAYERS {
            self.compute(tokens, blocks, layer);
            self.agent.layer_ready_on(layer as u32, &stream).unwrap();
        }
        self.agent.end_step_on(&stream).unwrap();
    }

    fn until<T>(&self, mut what: impl FnMut(&Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(started.elapsed() < DEADLINE, "waited in vain: {:?}", self.agent.stats());
            self.observer.wait(Duration::from_millis(5));
        }
    }

    fn until_pushed(&self, offer: OfferId, chunks: usize) {
        let mut left = chunks;
        self.until(|engine| {
            for (other, done) in engine.observer.pushed() {
                left -= if other == offer { done.len() } else { 0 };
            }
            (left == 0).then_some(())
        });
    }

    fn claim(&self, tokens: &[u32]) -> ClaimId {
        self.observer.claim("request", &self.keys.chain(tokens, &[]), DEADLINE)
    }

    fn until_claimed(&self, claim: ClaimId, next: Next) -> ClaimStatus {
        self.until(|engine| engine.observer.status(claim).filter(|status| status.next == next))
    }

    fn load(&mut self, claim: ClaimId, tokens: &[u32], blocks: &[BlockId]) -> Loaded {
        self.next_load += 1;
        let load = LoadId(self.next_load);
        let chunks = tokens.len().div_ceil(CHUNK_TOKENS as usize) as u32;
        let request = LoadRequest { load, claim, first_chunk: 0, chunks };
        let stream = self.engine_stream();
        self.agent.load_on(request, vec![blocks.to_vec()], &stream).unwrap();
        self.until(|engine| {
            let mut loaded = Vec::new();
            engine.agent.poll(&mut loaded);
            loaded.pop()
        })
    }

    /// Whether these blocks hold the prompt's KV.
    fn holds(&self, tokens: &[u32], blocks: &[BlockId]) -> bool {
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

    fn poison(&self) {
        for buffer in &self.memory {
            put(&self.device, buffer.ptr(), &vec![0xEE; (BLOCKS * BLOCK_BYTES) as usize]);
        }
    }

    fn until_empty(&self) {
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

struct Pair {
    prefill: Engine,
    decode: Engine,
    _folder: Folder,
}

fn pair(device: &Device, change: impl Fn(&mut AgentConfig)) -> Pair {
    let folder = Folder::new();
    let mut consumer = config(Role::Consumer, &folder.0);
    change(&mut consumer);
    let decode = Engine::start(device, consumer);
    let mut producer = config(Role::Producer, &folder.0);
    producer.peers = vec![decode.tcp()];
    change(&mut producer);
    Pair { prefill: Engine::start(device, producer), decode, _folder: folder }
}

#[test]
fn kv_gets_from_one_engine_to_the_other() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    for (seed, tokens) in [(1, 1), (2, 16), (3, 65), (4, 700)] {
        let prompt = prompt(seed, tokens);
        let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
        pair.decode.poison();
        let offer = pair.prefill.offer(&prompt);
        pair.prefill.step(offer, &prompt, &from);
        let claim = pair.decode.claim(&prompt);
        let status = pair.decode.until_claimed(claim, Next::Done);
        let loaded = pair.decode.load(claim, &prompt, &to);
        assert_eq!((loaded.result, loaded.tokens), (Ok(()), u64::from(tokens)));
        assert_eq!(loaded.path, "cuda_ipc (same GPU)");
        assert!(pair.decode.holds(&prompt, &to), "{tokens} tokens");
        pair.prefill.until_pushed(offer, status.ready as usize);
    }
    pair.decode.until_empty();
}

/// The engine's stream is held back: whatever is read before its events is poison.
#[test]
fn nothing_is_read_before_the_engine_has_written_it_nor_committed_before_it_is_there() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(5, 300);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    pair.prefill.poison();
    let gate = Gate::before(&pair.prefill.stream);
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &from);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Writing);
    pair.prefill.until(|engine| (engine.agent.stats().unwrap().posts == 15).then_some(()));
    assert_eq!(pair.decode.agent.stats().unwrap().consumer.committed, 0);
    gate.open();
    pair.decode.until_claimed(claim, Next::Done);
    assert_eq!(pair.decode.load(claim, &prompt, &to).result, Ok(()));
    assert!(pair.decode.holds(&prompt, &to));
}

/// A load waits for the stream that may still use the blocks.
#[test]
fn a_load_begins_behind_the_engines_stream() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(6, 100);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &from);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    // What the engine still writes there comes first, and is overwritten by the load.
    let gate = Gate::before(&pair.decode.stream);
    for layer in 0..LAYERS {
        pair.decode.compute(&[9, 9, 9], &to, layer);
    }
    let opener = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        gate.open();
    });
    assert_eq!(pair.decode.load(claim, &prompt, &to).result, Ok(()));
    opener.join().unwrap();
    drain(&pair.decode.stream);
    assert!(pair.decode.holds(&prompt, &to));
}

#[test]
fn a_load_is_told_when_its_copies_have_ended() {
    let device = device!();
    let pair = pair(&device, |_| {});
    let prompt = prompt(6, 100);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &from);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    let gate = Gate::before(&pair.decode.stream);
    let request = LoadRequest { load: LoadId(1), claim, first_chunk: 0, chunks: 2 };
    let stream = pair.decode.engine_stream();
    pair.decode.agent.load_on(request, vec![to.clone()], &stream).unwrap();
    // Each answer is a turn of the agent, which by then has done with the load all that it can.
    let mut loaded = Vec::new();
    for _ in 0..20 {
        pair.decode.agent.stats().unwrap();
        pair.decode.agent.poll(&mut loaded);
        assert!(loaded.is_empty(), "told before anything was copied: {loaded:?}");
    }
    gate.open();
    let loaded = pair.decode.until(|engine| {
        engine.agent.poll(&mut loaded);
        loaded.pop()
    });
    assert_eq!(loaded.result, Ok(()));
    assert!(pair.decode.holds(&prompt, &to));
}

#[test]
fn blocks_that_are_not_wanted_stay_as_they_are_and_are_verified() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(7, 128);
    let (from, mut to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &from);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    pair.decode.poison();
    let kept = std::mem::replace(&mut to[1], NO_BLOCK);
    let loaded = pair.decode.load(claim, &prompt, &to);
    assert_eq!((loaded.result, loaded.tokens), (Ok(()), 112));
    assert!(pair.decode.holds(&prompt, &to));
    let ptr = pair.decode.memory[0].ptr().offset(u64::from(kept * BLOCK_BYTES));
    assert!(get(&device, ptr, BLOCK_BYTES as usize).iter().all(|&byte| byte == 0xEE));
}

/// An engine that overwrites blocks without having heard that they are not read any more.
#[test]
fn blocks_are_written_to_again_only_after_the_reads_that_began_and_the_others_never_begin() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    for seed in 10..20 {
        let prompt = prompt(seed, 700);
        let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
        let offer = pair.prefill.offer(&prompt);
        pair.prefill.step(offer, &prompt, &from);
        pair.prefill.agent.reads_done_on(&pair.prefill.engine_stream()).unwrap();
        for layer in 0..LAYERS {
            pair.prefill.compute(&[9, 9, 9], &from, layer);
        }
        // Each chunk is the prompt's KV, or not there.
        let claim = pair.decode.claim(&prompt);
        let status = pair.decode.until(|engine| {
            let settled = |status: &ClaimStatus| {
                matches!(status.next, Next::Done | Next::Lost | Next::Missing)
            };
            engine.observer.status(claim).filter(settled)
        });
        if status.next == Next::Done {
            assert_eq!(pair.decode.load(claim, &prompt, &to).result, Ok(()));
            assert!(pair.decode.holds(&prompt, &to), "seed {seed}");
        } else {
            pair.decode.observer.release(claim, 0, 0);
        }
        drain(&pair.prefill.stream);
    }
    assert_eq!(pair.decode.agent.stats().unwrap().consumer.corrupt, 0);
}

#[test]
fn what_was_not_started_is_voided_for_good() {
    let device = device!();
    let pair = pair(&device, |_| {});
    let prompt = prompt(8, 700);
    let from = blocks(&prompt, 7);
    let gate = Gate::before(&pair.prefill.stream);
    // Offered and read by nobody yet: the consumer's grants come later than the engine's change of mind.
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &from);
    let other = pair.prefill.device.stream(Priority::Default).unwrap();
    // SAFETY: the stream lives to the end of this test.
    let engine = unsafe { pair.prefill.agent.engine_stream(other.handle()) }.unwrap();
    pair.prefill.agent.reads_done_on(&engine).unwrap();
    gate.open();
    pair.prefill.until_pushed(offer, 11);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until(|engine| {
        let status = engine.observer.status(claim)?;
        matches!(status.next, Next::Done | Next::Lost | Next::Missing).then_some(())
    });
    drain(&other);
}

#[test]
fn a_captured_stream_is_refused_and_stays_captured() {
    let device = device!();
    let pair = pair(&device, |_| {});
    let stream = pair.prefill.engine_stream();
    let mut errors = Vec::new();
    pair.prefill
        .stream
        .capture(|| {
            errors.push(pair.prefill.agent.layer_ready_on(0, &stream).unwrap_err());
            errors.push(pair.prefill.agent.end_step_on(&stream).unwrap_err());
            errors.push(pair.prefill.agent.reads_done_on(&stream).unwrap_err());
        })
        .unwrap();
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("captur"), "{error}");
    }
    pair.prefill.agent.end_step_on(&stream).unwrap();
}

#[test]
fn calls_that_do_not_fit_the_memory_are_refused_by_name() {
    let device = device!();
    let pair = pair(&device, |_| {});
    assert_eq!(pair.prefill.agent.layer_ready(0).unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(pair.prefill.agent.end_step().unwrap_err().kind(), ErrorKind::Config);
    let mut wrong = config(Role::Consumer, &pair._folder.0);
    wrong.require_path = Some("shm".into());
    let error = Agent::start(wrong).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("kv_buffer_device"), "{error}");
}

#[test]
fn kv_in_host_memory_and_a_pool_on_a_gpu_do_not_meet() {
    let device = device!();
    let folder = Folder::new();
    let decode = Engine::start(&device, config(Role::Consumer, &folder.0));
    let mut producer = config(Role::Producer, &folder.0);
    producer.memory = Memory::Host;
    producer.peers = vec![decode.tcp()];
    let agent = Agent::start(producer).unwrap();
    let mut memory = vec![vec![0_u64; (BLOCKS * BLOCK_BYTES / 8) as usize]; LAYERS];
    let layer = |memory: &mut Vec<u64>| KvLayer {
        address: memory.as_mut_ptr().addr(),
        blocks: BLOCKS,
        stride: BLOCK_BYTES.into(),
    };
    // SAFETY: the memory outlives the agent.
    unsafe { agent.register(memory.iter_mut().map(layer).collect()) }.unwrap();
    assert!(!agent.wait_connected(Duration::from_millis(500)));
    let claim = decode.claim(&prompt(1, 100));
    decode.until_claimed(claim, Next::NoProducer);
    agent.close().unwrap();
}

#[cfg(feature = "faults")]
#[test]
fn wrong_bytes_in_the_pool_are_caught() {
    let device = device!();
    let flip = |config: &mut AgentConfig| config.fault = Some(kvxfer_cuda::Fault::FlipAfterCommit);
    let mut pair = pair(&device, flip);
    let prompt = prompt(1, 100);
    let offer = pair.prefill.offer(&prompt);
    pair.prefill.step(offer, &prompt, &blocks(&prompt, 7));
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    let loaded = pair.decode.load(claim, &prompt, &blocks(&prompt, 11));
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::Corrupt);
    pair.decode.until_empty();
}

/// Agents in processes of their own, and all that they had given back.
#[test]
fn nothing_is_left_when_agents_are_closed() {
    if parent("pair-alone").is_some() {
        let device = child_device();
        let mut pair = pair(&device, |_| {});
        let prompt = prompt(1, 500);
        let offer = pair.prefill.offer(&prompt);
        pair.prefill.step(offer, &prompt, &blocks(&prompt, 7));
        let claim = pair.decode.claim(&prompt);
        pair.decode.until_claimed(claim, Next::Done);
        assert_eq!(pair.decode.load(claim, &prompt, &blocks(&prompt, 11)).result, Ok(()));
        // With loads and pushes under way.
        let next = self::prompt(2, 500);
        let offer = pair.prefill.offer(&next);
        pair.prefill.step(offer, &next, &blocks(&next, 7));
        drop(pair);
        drop(device);
        return assert_nothing_lives();
    }
    let _lease = device!();
    let peer = Peer::start("pair::nothing_is_left_when_agents_are_closed", "pair-alone");
    peer.succeeds();
}

/// Not a test by itself: a prefill engine, which computes one prompt for each word and says so.
#[test]
fn child_prefill() {
    let Some(mut wire) = parent("pair-prefill") else { return };
    let device = child_device();
    let (folder, consumer) = (wire.hear(), wire.hear());
    let mut config = config(Role::Producer, Path::new(&folder));
    config.peers = vec![consumer.parse().unwrap()];
    let engine = Engine::start(&device, config);
    assert!(engine.agent.wait_connected(DEADLINE));
    wire.say("ready");
    let mut gate = None;
    loop {
        let order = wire.hear();
        let (word, seed) = order.split_once(' ').unwrap();
        if word == "end" {
            return;
        }
        if word == "hold" {
            gate = Some(Gate::before(&engine.stream));
        }
        let prompt = prompt(seed.parse().unwrap(), 500);
        let offer = engine.offer(&prompt);
        engine.step(offer, &prompt, &blocks(&prompt, 7));
        wire.say("computed");
        if gate.is_none() {
            engine.until_pushed(offer, 8);
            wire.say("pushed");
        }
    }
}

fn prefill(decode: &Engine, folder: &Folder) -> Peer {
    let mut peer = Peer::start("pair::child_prefill", "pair-prefill");
    peer.wire.say(&folder.0.display().to_string());
    peer.wire.say(&decode.tcp().to_string());
    assert_eq!(peer.wire.hear(), "ready");
    peer
}

#[test]
fn kv_gets_from_one_process_to_the_other() {
    let device = device!();
    let folder = Folder::new();
    let mut decode = Engine::start(&device, config(Role::Consumer, &folder.0));
    let mut peer = prefill(&decode, &folder);
    for seed in 1..6 {
        let prompt = prompt(seed, 500);
        let to = blocks(&prompt, 11);
        peer.wire.say(&format!("go {seed}"));
        assert_eq!(peer.wire.hear(), "computed");
        let claim = decode.claim(&prompt);
        decode.until_claimed(claim, Next::Done);
        let loaded = decode.load(claim, &prompt, &to);
        assert_eq!((loaded.result, loaded.path.as_str()), (Ok(()), "cuda_ipc (same GPU)"));
        assert!(decode.holds(&prompt, &to));
        assert_eq!(peer.wire.hear(), "pushed");
    }
    decode.until_empty();
    peer.wire.say("end 0");
    peer.succeeds();
}

#[test]
fn a_producer_killed_in_the_middle_is_fenced_by_fresh_memory_and_a_new_one_serves() {
    let device = device!();
    let folder = Folder::new();
    let mut decode = Engine::start(&device, config(Role::Consumer, &folder.0));
    let mut peer = prefill(&decode, &folder);
    peer.wire.say("hold 1");
    assert_eq!(peer.wire.hear(), "computed");
    let text = prompt(1, 500);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Writing);
    peer.kill();
    decode.until_claimed(claim, Next::Lost);
    decode.until_empty();
    let stats = decode.agent.stats().unwrap();
    assert!(stats.consumer.replaced_segments > 0, "a death is no fence yet: {stats:?}");

    let mut again = prefill(&decode, &folder);
    again.wire.say("go 1");
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    assert_eq!(decode.load(claim, &text, &blocks(&text, 11)).result, Ok(()));
    assert!(decode.holds(&text, &blocks(&text, 11)));
    again.wire.say("end 0");
}

/// A GPU that fails takes nobody down: loads and pushes end with errors, and agents close.
#[test]
fn a_device_that_fails_fails_its_loads_and_pushes_and_nothing_else() {
    if parent("pair-sticky").is_some() {
        let device = child_device();
        let pair = pair(&device, |_| {});
        let stream = pair.prefill.engine_stream();
        // The side stream cannot wait for the engine's any more, and with that the device is lost.
        let failed = (0..50).any(|seed| {
            let prompt = prompt(seed, 500);
            let offer = pair.prefill.offer(&prompt);
            let range =
                PushRange::new(pair.prefill.agent.layout(), offer, 0, &[blocks(&prompt, 7)]);
            pair.prefill.agent.begin_step(vec![range.unwrap()]).unwrap();
            let ended = pair.prefill.agent.end_step_on(&stream);
            std::thread::sleep(Duration::from_millis(10));
            let stats = pair.prefill.agent.stats().unwrap();
            ended.is_err() || stats.producer.failed_posts > 0
        });
        assert!(failed);
        assert!(!pair.prefill.agent.is_stopped() && !pair.decode.agent.is_stopped());
        // Nothing is freed on a device that is lost: the process ends.
        std::process::exit(0);
    }
    let _lease = device!();
    if !on_standin() {
        return crate::harness::skip("only the stand-in fails when it is told to");
    }
    let config = format!(
        "{};sticky=cuStreamWaitEvent:2:700",
        std::env::var("KVXFER_STANDIN").unwrap_or_default()
    );
    let test = "pair::a_device_that_fails_fails_its_loads_and_pushes_and_nothing_else";
    let peer = Peer::start_with(test, "pair-sticky", &[("KVXFER_STANDIN", &config)]);
    peer.succeeds();
}
