//! A transport that goes wrong when it is told to. For tests.
//!
//! Nothing is left to chance: the n-th call of [`Transport::post`] gets what [`Faults::at`] or the seed
//! of [`Faults::seeded`] says.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvxfer_core::path::PathName;
use kvxfer_core::transport::{Completion, Post, SegmentHandle, Transport, Write};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};
use parking_lot::Mutex;

use super::local;
use crate::memory::Mapping;

/// What happens to a post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// It is refused, as when the queue is full.
    Refuse,
    /// It is accepted and its bytes move, but it ends in an error.
    Fail,
    /// A bit of the first byte it stored is flipped before it ends, in good faith.
    Flip,
    /// It ends that many polls later than it would.
    Delay(u32),
    /// It ends well, and nothing that it stored stays: as on a path that drops writes.
    Drop,
}

/// The strings of a [`Fault`]. Clones pull the same ones.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    held: bool,
    posts: u64,
    acts: HashMap<u64, Act>,
    each: Option<Act>,
    seed: Option<(u64, u64)>,
}

impl Faults {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// About one in `one_in` posts gets an act, which the seed chooses.
    pub fn seeded(seed: u64, one_in: u64) -> Self {
        let plan = Plan { seed: Some((seed, one_in.max(1))), ..Plan::default() };
        Self(Arc::new(Mutex::new(plan)))
    }

    /// Each post gets this act.
    pub fn each(act: Act) -> Self {
        let plan = Plan { each: Some(act), ..Plan::default() };
        Self(Arc::new(Mutex::new(plan)))
    }

    /// What the n-th post, counted from 0 in calls, gets.
    pub fn at(&self, nth: u64, act: Act) {
        self.0.lock().acts.insert(nth, act);
    }

    /// What the next post gets.
    pub fn next(&self, act: Act) {
        let mut plan = self.0.lock();
        let nth = plan.posts;
        plan.acts.insert(nth, act);
    }

    /// Nothing moves and nothing ends, until [`Faults::release`].
    pub fn hold(&self) {
        self.0.lock().held = true;
    }

    /// Ends [`Faults::hold`].
    pub fn release(&self) {
        self.0.lock().held = false;
    }

    /// How many posts were called.
    pub fn posts(&self) -> u64 {
        self.0.lock().posts
    }

    fn draw(&self) -> Option<Act> {
        let mut plan = self.0.lock();
        let nth = plan.posts;
        plan.posts += 1;
        plan.acts.remove(&nth).or(plan.each).or_else(|| {
            let (seed, one_in) = plan.seed?;
            // The finaliser of SplitMix64.
            let mut z = seed.wrapping_add((nth + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15));
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^= z >> 31;
            let acts = [Act::Refuse, Act::Fail, Act::Flip, Act::Delay((z >> 40) as u32 % 8 + 1)];
            (z % one_in == 0).then(|| acts[(z >> 32) as usize % acts.len()])
        })
    }
}

/// A transport with faults.
pub struct Fault<T> {
    inner: T,
    faults: Faults,
    /// What accepted posts still have coming, and what was where they write.
    acts: HashMap<PostId, (Act, Vec<Spot>)>,
    /// The number of the poll that lets it out.
    delayed: VecDeque<(u64, Completion)>,
    polls: u64,
    /// A view of each segment, to spoil it.
    segments: HashMap<(Incarnation, SegmentId), Arc<Mapping>>,
}

/// What was in a segment before it was written to.
struct Spot {
    segment: SegmentId,
    offset: u64,
    bytes: Vec<u8>,
}

impl<T: Transport> Fault<T> {
    /// That transport, with these faults.
    pub fn new(inner: T, faults: Faults) -> Self {
        let (acts, delayed, segments) = Default::default();
        Self { inner, faults, acts, delayed, polls: 0, segments }
    }

    fn end(&mut self, mut completion: Completion, out: &mut Vec<Completion>) {
        match self.acts.remove(&completion.id) {
            Some((Act::Fail, _)) => {
                completion.result = Err(ErrorKind::PeerLost.error("a fault that was asked for"));
            }
            Some((Act::Flip, spots)) if completion.result.is_ok() => {
                if let Some(Spot { segment, offset, .. }) = spots.first() {
                    self.flip(completion.peer, *segment, *offset);
                }
            }
            Some((Act::Drop, spots)) => spots.iter().for_each(|s| self.undo(completion.peer, s)),
            Some((Act::Delay(polls), _)) if completion.result.is_ok() => {
                return self.delayed.push_back((self.polls + u64::from(polls), completion));
            }
            _ => {}
        }
        out.push(completion);
    }

