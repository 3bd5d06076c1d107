//! Loads: pool to engine, chunk by chunk.
//!
//! A load copies a range of a claim's chunks as they are pinned, and lets go of each once its copy is verified, so a
//! prompt larger than the pool flows through it.

use std::sync::Arc;

use super::claims::{Claim, Hold};
use super::{Consumer, ConsumerAction, Phase};
use crate::wire::Message;
use crate::wire::message::{ClaimStatus, Next};
use crate::{ClaimId, Error, ErrorKind, GrantId, LoadId, Result, Time};

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
pub(super) struct Load {
    pub(super) request: LoadRequest,
    /// Chunks not yet copied and verified.
    pub(super) left: u32,
    pub(super) copying: u32,
    pub(super) failed: Option<Error>,
}

impl LoadRequest {
    fn covers(&self, chunk: u32) -> bool {
        chunk >= self.first_chunk && chunk - self.first_chunk < self.chunks
    }
}

impl Consumer {
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
    pub(super) fn copy(&mut self, now: Time, id: LoadId, claim: ClaimId, chunk: u32) {
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
    pub(super) fn condemn(&mut self, number: GrantId) {
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
    pub(super) fn fail_load(&mut self, now: Time, id: LoadId, error: Error) {
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

    pub(super) fn finish_load(&mut self, now: Time, id: LoadId) {
        let Some(load) = self.loads.remove(&id) else { return };
        self.end_load(id, Ok(()));
        self.end_claim(now, load.request.claim);
    }

    pub(super) fn end_load(&mut self, load: LoadId, result: Result<()>) {
        match &result {
            Ok(()) => self.stats.loads += 1,
            Err(_) => self.stats.failed_loads += 1,
        }
        self.actions.push_back(ConsumerAction::Loaded { load, result });
    }

    /// One load a claim: with it the claim ends.
    pub(super) fn end_claim(&mut self, now: Time, id: ClaimId) {
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

    pub(super) fn fail_if_hopeless(&mut self, now: Time, id: ClaimId, status: ClaimStatus) {
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
}
