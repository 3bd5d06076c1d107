//! What is refused, and that it is said once.

use std::time::Duration;

use kvxfer_core::wire::message::Next;
use kvxfer_cuda::Role;

use crate::engine::{Engine, PATIENCE, config};
use crate::logs::{self, lines};
use crate::{prompt, tempdir};

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
