//! Memory that is shared, and memory that the engine registered.
//!
//! * [`HostPool`]: the consumer's segments, each a sealed memfd of its own, so that one peer is given
//!   one segment and can reach nothing else.
//! * [`Mapping`]: a mapped segment, on either side. All its pages are there before the first byte
//!   moves, its size can't change, and children of this process do not inherit it.
//! * [`Regions`]: what the engine registered, by number.
//!
//! Peers and the engine write to this memory whenever they like, so it is reached through raw
//! pointers only, and read by [`crate::copy`] only. Each pointer is given out for a range that was
//! checked.

mod available;
mod mapping;
mod pool;
mod regions;

pub use available::{Bytes, Room};
pub use mapping::Mapping;
pub use pool::HostPool;
pub use regions::{Address, Regions};

/// Whether `len` bytes from `offset` lie inside `bytes`.
pub(crate) fn inside(bytes: u64, offset: u64, len: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= bytes)
}
