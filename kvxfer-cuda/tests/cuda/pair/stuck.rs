//! A GPU that does not go on. Whoever waits for it is told in time, and what it may still use stays as it is.

use std::time::{Duration, Instant};

use kvxfer_core::ErrorKind;
use kvxfer_cuda::{Agent, Role};

use super::engine::{Engine, Folder, blocks, config, pair, prompt};
use crate::harness::{DEADLINE, Gate, Peer, child_device, device, get, live, on_standin, parent};

/// Longer than an agent waits for a GPU, shorter than a caller waits for an agent.
const IN_TIME: Duration = Duration::from_secs(9);

/// A test again, in a child; if there is a stand-in, it is told more.
fn again(test: &str, role: &str, standin: &str) {
    let own = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    let config = format!("{own};{standin}");
    Peer::start_with(test, role, &[("KVXFER_STANDIN", &config)]).succeeds();
}

/// The same, with a stand-in that never ends the first upload.
fn with_a_stuck_upload(test: &str, role: &str) {
    let _lease = device!();
    if !on_standin() {
        return crate::harness::skip("only the stand-in is stuck when it is told to be");
    }
    again(test, role, "late=cuMemcpyHtoDAsync:1:0");
}

fn something_lives() -> bool {
    live().is_some_and(|counts| counts.iter().any(|&count| count > 0))
}

#[test]
fn an_upload_that_does_not_end_is_an_error_and_its_memory_stays() {
    let role = "stuck-upload";
    if parent(role).is_none() {
        let test = "pair::stuck::an_upload_that_does_not_end_is_an_error_and_its_memory_stays";
        return with_a_stuck_upload(test, role);
    }
    let device = child_device();
    let patience = Duration::from_millis(50);
    let error = kvxfer_cuda::device::upload(&device, &[7; 4096], patience).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    // The next one goes on, in memory of its own.
    let sound = kvxfer_cuda::device::upload(&device, &[8; 4096], DEADLINE).unwrap();
    assert_eq!(get(&device, sound.ptr(), 4096), [8; 4096]);
    drop((sound, device));
    assert!(something_lives());
}

#[test]
fn a_start_on_a_gpu_that_is_stuck_is_an_error_in_time() {
    let role = "stuck-start";
    if parent(role).is_none() {
        let test = "pair::stuck::a_start_on_a_gpu_that_is_stuck_is_an_error_in_time";
        return with_a_stuck_upload(test, role);
    }
    let folder = Folder::new();
    let started = Instant::now();
    let mut config = config(Role::Both, &folder.0);
    config.peers = vec!["127.0.0.1:1".parse().unwrap()];
    let error = Agent::start(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(started.elapsed() < IN_TIME, "{:?}", started.elapsed());
    assert!(something_lives());
    // It was one copy that did not end.
    Agent::start(config).unwrap().close().unwrap();
}

/// Closes an agent whose copies wait for the engine's stream.
fn close(agent: &Agent) {
    let started = Instant::now();
    let error = agent.close().unwrap_err();
    assert!(started.elapsed() < IN_TIME, "{:?}", started.elapsed());
    assert_eq!(error.kind(), ErrorKind::Timeout);
    assert!(error.to_string().contains("copies of the engine's memory"), "{error}");
    assert!(agent.is_stopped());
}

#[test]
fn a_close_with_copies_that_do_not_end_returns_in_time_and_what_they_use_stays() {
    let role = "stuck-close";
    if parent(role).is_none() {
        let _lease = device!();
        let test = "pair::stuck::a_close_with_copies_that_do_not_end_returns_in_time_and_what_they_use_stays";
        // What it looks at in the end is written by copies that nobody waits for any more.
        return again(test, role, "races=0");
    }
    let device = child_device();
    let mut first = pair(&device, |_| {});
    let (arrived, stuck) = (prompt(1, 300), prompt(2, 300));
    let (from, to) = (blocks(&arrived, 7), blocks(&arrived, 11));
    let claim = first.pushed_and_claimed(&arrived);

    // A load and pushes, all started, behind streams that are held.
    first.decode.poison();
    let gates = [&first.decode.stream, &first.prefill.stream].map(Gate::before);
    first.decode.begin_load(claim, &arrived, &to);
    let posts = first.prefill.agent.stats().unwrap().posts;
    let offer = first.prefill.offer(&stuck);
    first.prefill.step(offer, &stuck, &from);
    let under_way =
        |engine: &Engine| (engine.agent.stats().unwrap().posts == posts + 15).then_some(());
    first.prefill.until(under_way);
    // Each answer is a turn of the agent, which by then has started what it can.
    first.decode.agent.stats().unwrap();
    first.decode.agent.stats().unwrap();

    std::thread::scope(|scope| {
        scope.spawn(|| close(&first.decode.agent));
        scope.spawn(|| close(&first.prefill.agent));
    });
    // Nor is it different when it is asked again.
    close(&first.decode.agent);
    let loaded = first.decode.loaded().unwrap();
    assert_eq!(loaded.result.unwrap_err().kind(), ErrorKind::Closed);

    // They run to their ends, in memory that is still there: else the device would be lost.
    gates.iter().for_each(Gate::open);
    first.decode.until(|engine| engine.holds(&arrived, &to).then_some(()));
    let mut second = pair(&device, |_| {});
    let claim = second.pushed_and_claimed(&stuck);
    assert_eq!(second.decode.load(claim, &stuck, &to).result, Ok(()));
    assert!(second.decode.holds(&stuck, &to));
    // Its engines must not be dropped as those of agents that end are.
    std::mem::forget(first);
}
