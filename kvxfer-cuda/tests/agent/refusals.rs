//! What is refused, and that it is said once.

use std::time::{Duration, Instant};

use kvxfer_core::wire::message::Next;
use kvxfer_cuda::Role;

use crate::engine::{BLOCK_BYTES, Engine, LAYERS, PATIENCE, config};
use crate::logs::{self, lines};
use crate::{blocks, pair, prompt, tempdir};

/// Half of it at least passes between two dials.
const BACKOFF: Duration = Duration::from_secs(2);

#[test]
fn a_producer_of_another_model_is_refused_by_name_once_an_attempt_and_served_when_that_is_put_right()
 {
    logs::listen();
    let dir = tempdir::TempDir::new();
    let mut consumer = config(Role::Consumer, dir.path());
    consumer.name = "decode of a model".into();
    let mut decode = Engine::start(consumer.clone());
    consumer.listen = Some(decode.tcp());
    let mut producer = config(Role::Producer, dir.path());
    producer.name = "prefill of a model".into();
    producer.peers = vec![decode.tcp()];
    producer.layout.model = "another model".into();
    producer.refused_backoff = BACKOFF;
    let prefill = Engine::start(producer);

    let ours = || lines(&["decode of a model"]);
    let theirs = || lines(&["prefill of a model"]);
    let claim = decode.claim(&prompt(1, 100));
    decode.until_claimed(claim, Next::NoProducer);
    prefill.until(|_| (ours().len() >= 2 && theirs().len() >= 2).then_some(()));
    for line in ours() {
        assert!(line.starts_with("ERROR no KV goes to a consumer; next attempt in "), "{line}");
        let seconds: f64 = line.split(' ').nth(10).unwrap().parse().unwrap();
        assert!(seconds >= BACKOFF.as_secs_f64() / 2.0, "{line}");
    }
    for line in theirs() {
        assert!(line.starts_with("ERROR refused a producer"), "{line}");
    }
    for line in ours().into_iter().chain(theirs()) {
        let field =
            "model: the consumer has \"model of the tests\", the producer \"another model\"";
        assert!(line.contains(field) && line.contains("set model_name"), "{line}");
    }
    assert!(!prefill.agent.wait_connected(Duration::ZERO), "refused is not connected");
    assert_eq!(decode.agent.stats().unwrap().consumer.offered, 0);

    drop(decode);
    consumer.layout.model = "another model".into();
    decode = Engine::start(consumer);
    assert!(prefill.agent.wait_connected(PATIENCE));
    assert_eq!(lines(&["INFO connected to a consumer", "decode of a model"]).len(), 1);
    decode.until(|_| lines(&["INFO a producer connected", "prefill of a model"]).pop());
}

#[test]
fn a_chunk_larger_than_the_pool_is_refused_and_both_logs_say_so_now_and_then() {
    logs::listen();
    let page = u64::from(BLOCK_BYTES) * LAYERS as u64;
    let begun = Instant::now();
    let mut pair = pair(|config| {
        config.buffer_size = page * 3;
        config.segments = 1;
        config.name = format!("{:?} too small", config.role);
    });
    for seed in 0..5 {
        let prompt = prompt(seed, 100);
        let offer = pair.prefill.prefill(&prompt, &blocks(&prompt, 7));
        pair.prefill.until_pushed(offer, 2);
        let claim = pair.decode.claim(&prompt);
        pair.decode.until_claimed(claim, Next::Lost);
    }
    assert_eq!(pair.prefill.agent.stats().unwrap().producer.skipped, 10);
    let says = format!("a chunk of 64 tokens takes {} bytes, and the whole pool", page * 4);
    let fix = format!("has {} (set buffer_size to at least {}", page * 3, page * 4);
    let most = 1 + begun.elapsed().as_secs() as usize / 10;
    for peer in ["Producer too small", "Consumer too small"] {
        let said = lines(&["WARN", peer, &says, &fix]).len();
        assert!((1..=most).contains(&said), "{said} lines about {peer}");
    }
}

/// A path that drops writes and reports success ends the link before anything of it is believed.
#[cfg(feature = "faults")]
#[test]
fn a_path_on_which_writes_do_not_arrive_is_no_path() {
    logs::listen();
    let dir = tempdir::TempDir::new();
    let mut consumer = config(Role::Consumer, dir.path());
    consumer.name = "decode without writes".into();
    let decode = Engine::start(consumer);
    let mut producer = config(Role::Producer, dir.path());
    producer.name = "prefill without writes".into();
    producer.peers = vec![decode.tcp()];
    producer.fault = Some(kvxfer_cuda::Fault::DropWrites);
    let mut prefill = Engine::start(producer);

    let text = prompt(1, 100);
    prefill.prefill(&text, &crate::blocks(&text, 7));
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Lost);
    let line = decode.until(|_| lines(&["prefill without writes", "does not arrive"]).pop());
    assert!(line.starts_with("ERROR refused a producer") && line.contains("by local"), "{line}");
    prefill.until(|_| lines(&["decode without writes", "does not arrive"]).pop());
    let stats = decode.agent.stats().unwrap();
    assert_eq!((stats.consumer.committed, stats.links), (0, 1), "{stats:?}");
}
