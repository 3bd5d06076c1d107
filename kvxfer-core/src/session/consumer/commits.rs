//! The end of a grant: commits, chunks that wait in line again, producers that are lost.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::offers::{Place, State};
use super::probes::{Early, Probe};
use super::reclaim::Then;
use super::{Consumer, Entry, LinkKind, Phase};
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::wire::message::CommitOutcome;
use crate::{GrantId, Incarnation, LinkId, OfferId, Result, Time};

impl Consumer {
    pub(super) fn renewed(&mut self, now: Time, peer: Incarnation, number: GrantId) {
        let ttl = self.config.grant_ttl;
        if let Some(grant) = self.grants.get_mut(&number)
            && grant.peer == peer
            && let Phase::Writing { deadline, cap } = &mut grant.phase
        {
            *deadline = (now + ttl).min(*cap);
        }
    }

    pub(super) fn committed(
        &mut self,
        now: Time,
        link: LinkId,
        peer: Incarnation,
        number: GrantId,
        sums: Vec<u64>,
    ) -> Result<()> {
        let layers = self.config.layout.layers() as usize;
        if sums.len() != layers {
            return Err(protocol(format!(
                "the commit of grant {number} has {} sums for {layers} layers",
                sums.len()
            )));
        }
        let outcome = match self.grants.get_mut(&number) {
            Some(grant) if grant.peer != peer => {
                return Err(protocol(format!("grant {number} was given to {}", grant.peer)));
            }
            Some(grant) if matches!(grant.phase, Phase::Writing { .. }) => {
                match self.least_probe(link, number) {
                    Probe::Passed => {}
                    Probe::Verifying(_) => {
                        self.early.push(Early { link, grant: number, sums });
                        return Ok(());
                    }
                    Probe::Awaited(_) => {
                        return Err(protocol(format!(
                            "grant {number} was committed before its segments were probed"
                        )));
                    }
                }
                let Some(grant) = self.grants.get_mut(&number) else { return Ok(()) };
                grant.phase = Phase::Resident { sums: sums.into() };
                self.index(now, number)?;
                CommitOutcome::Indexed
            }
            Some(grant) if matches!(grant.phase, Phase::Resident { .. }) => CommitOutcome::Indexed,
            // The leave had ended. The commit still proves that the writer is done.
            _ => {
                self.stats.late_commits += 1;
                self.fenced(now, peer, number, Then::Lose)?;
                CommitOutcome::Expired
            }
        };
        self.send(link, Message::CommitAck { grant: number, outcome });
        Ok(())
    }

    pub(super) fn index(&mut self, now: Time, number: GrantId) -> Result<()> {
        let Some(grant) = self.grants.get(&number) else { return Ok(()) };
        let (key, place, pages, extents) =
            (grant.key, grant.place, grant.pages, Arc::clone(&grant.extents));
        self.pool.commit(number, &extents).map_err(|stamp| protocol(stamp.to_string()))?;
        self.stats.committed += 1;
        self.window_back(place.link, pages);
        let parent = place
            .chunk
            .checked_sub(1)
            .and_then(|before| {
                Some(self.offers.get(&(place.link, place.offer))?.chunks[before as usize].key)
            })
            .and_then(|key| self.entries.get(&key)?.committed);
        self.collector.insert(now, number, parent, pages);
        let entry: &mut Entry = self.entries.entry(key).or_default();
        entry.writing = None;
        entry.committed = Some(number);
        entry.lost_until = None;
        // One that is granted has been revoked, and is answered when its writer has drained.
        let granted = |place: &Place| {
            let offer = self.offers.get(&(place.link, place.offer));
            offer.is_some_and(|offer| offer.chunks[place.chunk as usize].state == State::Granted)
        };
        let (fencing, waiting): (Vec<Place>, Vec<Place>) =
            std::mem::take(&mut entry.offers).into_iter().partition(granted);
        entry.offers = fencing;
        let claims = std::mem::take(&mut entry.claims);
        for (claim, chunk) in claims {
            self.pin(now, claim, chunk, number);
        }
        self.settle_chunk(place);
        self.promise(now, key);
        for other in waiting {
            self.have(now, other);
            self.send(other.link, Message::Have { offer: other.offer, chunks: vec![other.chunk] });
        }
        Ok(())
    }

    /// Pages of a link that are no longer granted and uncommitted.
    pub(super) fn window_back(&mut self, link: LinkId, pages: u32) {
        if let Some(LinkKind::Producer { outstanding_pages, .. }) =
            self.links.get_mut(&link).map(|link| &mut link.kind)
        {
            *outstanding_pages = outstanding_pages.saturating_sub(pages);
        }
    }

    /// A fenced grant's chunk goes back to the end of the queue, if its offer still stands.
    pub(super) fn requeue(&mut self, now: Time, place: Place) {
        let Some(offer) = self.offers.get_mut(&(place.link, place.offer)) else { return };
        let chunk = &mut offer.chunks[place.chunk as usize];
        if chunk.state != State::Granted {
            return;
        }
        chunk.state = State::Waiting;
        offer.next = offer.next.min(place.chunk as usize);
        let key = chunk.key;
        let entry = self.entries.entry(key).or_default();
        if !entry.offers.contains(&place) {
            entry.offers.push(place);
        }
        if entry.committed.is_some() {
            self.have(now, place);
            self.send(place.link, Message::Have { offer: place.offer, chunks: vec![place.chunk] });
        } else if !self.queue.contains(&(place.link, place.offer)) {
            self.queue.push_back((place.link, place.offer));
        }
    }

    pub(super) fn producer_lost(
        &mut self,
        now: Time,
        link: LinkId,
        peer: Incarnation,
        offers: BTreeSet<OfferId>,
    ) {
        let writing: Vec<GrantId> = self
            .grants
            .iter()
            .filter(|(_, grant)| {
                grant.place.link == link && matches!(grant.phase, Phase::Writing { .. })
            })
            .map(|(&number, _)| number)
            .collect();
        for number in writing {
            self.end_leave(now, number);
            // It may be back already.
            self.revoke(number);
            if planted(Bug::EofFences) {
                self.release_grant(now, number, Then::Lose);
            }
        }
        for offer in offers {
            let count = self.offers.get(&(link, offer)).map_or(0, |offer| offer.chunks.len());
            for chunk in 0..count as u32 {
                self.lose(now, Place { link, offer, chunk });
            }
        }
        self.told_by_absence(link);
        self.orphaned(now, peer);
    }
}
