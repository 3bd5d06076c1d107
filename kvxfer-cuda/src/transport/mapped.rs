//! Stores into mapped segments: all of a transport but how a segment is found.
//!
//! The caller's thread moves the bytes, in [`Transport::poll`], post after post in the order in which
//! they came; a post may take several polls. Each queued copy holds pointers, which stay valid because
//! a segment is let go of only after the posts that name it have ended, and the regions are shared.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::sum::words;
use kvxfer_core::transport::{Completion, Post, SegmentHandle, Transport};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};

use super::overlap::Overlap;
use crate::copy::{Drain, Stores, copy_summed};
use crate::memory::{Mapping, Regions};

/// The most posts under way.
pub(super) const POSTS: usize = 1 << 12;
/// The most writes under way, in all posts; a post with more is taken when it is alone.
pub(super) const WRITES: usize = 1 << 16;
/// The least that is copied at once, so that a small budget does not make many small copies. A
/// multiple of 64: a write goes on where words and cache lines begin.
const SLICE: u64 = 4096;
/// What a write costs of the budget at least.
const WRITE_COST: u64 = 64;

/// How a segment is found.
pub trait Attach: Send {
    /// The transport's name.
    const NAME: PathName;

    /// The memory that a handle describes.
    ///
    /// # Errors
    /// The handle is malformed, or not what its owner says it is.
    fn open(
        &self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<Arc<Mapping>>;
}

/// A transport whose segments are mapped into this process.
pub struct Mapped<A> {
    attach: A,
    regions: Arc<Regions>,
    segments: HashMap<(Incarnation, SegmentId), Arc<Mapping>>,
    /// Accepted, in order.
    posts: VecDeque<Queued>,
    /// Their writes, in order: the front post's are at the front.
    copies: VecDeque<Copy>,
    /// How far the front post is.
    cursor: Cursor,
    /// Ended outside of a poll.
    ended: Vec<Completion>,
    overlap: Overlap,
}

struct Queued {
    id: PostId,
    peer: Incarnation,
    seed: u64,
    copies: usize,
}

struct Copy {
    segment: SegmentId,
    src: *const u8,
    dst: *mut u8,
    len: u64,
}

// SAFETY: the memory behind both pointers is that of `Regions` and `Mapping`, which any thread may use.
unsafe impl Send for Copy {}

#[derive(Default)]
struct Cursor {
    /// Copies of the post that are done.
    copy: usize,
    /// Bytes of the next one that are done.
    at: u64,
    /// Words and sum of what is done.
    index: u64,
    sum: u64,
}

impl<A: Attach> Mapped<A> {
    pub(super) fn over(attach: A, regions: Arc<Regions>) -> Self {
        Self {
            attach,
            regions,
            segments: HashMap::new(),
            posts: VecDeque::with_capacity(POSTS),
            copies: VecDeque::with_capacity(WRITES),
            cursor: Cursor::default(),
            ended: Vec::new(),
            overlap: Overlap::default(),
        }
    }

    /// Checks each write and queues its copy. On an error some may be queued.
    fn queue(&mut self, post: &Post<'_>) -> Result<()> {
        let mut last: Option<(SegmentId, &Mapping)> = None;
        for write in post.writes {
            let mapping = match last {
                Some((segment, mapping)) if segment == write.segment => mapping,
                _ => self.segments.get(&(post.peer, write.segment)).ok_or_else(|| {
                    ErrorKind::NotFound.error(format!(
                        "segment {} of peer {} is not attached",
                        write.segment, post.peer
                    ))
                })?,
            };
            last = Some((write.segment, mapping));
            self.copies.push_back(Copy {
                segment: write.segment,
                src: self.regions.at(write.region, write.src, write.len)?,
                dst: mapping.at(write.dst, write.len)?,
                len: write.len,
            });
        }
        self.overlap.refuse(post.writes)
    }

