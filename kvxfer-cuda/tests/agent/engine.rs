//! A model engine: KV memory of its own, an agent, an observer.

use std::time::{Duration, Instant};

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::wire::message::{Chunk, ClaimStatus, Next};
use kvxfer_core::{BlockId, ClaimId, LoadId, OfferId};
use kvxfer_cuda::{Address, Agent, AgentConfig, KvLayer, Loaded, ObserverHandle, Role};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const BLOCK_TOKENS: u32 = 16;
pub(crate) const CHUNK_TOKENS: u32 = 64;
pub(crate) const LAYERS: usize = 3;
pub(crate) const BLOCK_BYTES: u32 = 1024;
pub(crate) const BLOCKS: u32 = 256;

pub(crate) fn layout() -> KvLayout {
    KvLayout {
        model: "model of the tests".into(),
        dtype: "bytes".into(),
        chunk_tokens: CHUNK_TOKENS,
        shard: (0, 1),
        groups: vec![Group { block_tokens: BLOCK_TOKENS, block_bytes: vec![BLOCK_BYTES; LAYERS] }],
        tags: [].into(),
    }
}

pub(crate) fn prompt(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| at.wrapping_mul(2_654_435_761) ^ seed).collect()
}

/// Scattered, so that runs of one block are the rule.
pub(crate) fn blocks(tokens: &[u32], stride: u32) -> Vec<BlockId> {
    let count = (tokens.len() as u32).div_ceil(BLOCK_TOKENS);
    (0..count).map(|at| (at * stride + 3) % BLOCKS).collect()
}

pub(crate) struct Engine {
    pub(crate) agent: Agent,
    pub(crate) observer: ObserverHandle,
    keys: Keyspace,
    memory: Vec<Box<[u64]>>,
    next_load: u64,
}

pub(crate) fn config(role: Role, dir: &std::path::Path) -> AgentConfig {
    let mut config = AgentConfig::new(role, layout());
    config.socket_dir = dir.into();
    config.name = format!("{role:?}");
    config.buffer_size = 4 << 20;
    config.segments = 4;
    if role.consumes() {
        config.listen = Some("127.0.0.1:0".parse().unwrap());
    }
    config
}

impl Engine {
    pub(crate) fn start(config: AgentConfig) -> Self {
        let agent = Agent::start(config).unwrap();
        let words = BLOCKS as usize * BLOCK_BYTES as usize / 8;
        let mut memory: Vec<Box<[u64]>> =
            (0..LAYERS).map(|_| vec![0u64; words].into_boxed_slice()).collect();
        let layers = memory
            .iter_mut()
            .map(|layer| KvLayer {
                address: layer.as_mut_ptr().addr(),
                blocks: BLOCKS,
                stride: BLOCK_BYTES.into(),
            })
            .collect();
        // SAFETY: `memory` lives until this engine is dropped, which closes the agent first.
        unsafe { agent.register(layers) }.unwrap();
        let address = agent.observer_address().unwrap().clone();
        let observer = ObserverHandle::connect(vec![address], "observer").unwrap();
        Self { agent, observer, keys: Keyspace::new(b"", &layout()), memory, next_load: 0 }
    }

    pub(crate) fn tcp(&self) -> Address {
        let tcp = |address: &&Address| matches!(address, Address::Tcp { .. });
        self.agent.addresses().iter().find(tcp).unwrap().clone()
    }

    pub(crate) fn chunks(&self, tokens: &[u32]) -> Vec<Chunk> {
        self.keys.chain(tokens, &[])
    }

