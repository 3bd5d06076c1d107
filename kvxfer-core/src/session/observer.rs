//! An engine's scheduler half: it offers or claims, on every rank of its engine.
//!
//! Invariant: what [`Observer::status`] says holds on all ranks, so the ready chunks are pinned everywhere.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::protocol;
use crate::wire::Message;
use crate::wire::bounds;
use crate::wire::message::{Chunk, ClaimStatus, Next};
use crate::{ClaimId, Incarnation, LinkId, OfferId, Result};

/// What an observer wants done.
#[derive(Debug)]
pub enum ObserverAction {
    /// Send a message.
    Send {
        /// On this link.
        link: LinkId,
        /// This.
        message: Message,
    },
}

/// The observer's state machine. It has no timers: whoever asks it keeps the deadlines.
#[derive(Debug)]
pub struct Observer {
    ranks: Vec<Option<LinkId>>,
    claims: HashMap<ClaimId, Vec<Option<ClaimStatus>>>,
    /// For each rank that was told of the offer, which chunks it may still read.
    offers: BTreeMap<OfferId, Vec<Option<Vec<bool>>>>,
    pushed: Vec<(OfferId, Vec<u32>)>,
    next_number: u64,
    actions: VecDeque<ObserverAction>,
}

impl Observer {
    /// An observer of an engine of that many ranks.
    pub fn new(incarnation: Incarnation, ranks: usize) -> Self {
        // Numbers of observers that an agent outlives must not meet: start each at a random place.
        let [a, b, c, d, e, f, ..] = incarnation.0;
        Self {
            ranks: vec![None; ranks],
            claims: HashMap::new(),
            offers: BTreeMap::new(),
            pushed: Vec::new(),
            next_number: u64::from_le_bytes([0, 0, a, b, c, d, e, f]),
            actions: VecDeque::new(),
        }
    }

    /// The link to a rank is up.
    pub fn connected(&mut self, rank: usize, link: LinkId) {
        self.ranks[rank] = Some(link);
    }

    /// The link to a rank ended. Its agent ended with it: claims there are lost, nothing is read there.
    pub fn disconnected(&mut self, link: LinkId) {
        let Some(rank) = self.rank(link) else { return };
        self.ranks[rank] = None;
        for status in self.claims.values_mut() {
            status[rank] = Some(ClaimStatus { ready: 0, coming: 0, next: Next::Lost });
        }
        let offers: Vec<OfferId> = self.offers.keys().copied().collect();
        for offer in offers {
            self.not_read(offer, rank, None);
        }
    }

    fn rank(&self, link: LinkId) -> Option<usize> {
        self.ranks.iter().position(|&rank| rank == Some(link))
    }

