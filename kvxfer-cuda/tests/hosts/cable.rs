//! Hosts that stop hearing each other.

use std::time::Instant;

use kvxfer_core::ErrorKind;
use kvxfer_core::wire::message::Next;

use crate::common::network::{A, Network};
use crate::engine::{PATIENCE, blocks, prompt};
use crate::logs::{self, lines};
use crate::{DATA_PORT, SILENCE, pair, serves, until_empty};

#[test]
fn a_pulled_cable_ends_both_sides_in_time_and_plugged_in_again_it_serves() {
    let Some(network) = Network::new() else { return };
    let mut pair = pair(network, "pulled");
    serves(&mut pair, 1);
    let text = prompt(2, 1000);
    let offer = pair.prefill.observer.offer("request", &pair.prefill.chunks(&text));
    let claim = pair.decode.claim(&text);
    let (decode, network, mut pulled) = (&pair.decode, &pair.network, None);
    pair.prefill.push_meanwhile(offer, &text, &blocks(&text, 7), |prefill, layer| {
        if layer == 0 {
            // The first third of the bytes has left, or is about to.
            decode.until_claimed(claim, Next::Writing);
            let before = decode.agent.stats().unwrap();
            assert!(before.pool.free < before.pool.pages, "{before:?}");
            network.pull();
            pulled = Some(Instant::now());
            assert_eq!(prefill.agent.stats().unwrap().paths.len(), 1);
        }
    });
    decode.until_claimed(claim, Next::Lost);
    pair.prefill.until(|prefill| prefill.agent.stats().unwrap().paths.is_empty().then_some(()));
    until_empty(decode);
    // Twice, for a busy machine, and what fences take.
    let took = pulled.unwrap().elapsed();
    assert!(took >= SILENCE / 2 && took < SILENCE * 4, "{took:?}");
    let loaded = pair.decode.load(claim, &text, &blocks(&text, 11));
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::PeerLost);

    pair.network.plug();
    assert!(pair.prefill.agent.wait_connected(PATIENCE));
    serves(&mut pair, 3);
}

#[test]
fn a_data_port_that_swallows_everything_is_no_path_by_its_deadline_and_the_log_names_the_fix() {
    logs::listen();
    let Some(network) = Network::new() else { return };
    network.swallow(A, DATA_PORT);
    let mut pair = pair(network, "behind a firewall");
    let text = prompt(1, 100);
    let begun = Instant::now();
    pair.prefill.prefill(&text, &blocks(&text, 7));
    let claim = pair.decode.claim(&text);
    pair.decode.until_claimed(claim, Next::Lost);
    let port = format!("no data connection to {}:{DATA_PORT}", Network::HOSTS[A]);
    let said = ["Consumer behind a firewall", &port, "open that port between the hosts"];
    pair.prefill.until(|_| lines(&said).pop());
    assert!(begun.elapsed() < PATIENCE / 2, "{:?}", begun.elapsed());
    until_empty(&pair.decode);
    assert_eq!(pair.decode.agent.stats().unwrap().consumer.committed, 0);
}
