//! A consumer's address, at which another process listens now.

use std::path::Path;

use kvxfer_core::wire::message::Next;

use crate::common::network::{A, B, Network};
use crate::common::{Peer, parent};
use crate::engine::{CHUNK_TOKENS, Engine, PATIENCE, blocks, prompt};
use crate::tempdir::TempDir;
use crate::{of_host, path, until_empty};

/// A decode engine in a process of its own, on host A.
struct Decode {
    process: Peer,
    _dir: TempDir,
}

impl Decode {
    fn start(network: &Network) -> Self {
        let dir = TempDir::new();
        let mut process = network.inside(A, || Peer::start("reused::child_decode", "decode"));
        process.wire.say(&dir.path().display().to_string());
        let mut decode = Self { process, _dir: dir };
        decode.expect("ready");
        decode
    }

    fn expect(&mut self, what: &str) {
        assert_eq!(self.process.wire.hear(), what);
    }
}

/// Not a test: what the child process does, until it is killed or its parent goes away.
#[test]
fn child_decode() {
    let Some(mut wire) = parent("decode") else { return };
    let mut engine = Engine::start(of_host(A, Path::new(&wire.hear()), "at that address"));
    wire.say("ready");
    while let Some([seed, wanted]) = wire.order() {
        let text = prompt(seed.into(), 1000);
        let claim = engine.claim(&text);
        if wanted == 0 {
            engine.until_claimed(claim, Next::Writing);
            wire.say("writing");
            continue;
        }
        engine.until_claimed(claim, Next::Done);
        let to = blocks(&text, 11);
        assert_eq!(engine.load(claim, &text, &to).result, Ok(()));
        assert!(engine.holds(&text, &to));
        until_empty(&engine);
        let stats = engine.agent.stats().unwrap();
        wire.say(&format!(
            "{} committed, {} corrupt",
            stats.consumer.committed, stats.consumer.corrupt
        ));
    }
}

/// The first consumer dies unseen, so that the producer's connections still stand when it meets the second.
#[test]
fn another_process_at_a_consumers_address_is_another_consumer_and_gets_nothing_meant_for_the_first()
{
    let Some(network) = Network::new() else { return };
    let dir = TempDir::new();
    let mut first = Decode::start(&network);
    let prefill = || Engine::start(of_host(B, dir.path(), "of two lives"));
    let mut prefill = network.inside(B, prefill);
    assert!(prefill.agent.wait_connected(PATIENCE));
    let met = path(&prefill).peer;

    let text = prompt(1, 1000);
    let offer = prefill.observer.offer("request", &prefill.chunks(&text));
    first.process.wire.send(&[1, 0]);
    let mut second = None;
    prefill.push_meanwhile(offer, &text, &blocks(&text, 7), |_, layer| {
        if layer == 0 {
            first.expect("writing");
            network.pull();
            first.process.kill();
            second = Some(Decode::start(&network));
            network.plug();
        }
    });
    let mut second = second.unwrap();
    let found = prefill.until(|engine| {
        let paths = engine.agent.stats().unwrap().paths;
        paths.into_iter().map(|path| path.peer).find(|&peer| peer != met)
    });
    assert_ne!(found, met);

    let text = prompt(2, 1000);
    second.process.wire.send(&[2, 1]);
    prefill.prefill(&text, &blocks(&text, 7));
    second.expect(&format!("{} committed, 0 corrupt", 1000_u32.div_ceil(CHUNK_TOKENS)));
    let peers: Vec<_> = prefill.agent.stats().unwrap().paths.iter().map(|path| path.peer).collect();
    assert_eq!(peers, [found]);
    second.process.ends();
}
