//! The small names that everything else is about.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A point on this agent's own monotonic clock, measured from an arbitrary origin.
///
/// Points of two hosts are never compared: what travels is a duration.
pub type Time = Duration;

/// 128 random bits drawn when an agent starts. A restarted agent is a different peer, even on
/// the same address; every frame carries its sender's incarnation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Incarnation(pub [u8; 16]);

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Incarnation {
    /// The first four bytes in hex: enough to tell two peers apart in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The engine's own number of a KV block.
pub type BlockId = u32;

/// In a list of [`BlockId`]s: the engine has no block for this position, skip it.
pub const NO_BLOCK: BlockId = BlockId::MAX;

macro_rules! number {
    ($(#[$doc:meta] $name:ident($inner:ty);)*) => {$(
        #[$doc]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

number! {
    /// One chunk's leave to be written. Drawn by the consumer, never reused, stamped on every page it covers.
    GrantId(u64);
    /// One request's chunks as a producer offers them. Drawn by whoever makes the offer.
    OfferId(u64);
    /// One consumer request's hold on chunks, on every rank. Drawn by the observer.
    ClaimId(u64);
    /// One load from the pool into the engine's blocks. Drawn by the caller.
    LoadId(u64);
    /// One of the pool's equal parts, counted from 0.
    SegmentId(u32);
    /// One connection to a peer, as the agent that performs the I/O counts them. Never reused.
    LinkId(u64);
    /// One accepted post of a transport. Drawn by the poster, never reused.
    PostId(u64);
}