    /// What lies where a post is going to write.
    fn spots(&self, post: &Post<'_>) -> Vec<Spot> {
        let writes = post.writes.iter().filter(|write| write.len > 0);
        let spot = |write: &Write| {
            let &Write { segment, dst: offset, len, .. } = write;
            let mapping = self.segments.get(&(post.peer, segment))?;
            let start = mapping.at(offset, len).ok()?;
            // SAFETY: `at` checked the range, and the mapping is alive.
            let byte = |at| unsafe { start.add(at).read_volatile() };
            Some(Spot { segment, offset, bytes: (0..len as usize).map(byte).collect() })
        };
        writes.filter_map(spot).collect()
    }

    fn undo(&self, peer: Incarnation, spot: &Spot) {
        let Some(mapping) = self.segments.get(&(peer, spot.segment)) else { return };
        let Ok(start) = mapping.at(spot.offset, spot.bytes.len() as u64) else { return };
        for (at, &byte) in spot.bytes.iter().enumerate() {
            // SAFETY: `at` checked the range, and the mapping is alive.
            unsafe { start.add(at).write_volatile(byte) };
        }
    }

    fn flip(&self, peer: Incarnation, segment: SegmentId, offset: u64) {
        let Some(mapping) = self.segments.get(&(peer, segment)) else { return };
        let Ok(byte) = mapping.at(offset, 1) else { return };
        // SAFETY: one byte of a mapping that outlives the reference.
        unsafe { AtomicU8::from_ptr(byte) }.fetch_xor(1, Ordering::Relaxed);
    }
}

impl<T: Transport> Transport for Fault<T> {
    fn name(&self) -> PathName {
        self.inner.name()
    }

    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<()> {
        let mapping = match handle.fds.first() {
            Some(fd) => Mapping::import(fd, handle.bytes).ok().map(Arc::new),
            None => local::find(peer, segment).map(|(_, mapping)| mapping),
        };
        self.inner.attach(peer, segment, handle)?;
        if let Some(mapping) = mapping {
            self.segments.insert((peer, segment), mapping);
        }
        Ok(())
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        self.inner.detach(peer, segment);
        self.segments.retain(|&(owner, id), _| {
            owner != peer || segment.is_some_and(|segment| id != segment)
        });
        for (due, completion) in &mut self.delayed {
            if completion.peer == peer {
                *due = 0;
            }
        }
    }

    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        self.inner.holds(peer, segment) || self.delayed.iter().any(|(_, end)| end.peer == peer)
    }

    fn post(&mut self, post: Post<'_>) -> Result<()> {
        let act = self.faults.draw();
        if act == Some(Act::Refuse) {
            return Err(ErrorKind::PoolFull.error("a fault that was asked for").retry());
        }
        // Before the bytes can move.
        let spots = if act.is_some() { self.spots(&post) } else { Vec::new() };
        self.inner.post(post)?;
        if let Some(act) = act {
            self.acts.insert(post.id, (act, spots));
        }
        Ok(())
    }

    fn poll(&mut self, budget: u64, out: &mut Vec<Completion>) {
        if self.faults.0.lock().held {
            return;
        }
        self.polls += 1;
        for _ in 0..self.delayed.len() {
            match self.delayed.pop_front() {
                Some((due, completion)) if due <= self.polls => out.push(completion),
                Some(later) => self.delayed.push_back(later),
                None => break,
            }
        }
        let mut ended = Vec::new();
        self.inner.poll(budget, &mut ended);
        ended.into_iter().for_each(|completion| self.end(completion, out));
    }

    fn pending(&self) -> usize {
        self.inner.pending() + self.delayed.len()
    }

    fn lost(&mut self) -> Option<(Incarnation, Error)> {
        self.inner.lost()
    }

    fn rests(&mut self) -> bool {
        self.inner.rests() && self.delayed.is_empty()
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        self.inner.event_fd()
    }
}
