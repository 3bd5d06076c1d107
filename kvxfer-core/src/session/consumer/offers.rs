//! Offers, grants, commits.
//!
//! Offers wait in one queue, in the order in which they came. A grant is one chunk's, so an offer that does not
//! fit as a whole is served window by window. A blocked offer keeps its place; others may overtake it a bounded
//! number of times, and only if they fit entirely.

use std::sync::Arc;

use super::probes::Probe;
use super::{Consumer, ConsumerAction, Grant, LinkKind, Phase, Timer};
use crate::pool::PageState;
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::wire::message::{Chunk, Granted};
use crate::{ChunkKey, GrantId, Incarnation, LinkId, OfferId, Result, Time};

/// A chunk of an offer on a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) link: LinkId,
    pub(super) offer: OfferId,
    pub(super) chunk: u32,
}

#[derive(Debug)]
pub(super) struct Offer {
    pub(super) request: Arc<str>,
    pub(super) chunks: Vec<Offered>,
    /// Chunks before this one are not [`State::Waiting`].
    pub(super) next: usize,
    /// Chunks not yet [`State::Settled`].
    pub(super) open: usize,
    pub(super) overtaken: u32,
    pub(super) told_busy: bool,
}

#[derive(Debug)]
pub(super) struct Offered {
    pub(super) key: ChunkKey,
    pub(super) tokens: u32,
    pub(super) state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Waiting,
    Granted,
    Settled,
}

pub(super) enum Served {
    All,
    /// The link has as much as it may have; its commits will bring it back.
    Window,
    /// The pool has no room.
    Blocked,
}

