//! Fences, segments changing hands, and what the collector gives up.
//!
//! A writer is fenced by its own word (commit, abort, acknowledgement: each is sent when all its writes are
//! terminal), by the death of its process, or by fresh memory behind its segments. A deadline, an EOF and silence
//! only quarantine.

use std::sync::Arc;

use super::{Consumer, ConsumerAction, Grant, Link, LinkKind, Phase, Timer};
use crate::pool::PageState;
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::{ChunkKey, ErrorKind, GrantId, Incarnation, LinkId, Result, SegmentId, Time};

/// Lost chunks remembered at most; the oldest go first.
const LOST_MAX: usize = 1 << 16;

/// What becomes of the chunk of a grant that ended without a commit.
#[derive(Clone, Copy, Debug)]
pub(super) enum Then {
    /// Its producer still has it: it waits in line again.
    Requeue,
    /// Its producer gave it up.
    Lose,
}

impl Consumer {
    pub(super) fn grant_due(&mut self, now: Time, number: GrantId) {
        let Some(grant) = self.grants.get(&number) else { return };
        let Phase::Writing { deadline, .. } = grant.phase else { return };
        if deadline > now {
            self.timers.set(deadline, Timer::Grant(number));
            return;
        }
        if planted(Bug::LateCommitIndexed) {
            return self.revoke(number);
        }
        self.end_leave(now, number);
        self.revoke(number);
        if planted(Bug::DeadlineFrees) {
            self.release_grant(now, number, Then::Requeue);
        }
    }

    /// Asks the writer of a grant to stop, on whichever link it is reached.
    pub(super) fn revoke(&mut self, number: GrantId) {
        if let Some(grant) = self.grants.get(&number)
            && let Some(link) = self.link_of(grant.peer)
        {
            self.send(link, Message::Revoke { grant: number });
        }
    }

    /// A producer is back on another link. What it was granted on the last one is still to be fenced, and only
    /// it can say when.
    pub(super) fn revoke_again(&mut self, peer: Incarnation) {
        let of = |grant: &Grant| grant.peer == peer && matches!(grant.phase, Phase::Fencing { .. });
        let fencing: Vec<GrantId> =
            self.grants.iter().filter(|(_, grant)| of(grant)).map(|(&n, _)| n).collect();
        for number in fencing {
            self.revoke(number);
        }
    }

    /// The newest link on which a producer can be told something.
    fn link_of(&self, peer: Incarnation) -> Option<LinkId> {
        let attached = |kind: &LinkKind| matches!(kind, LinkKind::Producer { attached: true, .. });
        let of = |(_, link): &(&LinkId, &Link)| link.peer == peer && attached(&link.kind);
        self.links.iter().rev().find(of).map(|(&id, _)| id)
    }

    /// The leave to write ended; the writer may still be at it.
    pub(super) fn end_leave(&mut self, now: Time, number: GrantId) {
        let Some(grant) = self.grants.get_mut(&number) else { return };
        let Phase::Writing { .. } = grant.phase else { return };
        grant.phase = Phase::Fencing { since: now };
        let (key, link, pages) = (grant.key, grant.place.link, grant.pages);
        let quarantined = self.pool.quarantine(number, &grant.extents);
        debug_assert!(quarantined.is_ok(), "a granted page lost its stamp");
        self.stats.revoked += 1;
        self.window_back(link, pages);
        self.not_writing(key, number);
        self.timers.set(now + self.config.fence_timeout, Timer::Fence(number));
    }

    fn not_writing(&mut self, key: ChunkKey, number: GrantId) {
        if let Some(entry) = self.entries.get_mut(&key)
            && entry.writing == Some(number)
        {
            entry.writing = None;
            self.touched.extend(entry.claims.iter().map(|&(claim, _)| claim));
        }
    }

    /// The writer of a grant says that it is done with it: no write is under way, none will follow. A grant that is
    /// committed or long gone is not changed by that.
    pub(super) fn fenced(
        &mut self,
        now: Time,
        peer: Incarnation,
        number: GrantId,
        then: Then,
    ) -> Result<()> {
        let Some(grant) = self.grants.get(&number) else { return Ok(()) };
        if grant.peer != peer {
            return Err(protocol(format!("grant {number} was given to {}", grant.peer)));
        }
        if !matches!(grant.phase, Phase::Resident { .. }) {
            self.release_grant(now, number, then);
        }
        Ok(())
    }

    /// Frees a grant whose writer is fenced.
    pub(super) fn release_grant(&mut self, now: Time, number: GrantId, then: Then) {
        let Some(grant) = self.grants.remove(&number) else { return };
        let freed = self.pool.free(number, &grant.extents);
        debug_assert!(freed.is_ok(), "a fenced page lost its stamp");
        if let Phase::Writing { .. } = grant.phase {
            self.window_back(grant.place.link, grant.pages);
            self.not_writing(grant.key, number);
        }
        match then {
            Then::Requeue => self.requeue(now, grant.place),
            Then::Lose => self.lose(now, grant.place),
        }
        self.tidy(&grant.key);
        self.unassign_dead(grant.peer);
    }

