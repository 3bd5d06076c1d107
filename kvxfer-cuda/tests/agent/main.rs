//! Agents and observers, engines being models of ours: whole requests over real sockets and memory.

#[path = "../common/mod.rs"]
mod common;
mod engine;
mod logs;
mod paths;
mod processes;
mod refusals;
#[cfg(feature = "faults")]
mod table;
mod tempdir;

use std::time::Duration;

use engine::{CHUNK_TOKENS, Engine, PATIENCE, blocks, config, prompt};
use kvxfer_core::session::LoadRequest;
use kvxfer_core::wire::message::Next;
use kvxfer_core::{ErrorKind, LoadId};
use kvxfer_cuda::Role;

struct Pair {
    prefill: Engine,
    decode: Engine,
    _dir: tempdir::TempDir,
}

fn pair(change: impl Fn(&mut kvxfer_cuda::AgentConfig)) -> Pair {
    let dir = tempdir::TempDir::new();
    let mut consumer = config(Role::Consumer, dir.path());
    change(&mut consumer);
    let decode = Engine::start(consumer);
    let mut producer = config(Role::Producer, dir.path());
    producer.peers = vec![decode.tcp()];
    change(&mut producer);
    Pair { prefill: Engine::start(producer), decode, _dir: dir }
}

#[test]
fn a_prompt_gets_from_one_engine_to_the_other() {
    let mut pair = pair(|_| {});
    for (seed, tokens) in [(1, 1), (2, 16), (3, 17), (4, 64), (5, 65), (6, 1000)] {
        let prompt = prompt(seed, tokens);
        let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
        pair.decode.poison();
        let offer = pair.prefill.prefill(&prompt, &from);
        let claim = pair.decode.claim(&prompt);
        let status = pair.decode.until_claimed(claim, Next::Done);
        assert_eq!(status.ready, tokens.div_ceil(CHUNK_TOKENS));
        let loaded = pair.decode.load(claim, &prompt, &to);
        assert_eq!(loaded.result, Ok(()));
        assert_eq!(loaded.tokens, u64::from(tokens));
        assert_eq!(loaded.path, "local");
        assert!(pair.decode.holds(&prompt, &to), "{tokens} tokens");
        pair.prefill.until_pushed(offer, status.ready as usize);
    }
    let stats = pair.decode.agent.stats().unwrap();
    assert_eq!((stats.pool.free, stats.pages_leaked), (stats.pool.pages, 0), "{stats:?}");
}

#[test]
fn waiting_ends_with_what_was_waited_for_or_with_the_time() {
    let mut pair = pair(|_| {});
    assert!(pair.decode.agent.wait_connected(Duration::ZERO), "it dials nobody");
    assert!(pair.prefill.agent.wait_connected(PATIENCE));
    let prompt = prompt(1, 100);
    let blocks = blocks(&prompt, 7);
    let offer = pair.prefill.observer.offer("request", &pair.prefill.chunks(&prompt));
    let claim = pair.decode.claim(&prompt);
    let status = pair.decode.observer.settled(claim, Duration::from_millis(20));
    assert!(status.is_none_or(|status| status.ready == 0 && status.next != Next::Done));
    assert!(!pair.decode.agent.wait(Duration::from_millis(1)), "nothing was loaded");
    pair.prefill.push(offer, &prompt, &blocks);
    let status = pair.decode.observer.settled(claim, PATIENCE).unwrap();
    assert_eq!((status.ready, status.next), (2, Next::Done));

    let request = LoadRequest { load: LoadId(1), claim, first_chunk: 0, chunks: 2 };
    pair.decode.agent.load(request, vec![blocks.clone()]).unwrap();
    assert!(pair.decode.agent.wait(PATIENCE));
    let mut loaded = Vec::new();
    pair.decode.agent.poll(&mut loaded);
    assert_eq!(loaded[0].result, Ok(()));
    assert!(pair.decode.holds(&prompt, &blocks));

    pair.decode.agent.close().unwrap();
    assert!(!pair.decode.agent.wait(PATIENCE), "a closed agent keeps nobody waiting");
}

#[test]
fn a_pool_smaller_than_the_prompt_lets_it_through_in_windows() {
    let page = u64::from(engine::BLOCK_BYTES) * engine::LAYERS as u64;
    let mut pair = pair(|config| {
        // Room for three chunks; the prompt has sixteen.
        config.buffer_size = page * 12;
        config.segments = 1;
    });
    let prompt = prompt(9, 1000);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    let offer = pair.prefill.prefill(&prompt, &from);
    let claim = pair.decode.claim(&prompt);
    let status = pair.decode.until_claimed(claim, Next::Stalled);
    assert!(status.ready < 16 && status.coming == 16, "{status:?}");
    let loaded = pair.decode.load(claim, &prompt, &to);
    assert_eq!(loaded.result, Ok(()));
    assert!(pair.decode.holds(&prompt, &to));
    pair.prefill.until_pushed(offer, 16);
}

#[test]
fn what_nobody_offers_is_missing_after_one_question() {
    let pair = pair(|_| {});
    pair.prefill.until(|engine| (engine.agent.stats().unwrap().links == 2).then_some(()));
    let claim = pair.decode.claim(&prompt(1, 100));
    pair.decode.until_claimed(claim, Next::Missing);
}

/// An engine that has the first chunk in a cache of its own.
#[test]
fn a_load_begins_with_the_chunk_it_names() {
    let mut pair = pair(|_| {});
    let prompt = prompt(1, 150);
    let mut to = blocks(&prompt, 11);
    pair.prefill.prefill(&prompt, &blocks(&prompt, 7));
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    pair.decode.poison();
    let own = to.drain(..4).collect::<Vec<_>>();
    let request = LoadRequest { load: LoadId(1), claim, first_chunk: 1, chunks: 2 };
    pair.decode.agent.load(request, vec![to.clone()]).unwrap();
    let loaded = pair.decode.until_loaded(LoadId(1));
    assert_eq!((loaded.result, loaded.tokens), (Ok(()), 86));
    assert!(pair.decode.holds_from(4, &prompt, &to));
    assert!(!pair.decode.holds(&prompt, &own), "the first chunk was left alone");
}

#[test]
fn a_load_of_what_is_not_claimed_fails_once() {
    let mut pair = pair(|_| {});
    let prompt = prompt(1, 100);
    let nobody = kvxfer_core::ClaimId(12345);
    let loaded = pair.decode.load(nobody, &prompt, &blocks(&prompt, 7));
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::NotFound);
}

#[cfg(feature = "faults")]
#[test]
fn a_byte_that_flips_in_the_pool_is_caught() {
    let mut pair = pair(|config| config.fault = Some(kvxfer_cuda::Fault::FlipAfterCommit));
    let prompt = prompt(1, 100);
    pair.prefill.prefill(&prompt, &blocks(&prompt, 7));
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    let loaded = pair.decode.load(claim, &prompt, &blocks(&prompt, 11));
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::Corrupt);
    let stats = pair.decode.agent.stats().unwrap();
    assert_eq!((stats.pool.free, stats.consumer.corrupt), (stats.pool.pages, 2), "{stats:?}");
}
