//! Engines in processes of their own: what they leave behind, what a killed one does, what a broken GPU does.

use std::path::Path;

use kvxfer_core::session::PushRange;
use kvxfer_core::wire::message::Next;
use kvxfer_cuda::driver::{Device, Sharing};
use kvxfer_cuda::{AgentConfig, Role};
use rustix::process::Signal;

use super::engine::{Engine, Folder, blocks, config, pair, prompt};
use crate::harness::{
    DEADLINE, Gate, Peer, assert_nothing_lives, child_device, device, on_standin, parent, shares,
    skip,
};

/// Agents in processes of their own, and all that they had given back.
#[test]
fn nothing_is_left_when_agents_are_closed() {
    if parent("pair-alone").is_some() {
        let device = child_device();
        let mut pair = pair(&device, |_| {});
        let prompt = prompt(1, 500);
        let claim = pair.pushed_and_claimed(&prompt);
        assert_eq!(pair.decode.load(claim, &prompt, &blocks(&prompt, 11)).result, Ok(()));
        // With loads and pushes under way.
        let next = self::prompt(2, 500);
        let offer = pair.prefill.offer(&next);
        pair.prefill.step(offer, &next, &blocks(&next, 7));
        drop(pair);
        drop(device);
        return assert_nothing_lives();
    }
    let _lease = device!();
    let peer = Peer::start("pair::processes::nothing_is_left_when_agents_are_closed", "pair-alone");
    peer.succeeds();
}

/// Not a test by itself: a prefill engine, which computes one prompt for each word and says so.
#[test]
fn child_prefill() {
    let Some(mut wire) = parent("pair-prefill") else { return };
    let device = child_device();
    let (folder, consumer) = (wire.hear(), wire.hear());
    let mut config = config(Role::Producer, Path::new(&folder));
    config.peers = vec![consumer.parse().unwrap()];
    let engine = Engine::start(&device, config);
    assert!(engine.agent.wait_connected(DEADLINE));
    wire.say("ready");
    let mut gate = None;
    loop {
        let order = wire.hear();
        let (word, seed) = order.split_once(' ').unwrap();
        if word == "end" {
            return;
        }
        if word == "hold" {
            gate = Some(Gate::before(&engine.stream));
        }
        let prompt = prompt(seed.parse().unwrap(), 500);
        let offer = engine.offer(&prompt);
        engine.step(offer, &prompt, &blocks(&prompt, 7));
        wire.say("computed");
        if gate.is_none() {
            engine.until_pushed(offer, &prompt);
            wire.say("pushed");
        }
    }
}

fn prefill(decode: &Engine, folder: &Folder) -> Peer {
    let mut peer = Peer::start("pair::processes::child_prefill", "pair-prefill");
    peer.wire.say(&folder.0.display().to_string());
    peer.wire.say(&decode.tcp().to_string());
    assert_eq!(peer.wire.hear(), "ready");
    peer
}

#[test]
fn kv_gets_from_one_process_to_the_other() {
    let device = device!();
    shares(&device).for_each(|sharing| kv_gets_across(&device, sharing));
}

fn kv_gets_across(device: &Device, sharing: Sharing) {
    let folder = Folder::new();
    // Producers follow.
    let config = AgentConfig { sharing, ..config(Role::Consumer, &folder.0) };
    let mut decode = Engine::start(device, config);
    let mut peer = prefill(&decode, &folder);
    for seed in 1..6 {
        let prompt = prompt(seed, 500);
        let to = blocks(&prompt, 11);
        peer.wire.say(&format!("go {seed}"));
        assert_eq!(peer.wire.hear(), "computed");
        let claim = decode.claim(&prompt);
        decode.until_claimed(claim, Next::Done);
        let loaded = decode.load(claim, &prompt, &to);
        assert_eq!((loaded.result, loaded.path.as_str()), (Ok(()), "cuda_ipc (same GPU)"));
        assert!(decode.holds(&prompt, &to));
        assert_eq!(peer.wire.hear(), "pushed");
    }
    decode.until_empty();
    peer.wire.say("end 0");
    peer.succeeds();
}

/// A fabric's handles travel in the message, so the link need not be a Unix socket.
#[test]
fn a_fabric_is_told_of_over_tcp() {
    let device = device!();
    if !shares(&device).any(|sharing| sharing == Sharing::Fabric) {
        return;
    }
    // Of a folder each: they don't find each other's Unix sockets.
    let folders = [Folder::new(), Folder::new()];
    let side = |role, folder: &Folder| {
        let config = config(role, &folder.0);
        AgentConfig { sharing: Sharing::Fabric, allow_insecure: true, ..config }
    };
    let mut decode = Engine::start(&device, side(Role::Consumer, &folders[0]));
    let peers = vec![decode.tcp()];
    let producer = AgentConfig { peers, ..side(Role::Producer, &folders[1]) };
    let prefill = Engine::start(&device, producer);
    assert!(prefill.agent.wait_connected(DEADLINE));
    let text = prompt(1, 500);
    let offer = prefill.offer(&text);
    prefill.step(offer, &text, &blocks(&text, 7));
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    assert_eq!(decode.load(claim, &text, &blocks(&text, 11)).result, Ok(()));
    assert!(decode.holds(&text, &blocks(&text, 11)));
}