    /// A fence was not acknowledged in time: a peer that breaks the rules is cut off.
    pub(super) fn fence_due(&mut self, now: Time, number: GrantId) {
        let Some(grant) = self.grants.get(&number) else { return };
        let Phase::Fencing { since } = grant.phase else { return };
        if let Some(link) = self.link_of(grant.peer) {
            let waited = now.saturating_sub(since);
            let error =
                protocol(format!("grant {number} was revoked {waited:?} ago and not fenced"));
            self.actions.push_back(ConsumerAction::Close { link, error });
        }
    }

    /// A writer's link ended. If neither its death nor its own word fences it in time, its memory is replaced.
    pub(super) fn orphaned(&mut self, now: Time, peer: Incarnation) {
        for segment in self.pool.segments_of(peer) {
            self.segments[segment.0 as usize].retiring = None;
        }
        if self.dead.contains(&peer) {
            self.unassign_dead(peer);
        } else if self.pool.segments_of(peer).next().is_some() {
            self.timers.set(now + self.config.fence_timeout, Timer::Orphan(peer));
        }
    }

    pub(super) fn orphan_due(&mut self, now: Time, peer: Incarnation) {
        // One that is back may take as long as any other, counted from when its leave ended.
        let late = |grant: &Grant| {
            let Phase::Fencing { since } = grant.phase else { return false };
            grant.peer == peer && since + 2 * self.config.fence_timeout <= now
        };
        // Nor may it cling to a segment by coming back: one that is asked for it a second time had its time.
        let clings = |segment: SegmentId| {
            let state = &self.segments[segment.0 as usize];
            state.clung && state.retiring.is_some()
        };
        let overdue = || self.grants.values().any(late) || self.pool.segments_of(peer).any(clings);
        let links = self.links_of(peer);
        if self.dead.contains(&peer) || (!links.is_empty() && !overdue()) {
            return;
        }
        for link in links {
            let error = ErrorKind::PeerLost.error(format!("peer {peer} cannot be fenced"));
            self.actions.push_back(ConsumerAction::Close { link, error });
            self.disconnected(now, link);
        }
        let segments: Vec<SegmentId> = self.pool.segments_of(peer).collect();
        if segments.is_empty() {
            return self.writer_dead(now, peer);
        }
        for segment in segments {
            if self.segments[segment.0 as usize].replacing {
                continue;
            }
            let live = self
                .grants
                .values()
                .filter(|grant| matches!(grant.phase, Phase::Resident { .. }))
                .flat_map(|grant| grant.extents.iter())
                .filter(|extent| extent.segment == segment)
                .copied()
                .collect();
            self.segments[segment.0 as usize].replacing = true;
            self.stats.replaced_segments += 1;
            self.actions.push_back(ConsumerAction::Replace { segment, live });
        }
    }

    pub(super) fn is_replacing(&self, peer: Incarnation) -> bool {
        self.pool.segments_of(peer).any(|segment| self.segments[segment.0 as usize].replacing)
    }

    fn links_of(&self, peer: Incarnation) -> Vec<LinkId> {
        self.links.iter().filter(|(_, link)| link.peer == peer).map(|(&id, _)| id).collect()
    }

    /// Fresh memory is behind a segment: whoever wrote to the old one writes to nothing of ours.
    pub fn replaced(&mut self, now: Time, segment: SegmentId) {
        let Some(state) = self.segments.get_mut(segment.0 as usize) else { return };
        if !std::mem::take(&mut state.replacing) {
            return;
        }
        state.generation += 1;
        for link in self.links.values_mut() {
            if let LinkKind::Producer { exported, .. } = &mut link.kind {
                exported.remove(&segment);
            }
        }
        if let Some(peer) = self.pool.writer(segment)
            && !self.is_replacing(peer)
        {
            self.writer_dead(now, peer);
        }
    }

    /// A writer can write no more: its process ended, or nothing of ours is in its reach.
    pub fn writer_dead(&mut self, now: Time, peer: Incarnation) {
        self.dead.insert(peer);
        for link in self.links_of(peer) {
            let error = ErrorKind::PeerLost.error(format!("peer {peer} can write no more"));
            self.actions.push_back(ConsumerAction::Close { link, error });
            self.disconnected(now, link);
        }
        let fenced: Vec<GrantId> = self
            .grants
            .iter()
            .filter(|(_, grant)| {
                let of = grant.peer == peer || planted(Bug::ReplaceFreesOthers);
                of && matches!(grant.phase, Phase::Fencing { .. })
            })
            .map(|(&number, _)| number)
            .collect();
        for number in fenced {
            self.release_grant(now, number, Then::Lose);
        }
        self.unassign_dead(peer);
        self.settle(now);
    }

