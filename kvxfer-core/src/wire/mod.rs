//! Frames and messages.
//!
//! [`message`] says what peers tell each other, [`frame`] how that looks in bytes, [`bounds`] what
//! of it is allowed. Both ends apply the bounds: what is encoded here is never refused there for
//! its size.

pub mod bounds;
pub mod frame;
pub mod message;

pub use frame::{Decoder, Frame, encode, encode_hello};
pub use message::{Hello, Message, Purpose};

use crate::{Error, ErrorKind};

/// Versions of the protocol that this library speaks, inclusive.
pub const VERSIONS: (u16, u16) = (1, 1);

/// The highest version in both ranges (inclusive, lowest first). For the protocol's and for the
/// chunk keys' versions.
///
/// # Errors
/// [`ErrorKind::VersionMismatch`], naming both ranges; also for a range that is upside down.
pub fn negotiate(ours: (u16, u16), theirs: (u16, u16)) -> Result<u16, Error> {
    let version = ours.1.min(theirs.1);
    if ours.0 <= version && theirs.0 <= version {
        return Ok(version);
    }
    let range =
        |(low, high)| if low == high { format!("{low}") } else { format!("{low} to {high}") };
    Err(ErrorKind::VersionMismatch
        .error(format!("no common version: ours {}, theirs {}", range(ours), range(theirs)))
        .fix("run releases of kvxfer on both sides that are at most one version apart"))
}