impl Consumer {
    pub(super) fn offered(
        &mut self,
        now: Time,
        link: LinkId,
        offer: OfferId,
        request: String,
        chunks: Vec<Chunk>,
    ) -> Result<()> {
        if self.offers.contains_key(&(link, offer)) || chunks.is_empty() {
            return Ok(());
        }
        if chunks.iter().any(|c| c.tokens == 0 || c.tokens > self.config.layout.chunk_tokens) {
            return Err(protocol(format!("offer {offer} has a chunk of an impossible size")));
        }
        self.stats.offered += chunks.len() as u64;
        let mut have = Vec::new();
        let mut pending = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let place = Place { link, offer, chunk: index as u32 };
            let entry = self.entries.entry(chunk.key).or_default();
            if entry.committed.is_some() {
                have.push(place.chunk);
                continue;
            }
            if !entry.offers.is_empty() {
                pending.push(place.chunk);
            }
            entry.offers.push(place);
            entry.lost_until = None;
            self.touched.extend(entry.claims.iter().map(|&(claim, _)| claim));
        }
        let open = chunks.len();
        let chunks = chunks
            .into_iter()
            .map(|Chunk { key, tokens }| Offered { key, tokens, state: State::Waiting })
            .collect();
        let request = request.into();
        let state = Offer { request, chunks, next: 0, open, overtaken: 0, told_busy: false };
        self.offers.insert((link, offer), state);
        if let Some(LinkKind::Producer { offers, .. }) =
            self.links.get_mut(&link).map(|link| &mut link.kind)
        {
            offers.insert(offer);
        }
        if !have.is_empty() {
            for &chunk in &have {
                self.have(now, Place { link, offer, chunk });
            }
            self.send(link, Message::Have { offer, chunks: have });
        }
        if !pending.is_empty() {
            self.send(link, Message::Pending { offer, chunks: pending });
        }
        if self.offers.contains_key(&(link, offer)) {
            self.queue.push_back((link, offer));
        }
        Ok(())
    }

    /// The chunk of that place is here: settle it, and hold the chunk for the claim that will come.
    pub(super) fn have(&mut self, now: Time, place: Place) {
        self.stats.had += 1;
        if let Some(key) = self.settle_chunk(place) {
            self.promise(now, key);
        }
    }

    /// One more producer was told that the chunk is here, so one more claim is to be expected, unless
    /// it came already.
    pub(super) fn promise(&mut self, now: Time, key: ChunkKey) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.promised += 1;
        if let Some(grant) = entry.committed
            && entry.promised > entry.claimed
            && !planted(Bug::DropIgnoresExpected)
        {
            self.collector.expect(now, grant);
        }
    }

    /// Answers a chunk of an offer for good; gives its key. The offer ends with its last one.
    pub(super) fn settle_chunk(&mut self, place: Place) -> Option<ChunkKey> {
        let offer = self.offers.get_mut(&(place.link, place.offer))?;
        let chunk = offer.chunks.get_mut(place.chunk as usize)?;
        if chunk.state == State::Settled {
            return None;
        }
        chunk.state = State::Settled;
        let key = chunk.key;
        offer.open -= 1;
        if offer.open == 0 {
            self.offers.remove(&(place.link, place.offer));
            if let Some(LinkKind::Producer { offers, .. }) =
                self.links.get_mut(&place.link).map(|link| &mut link.kind)
            {
                offers.remove(&place.offer);
            }
        }
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.offers.retain(|&other| other != place);
        }
        Some(key)
    }

    /// Settles a chunk that will not come from that place; the claims that wait for it learn it is lost unless
    /// another offer has it.
    pub(super) fn lose(&mut self, now: Time, place: Place) {
        let Some(key) = self.settle_chunk(place) else { return };
        self.lost_key(now, key);
    }

    pub(super) fn lost_key(&mut self, now: Time, key: ChunkKey) {
        let until = now + self.config.lost_ttl;
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if entry.offers.is_empty() && entry.writing.is_none() && entry.committed.is_none() {
            entry.lost_until = Some(until);
            (entry.promised, entry.claimed) = (0, entry.claims.len() as u32);
            self.lost.push_back((until, key));
            self.touched.extend(entry.claims.iter().map(|&(claim, _)| claim));
        }
    }

    pub(super) fn withdrawn(
        &mut self,
        now: Time,
        link: LinkId,
        offer: OfferId,
        chunks: &[u32],
    ) -> Result<()> {
        let Some(state) = self.offers.get(&(link, offer)) else { return Ok(()) };
        let count = state.chunks.len() as u32;
        if chunks.iter().any(|&chunk| chunk >= count) {
            return Err(protocol(format!("offer {offer} has {count} chunks; withdrawn past them")));
        }
        // A granted one is not withdrawn but aborted: that message may be under way.
        let waiting = |chunk: &u32| state.chunks[*chunk as usize].state == State::Waiting;
        let all: Vec<u32> = (0..count).collect();
        let chunks = if chunks.is_empty() { &all } else { chunks };
        let gone: Vec<u32> = chunks.iter().copied().filter(waiting).collect();
        for chunk in gone {
            self.lose(now, Place { link, offer, chunk });
        }
        Ok(())
    }

    /// Hands out grants, in the order of the queue, as far as room and windows allow.
    pub(super) fn pump(&mut self, now: Time) {
        let mut blocked: Option<usize> = None;
        let mut at = 0;
        while at < self.queue.len() {
            let (link, offer) = self.queue[at];
            let Some(state) = self.offers.get(&(link, offer)) else {
                self.queue.remove(at);
                continue;
            };
            if let Some(first) = blocked {
                let overtaken = self.offers.get(&self.queue[first]).map_or(0, |o| o.overtaken);
                let peer = self.links.get(&link).map(|link| link.peer);
                let need = state.chunks[state.next..]
                    .iter()
                    .filter(|chunk| chunk.state == State::Waiting)
                    .map(|chunk| self.pages(chunk.tokens))
                    .sum::<u32>();
                let fits = peer.is_some_and(|peer| self.pool.fits(peer, &[(0, need)]));
                if overtaken >= self.config.overtakes || need == 0 || !fits {
                    self.tell_busy(at);
                    at += 1;
                    continue;
                }
            }
            let (here, before) = (at, self.stats.granted);
            match self.serve(now, link, offer) {
                Served::All => {
                    // What is left of it waits for other producers' writes, and is found again through
                    // its entries.
                    let waits = self.offers.get(&(link, offer)).is_some_and(|o| {
                        o.chunks[o.next..].iter().any(|chunk| chunk.state == State::Waiting)
                    });
                    if waits {
                        at += 1;
                    } else {
                        self.queue.remove(at);
                    }
                }
                Served::Window => at += 1,
                Served::Blocked => {
                    if blocked.is_none() {
                        self.make_room(now, link);
                        blocked = Some(at);
                    }
                    self.tell_busy(at);
                    at += 1;
                }
            }
            if let Some(first) = blocked
                && first < here
                && self.stats.granted > before
                && let Some(offer) = self.offers.get_mut(&self.queue[first])
            {
                offer.overtaken += 1;
            }
        }
    }

    fn tell_busy(&mut self, at: usize) {
        let (link, id) = self.queue[at];
        if let Some(offer) = self.offers.get_mut(&(link, id))
            && !offer.told_busy
        {
            offer.told_busy = true;
            self.send(link, Message::Busy { offer: id, ahead: at as u32 });
        }
    }

    /// Grants one offer's chunks, in order, as far as they go.
    fn serve(&mut self, now: Time, link: LinkId, id: OfferId) -> Served {
        let mut grants = Vec::new();
        let served = self.serve_into(now, link, id, &mut grants);
        if !grants.is_empty() {
            self.export(link, &grants);
            let deadline_ms = self.config.grant_ttl.as_millis() as u32;
            self.send(link, Message::Granted { offer: id, deadline_ms, grants });
        }
        served
    }

    fn serve_into(
        &mut self,
        now: Time,
        link: LinkId,
        id: OfferId,
        out: &mut Vec<Granted>,
    ) -> Served {
        let Some(peer) = self.links.get(&link).map(|link| link.peer) else { return Served::All };
        let mut at = match self.offers.get(&(link, id)) {
            Some(offer) => offer.next,
            None => return Served::All,
        };
        let mut leading = true;
        loop {
            let Some(offer) = self.offers.get_mut(&(link, id)) else { return Served::All };
            if leading {
                offer.next = at;
            }
            let Some(chunk) = offer.chunks.get(at) else { return Served::All };
            let (key, tokens, state) = (chunk.key, chunk.tokens, chunk.state);
            if state != State::Waiting {
                at += 1;
                continue;
            }
            let entry = self.entries.entry(key).or_default();
            if entry.writing.is_some() || entry.committed.is_some() {
                leading = false;
                at += 1;
                continue;
            }
            let pages = self.pages(tokens);
            let Some(LinkKind::Producer { outstanding_pages, .. }) =
                self.links.get(&link).map(|link| &link.kind)
            else {
                return Served::All;
            };
            if *outstanding_pages > 0 && outstanding_pages + pages > self.config.window_pages {
                return Served::Window;
            }
            let place = Place { link, offer: id, chunk: at as u32 };
            match self.grant(now, peer, place, key, tokens) {
                Ok(granted) => out.push(granted),
                Err(never_fits) if never_fits => {
                    self.refuse_rest(now, link, id, at, pages);
                    return Served::All;
                }
                Err(_) => return Served::Blocked,
            }
            at += 1;
        }
    }

    fn grant(
        &mut self,
        now: Time,
        peer: Incarnation,
        place: Place,
        key: ChunkKey,
        tokens: u32,
    ) -> std::result::Result<Granted, bool> {
        let number = GrantId(self.next_number);
        let pieces: Vec<_> = self.config.layout.chunk_pieces(tokens).collect();
        let pages: u32 = pieces.iter().map(|&(_, pages)| pages).sum();
        let mut extents = Vec::with_capacity(pieces.len());
        while let Err(full) = self.pool.grant(peer, number, &pieces, &mut extents) {
            // A segment that can change hands is room enough: see `make_room`.
            if full.never_fits || self.pool.idle_segment(peer).is_some() {
                return Err(full.never_fits);
            }
            // What is free in others' segments is no room for this writer. Giving up chunks there makes one idle.
            let others = self.pool.count(PageState::Free) - self.pool.free_for(peer);
            if self.collect(now, (pages + others).min(self.pool.pages())) == 0 {
                return Err(false);
            }
            extents.clear();
        }
        self.next_number += 1;
        let deadline = now + self.config.grant_ttl;
        let phase = Phase::Writing { deadline, cap: now + self.config.grant_cap };
        let shared: Arc<[_]> = extents.as_slice().into();
        self.grants
            .insert(number, Grant { peer, place, key, tokens, pages, extents: shared, phase });
        self.timers.set(deadline, Timer::Grant(number));
        self.stats.granted += 1;
        if let Some(LinkKind::Producer { outstanding_pages, .. }) =
            self.links.get_mut(&place.link).map(|link| &mut link.kind)
        {
            *outstanding_pages += pages;
        }
        if let Some(offer) = self.offers.get_mut(&(place.link, place.offer)) {
            offer.chunks[place.chunk as usize].state = State::Granted;
        }
        let entry = self.entries.entry(key).or_default();
        entry.writing = Some(number);
        self.touched.extend(entry.claims.iter().map(|&(claim, _)| claim));
        Ok(Granted { chunk: place.chunk, grant: number, extents })
    }

    /// Segments are exported to their writer before the first grant in them.
    fn export(&mut self, link: LinkId, grants: &[Granted]) {
        let Some(LinkKind::Producer { exported, .. }) =
            self.links.get_mut(&link).map(|link| &mut link.kind)
        else {
            return;
        };
        for segment in grants.iter().flat_map(|grant| &grant.extents).map(|extent| extent.segment) {
            if let std::collections::btree_map::Entry::Vacant(place) = exported.entry(segment) {
                let probe = self.next_probe;
                self.next_probe += 1;
                place.insert(Probe::Awaited(probe));
                let state = &mut self.segments[segment.0 as usize];
                // It was asked to let go, and needs the segment again: its answer is of no use any more.
                state.retiring = None;
                state.clung = false;
                let generation = state.generation;
                let export = ConsumerAction::Export { link, segment, generation, probe };
                self.actions.push_back(export);
            }
        }
    }

    /// A chunk that is larger than the pool: neither it nor what follows it can be used.
    fn refuse_rest(&mut self, now: Time, link: LinkId, id: OfferId, from: usize, pages: u32) {
        let Some(offer) = self.offers.get(&(link, id)) else { return };
        let chunks: Vec<u32> = (from..offer.chunks.len())
            .filter(|&at| offer.chunks[at].state == State::Waiting)
            .map(|at| at as u32)
            .collect();
        self.stats.refused += chunks.len() as u64;
        let bytes = |pages: u32| u64::from(pages) * self.config.layout.page_bytes();
        let segments = self.config.geometry.segments;
        let reason = format!(
            "request {}: a chunk of {} tokens takes {} bytes, and the whole pool of the consumer has {} (set \
             buffer_size to at least {}, or chunk_size to less on both sides)",
            offer.request,
            offer.chunks[from].tokens,
            bytes(pages),
            bytes(self.pool.pages()),
            bytes(pages.div_ceil(segments) * segments),
        );
        for &chunk in &chunks {
            self.lose(now, Place { link, offer: id, chunk });
        }
        let reason = crate::wire::bounds::reason(&reason);
        self.send(link, Message::Refused { offer: id, chunks, reason });
    }

    fn pages(&self, tokens: u32) -> u32 {
        self.config.layout.chunk_pieces(tokens).map(|(_, pages)| pages).sum()
    }
}