    /// Takes the segments of a dead writer back as soon as nothing is in them, and no memory is being put behind
    /// them: the next writer's would be swapped away.
    fn unassign_dead(&mut self, peer: Incarnation) {
        if !self.dead.contains(&peer) {
            return;
        }
        let segments: Vec<SegmentId> = self.pool.segments_of(peer).collect();
        let mut left = 0;
        for segment in segments {
            let replacing = self.segments[segment.0 as usize].replacing;
            left += u32::from(replacing || self.pool.unassign(segment).is_err());
        }
        if left == 0 {
            // Nothing is left of it: its name need not be remembered.
            self.dead.remove(&peer);
        }
    }

    /// A producer cannot be served. Ask a writer that does not need its segment to let go of it.
    pub(super) fn make_room(&mut self, now: Time, link: LinkId) {
        let Some(peer) = self.links.get(&link).map(|link| link.peer) else { return };
        let Some(segment) = self.pool.idle_segment(peer) else { return };
        let Some(owner) = self.pool.writer(segment) else { return };
        if self.segments[segment.0 as usize].retiring.is_some() {
            return;
        }
        // Without a link, the owner is an orphan: its death or fresh memory will give the segment back.
        let Some(link) = self.link_of(owner) else { return };
        if let Some(LinkKind::Producer { exported, .. }) =
            self.links.get_mut(&link).map(|link| &mut link.kind)
        {
            // A grant that follows exports it again.
            exported.remove(&segment);
        }
        let state = &mut self.segments[segment.0 as usize];
        state.retiring = Some(now);
        let generation = state.generation;
        self.timers.set(now + self.config.fence_timeout, Timer::Retire(segment));
        self.send(link, Message::Retire { segment, generation });
    }

    /// A writer did not let go of a segment in time. It may still write there: as an orphan, it is fenced.
    pub(super) fn retire_due(&mut self, now: Time, segment: SegmentId) {
        let state = &mut self.segments[segment.0 as usize];
        // Whatever changes its writer or its memory ends the question as well.
        let Some(since) = state.retiring.filter(|&since| since + self.config.fence_timeout <= now)
        else {
            return;
        };
        if planted(Bug::RetireFrees) {
            state.retiring = None;
            let _ = self.pool.unassign(segment);
            return;
        }
        state.clung = true;
        if let Some(link) = self.pool.writer(segment).and_then(|owner| self.link_of(owner)) {
            let waited = now.saturating_sub(since);
            let error =
                protocol(format!("segment {segment} was to be let go {waited:?} ago and was not"));
            self.actions.push_back(ConsumerAction::Close { link, error });
        }
    }

    /// A writer let go of a segment. Should it have been granted pages in it meanwhile, it keeps it.
    pub(super) fn retired(&mut self, peer: Incarnation, segment: SegmentId, generation: u32) {
        let Some(state) = self.segments.get_mut(segment.0 as usize) else { return };
        if state.retiring.is_some()
            && state.generation == generation
            && self.pool.writer(segment) == Some(peer)
        {
            state.retiring = None;
            state.clung = false;
            // An error means that pages are in use: then the segment was exported to it again.
            let _ = self.pool.unassign(segment);
        }
    }

    /// Gives up what the collector condemns; says how many chunks that were.
    pub(super) fn collect(&mut self, now: Time, wanted_pages: u32) -> usize {
        let pages = self.pool.pages();
        let used = pages - self.pool.count(PageState::Free);
        let mut condemned = Vec::new();
        let goes_on = |number| {
            let place = self.grants.get(&number).map(|grant: &Grant| grant.place);
            place.is_some_and(|place| self.offers.contains_key(&(place.link, place.offer)))
        };
        self.collector.tick(now, used, pages, wanted_pages, goes_on, &mut condemned);
        self.stats.overdue = self.collector.stats().overdue;
        for &number in &condemned {
            self.give_up(number);
        }
        condemned.len()
    }

    fn give_up(&mut self, number: GrantId) {
        let Some(grant) = self.grants.remove(&number) else { return };
        let extents = Arc::clone(&grant.extents);
        let freed =
            self.pool.condemn(number, &extents).and_then(|()| self.pool.free(number, &extents));
        debug_assert!(freed.is_ok(), "a committed page lost its stamp");
        // Compare and remove: the key may be another grant's by now.
        if let Some(entry) = self.entries.get_mut(&grant.key)
            && entry.committed == Some(number)
        {
            entry.committed = None;
            entry.promised = 0;
            entry.claimed = entry.claims.len() as u32;
        }
        self.tidy(&grant.key);
        self.unassign_dead(grant.peer);
    }

    pub(super) fn forget_lost(&mut self, now: Time) {
        while let Some(&(until, key)) = self.lost.front()
            && (until <= now || self.lost.len() > LOST_MAX)
        {
            self.lost.pop_front();
            if let Some(entry) = self.entries.get_mut(&key)
                && entry.lost_until == Some(until)
            {
                entry.lost_until = None;
            }
            self.tidy(&key);
        }
    }
}