    /// Ends the posts that name a segment of a peer, or any.
    fn fail(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        for i in 0..self.posts.len() {
            let Some(post) = self.posts.pop_front() else { break };
            let mut copies = self.copies.range(..post.copies);
            let named = post.peer == peer
                && segment.is_none_or(|segment| copies.any(|copy| copy.segment == segment));
            if !named {
                // Once around, and the order is as before.
                self.copies.rotate_left(post.copies);
                self.posts.push_back(post);
                continue;
            }
            self.copies.drain(..post.copies);
            if i == 0 {
                self.cursor = Cursor::default();
            }
            let why = format!("{} let go of peer {peer} with post {} under way", A::NAME, post.id);
            let result = Err(ErrorKind::PeerLost.error(why));
            self.ended.push(Completion { id: post.id, peer, result });
        }
    }

    /// Copies of the front post. Whether it is done.
    fn advance(&mut self, budget: &mut u64, drain: &Drain) -> bool {
        let Some(post) = self.posts.front() else { return false };
        let cursor = &mut self.cursor;
        while cursor.copy < post.copies {
            if *budget == 0 {
                return false;
            }
            let copy = &self.copies[cursor.copy];
            let len = (copy.len - cursor.at).min((*budget).max(SLICE) / SLICE * SLICE);
            let at = cursor.at as usize;
            // SAFETY: `queue` checked the ranges; both mappings are still there (see the module); a
            // segment and a region are never the same memory.
            let sum = unsafe {
                let (dst, src) = (copy.dst.add(at), copy.src.add(at));
                let stores = Stores::for_peer(copy.len, drain);
                copy_summed(dst, src, len as usize, post.seed, cursor.index, stores)
            };
            cursor.sum = cursor.sum.wrapping_add(sum);
            cursor.index = cursor.index.wrapping_add(words(len));
            cursor.at += len;
            if cursor.at == copy.len {
                cursor.copy += 1;
                cursor.at = 0;
            }
            *budget = budget.saturating_sub(len.max(WRITE_COST));
        }
        true
    }
}

impl<A: Attach> Transport for Mapped<A> {
    fn name(&self) -> PathName {
        A::NAME
    }

    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<()> {
        let mapping = self.attach.open(peer, segment, handle)?;
        self.fail(peer, Some(segment));
        self.segments.insert((peer, segment), mapping);
        Ok(())
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        self.fail(peer, segment);
        self.segments.retain(|&(owner, id), _| {
            owner != peer || segment.is_some_and(|segment| id != segment)
        });
    }

    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        // What names a segment fails with it.
        match segment {
            Some(segment) => self.segments.contains_key(&(peer, segment)),
            None => self.segments.keys().any(|&(owner, _)| owner == peer),
        }
    }

    fn post(&mut self, post: Post<'_>) -> Result<()> {
        let queued = self.copies.len();
        let room = queued + post.writes.len() <= WRITES && self.posts.len() < POSTS;
        if !room && !self.posts.is_empty() {
            return Err(full(A::NAME, self.posts.len(), queued));
        }
        if let Err(error) = self.queue(&post) {
            self.copies.truncate(queued);
            return Err(error);
        }
        let Post { id, peer, seed, writes, grant: _ } = post;
        self.posts.push_back(Queued { id, peer, seed, copies: writes.len() });
        Ok(())
    }

    fn poll(&mut self, budget: u64, out: &mut Vec<Completion>) {
        out.append(&mut self.ended);
        // Gone before the caller can tell anyone about the completions.
        let drain = Drain::new();
        let mut left = budget;
        while self.advance(&mut left, &drain) {
            let Some(post) = self.posts.pop_front() else { break };
            self.copies.drain(..post.copies);
            let sum = std::mem::take(&mut self.cursor).sum;
            out.push(Completion { id: post.id, peer: post.peer, result: Ok(sum) });
        }
    }

    fn pending(&self) -> usize {
        self.posts.len() + self.ended.len()
    }
}

pub(super) fn full(name: PathName, posts: usize, writes: usize) -> Error {
    ErrorKind::PoolFull
        .error(format!("{name} is busy with {posts} posts of {writes} writes"))
        .fix("poll, then post again")
        .retry()
}
