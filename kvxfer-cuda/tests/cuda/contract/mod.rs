//! What we rely on the driver for: one test for each behaviour, for any driver.
//!
//! Each module lists its tests with the behaviour that each shows. `docs/driver-contract.md` is made of these lists
//! and of `docs/hardware.json`, which names the tests that passed on a real GPU.

use std::time::Instant;

use kvxfer_cuda::driver::{Device, PeerLink};

use crate::harness::{DEADLINE, skip};

mod capture;
mod context;
mod copies;
mod kernels;
mod memory;
mod sharing;
mod streams;
mod table;

/// The name of a test inside this module, and what the driver does when it passes.
type Clause = (&'static str, &'static str);

/// Waits until about that many bytes are free: a driver may take its time after a process has ended.
#[track_caller]
fn assert_free(device: &Device, bytes: u64) {
    let start = Instant::now();
    loop {
        let free = device.memory().unwrap().0;
        // The driver's own bookkeeping comes and goes.
        if free.abs_diff(bytes) < SLACK {
            return;
        }
        let waited = start.elapsed();
        assert!(waited < DEADLINE / 6, "{free} bytes are free, not {bytes}");
        std::thread::sleep(DEADLINE / 600);
    }
}

/// So much that nothing that a driver does by the way hides it.
const MUCH: u64 = 256 << 20;
const SLACK: u64 = MUCH / 4;

/// Whether one device can't reach the other, which is said.
fn unreachable(own: &Device, peer: &Device) -> bool {
    let link = own.link_to(peer.uuid()).unwrap();
    let none = matches!(link, PeerLink::None { .. });
    if none {
        skip("the two devices don't reach each other");
    }
    none
}
