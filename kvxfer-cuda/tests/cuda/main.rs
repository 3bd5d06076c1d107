//! What needs a CUDA driver, on whichever one is found: the machine's own, or the stand-in.
//!
//! Without a driver each test says that it is skipped, and passes; with `KVXFER_REQUIRE_CUDA=1` it fails
//! instead. `make standin` runs them all on the stand-in.

#![expect(unreachable_pub, reason = "a test has no users")]

mod allocations;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod copier;
mod faults;
mod harness;
mod objects;
mod orders;
mod pair;
mod sharing;
mod two_process;
