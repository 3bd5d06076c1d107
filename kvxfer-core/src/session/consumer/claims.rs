//! Claims: what the engine's requests pin; and loads: pool to engine, chunk by chunk.
//!
//! A claim pins every chunk of its prompt that is here and every one that comes, in whatever order. A load copies
//! a range of a claim's chunks as they are pinned, and lets go of each once its copy is verified, so a prompt larger
//! than the pool flows through it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Consumer, ConsumerAction, LinkKind, Phase, Timer};
use crate::session::planted::{Bug, planted};
use crate::session::protocol;
use crate::wire::Message;
use crate::wire::message::{Chunk, ClaimStatus, Next};
use crate::{ChunkKey, ClaimId, Error, ErrorKind, GrantId, LinkId, LoadId, Result, Time};

/// A load, as the engine's worker half asks for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadRequest {
    /// Names the load.
    pub load: LoadId,
    /// The claim that holds its chunks.
    pub claim: ClaimId,
    /// First chunk of the claim to load.
    pub first_chunk: u32,
    /// How many.
    pub chunks: u32,
}

/// A [`ConsumerAction::Copy`] ended.
#[derive(Clone, Debug)]
pub struct Copied {
    /// The load.
    pub load: LoadId,
    /// The chunk of its claim.
    pub chunk: u32,
    /// Whether the engine's blocks hold the bytes that were sent.
    pub result: Result<()>,
}

#[derive(Debug)]
pub(super) struct Claim {
    link: LinkId,
    request: Arc<str>,
    chunks: Vec<Wanted>,
    deadline: Time,
    load: Option<LoadId>,
    /// Leading chunks that are not [`Hold::Waiting`]. Never shrinks: what is pinned stays.
    ready: usize,
    ask: Asked,
    told: Option<ClaimStatus>,
}

#[derive(Debug)]
struct Wanted {
    key: ChunkKey,
    hold: Hold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Waiting,
    Pinned(GrantId),
    /// A copy reads it. It is let go when the copy ends, not before.
    Copying(GrantId),
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Never,
    Now(u64),
    Answered,
}

#[derive(Debug)]
pub(super) struct Ask {
    claim: ClaimId,
    waiting: BTreeSet<LinkId>,
}

#[derive(Debug)]
pub(super) struct Load {
    request: LoadRequest,
    /// Chunks not yet copied and verified.
    left: u32,
    copying: u32,
    failed: Option<Error>,
}

impl LoadRequest {
    fn covers(&self, chunk: u32) -> bool {
        chunk >= self.first_chunk && chunk - self.first_chunk < self.chunks
    }
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
                    // It took nothing, so whoever was expected still is.
                    entry.claimed = entry.claimed.saturating_sub(1);
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

    /// Starts a load. It ends in exactly one [`ConsumerAction::Loaded`], whatever happens.
    pub fn load(&mut self, now: Time, request: LoadRequest) {
        let LoadRequest { load, claim: id, first_chunk, chunks } = request;
        let fits = |claim: &&mut Claim| {
            let end = first_chunk.checked_add(chunks).map(|end| end as usize);
            let range = end.and_then(|end| claim.chunks.get(first_chunk as usize..end));
            // What was let go does not come again.
            range.is_some_and(|chunks| chunks.iter().all(|c| c.hold != Hold::Released))
        };
        match self.claims.get_mut(&id).filter(fits) {
            Some(claim) if claim.load.is_none() => claim.load = Some(load),
            _ => {
                let what = format!(
                    "chunks {first_chunk}..{first_chunk}+{chunks} of claim {id} cannot be loaded"
                );
                return self.end_load(load, Err(ErrorKind::NotFound.error(what)));
            }
        }
        self.loads.insert(load, Load { request, left: chunks, copying: 0, failed: None });
        for chunk in first_chunk..first_chunk + chunks {
            self.copy(now, load, id, chunk);
        }
        if chunks == 0 {
            self.finish_load(now, load);
        } else if self.claims.get(&id).is_some_and(|claim| now >= claim.deadline) {
            self.claim_due(now, id);
        }
        self.touched.push(id);
        self.settle(now);
    }

    /// Copies a chunk if it is pinned and belongs to the load.
    fn copy(&mut self, now: Time, id: LoadId, claim: ClaimId, chunk: u32) {
        let Some(load) = self.loads.get_mut(&id) else { return };
        let Some(wanted) =
            self.claims.get_mut(&claim).and_then(|claim| claim.chunks.get_mut(chunk as usize))
        else {
            return;
        };
        let Hold::Pinned(number) = wanted.hold else { return };
        if !load.request.covers(chunk) || load.failed.is_some() {
            return;
        }
        let Some(grant) = self.grants.get(&number) else { return };
        let Phase::Resident { sums } = &grant.phase else { return };
        // Last look before the bytes are used: the pages still carry the number they were granted under.
        if let Err(stamp) = self.pool.check(number, &grant.extents) {
            return self.fail_load(now, id, ErrorKind::Corrupt.error(stamp.to_string()));
        }
        wanted.hold = Hold::Copying(number);
        load.copying += 1;
        self.actions.push_back(ConsumerAction::Copy {
            load: id,
            chunk,
            key: grant.key,
            grant: number,
            tokens: grant.tokens,
            extents: Arc::clone(&grant.extents),
            sums: Arc::clone(sums),
        });
    }

