//! The parts of kvxfer that do no I/O.
//!
//! kvxfer moves the KV cache of a prompt from the engine that prefilled it to the engine that
//! decodes it. The consumer owns the memory and grants pages of it; producers write into them.
//! This crate holds the names of content ([`ChunkKey`]), the geometry ([`layout`]), the memory's
//! book-keeping ([`pool`], [`gc`]), the messages ([`wire`]) and the protocol as state machines
//! ([`session`]) that are fed events and the time, and answer with actions. It has no sockets,
//! threads, clocks or `unsafe`, so all of it runs in a seeded simulation.

#![forbid(unsafe_code)]

pub mod error;
pub mod gc;
mod ids;
pub mod key;
pub mod layout;
pub mod path;
pub mod plan;
pub mod pool;
pub mod session;
pub mod sum;
pub mod transport;
pub mod wire;

pub use error::{Error, ErrorKind, Result};
pub use ids::{
    BlockId, ClaimId, GrantId, Incarnation, LinkId, LoadId, NO_BLOCK, OfferId, PostId, SegmentId,
    Time,
};
pub use key::ChunkKey;
