//! Claims: what the engine's requests pin; and loads: pool to engine, chunk by chunk.
//!
//! A claim pins every chunk of its prompt that is here and every one that comes, in whatever order. A load copies
//! a range of a claim's chunks as they are pinned, and lets go of each once its copy is verified, so a prompt larger
//! than the pool flows through it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Consumer, ConsumerAction, LinkKind, Timer};
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::wire::message::{Chunk, ClaimStatus, Next};
use crate::{ChunkKey, ClaimId, ErrorKind, GrantId, LinkId, LoadId, Result, Time};

#[derive(Debug)]
pub(super) struct Claim {
    pub(super) link: LinkId,
    pub(super) request: Arc<str>,
    pub(super) chunks: Vec<Wanted>,
    pub(super) deadline: Time,
    pub(super) load: Option<LoadId>,
    /// Leading chunks that are not [`Hold::Waiting`]. Never shrinks: what is pinned stays.
    pub(super) ready: usize,
    pub(super) ask: Asked,
    pub(super) told: Option<ClaimStatus>,
}

#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) key: ChunkKey,
    pub(super) hold: Hold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    Waiting,
    Pinned(GrantId),
    /// A copy reads it. It is let go when the copy ends, not before.
    Copying(GrantId),
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Never,
    Now(u64),
    Answered,
}

#[derive(Debug)]
pub(super) struct Ask {
    pub(super) claim: ClaimId,
    pub(super) waiting: BTreeSet<LinkId>,
}

impl Consumer {
    pub(super) fn claimed(
        &mut self,
        now: Time,
        link: LinkId,
        id: ClaimId,
        request: String,
        chunks: Vec<Chunk>,
        deadline: Time,
    ) -> Result<()> {
        if let Some(claim) = self.claims.get(&id) {
            return match claim.link == link {
                true => Ok(()),
                false => Err(protocol(format!("claim {id} belongs to another observer"))),
            };
        }
        if let Some(LinkKind::Observer { claims, newest }) =
            self.links.get_mut(&link).map(|link| &mut link.kind)
        {
            if newest.is_some_and(|newest| id <= newest) {
                return Ok(());
            }
            *newest = Some(id);
            claims.insert(id);
        }
        self.stats.claims += 1;
        let chunks = chunks
            .into_iter()
            .enumerate()
            .map(|(at, chunk)| {
                let entry = self.entries.entry(chunk.key).or_default();
                entry.claimed += 1;
                let hold = match entry.committed {
                    Some(grant) => {
                        if !planted(Bug::MatchWithoutPin) {
                            self.collector.pin(grant);
                        }
                        Hold::Pinned(grant)
                    }
                    None => {
                        entry.claims.push((id, at as u32));
                        Hold::Waiting
                    }
                };
                Wanted { key: chunk.key, hold }
            })
            .collect();
        let claim = Claim {
            link,
            request: request.into(),
            chunks,
            deadline,
            load: None,
            ready: 0,
            ask: Asked::Never,
            told: None,
        };
        self.claims.insert(id, claim);
        self.timers.set(deadline.max(now), Timer::Claim(id));
        self.touched.push(id);
        Ok(())
    }

    /// A chunk that a claim waited for was committed.
    pub(super) fn pin(&mut self, now: Time, id: ClaimId, chunk: u32, grant: GrantId) {
        let Some(claim) = self.claims.get_mut(&id) else { return };
        let wanted = &mut claim.chunks[chunk as usize];
        if wanted.hold != Hold::Waiting {
            return;
        }
        self.collector.pin(grant);
        wanted.hold = Hold::Pinned(grant);
        self.touched.push(id);
        if let Some(load) = claim.load {
            self.copy(now, load, id, chunk);
        }
    }

    pub(super) fn released(
        &mut self,
        now: Time,
        link: LinkId,
        id: ClaimId,
        keep_from: u32,
        keep_to: u32,
    ) {
        let Some(claim) = self.claims.get(&id).filter(|claim| claim.link == link) else { return };
        let keep = keep_from..keep_to;
        if keep.is_empty() {
            return self.drop_claim(now, id);
        }
        for chunk in (0..claim.chunks.len() as u32).filter(|chunk| !keep.contains(chunk)) {
            self.let_go(now, id, chunk);
        }
        self.touched.push(id);
    }

    /// Ends a claim. A load under way fails, once the copies that it started have ended.
    pub(super) fn drop_claim(&mut self, now: Time, id: ClaimId) {
        let Some(claim) = self.claims.get(&id) else { return };
        let (load, count) = (claim.load, claim.chunks.len() as u32);
        for chunk in 0..count {
            self.let_go(now, id, chunk);
        }
        match load {
            Some(load) => {
                let error = ErrorKind::Closed.error(format!("claim {id} was released"));
                self.fail_load(now, load, error);
            }
            None => self.forget_claim(id),
        }
    }

    fn forget_claim(&mut self, id: ClaimId) {
        let Some(claim) = self.claims.remove(&id) else { return };
        if let Asked::Now(ask) = claim.ask {
            self.asks.remove(&ask);
        }
        if let Some(LinkKind::Observer { claims, .. }) =
            self.links.get_mut(&claim.link).map(|link| &mut link.kind)
        {
            claims.remove(&id);
        }
    }