    /// Whether every rank is connected.
    pub fn is_connected(&self) -> bool {
        self.ranks.iter().all(Option::is_some)
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn send_all(&mut self, message: &Message) {
        for link in self.ranks.iter().copied().flatten() {
            let message = message.clone();
            self.actions.push_back(ObserverAction::Send { link, message });
        }
    }

    /// Offers a prompt's chunks to every consumer of this engine's agents.
    pub fn offer(&mut self, request: &str, chunks: &[Chunk]) -> OfferId {
        let offer = OfferId(self.number());
        if chunks.is_empty() {
            return offer;
        }
        if self.ranks.iter().all(Option::is_none) {
            self.pushed.push((offer, (0..chunks.len() as u32).collect()));
            return offer;
        }
        let reads = |rank: &Option<LinkId>| rank.map(|_| vec![true; chunks.len()]);
        self.offers.insert(offer, self.ranks.iter().map(reads).collect());
        self.send_all(&Message::Offer {
            offer,
            request: bounds::reason(request),
            chunks: chunks.to_vec(),
        });
        offer
    }

    /// Takes back what has not been handed over. [`Observer::pushed`] still names every chunk.
    pub fn withdraw(&mut self, offer: OfferId) {
        if self.offers.contains_key(&offer) {
            self.send_all(&Message::Withdraw { offer, chunks: Vec::new() });
        }
    }

    /// Claims a prompt's chunks on every rank.
    pub fn claim(&mut self, request: &str, chunks: &[Chunk], patience: Duration) -> ClaimId {
        let claim = ClaimId(self.number());
        let lost = ClaimStatus { ready: 0, coming: 0, next: Next::Lost };
        let status = self.ranks.iter().map(|rank| rank.is_none().then_some(lost)).collect();
        self.claims.insert(claim, status);
        self.send_all(&Message::Claim {
            claim,
            request: bounds::reason(request),
            chunks: chunks.to_vec(),
            deadline_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
        });
        claim
    }

    /// How a claim stands on all ranks together: the fewest ready, the fewest coming, and what holds up the rank
    /// that is furthest behind. `None` until every rank has answered, and for a claim that is not known.
    pub fn status(&self, claim: ClaimId) -> Option<ClaimStatus> {
        let ranks = self.claims.get(&claim)?;
        let mut all: Option<ClaimStatus> = None;
        for status in ranks {
            let status = (*status)?;
            all = Some(match all {
                None => status,
                Some(all) => ClaimStatus {
                    ready: all.ready.min(status.ready),
                    coming: all.coming.min(status.coming),
                    next: if status.ready < all.ready || all.next == Next::Done {
                        status.next
                    } else {
                        all.next
                    },
                },
            });
        }
        all
    }

    /// Keeps only chunks `keep_from..keep_to` of a claim; with an empty range the claim ends.
    pub fn release(&mut self, claim: ClaimId, keep_from: u32, keep_to: u32) {
        if !self.claims.contains_key(&claim) {
            return;
        }
        if keep_from >= keep_to {
            self.claims.remove(&claim);
        }
        self.send_all(&Message::Release { claim, keep_from, keep_to });
    }

    /// Chunks that no rank reads any more, each once.
    pub fn pushed(&mut self) -> Vec<(OfferId, Vec<u32>)> {
        std::mem::take(&mut self.pushed)
    }

    /// Whether anything is known that [`Observer::pushed`] would tell.
    pub fn has_pushed(&self) -> bool {
        !self.pushed.is_empty()
    }

    /// A message came. Says whether anything that can be asked changed.
    ///
    /// # Errors
    /// The protocol does not allow it: the caller closes the link.
    pub fn received(&mut self, link: LinkId, message: Message) -> Result<bool> {
        let Some(rank) = self.rank(link) else { return Ok(false) };
        match message {
            Message::Claimed { claim, status } => {
                let Some(ranks) = self.claims.get_mut(&claim) else { return Ok(false) };
                ranks[rank] = Some(status);
                Ok(true)
            }
            Message::Ended { claim } => Ok(self.claims.contains_key(&claim)),
            Message::Pushed { offer, chunks } => {
                let Some(ranks) = self.offers.get(&offer) else { return Ok(false) };
                let count = ranks[rank].as_ref().map_or(0, Vec::len);
                if let Some(chunk) = chunks.iter().find(|&&chunk| chunk as usize >= count) {
                    return Err(protocol(format!("offer {offer} has no chunk {chunk} there")));
                }
                Ok(self.not_read(offer, rank, Some(&chunks)))
            }
            Message::Ping | Message::Bye { .. } => Ok(false),
            other => Err(protocol(format!("an agent sent {other:?} to an observer"))),
        }
    }

    /// Whether no offer or claim is under way.
    pub fn is_idle(&self) -> bool {
        self.claims.is_empty() && self.offers.is_empty() && self.pushed.is_empty()
    }

    /// A rank reads these chunks of an offer no more (or none of them). Says whether any was read by nobody else.
    fn not_read(&mut self, offer: OfferId, rank: usize, chunks: Option<&[u32]>) -> bool {
        let Some(ranks) = self.offers.get_mut(&offer) else { return false };
        let Some(mut reads) = ranks[rank].take() else { return false };
        let all: Vec<u32> = (0..reads.len() as u32).collect();
        let mut done = Vec::new();
        for &chunk in chunks.unwrap_or(&all) {
            let at = chunk as usize;
            // Said twice counts once.
            if std::mem::take(&mut reads[at]) && !ranks.iter().flatten().any(|other| other[at]) {
                done.push(chunk);
            }
        }
        ranks[rank] = Some(reads);
        if !ranks.iter().flatten().flatten().any(|&reads| reads) {
            self.offers.remove(&offer);
        }
        let changed = !done.is_empty();
        if changed {
            self.pushed.push((offer, done));
        }
        changed
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<ObserverAction> {
        self.actions.pop_front()
    }
}
