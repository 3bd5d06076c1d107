//! The consumer's end of a path whose bytes it takes itself.
//!
//! Where a producer stores into mapped memory, a handle is all that a consumer gives. Over a network somebody
//! receives: a [`Target`], owned by the same thread as the pool. When it has [cut a writer
//! off](Target::cut_off), nothing more of that writer's is stored: that is the fence of such a path.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::transport::SegmentHandle;
#[cfg(doc)]
use kvxfer_core::transport::Transport;
use kvxfer_core::{Error, GrantId, Incarnation, Result, SegmentId};

use crate::memory::Mapping;

/// What a writer is about to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Who.
    pub writer: Incarnation,
    /// By which leave; `None` for a probe.
    pub grant: Option<GrantId>,
    /// Where.
    pub segment: SegmentId,
    /// Offset in the segment, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Says whether a writer may store something now. Asked before a byte of it is.
///
/// # Errors
/// It may not, and why.
pub type Leave<'a> = &'a dyn Fn(&Incoming) -> Result<()>;

/// Receives what writers send into segments. No method blocks.
pub trait Target: Send {
    /// The path.
    fn name(&self) -> PathName;

    /// Whether this end can talk to one with that [ability](Transport::ability). Asked before a path is chosen.
    ///
    /// # Errors
    /// It can't, and why.
    fn accepts(&self, ability: &[u8]) -> Result<()> {
        let _ = ability;
        Ok(())
    }

    /// A writer is about to be shown segments. `ability` is what [its end](Transport::ability) says of itself, `local`
    /// the address of ours that it dialled, if it was one of the network.
    ///
    /// # Errors
    /// The two cannot talk.
    fn welcome(&mut self, writer: Incarnation, ability: &[u8], local: Option<IpAddr>)
    -> Result<()>;

    /// Makes a segment reachable for its one writer; `memory` is what is behind it now. The first handle that a writer
    /// gets says how to connect. Exported again, with other memory perhaps, the new one counts.
    ///
    /// # Errors
    /// The memory can't be registered, or no address is known.
    fn export(
        &mut self,
        writer: Incarnation,
        segment: SegmentId,
        memory: &Arc<Mapping>,
    ) -> Result<SegmentHandle>;

    /// Ends all connections of a writer. When this returns, nothing that it sent or sends is stored any more.
    fn cut_off(&mut self, writer: Incarnation);

    /// Stores up to about `budget` bytes of what has come, each write after `leave` was given; where bytes arrive by
    /// themselves, nobody is there to ask for it. Writers whose
    /// connections broke, or that wrote where they may not, are appended to `lost`: cut off, once.
    fn poll(&mut self, budget: u64, leave: Leave<'_>, lost: &mut Vec<(Incarnation, Error)>);

    /// Whether the caller may sleep until [`Target::event_fd`] is readable. Asked last before it does.
    fn rests(&mut self) -> bool;

    /// Readable when there is something to receive.
    fn event_fd(&self) -> BorrowedFd<'_>;

    /// Which of its ways the path from a writer takes, as [`Transport::lanes`].
    fn lanes(&self, writer: Incarnation) -> Option<String> {
        let _ = writer;
        None
    }
}