    /// Lets go of one chunk, unless a copy reads it.
    fn let_go(&mut self, now: Time, id: ClaimId, chunk: u32) {
        let Some(wanted) =
            self.claims.get_mut(&id).and_then(|claim| claim.chunks.get_mut(chunk as usize))
        else {
            return;
        };
        match wanted.hold {
            Hold::Waiting => {
                let key = wanted.key;
                wanted.hold = Hold::Released;
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.claims.retain(|&waiting| waiting != (id, chunk));
                    // It was the one that an offer led to and will not come again; unless there are more claims
                    // than offers: then it took nothing, and whoever was expected still is.
                    if entry.claimed as usize > entry.promised as usize + entry.offers.len() {
                        entry.claimed -= 1;
                    }
                }
                self.tidy(&key);
            }
            Hold::Pinned(grant) => {
                wanted.hold = Hold::Released;
                self.collector.unpin(now, grant, true);
            }
            Hold::Copying(_) | Hold::Released => {}
        }
    }

    /// Tells each claim that may have changed how it stands, and fails loads that wait in vain.
    pub(super) fn tell_claims(&mut self, now: Time) {
        while let Some(id) = self.touched.pop() {
            let Some(mut status) = self.status(id) else { continue };
            if status.next == Next::Missing
                && self.claims.get(&id).is_some_and(|claim| claim.ask == Asked::Never)
            {
                self.ask(now, id);
                status.next = Next::Asking;
            }
            let Some(claim) = self.claims.get_mut(&id) else { continue };
            if claim.told != Some(status) {
                claim.told = Some(status);
                let link = claim.link;
                self.send(link, Message::Claimed { claim: id, status });
            }
            self.fail_if_hopeless(now, id, status);
        }
    }

    fn status(&mut self, id: ClaimId) -> Option<ClaimStatus> {
        let claim = self.claims.get_mut(&id)?;
        let here = |wanted: &Wanted| wanted.hold != Hold::Waiting;
        claim.ready += claim.chunks[claim.ready..].iter().take_while(|w| here(w)).count();
        let mut coming = claim.ready;
        let mut next = Next::Done;
        for wanted in &claim.chunks[claim.ready..] {
            let entry = self.entries.get(&wanted.key);
            let writing = entry.is_some_and(|entry| entry.writing.is_some());
            let offered = entry.is_some_and(|entry| !entry.offers.is_empty());
            if coming == claim.ready {
                let producers = || {
                    let attached =
                        |kind: &LinkKind| matches!(kind, LinkKind::Producer { attached: true, .. });
                    self.links.values().any(|link| attached(&link.kind))
                };
                next = match claim.ask {
                    _ if writing => Next::Writing,
                    _ if offered => Next::Stalled,
                    _ if entry.is_some_and(|entry| entry.lost_until.is_some()) => Next::Lost,
                    _ if !producers() => Next::NoProducer,
                    Asked::Now(_) => Next::Asking,
                    Asked::Never | Asked::Answered => Next::Missing,
                };
            }
            if !here(wanted) && !writing && !offered {
                break;
            }
            coming += 1;
        }
        Some(ClaimStatus { ready: claim.ready as u32, coming: coming as u32, next })
    }

    /// Asks every producer whether it has offered all it has.
    fn ask(&mut self, now: Time, claim: ClaimId) {
        let waiting: BTreeSet<LinkId> = self
            .links
            .iter()
            .filter(|(_, link)| matches!(link.kind, LinkKind::Producer { attached: true, .. }))
            .map(|(&id, _)| id)
            .collect();
        let ask = self.number();
        for &link in &waiting {
            self.send(link, Message::Ask { ask });
        }
        self.asks.insert(ask, Ask { claim, waiting });
        self.timers.set(now + self.config.ask_timeout, Timer::Ask(ask));
        if let Some(claim) = self.claims.get_mut(&claim) {
            claim.ask = Asked::Now(ask);
        }
    }

    /// A producer is there that claims have not asked: they may have been told that nobody has their chunks.
    pub(super) fn ask_too(&mut self, link: LinkId) {
        for (&id, claim) in &mut self.claims {
            match claim.ask {
                Asked::Never => {}
                Asked::Answered => claim.ask = Asked::Never,
                Asked::Now(ask) => {
                    if let Some(state) = self.asks.get_mut(&ask)
                        && state.waiting.insert(link)
                    {
                        self.actions.push_back(ConsumerAction::Send {
                            link,
                            message: Message::Ask { ask },
                        });
                    }
                }
            }
            self.touched.push(id);
        }
    }

    pub(super) fn told(&mut self, link: LinkId, ask: u64) {
        let Some(state) = self.asks.get_mut(&ask) else { return };
        state.waiting.remove(&link);
        if state.waiting.is_empty() {
            self.ask_due(ask);
        }
    }

    /// Everyone answered, or the time for answers is up.
    pub(super) fn ask_due(&mut self, ask: u64) {
        let Some(Ask { claim: id, .. }) = self.asks.remove(&ask) else { return };
        if let Some(claim) = self.claims.get_mut(&id) {
            claim.ask = Asked::Answered;
            self.touched.push(id);
        }
    }

    /// A link that is gone answers no more.
    pub(super) fn told_by_absence(&mut self, link: LinkId) {
        let asks: Vec<u64> = self.asks.keys().copied().collect();
        for ask in asks {
            self.told(link, ask);
        }
    }
}
