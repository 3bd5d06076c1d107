//! Whole agents on a GPU: an engine's KV from layer to layer into another engine's blocks, in one process and in two.
//!
//! The engines are models: what they compute for a block follows from the prompt's tokens, and is put into device
//! memory by work in a stream of theirs, which a gate can hold back.

mod engine;
mod processes;
mod stuck;

use std::time::Duration;

use kvxfer_core::path::PathName;
use kvxfer_core::wire::message::{ClaimStatus, Next};
use kvxfer_core::{ErrorKind, NO_BLOCK};
use kvxfer_cuda::driver::Priority;
use kvxfer_cuda::{Agent, KvLayer, Memory, Role};

use crate::harness::{Gate, device, drain, get};
use engine::{BLOCK_BYTES, BLOCKS, Engine, Folder, LAYERS, blocks, config, pair, prompt};

#[test]
fn kv_gets_from_one_engine_to_the_other() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    for (seed, tokens) in [(1, 1), (2, 16), (3, 65), (4, 700)] {
        let prompt = prompt(seed, tokens);
        let to = blocks(&prompt, 11);
        pair.decode.poison();
        let claim = pair.pushed_and_claimed(&prompt);
        let loaded = pair.decode.load(claim, &prompt, &to);
        assert_eq!((loaded.result, loaded.tokens), (Ok(()), u64::from(tokens)));
        assert_eq!(loaded.path, "cuda_ipc (same GPU)");
        assert!(pair.decode.holds(&prompt, &to), "{tokens} tokens");
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

/// A load waits for the stream that may still use the blocks, and is told when its copies have ended.
#[test]
fn a_load_begins_behind_the_engines_stream_and_is_told_at_its_end() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(6, 100);
    let to = blocks(&prompt, 11);
    let claim = pair.pushed_and_claimed(&prompt);
    // What the engine still writes there comes first, and is overwritten by the load.
    let gate = Gate::before(&pair.decode.stream);
    for layer in 0..LAYERS {
        pair.decode.compute(&[9, 9, 9], &to, layer);
    }
    pair.decode.begin_load(claim, &prompt, &to);
    // Each answer is a turn of the agent, which by then has done with the load all that it can.
    for _ in 0..20 {
        pair.decode.agent.stats().unwrap();
        let loaded = pair.decode.loaded();
        assert!(loaded.is_none(), "told before anything was copied: {loaded:?}");
    }
    gate.open();
    assert_eq!(pair.decode.until(Engine::loaded).result, Ok(()));
    drain(&pair.decode.stream);
    assert!(pair.decode.holds(&prompt, &to));
}

#[test]
fn blocks_that_are_not_wanted_stay_as_they_are_and_are_verified() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(7, 128);
    let mut to = blocks(&prompt, 11);
    let claim = pair.pushed_and_claimed(&prompt);
    pair.decode.poison();
    let kept = std::mem::replace(&mut to[1], NO_BLOCK);
    let loaded = pair.decode.load(claim, &prompt, &to);
    assert_eq!((loaded.result, loaded.tokens), (Ok(()), 112));
    assert!(pair.decode.holds(&prompt, &to));
    let ptr = pair.decode.memory[0].ptr().offset(u64::from(kept * BLOCK_BYTES));
    assert!(get(&device, ptr, BLOCK_BYTES as usize).iter().all(|&byte| byte == 0xEE));
}

/// What of a load can be copied is copied; the load is as its worst chunk all the same.
#[test]
fn a_load_into_blocks_that_are_not_there_fails() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(7, 128);
    for at in [0, 7] {
        let mut to = blocks(&prompt, 11);
        to[at] = BLOCKS;
        let claim = pair.pushed_and_claimed(&prompt);
        let error = pair.decode.load(claim, &prompt, &to).result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{error}");
    }
    pair.decode.until_empty();
}

/// 48 copies each, and 4096 are taken at a time.
#[test]
fn loads_for_which_there_is_no_room_yet_wait() {
    let device = device!();
    let mut pair = pair(&device, |_| {});
    let prompt = prompt(7, 1024);
    let to = blocks(&prompt, 11);
    let last = pair.pushed_and_claimed(&prompt);
    let claims: Vec<_> = (0..100).map(|_| pair.decode.claim(&prompt)).collect();
    let gate = Gate::before(&pair.decode.stream);
    for claim in claims {
        pair.decode.until_claimed(claim, Next::Done);
        pair.decode.begin_load(claim, &prompt, &vec![NO_BLOCK; to.len()]);
    }
    pair.decode.begin_load(last, &prompt, &to);
    pair.decode.agent.stats().unwrap();
    gate.open();
    let mut loaded = Vec::new();
    pair.decode.until(|engine| {
        engine.agent.poll(&mut loaded);
        (loaded.len() == 101).then_some(())
    });
    assert!(loaded.iter().all(|load| load.result == Ok(())), "{loaded:?}");
    assert!(pair.decode.holds(&prompt, &to));
    pair.decode.until_empty();
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
    pair.prefill.until_pushed(offer, &prompt);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until(|engine| {
        let status = engine.observer.status(claim)?;
        matches!(status.next, Next::Done | Next::Lost | Next::Missing).then_some(())
    });
    drain(&other);
}

/// A probe that waits behind what the engine has voided is no read of the engine's blocks: it is sent all the same.
#[test]
fn a_probe_outlives_what_is_voided() {
    let device = device!();
    // A segment has room for four chunks, whose launches are at least as many as there can be.
    let pair = pair(&device, |config| {
        config.buffer_size = 32 * u64::from(BLOCK_BYTES) * LAYERS as u64;
    });
    let gate = Gate::before(&pair.prefill.stream);
    for seed in 0..5 {
        let prompt = prompt(seed, 64);
        let offer = pair.prefill.offer(&prompt);
        // Of its own: the others' are still read.
        let from: Vec<_> = (4 * seed..4 * seed + 4).collect();
        pair.prefill.step(offer, &prompt, &from);
        let posts = u64::from(seed + 1) * LAYERS as u64;
        pair.prefill.until(|engine| (engine.agent.stats().unwrap().posts == posts).then_some(()));
    }
    // The fifth chunk's segment is the second one, whose probe came before its posts.
    let other = device.stream(Priority::Default).unwrap();
    // SAFETY: the stream lives to the end of this test.
    let engine = unsafe { pair.prefill.agent.engine_stream(other.handle()) }.unwrap();
    pair.prefill.agent.reads_done_on(&engine).unwrap();
    gate.open();
    let ended = pair.prefill.until(|engine| {
        let stats = engine.agent.stats().unwrap().producer;
        (stats.committed + stats.skipped == 5).then_some(stats)
    });
    assert!(ended.failed_posts >= LAYERS as u64, "the fifth, at least, was voided: {ended:?}");
    drain(&other);
    // The first segment is full.
    for seed in 5..8 {
        pair.pushed_and_claimed(&prompt(seed, 64));
    }
    // Nor was the link given up, which takes back what was granted by it.
    assert_eq!(pair.decode.agent.stats().unwrap().consumer.revoked, 0);
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
    let mut wrong = config(Role::Consumer, &pair.folder.0);
    wrong.require_path = Some(PathName::Shm);
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
    let mut pair = pair(&device, |config| config.fault = Some(kvxfer_cuda::Fault::FlipAfterCommit));
    let prompt = prompt(1, 100);
    let claim = pair.pushed_and_claimed(&prompt);
    let loaded = pair.decode.load(claim, &prompt, &blocks(&prompt, 11));
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::Corrupt);
    pair.decode.until_empty();
}
