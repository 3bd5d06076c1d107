//! UCX for real, over TCP on the loopback device.
//!
//! The library is that of `$KVXFER_TEST_UCX`, which is what `env/ucx` prints; without it a test says that it was
//! skipped. What needs a process of its own is this binary, run again for the one test [`child`]. Nothing sleeps;
//! each wait has a deadline, and each child is reaped.

mod deaths;
mod harness;
mod library;
mod pair;
mod processes;

/// The body of a child process; an empty test otherwise.
#[test]
fn child() {
    match std::env::var(harness::ROLE).as_deref() {
        Err(_) => {}
        Ok("consume") => processes::consume(),
        Ok("produce") => deaths::produce(),
        Ok(role) => library::open_as(role),
    }
}