#[test]
fn a_producer_killed_in_the_middle_is_fenced_by_fresh_memory_and_a_new_one_serves() {
    let device = device!();
    let folder = Folder::new();
    let mut decode = Engine::start(&device, config(Role::Consumer, &folder.0));
    let mut peer = prefill(&decode, &folder);
    peer.wire.say("hold 1");
    assert_eq!(peer.wire.hear(), "computed");
    let text = prompt(1, 500);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Writing);
    peer.kill();
    decode.until_claimed(claim, Next::Lost);
    decode.until_empty();
    let stats = decode.agent.stats().unwrap();
    assert!(stats.consumer.replaced_segments > 0, "a death is no fence yet: {stats:?}");

    let mut again = prefill(&decode, &folder);
    again.wire.say("go 1");
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    assert_eq!(decode.load(claim, &text, &blocks(&text, 11)).result, Ok(()));
    assert!(decode.holds(&text, &blocks(&text, 11)));
    again.wire.say("end 0");
}

/// Plain memory is not freed under a producer that was cut off and lives, and is when that has died.
#[test]
fn memory_that_was_replaced_under_a_stopped_producer_is_free_when_it_is_dead() {
    let device = device!(counted);
    if !shares(&device).any(|sharing| sharing == Sharing::Legacy) {
        return;
    }
    let folder = Folder::new();
    let config = AgentConfig {
        sharing: Sharing::Legacy,
        buffer_size: 256 << 20,
        ..config(Role::Consumer, &folder.0)
    };
    let mut decode = Engine::start(&device, config);
    // To the half of a segment: the driver and the agents take something for themselves.
    let free = || device.memory().unwrap().0 + (64 << 20);
    let before = device.memory().unwrap().0;
    let mut peer = prefill(&decode, &folder);
    peer.wire.say("go 1");
    let text = prompt(1, 500);
    let claim = decode.claim(&text);
    decode.until_claimed(claim, Next::Done);
    assert_eq!(decode.load(claim, &text, &blocks(&text, 11)).result, Ok(()));
    assert_eq!([peer.wire.hear(), peer.wire.hear()], ["computed", "pushed"]);
    decode.until_empty();

    let shown = device.memory().unwrap().0;
    peer.signal(Signal::STOP);
    // Fresh memory beside the old one.
    decode.until(|_| (free() < shown).then_some(()));
    peer.kill();
    decode.until(|_| (free() > before).then_some(()));
}

/// A load that reads the old memory when it is replaced is not disturbed, and one that comes later finds all of it in
/// the fresh memory.
#[test]
fn what_was_committed_outlives_its_writer_and_its_memory() {
    let device = device!();
    let folder = Folder::new();
    let mut consumer = config(Role::Consumer, &folder.0);
    consumer.segments = 1;
    let mut decode = Engine::start(&device, consumer);
    let mut peer = prefill(&decode, &folder);
    peer.wire.say("go 1");
    assert_eq!(peer.wire.hear(), "computed");
    let text = prompt(1, 500);
    let claims = [(); 3].map(|()| decode.claim(&text));
    for claim in claims {
        decode.until_claimed(claim, Next::Done);
    }
    assert_eq!(peer.wire.hear(), "pushed");
    peer.wire.say("hold 2");
    assert_eq!(peer.wire.hear(), "computed");
    let lost = decode.claim(&prompt(2, 500));
    decode.until_claimed(lost, Next::Writing);

    let gate = Gate::before(&decode.stream);
    let [first, second] = [0, 32].map(|from| (from..from + 32).collect::<Vec<_>>());
    decode.begin_load(claims[0], &text, &first);
    peer.kill();
    // The copies into fresh memory are queued behind the first load, and the second load behind them.
    decode.until(|engine| {
        (engine.agent.stats().unwrap().consumer.replaced_segments == 1).then_some(())
    });
    decode.begin_load(claims[1], &text, &second);
    decode.agent.stats().unwrap();
    gate.open();
    let mut loaded = Vec::new();
    decode.until(|engine| {
        engine.agent.poll(&mut loaded);
        (loaded.len() == 2).then_some(())
    });
    assert!(loaded.iter().all(|load| load.result == Ok(())), "{loaded:?}");
    assert!(decode.holds(&text, &first) && decode.holds(&text, &second));
    decode.poison();
    assert_eq!(decode.load(claims[2], &text, &first).result, Ok(()));
    assert!(decode.holds(&text, &first));
    decode.until_empty();
}

/// A GPU that fails takes nobody down: loads and pushes end with errors, and agents close.
#[test]
fn a_device_that_fails_fails_its_loads_and_pushes_and_nothing_else() {
    if parent("pair-sticky").is_some() {
        let device = child_device();
        let pair = pair(&device, |_| {});
        let stream = pair.prefill.engine_stream();
        // The side stream cannot wait for the engine's any more, and with that the device is lost.
        let mut seeds = 0..;
        pair.prefill.until(|engine| {
            let prompt = prompt(seeds.next()?, 500);
            let offer = engine.offer(&prompt);
            let range = PushRange::new(engine.agent.layout(), offer, 0, &[blocks(&prompt, 7)]);
            engine.agent.begin_step(vec![range.unwrap()]).unwrap();
            let ended = engine.agent.end_step_on(&stream);
            let failed = engine.agent.stats().unwrap().producer.failed_posts;
            (ended.is_err() || failed > 0).then_some(())
        });
        assert!(!pair.prefill.agent.is_stopped() && !pair.decode.agent.is_stopped());
        // Nothing is freed on a device that is lost: the process ends.
        std::process::exit(0);
    }
    let _lease = device!();
    if !on_standin() {
        return skip("only the stand-in fails when it is told to");
    }
    let config = format!(
        "{};sticky=cuStreamWaitEvent:2:700",
        std::env::var("KVXFER_STANDIN").unwrap_or_default()
    );
    let test = "pair::processes::a_device_that_fails_fails_its_loads_and_pushes_and_nothing_else";
    let peer = Peer::start_with(test, "pair-sticky", &[("KVXFER_STANDIN", &config)]);
    peer.succeeds();
}
