//! A prompt's KV from one engine to another, both in this process: `cargo run -p kvxfer-examples --example hello`.
//!
//! In real life the two halves below are two processes, on one host, with the same code: the path is then `shm`. And an
//! engine's scheduler (`ObserverHandle`) and its workers (`Agent`, one a rank) are processes of their own as well.

use std::time::Duration;

use kvxfer_core::key::Keyspace;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::session::{LoadRequest, PushRange};
use kvxfer_core::{LoadId, Result};
use kvxfer_cuda::{Agent, AgentConfig, KvLayer, ObserverHandle, Role};

const LAYERS: usize = 4;
const BLOCKS: usize = 128;
const BLOCK_BYTES: usize = 16 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// One engine's KV cache: for each layer, blocks of 16 tokens.
type Cache = Vec<Vec<u8>>;

fn memory(cache: &mut Cache) -> Vec<KvLayer> {
    let layer = |layer: &mut Vec<u8>| KvLayer {
        address: layer.as_mut_ptr().addr(),
        blocks: BLOCKS as u32,
        stride: BLOCK_BYTES as u64,
    };
    cache.iter_mut().map(layer).collect()
}

fn main() -> Result<()> {
    let mut computed: Cache = (1..=LAYERS).map(|l| vec![l as u8; BLOCKS * BLOCK_BYTES]).collect();
    let mut empty: Cache = vec![vec![0; BLOCKS * BLOCK_BYTES]; LAYERS];
    // Anything but in order: an engine's free blocks are scattered.
    let from: Vec<u32> = (0..63).map(|block| block * 37 % 128).collect();
    let to: Vec<u32> = (0..63).map(|block| block * 51 % 128).collect();
    for layer in &mut computed {
        for (at, &block) in from.iter().enumerate() {
            layer[block as usize * BLOCK_BYTES..][..BLOCK_BYTES].fill(at as u8 + 100);
        }
    }

    // README: from here on.
    let group = Group { block_tokens: 16, block_bytes: vec![BLOCK_BYTES as u32; LAYERS] };
    let layout = KvLayout::one_group("my-model", "bfloat16", 256, group);
    let prompt: Vec<u32> = (0..1000).collect();
    let chunks = Keyspace::new(b"", &layout).chain(&prompt, &[]);

    // The decode engine. It owns the memory that prompts arrive in.
    let decode = Agent::start(AgentConfig::new(Role::Consumer, layout.clone()))?;
    // SAFETY: `empty` stays until `close`, and nobody else touches it before the load has ended.
    unsafe { decode.register(memory(&mut empty)) }?;
    let decode_scheduler = ObserverHandle::connect(decode.addresses().to_vec(), "decode")?;

    // The prefill engine. It offers a prompt as soon as it arrives, then pushes what it computes.
    let peers = decode.addresses().to_vec();
    let config = AgentConfig { peers, ..AgentConfig::new(Role::Producer, layout.clone()) };
    let prefill = Agent::start(config)?;
    // SAFETY: `computed` stays until `close`.
    unsafe { prefill.register(memory(&mut computed)) }?;
    let prefill_scheduler = ObserverHandle::connect(prefill.addresses().to_vec(), "prefill")?;
    assert!(prefill.wait_connected(PATIENCE), "no decode engine");
    let offer = prefill_scheduler.offer("request 1", &chunks);
    prefill.begin_step(vec![PushRange::new(&layout, offer, 0, &[from])?])?;
    // The forward pass: after each layer `prefill.layer_ready(layer)`, to send it meanwhile.
    prefill.end_step()?;

    // The decode engine again: what of this prompt is here, or on its way? Into its own blocks with it.
    let claim = decode_scheduler.claim("request 1", &chunks, PATIENCE);
    let status = decode_scheduler.settled(claim, PATIENCE).expect("an answer in time");
    let all = LoadRequest { load: LoadId(1), claim, first_chunk: 0, chunks: status.ready };
    decode.load(all, vec![to.clone()])?;
    assert!(decode.wait(PATIENCE), "not loaded in time");
    let mut loaded = Vec::new();
    decode.poll(&mut loaded);
    // README: to here.

    prefill_scheduler.close()?;
    decode_scheduler.close()?;
    prefill.close()?;
    decode.close()?;
    loaded[0].result.clone()?;
    for layer in &empty {
        for (at, &block) in to.iter().enumerate() {
            let bytes = &layer[block as usize * BLOCK_BYTES..][..BLOCK_BYTES];
            assert!(bytes.iter().all(|&byte| byte == at as u8 + 100), "block {block} is wrong");
        }
    }
    let (done, ms) = (&loaded[0], loaded[0].seconds * 1e3);
    println!("{} tokens, {} bytes by {} in {ms:.2} ms", done.tokens, done.bytes, done.path);
    Ok(())
}
