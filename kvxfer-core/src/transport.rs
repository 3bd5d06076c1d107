//! The seam behind which bytes move.
//!
//! A transport has one data-plane verb: write spans of registered local memory into pages of a
//! peer's segment. The contract, which the conformance suite of `kvxfer-cuda` checks on each
//! implementation:
//!
//! 1. A post is either refused (`Err`, and no event will ever follow) or accepted, and then ends in
//!    exactly one [`Completion`].
//! 2. `Ok` means that every byte is visible to the consumer.
//! 3. An error says nothing about which bytes arrived, but says that no more will: a completion is
//!    a local drain. Nothing is cancelled by waiting less. Over a network, what has left here and not been
//!    stored is for its receiver to refuse.
//! 4. Each completion carries the incarnation of the peer it concerns, so that one of a peer's
//!    earlier life is recognised.
//! 5. A post is validated as a whole before its first byte moves.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::path::PathName;
use crate::{Error, GrantId, Incarnation, PostId, SegmentId};

/// Bytes of a segment behind its last page, of which nobody reads but whoever shows that writes arrive there.
///
/// A path may drop writes and report success (PCIe peer-to-peer behind an IOMMU was seen to). So before the first
/// commit in a segment its writer posts bytes of its own choice to its last `PROBE_BYTES` bytes and tells
/// their checksum, and its owner compares that with what it reads there. How long that took is what is first known
/// of a path's speed; so they are more than a few.
pub const PROBE_BYTES: u64 = 1 << 20;

/// A piece of memory that the engine registered with its agent, in the order of registration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(pub u32);

/// One contiguous copy: `len` bytes from a registered region into a peer's segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where the bytes come from.
    pub region: RegionId,
    /// Offset in the region, in bytes.
    pub src: u64,
    /// The peer's segment.
    pub segment: SegmentId,
    /// Offset in the segment, in bytes.
    pub dst: u64,
    /// Bytes.
    pub len: u64,
}

/// What a producer asks of a transport: some writes to one peer, and the checksum of what was
/// written.
#[derive(Clone, Copy, Debug)]
pub struct Post<'a> {
    /// Names the completion.
    pub id: PostId,
    /// Whose segments are written.
    pub peer: Incarnation,
    /// The leave to do so. `None` is a probe, which may be written without leave to the segment's last
    /// [`PROBE_BYTES`].
    pub grant: Option<GrantId>,
    /// Seed of the checksum; see [`crate::sum`].
    pub seed: u64,
    /// Non-overlapping, in the order in which the checksum runs over them.
    pub writes: &'a [Write],
}

/// The terminal event of a post.
#[derive(Debug)]
pub struct Completion {
    /// The post.
    pub id: PostId,
    /// The peer it went to.
    pub peer: Incarnation,
    /// The checksum ([`crate::sum::Sum`]) of the bytes *as they were stored*, or why they were not.
    pub result: Result<u64, Error>,
}

/// What a consumer hands to the one writer of a segment so that it can reach it.
///
/// `blob` means something to the transport of that name alone.
#[derive(Debug)]
pub struct SegmentHandle {
    /// The transport's own description.
    pub blob: Vec<u8>,
    /// Bytes in the segment, as its owner states them.
    pub bytes: u64,
    /// File descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

/// A way to move bytes to peers. Owned by one thread; no method blocks.
pub trait Transport: Send {
    /// The path.
    fn name(&self) -> PathName;

    /// What the consumer's end of this path has to know of ours.
    ///
    /// # Errors
    /// Why the path can't be had here, for people.
    fn ability(&self) -> Result<Vec<u8>, String> {
        Ok(Vec::new())
    }

    /// Makes a peer's segment writable from here. Attaching a segment again replaces it.
    ///
    /// # Errors
    /// The handle is malformed, or not what its owner says it is.
    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<(), Error>;

    /// Lets go of one segment of a peer, or of all: no post that names it is accepted any more. Those
    /// under way end soon, well or with an error, and come out of later polls; bytes that move by
    /// themselves can't be called back, so nothing is unmapped before. [`Transport::holds`] tells when
    /// that is over.
    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>);

    /// Whether a segment of a peer, or any, is still mapped here, or named by a post that has not ended.
    /// Only when it is not may the segment's owner be told that it was let go.
    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool;

    /// Accepts or refuses a post.
    ///
    /// # Errors
    /// A write leaves its region or segment, the segment is not attached, or the queue is full
    /// (the one case in which [`Error::retryable`] holds).
    fn post(&mut self, post: Post<'_>) -> Result<(), Error>;

    /// Moves up to about `budget` bytes, where the caller's thread is what moves them, and appends
    /// what ended to `out`.
    fn poll(&mut self, budget: u64, out: &mut Vec<Completion>);

    /// A peer that can't be written to any more, though nobody let go of it, and why; each once. Its posts have ended
    /// or are about to, and until it is attached anew no others are accepted.
    fn lost(&mut self) -> Option<(Incarnation, Error)> {
        None
    }

    /// Posts accepted and not yet ended.
    fn pending(&self) -> usize;

    /// Whether the caller may sleep: nothing is to be done until [`Transport::event_fd`] is readable, or the transport
    /// wakes its owner. Asked last before it does, so that what happens in between is not missed.
    fn rests(&mut self) -> bool {
        self.pending() == 0
    }

    /// Readable, and so until the next poll, when there is something to do.
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Which of its ways the path to a peer takes, for people: "NVLink". `None` where there is one only.
    fn lanes(&self, peer: Incarnation) -> Option<String> {
        let _ = peer;
        None
    }
}
