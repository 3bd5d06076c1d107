//! Agents on two hosts, which are network namespaces here, and what can happen between them.
//!
//! Skipped, with a line that says why, where namespaces are not permitted or `ip` of iproute2 is missing.

// Two namespaces share a boot id: a switch of tests tells the agents that they are elsewhere.
#![cfg(feature = "faults")]

mod cable;
#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, reason = "shared with the tests of agents, which need all of it")]
#[path = "../agent/engine.rs"]
mod engine;
#[allow(dead_code, reason = "likewise")]
#[path = "../agent/logs.rs"]
mod logs;
mod reused;
#[path = "../agent/tempdir.rs"]
mod tempdir;

use std::time::Duration;

use common::network::{A, B, Host, Network};
use engine::{Engine, PATIENCE, blocks, config, prompt};
use kvxfer_core::path::PathName;
use kvxfer_core::wire::message::Next;
use kvxfer_cuda::{AgentConfig, Path, Role};
use tempdir::TempDir;

/// A namespace is a test's own, and so are all its ports.
const PORT: u16 = 7000;
const DATA_PORT: u16 = 7001;
/// A link is over when the other host has not been heard for so long.
const SILENCE: Duration = Duration::from_secs(2);

/// Decode on host A, prefill on host B; nothing in common but the network.
struct Pair {
    prefill: Engine,
    decode: Engine,
    network: Network,
    _dirs: [TempDir; 2],
}

fn of_host(host: Host, dir: &std::path::Path, name: &str) -> AgentConfig {
    let role = if host == A { Role::Consumer } else { Role::Producer };
    let mut config = config(role, dir);
    let consumer = format!("{}:{PORT}", Network::HOSTS[A]).parse().unwrap();
    match role {
        Role::Consumer => (config.listen, config.data_port) = (Some(consumer), DATA_PORT),
        _ => config.peers = vec![consumer],
    }
    config.name = format!("{role:?} {name}");
    config.allow_insecure = true;
    config.boot_id = Some([host as u8; 16]);
    config.silence = SILENCE;
    config.fence_timeout = Duration::from_secs(1);
    config
}

fn pair(network: Network, name: &str) -> Pair {
    pair_with(network, name, |_| {})
}

fn pair_with(network: Network, name: &str, change: impl Fn(&mut AgentConfig)) -> Pair {
    let dirs = [TempDir::new(), TempDir::new()];
    let [decode, prefill] = [A, B].map(|host| {
        let mut config = of_host(host, dirs[host].path(), name);
        change(&mut config);
        network.inside(host, || Engine::start(config))
    });
    Pair { prefill, decode, network, _dirs: dirs }
}

fn path(engine: &Engine) -> Path {
    engine.until(|engine| engine.agent.stats().unwrap().paths.pop())
}

fn until_empty(decode: &Engine) {
    decode.until(|engine| {
        let stats = engine.agent.stats().unwrap();
        (stats.pool.free == stats.pool.pages && stats.pages_leaked == 0).then_some(())
    });
}

/// A prompt gets across by tcp, and every byte of it is right.
fn serves(pair: &mut Pair, seed: u32) {
    let prompt = prompt(seed, 1000);
    let (from, to) = (blocks(&prompt, 7), blocks(&prompt, 11));
    pair.decode.poison();
    let offer = pair.prefill.prefill(&prompt, &from);
    let claim = pair.decode.claim(&prompt);
    pair.decode.until_claimed(claim, Next::Done);
    let loaded = pair.decode.load(claim, &prompt, &to);
    assert_eq!((loaded.result, &*loaded.path), (Ok(()), "tcp"));
    assert!(pair.decode.holds(&prompt, &to));
    pair.prefill.until_pushed(offer, 16);
    until_empty(&pair.decode);
}

#[test]
fn a_prompt_gets_to_another_host_by_tcp_and_both_sides_know_why_not_by_memory() {
    let Some(network) = Network::new() else { return };
    let mut pair = pair(network, "far");
    serves(&mut pair, 1);
    for engine in [&pair.decode, &pair.prefill] {
        let path = path(engine);
        assert_eq!(path.name, PathName::Tcp);
        let why = path.why();
        assert!(why.contains("local: the two are different processes"), "{why}");
        assert!(why.contains("shm: it is on another host"), "{why}");
    }
}

#[test]
fn packets_lost_delayed_and_reordered_leave_every_byte_right() {
    let Some(network) = Network::noisy() else { return };
    // Slow it may be; a link that is given up would be another test.
    let mut pair = pair_with(network, "on a bad line", |config| {
        config.silence = PATIENCE;
        config.grant_ttl = PATIENCE;
        config.segments = 1;
    });
    for seed in 1..=5 {
        serves(&mut pair, seed);
    }
    let (lost, reordered) = pair.network.noise.as_ref().unwrap().counts();
    assert!(lost > 10 && reordered > 50, "{lost} lost, {reordered} reordered: nothing was tested");
}