    /// A copy ended.
    pub fn copied(&mut self, now: Time, Copied { load: id, chunk, result }: Copied) {
        let Some(load) = self.loads.get_mut(&id) else { return };
        let claim = load.request.claim;
        let Some(wanted) =
            self.claims.get_mut(&claim).and_then(|claim| claim.chunks.get_mut(chunk as usize))
        else {
            return;
        };
        let Hold::Copying(grant) = wanted.hold else { return };
        wanted.hold = Hold::Released;
        load.copying -= 1;
        load.left -= 1;
        self.collector.unpin(now, grant, true);
        match result {
            Ok(()) if load.failed.is_none() && load.left == 0 => self.finish_load(now, id),
            Ok(()) => {
                if let Some(error) = load.failed.take() {
                    self.fail_load(now, id, error);
                }
            }
            Err(error) => {
                self.stats.corrupt += u64::from(error.kind() == ErrorKind::Corrupt);
                self.condemn(grant);
                self.fail_load(now, id, error);
            }
        }
        self.settle(now);
    }

    /// Nobody shall be told any more that this chunk is here.
    fn condemn(&mut self, number: GrantId) {
        let Some(grant) = self.grants.get(&number) else { return };
        let key = grant.key;
        if let Some(entry) = self.entries.get_mut(&key)
            && entry.committed == Some(number)
        {
            entry.committed = None;
            entry.promised = 0;
            entry.claimed = entry.claims.len() as u32;
        }
        self.collector.retire(number);
        self.tidy(&key);
    }

    /// Marks a load as failed; it ends when nothing is copied for it any more.
    fn fail_load(&mut self, now: Time, id: LoadId, error: Error) {
        let Some(load) = self.loads.get_mut(&id) else { return };
        let error = load.failed.take().unwrap_or(error);
        if load.copying > 0 {
            load.failed = Some(error);
            return;
        }
        let claim = load.request.claim;
        self.loads.remove(&id);
        self.end_load(id, Err(error));
        self.end_claim(now, claim);
    }

    fn finish_load(&mut self, now: Time, id: LoadId) {
        let Some(load) = self.loads.remove(&id) else { return };
        self.end_load(id, Ok(()));
        self.end_claim(now, load.request.claim);
    }

    fn end_load(&mut self, load: LoadId, result: Result<()>) {
        match &result {
            Ok(()) => self.stats.loads += 1,
            Err(_) => self.stats.failed_loads += 1,
        }
        self.actions.push_back(ConsumerAction::Loaded { load, result });
    }

    /// One load a claim: with it the claim ends.
    fn end_claim(&mut self, now: Time, id: ClaimId) {
        if let Some(claim) = self.claims.get_mut(&id) {
            claim.load = None;
            let link = claim.link;
            if self.links.contains_key(&link) {
                self.send(link, Message::Ended { claim: id });
            }
        }
        self.drop_claim(now, id);
    }

    /// A claim's patience ended. What is pinned stays for the observer to take; a load that still waits fails.
    pub(super) fn claim_due(&mut self, now: Time, id: ClaimId) {
        let Some(claim) = self.claims.get(&id) else { return };
        let Some(load) = claim.load else { return };
        let waits = self.loads.get(&load).is_some_and(|load| load.left > load.copying);
        if waits {
            let error = ErrorKind::Timeout.error(format!(
                "request {}: chunk {} of {} did not come in time",
                claim.request,
                claim.ready,
                claim.chunks.len()
            ));
            self.fail_load(now, load, error);
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

    fn fail_if_hopeless(&mut self, now: Time, id: ClaimId, status: ClaimStatus) {
        let Some(claim) = self.claims.get(&id) else { return };
        let Some(load) = claim.load.and_then(|load| self.loads.get(&load)) else { return };
        let why = match status.next {
            Next::Lost => "was lost: its producer went away or gave up",
            Next::Missing => "is not offered by any producer",
            Next::NoProducer => "cannot come: no producer is connected",
            Next::Done | Next::Asking | Next::Writing | Next::Stalled => return,
        };
        if load.request.covers(status.ready) {
            let what = format!(
                "request {}: chunk {} of {} {why}",
                claim.request,
                status.ready,
                claim.chunks.len()
            );
            self.fail_load(now, load.request.load, ErrorKind::PeerLost.error(what));
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
