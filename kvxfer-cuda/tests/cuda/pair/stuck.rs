//! A GPU that does not go on. Whoever waits for it is told in time, and what it may still use stays as it is.

use std::time::{Duration, Instant};

use kvxfer_core::ErrorKind;
use kvxfer_cuda::{Agent, Role};

use super::engine::{Folder, config};
use crate::harness::{DEADLINE, Peer, child_device, device, get, live, on_standin, parent};

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
