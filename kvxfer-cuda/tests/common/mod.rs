//! What more than one test binary needs: other processes, writers in them, other hosts.

#![allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "a test has no users, and none needs all of it"
)]

pub mod libucp;
pub mod network;
pub mod noise;
mod peer;
pub mod writer;

use std::io::{self, Write as _};
use std::time::Duration;

pub use peer::{Peer, Wire, parent};

/// No wait of a test is longer.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Says why a test does nothing.
pub fn skip(why: &str) {
    // Past the test harness, which shows the output of failed tests only.
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let _ = writeln!(io::stderr(), "skipped: {why} ({name})");
}
