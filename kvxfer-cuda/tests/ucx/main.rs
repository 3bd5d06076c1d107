//! UCX for real, over TCP on the loopback device.
//!
//! The library is that of `$KVXFER_TEST_UCX`, which is what `env/ucx` prints; without it a test says that it was
//! skipped. What needs a process of its own is this binary, run again for the one test [`child`].

#[path = "../common/mod.rs"]
mod common;
mod deaths;
mod harness;
mod library;
mod pair;
mod processes;
mod transport;

use common::parent;

/// The body of a child process; an empty test otherwise.
#[test]
fn child() {
    if let Some(wire) = parent("consume") {
        processes::consume(wire);
    }
    if let Some(wire) = parent("produce") {
        deaths::produce(wire);
    }
    if let Some(wire) = parent("open") {
        library::open(wire);
    }
}
