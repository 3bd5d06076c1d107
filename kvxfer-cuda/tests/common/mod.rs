//! What more than one test binary needs: other processes, and writers in them.

#![allow(dead_code, unreachable_pub, reason = "a test has no users, and none needs all of it")]

mod peer;
pub mod writer;

use std::time::Duration;

pub use peer::{Peer, Wire, parent};

/// No wait of a test is longer.
pub const DEADLINE: Duration = Duration::from_secs(60);
