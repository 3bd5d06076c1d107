//! The prefill engine in a process of its own, which can be killed, stopped and started again.
//!
//! The child is this test binary, told to be a prefill engine. It computes one prompt for each that it is told,
//! and says so.

use std::path::Path;
use std::time::Duration;

use kvxfer_core::path::PathName;
use kvxfer_core::wire::message::Next;
use kvxfer_cuda::{Address, Role};

use crate::common::{Peer, parent};
use crate::engine::{self, Engine, PATIENCE, config};
use crate::{blocks, prompt, tempdir::TempDir};

struct Prefill(Peer);

impl Prefill {
    fn start(dir: &Path, consumer: &Address, fault: &str) -> Self {
        let mut prefill = Self(Peer::start("processes::child_prefill", "prefill"));
        for word in [&*dir.display().to_string(), &*consumer.to_string(), fault] {
            prefill.0.wire.say(word);
        }
        prefill.expect("ready");
        prefill
    }

    fn expect(&mut self, what: &str) {
        assert_eq!(self.0.wire.hear(), what);
    }

    /// `computed` once the KV is there and the agent was told; `pushed` once no block is read any more.
    fn compute(&mut self, seed: u32, tokens: u32) {
        self.0.wire.say(&format!("{seed} {tokens}"));
        self.expect("computed");
    }
}

/// Not a test: what the child process does, until it is killed.
#[test]
fn child_prefill() {
    let Some(mut wire) = parent("prefill") else { return };
    let (dir, consumer, fault) = (wire.hear(), wire.hear(), wire.hear());
    let mut config = config(Role::Producer, Path::new(&dir));
    config.peers = vec![consumer.parse().unwrap()];
    config.hold = PATIENCE;
    #[cfg(feature = "faults")]
    {
        config.fault = (fault == "hold-commit").then_some(kvxfer_cuda::Fault::HoldCommit);
    }
    let mut engine = Engine::start(config);
    wire.say("ready");
    loop {
        let order = wire.hear();
        let numbers: Vec<u32> = order.split(' ').map(|word| word.parse().unwrap()).collect();
        let prompt = prompt(numbers[0], numbers[1]);
        let offer = engine.prefill(&prompt, &blocks(&prompt, 7));
        wire.say("computed");
        if fault.is_empty() {
            engine.until_pushed(offer, prompt.len().div_ceil(engine::CHUNK_TOKENS as usize));
            wire.say("pushed");
        }
    }
}

fn decode(dir: &TempDir) -> Engine {
    decode_by(dir, None)
}

fn decode_by(dir: &TempDir, path: Option<PathName>) -> Engine {
    let mut config = config(Role::Consumer, dir.path());
    config.require_path = path;
    config.silence = Duration::from_secs(2);
    config.fence_timeout = Duration::from_secs(1);
    Engine::start(config)
}

fn until_empty(decode: &Engine) {
    decode.until(|engine| {
        let stats = engine.agent.stats().unwrap();
        (stats.pool.free == stats.pool.pages && stats.pages_leaked == 0).then_some(())
    });
}

#[test]
fn another_process_is_reached_by_shared_memory() {
    let dir = TempDir::new();
    let mut decode = decode(&dir);
    let mut prefill = Prefill::start(dir.path(), &decode.tcp(), "");
    for (seed, tokens) in [(1, 1), (2, 640), (3, 1500)] {
        let prompt = prompt(seed, tokens);
        let to = blocks(&prompt, 11);
        prefill.compute(seed, tokens);
        let claim = decode.claim(&prompt);
        decode.until_claimed(claim, Next::Done);
        let loaded = decode.load(claim, &prompt, &to);
        assert_eq!((loaded.result, loaded.path.as_str()), (Ok(()), "shm"));
        assert!(decode.holds(&prompt, &to));
        prefill.expect("pushed");
    }
    until_empty(&decode);
}

#[cfg(feature = "faults")]
#[test]
fn a_killed_producer_is_fenced_by_its_death_and_a_new_one_serves() {
    let dir = TempDir::new();
    let mut decode = decode(&dir);
    let mut prefill = Prefill::start(dir.path(), &decode.tcp(), "hold-commit");
    let text = prompt(5, 1000);
    prefill.compute(5, 1000);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Writing);
    prefill.0.signal(rustix::process::Signal::KILL);
    decode.until_claimed(claim, Next::Lost);
    let loaded = decode.load(claim, &text, &blocks(&text, 11));
    assert_eq!(loaded.result.unwrap_err().kind(), kvxfer_core::ErrorKind::PeerLost);
    until_empty(&decode);
    assert_eq!(decode.agent.stats().unwrap().consumer.replaced_segments, 0);

    let mut again = Prefill::start(dir.path(), &decode.tcp(), "");
    again.compute(5, 1000);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    assert_eq!(decode.load(claim, &text, &blocks(&text, 11)).result, Ok(()));
    assert!(decode.holds(&text, &blocks(&text, 11)));
}

#[cfg(feature = "faults")]
#[test]
fn a_stopped_producer_is_fenced_by_fresh_memory() {
    let dir = TempDir::new();
    let decode = decode(&dir);
    let mut prefill = Prefill::start(dir.path(), &decode.tcp(), "hold-commit");
    let text = prompt(5, 1000);
    prefill.compute(5, 1000);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Writing);
    prefill.0.signal(rustix::process::Signal::STOP);
    // Silence ends the link, and frees nothing: the process lives.
    decode.until_claimed(claim, Next::Lost);
    until_empty(&decode);
    assert!(decode.agent.stats().unwrap().consumer.replaced_segments > 0);
    prefill.0.signal(rustix::process::Signal::CONT);
}

/// Nothing has to be put behind the pages: what it still sends is not received any more.
#[cfg(feature = "faults")]
#[test]
fn a_stopped_producer_that_sends_over_sockets_is_fenced_by_closing_them() {
    let dir = TempDir::new();
    let mut decode = decode_by(&dir, Some(PathName::Tcp));
    let mut prefill = Prefill::start(dir.path(), &decode.tcp(), "hold-commit");
    let text = prompt(5, 1000);
    prefill.compute(5, 1000);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Writing);
    prefill.0.signal(rustix::process::Signal::STOP);
    decode.until_claimed(claim, Next::Lost);
    until_empty(&decode);
    assert_eq!(decode.agent.stats().unwrap().consumer.replaced_segments, 0);

    let mut other = Prefill::start(dir.path(), &decode.tcp(), "");
    prefill.0.signal(rustix::process::Signal::CONT);
    other.compute(6, 1000);
    let text = prompt(6, 1000);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    let loaded = decode.load(claim, &text, &blocks(&text, 11));
    assert_eq!((loaded.result, loaded.path.as_str()), (Ok(()), "tcp"));
    assert!(decode.holds(&text, &blocks(&text, 11)));
}