    /// What the model computes for a block: a function of all tokens up to its end.
    pub(crate) fn kv(tokens: &[u32], layer: usize, block: usize, word: usize) -> u64 {
        let end = tokens.len().min((block + 1) * BLOCK_TOKENS as usize);
        let mut value = (layer as u64) << 32 | word as u64;
        for &token in &tokens[..end] {
            value = (value ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
        }
        value
    }

    fn words(&mut self, layer: usize, block: BlockId) -> &mut [u64] {
        let words = BLOCK_BYTES as usize / 8;
        &mut self.memory[layer][block as usize * words..][..words]
    }

    /// Computes a prompt's KV into blocks and pushes it, layer by layer.
    pub(crate) fn prefill(&mut self, tokens: &[u32], blocks: &[BlockId]) -> OfferId {
        let chunks = self.chunks(tokens);
        let offer = self.observer.offer("request", &chunks);
        self.push(offer, tokens, blocks);
        offer
    }

    pub(crate) fn push(&mut self, offer: OfferId, tokens: &[u32], blocks: &[BlockId]) {
        self.push_meanwhile(offer, tokens, blocks, |_, _| {});
    }

    /// The same, with something between each layer and the next.
    pub(crate) fn push_meanwhile(
        &mut self,
        offer: OfferId,
        tokens: &[u32],
        blocks: &[BlockId],
        mut meanwhile: impl FnMut(&Self, usize),
    ) {
        let range = PushRange::new(self.agent.layout(), offer, 0, &[blocks]).unwrap();
        self.agent.begin_step(vec![range]).unwrap();
        for layer in 0..LAYERS {
            for (at, &block) in blocks.iter().enumerate() {
                for (word, value) in self.words(layer, block).iter_mut().enumerate() {
                    *value = Self::kv(tokens, layer, at, word);
                }
            }
            self.agent.layer_ready(layer as u32).unwrap();
            meanwhile(self, layer);
        }
        self.agent.end_step().unwrap();
    }

    /// Waits until `what` holds of the observer or the agent.
    pub(crate) fn until<T>(&self, mut what: impl FnMut(&Self) -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            if let Some(found) = what(self) {
                return found;
            }
            assert!(started.elapsed() < PATIENCE, "waited in vain: {:?}", self.agent.stats());
            self.observer.wait(Duration::from_millis(5));
        }
    }

    pub(crate) fn until_pushed(&self, offer: OfferId, chunks: usize) {
        let mut left = chunks;
        self.until(|engine| {
            for (other, done) in engine.observer.pushed() {
                left -= if other == offer { done.len() } else { 0 };
            }
            (left == 0).then_some(())
        });
    }

    pub(crate) fn claim(&self, tokens: &[u32]) -> ClaimId {
        self.observer.claim("request", &self.chunks(tokens), PATIENCE)
    }

    pub(crate) fn until_claimed(&self, claim: ClaimId, next: Next) -> ClaimStatus {
        self.until(|engine| engine.observer.status(claim).filter(|status| status.next == next))
    }

    pub(crate) fn load(&mut self, claim: ClaimId, tokens: &[u32], blocks: &[BlockId]) -> Loaded {
        self.next_load += 1;
        let load = LoadId(self.next_load);
        let chunks = tokens.len().div_ceil(CHUNK_TOKENS as usize) as u32;
        let request = LoadRequest { load, claim, first_chunk: 0, chunks };
        self.agent.load(request, vec![blocks.to_vec()]).unwrap();
        self.until_loaded(load)
    }

    pub(crate) fn until_loaded(&self, load: LoadId) -> Loaded {
        self.until(|engine| {
            let mut loaded = Vec::new();
            engine.agent.poll(&mut loaded);
            assert!(loaded.iter().all(|one| one.load == load), "{loaded:?}");
            loaded.pop()
        })
    }

    /// Whether these blocks hold the prompt's KV.
    pub(crate) fn holds(&mut self, tokens: &[u32], blocks: &[BlockId]) -> bool {
        self.holds_from(0, tokens, blocks)
    }

    /// The same, from the prompt's `first` block on.
    pub(crate) fn holds_from(&mut self, first: usize, tokens: &[u32], blocks: &[BlockId]) -> bool {
        (0..LAYERS).all(|layer| {
            blocks.iter().enumerate().all(|(at, &block)| {
                self.words(layer, block)
                    .iter()
                    .enumerate()
                    .all(|(word, &value)| value == Self::kv(tokens, layer, first + at, word))
            })
        })
    }

    pub(crate) fn poison(&mut self) {
        self.memory.iter_mut().for_each(|layer| layer.fill(u64::MAX));
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Before the memory goes.
        self.agent.close().unwrap();
    }
}
