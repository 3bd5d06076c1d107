//! Posts and their writes, in order.

use std::collections::VecDeque;

use kvxfer_core::transport::RegionId;
use kvxfer_core::{GrantId, PostId, SegmentId};

#[derive(Debug)]
pub(super) struct Queued {
    pub(super) id: PostId,
    pub(super) grant: Option<GrantId>,
    pub(super) seed: u64,
    /// How many there are.
    pub(super) writes: usize,
    /// Of all writes.
    pub(super) bytes: u64,
    /// Of what was sent.
    pub(super) sum: u64,
    /// A segment of it was attached anew: whatever the target says, it does not end well.
    pub(super) spoilt: bool,
}

/// A write that was checked, of at least one byte.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) region: RegionId,
    pub(super) src: u64,
    pub(super) segment: SegmentId,
    pub(super) generation: u32,
    pub(super) dst: u64,
    pub(super) len: u64,
}

/// The front post's writes are at the front.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) posts: VecDeque<Queued>,
    pub(super) writes: VecDeque<Piece>,
}

impl Queue {
    /// Appends the front of another.
    pub(super) fn take_front(&mut self, other: &mut Self) -> bool {
        let Some(post) = other.posts.pop_front() else { return false };
        self.writes.extend(other.writes.drain(..post.writes));
        self.posts.push_back(post);
        true
    }

    pub(super) fn pop(&mut self) -> Option<Queued> {
        let post = self.posts.pop_front()?;
        self.writes.drain(..post.writes);
        Some(post)
    }

    /// Removes the posts that name a segment.
    pub(super) fn remove(&mut self, segment: SegmentId, mut removed: impl FnMut(Queued)) {
        for _ in 0..self.posts.len() {
            let Some(post) = self.posts.pop_front() else { break };
            if self.writes.range(..post.writes).any(|piece| piece.segment == segment) {
                self.writes.drain(..post.writes);
                removed(post);
            } else {
                // Once around, and the order is as before.
                self.writes.rotate_left(post.writes);
                self.posts.push_back(post);
            }
        }
    }

    /// Spoils the posts that name a segment.
    pub(super) fn spoil(&mut self, segment: SegmentId) {
        let mut at = 0;
        for post in &mut self.posts {
            let end = at + post.writes;
            post.spoilt |= self.writes.range(at..end).any(|piece| piece.segment == segment);
            at = end;
        }
    }

    pub(super) fn names(&self, segment: SegmentId) -> bool {
        self.writes.iter().any(|piece| piece.segment == segment)
    }
}
