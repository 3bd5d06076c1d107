//! The side that owns the memory.
//!
//! What it knows of a key is an [`Entry`]: whether its chunk is here, who writes it, which offers list it,
//! which claims wait for it. Everything else follows from the entries:
//!
//! * [`offers`]: a queue of offers; grants go out in order as room allows;
//! * [`commits`]: how a grant ends: committed, given back to the queue, lost with its producer;
//! * [`claims`]: what the engine's requests pin; [`loads`]: pool to engine, which empties the pool;
//! * [`probes`]: whether a producer's writes arrive; [`leave`]: whether it may write;
//! * [`reclaim`]: fences, segments changing hands, and what the collector gives up.
//!
//! Invariants, checked by the fleet simulation:
//!
//! * a key has at most one grant being written and at most one committed, never a third;
//! * a grant is in exactly one [`Phase`], and its pages are in the pool state that belongs to it;
//! * pages leave [`Phase::Fencing`] only by a fence of that grant's writer;
//! * a claim's pinned chunk stays until the claim lets go and no copy reads it.

mod claims;
mod commits;
mod leave;
mod loads;
mod offers;
mod probes;
mod reclaim;
mod types;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::planted::{Bug, planted};
use super::protocol;
use super::timers::Timers;
use crate::gc::Collector;
use crate::pool::{Extent, PageState, Pool, PoolStats};
use crate::wire::Message;
use crate::{
    ChunkKey, ClaimId, Error, ErrorKind, GrantId, Incarnation, LinkId, LoadId, OfferId, Result,
    SegmentId, Time,
};

use claims::Claim;
use loads::Load;
pub use loads::{Copied, LoadRequest};
use offers::{Offer, Place};
use probes::{Early, Probe};
use reclaim::Then;
pub use types::{ConsumerAction, ConsumerConfig, ConsumerStats};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Grant(GrantId),
    Fence(GrantId),
    Claim(ClaimId),
    Ask(u64),
    Orphan(Incarnation),
    Retire(SegmentId),
}

/// What is known of a key.
#[derive(Debug, Default)]
struct Entry {
    committed: Option<GrantId>,
    writing: Option<GrantId>,
    /// Offers that list the key and have not been answered for good.
    offers: Vec<Place>,
    /// Claims that want the chunk and do not have it.
    claims: Vec<(ClaimId, u32)>,
    /// Until when it is remembered that the chunk was offered and lost.
    lost_until: Option<Time>,
    /// Offers answered with the chunk being here, and claims that named it: where the former lead, a
    /// claim is still to be expected.
    promised: u32,
    claimed: u32,
}

#[derive(Debug)]
struct Grant {
    peer: Incarnation,
    place: Place,
    key: ChunkKey,
    tokens: u32,
    pages: u32,
    extents: Arc<[Extent]>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// The peer may write until the deadline, which renewals move up to the cap.
    Writing { deadline: Time, cap: Time },
    /// The leave ended, and the peer has not shown that it stopped.
    Fencing { since: Time },
    /// Committed: the writer is done, the index has it.
    Resident { sums: Arc<[u64]> },
}

#[derive(Debug)]
struct Link {
    peer: Incarnation,
    kind: LinkKind,
}

#[derive(Debug)]
enum LinkKind {
    Producer {
        /// Set by a compatible [`Message::Attach`]; nothing else is heard before.
        attached: bool,
        exported: BTreeMap<SegmentId, Probe>,
        outstanding_pages: u32,
        offers: BTreeSet<OfferId>,
    },
    Observer {
        claims: BTreeSet<ClaimId>,
        /// Its numbers grow, so a claim that is no newer was repeated.
        newest: Option<ClaimId>,
    },
}

#[derive(Debug, Default)]
struct SegmentState {
    generation: u32,
    /// Since when its writer is asked, on a link that is up, to let go of it.
    retiring: Option<Time>,
    /// It was asked before, and its link was closed because it did not.
    clung: bool,
    replacing: bool,
}

/// The consumer's state machine.
///
/// What is walked through is ordered, so that equal events give equal actions.
#[derive(Debug)]
pub struct Consumer {
    config: ConsumerConfig,
    pool: Pool,
    collector: Collector,
    segments: Vec<SegmentState>,
    entries: HashMap<ChunkKey, Entry>,
    lost: VecDeque<(Time, ChunkKey)>,
    grants: BTreeMap<GrantId, Grant>,
    links: BTreeMap<LinkId, Link>,
    /// Writers that can write no more: their processes ended.
    dead: HashSet<Incarnation>,
    offers: HashMap<(LinkId, OfferId), Offer>,
    queue: VecDeque<(LinkId, OfferId)>,
    claims: BTreeMap<ClaimId, Claim>,
    loads: HashMap<LoadId, Load>,
    asks: BTreeMap<u64, claims::Ask>,
    next_number: u64,
    next_probe: u64,
    /// Commits that came while the probe of a segment is verified.
    early: Vec<Early>,
    timers: Timers<Timer>,
    actions: VecDeque<ConsumerAction>,
    stats: ConsumerStats,
    /// Claims whose status may have changed in this call.
    touched: Vec<ClaimId>,
}

impl Consumer {
    /// A consumer with an empty pool.
    ///
    /// # Errors
    /// The layout or the collector's configuration is invalid.
    pub fn new(mut config: ConsumerConfig) -> Result<Self> {
        config.layout.validate()?;
        if planted(Bug::ExpectedYield) {
            config.gc.overdue_after = Duration::ZERO;
        }
        let segments = (0..config.geometry.segments).map(|_| SegmentState::default()).collect();
        Ok(Self {
            pool: Pool::new(config.geometry),
            collector: Collector::new(config.gc)?,
            config,
            segments,
            entries: HashMap::new(),
            lost: VecDeque::new(),
            grants: BTreeMap::new(),
            links: BTreeMap::new(),
            dead: HashSet::new(),
            offers: HashMap::new(),
            queue: VecDeque::new(),
            claims: BTreeMap::new(),
            loads: HashMap::new(),
            asks: BTreeMap::new(),
            next_number: 1,
            next_probe: 1,
            early: Vec::new(),
            timers: Timers::new(),
            actions: VecDeque::new(),
            stats: ConsumerStats::default(),
            touched: Vec::new(),
        })
    }

    /// A producer's link is up.
    pub fn producer_connected(&mut self, now: Time, link: LinkId, peer: Incarnation) {
        if self.is_replacing(peer) {
            // What it were granted now could lie in memory that is about to be nobody's.
            let error = ErrorKind::PeerLost.error("the memory that the peer wrote to is replaced");
            self.actions.push_back(ConsumerAction::Close { link, error: error.retry() });
            return;
        }
        let kind = LinkKind::Producer {
            attached: false,
            exported: BTreeMap::new(),
            outstanding_pages: 0,
            offers: BTreeSet::new(),
        };
        // Cut off once, and back: what it holds from now on is exported to it anew.
        self.dead.remove(&peer);
        self.links.insert(link, Link { peer, kind });
        self.settle(now);
    }

    /// The engine's scheduler half is connected.
    pub fn observer_connected(&mut self, now: Time, link: LinkId, peer: Incarnation) {
        let kind = LinkKind::Observer { claims: BTreeSet::new(), newest: None };
        self.links.insert(link, Link { peer, kind });
        self.settle(now);
    }

    /// A link ended: EOF, reset, silence, a violation. Fences nothing.
    pub fn disconnected(&mut self, now: Time, link: LinkId) {
        let Some(gone) = self.links.remove(&link) else { return };
        self.early.retain(|early| early.link != link);
        match gone.kind {
            LinkKind::Producer { offers, .. } => self.producer_lost(now, link, gone.peer, offers),
            LinkKind::Observer { claims, .. } => {
                for claim in claims {
                    self.drop_claim(now, claim);
                }
            }
        }
        self.settle(now);
    }

    /// A message came.
    ///
    /// # Errors
    /// The protocol does not allow it: the caller closes the link, which ends in [`Consumer::disconnected`].
    pub fn received(&mut self, now: Time, link: LinkId, message: Message) -> Result<()> {
        let Some(state) = self.links.get_mut(&link) else { return Ok(()) };
        let peer = state.peer;
        match (&mut state.kind, message) {
            (_, Message::Ping | Message::Bye { .. }) => {}
            (LinkKind::Producer { attached, .. }, Message::Attach { layout, .. }) => {
                self.config.layout.compatible_with(&layout)?;
                let first = !std::mem::replace(attached, true);
                self.actions.push_back(ConsumerAction::Attach { link });
                if first {
                    self.revoke_again(peer);
                    self.ask_too(link);
                }
            }
            (LinkKind::Producer { attached: false, .. }, _) => {
                return Err(protocol("a message came before the peer's layout"));
            }
            (LinkKind::Producer { .. }, message) => {
                self.received_from_producer(now, link, peer, message)?;
            }
            (LinkKind::Observer { .. }, message) => {
                self.received_from_observer(now, link, message)?
            }
        }
        self.settle(now);
        Ok(())
    }

    fn received_from_producer(
        &mut self,
        now: Time,
        link: LinkId,
        peer: Incarnation,
        message: Message,
    ) -> Result<()> {
        match message {
            Message::Offer { offer, request, chunks } => {
                self.offered(now, link, offer, request, chunks)
            }
            Message::Withdraw { offer, chunks } => self.withdrawn(now, link, offer, &chunks),
            Message::Commit { grant, sums } => self.committed(now, link, peer, grant, sums),
            Message::Abort { grant } => self.fenced(now, peer, grant, Then::Lose),
            Message::FenceAck { grant } => self.fenced(now, peer, grant, Then::Requeue),
            Message::Renew { grants } => {
                for grant in grants {
                    self.renewed(now, peer, grant);
                }
                Ok(())
            }
            Message::Told { ask } => {
                self.told(link, ask);
                Ok(())
            }
            Message::Retired { segment, generation } => {
                self.retired(peer, segment, generation);
                Ok(())
            }
            Message::Probed { segment, probe, sum, nanos: _ } => {
                self.probed(link, segment, probe, sum);
                Ok(())
            }
            other => Err(unexpected("producer", &other)),
        }
    }

    fn received_from_observer(&mut self, now: Time, link: LinkId, message: Message) -> Result<()> {
        match message {
            Message::Claim { claim, request, chunks, deadline_ms } => {
                let deadline = now + Duration::from_millis(deadline_ms.into());
                self.claimed(now, link, claim, request, chunks, deadline)
            }
            Message::Release { claim, keep_from, keep_to } => {
                self.released(now, link, claim, keep_from, keep_to);
                Ok(())
            }
            other => Err(unexpected("observer", &other)),
        }
    }

    /// Fires what is due. Input that has already arrived is fed first, so that a paused agent does not
    /// expire what was renewed in time.
    pub fn tick(&mut self, now: Time) {
        while let Some(timer) = self.timers.due(now) {
            match timer {
                Timer::Grant(grant) => self.grant_due(now, grant),
                Timer::Fence(grant) => self.fence_due(now, grant),
                Timer::Claim(claim) => self.claim_due(now, claim),
                Timer::Ask(ask) => self.ask_due(ask),
                Timer::Orphan(peer) => self.orphan_due(now, peer),
                Timer::Retire(segment) => self.retire_due(now, segment),
            }
        }
        self.forget_lost(now);
        self.settle(now);
    }

    /// When [`Consumer::tick`] has something to do next.
    pub fn next_timeout(&self) -> Option<Time> {
        let lost = self.lost.front().map(|&(at, _)| at);
        [self.timers.next(), self.collector.next_deadline(), lost].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<ConsumerAction> {
        self.actions.pop_front()
    }

    /// Page counts by state.
    pub fn pool(&self) -> PoolStats {
        self.pool.stats()
    }

    /// Counters.
    pub fn stats(&self) -> ConsumerStats {
        self.stats
    }

    /// Whether a peer is the writer of any segment, so that its death would matter.
    pub fn is_writer(&self, peer: Incarnation) -> bool {
        self.pool.segments_of(peer).next().is_some()
    }

    /// Pages that are neither free nor accounted for by a grant: 0, always.
    pub fn pages_leaked(&self) -> u32 {
        let held: u32 = self.grants.values().map(|grant| grant.pages).sum();
        (self.pool.pages() - self.pool.count(PageState::Free)).saturating_sub(held)
    }

    /// What a page is doing, and whose it is or, if free, was last.
    ///
    /// # Panics
    /// If the pool has no such page.
    pub fn page(&self, segment: SegmentId, page: u32) -> (PageState, GrantId) {
        self.pool.page(segment, page)
    }

    /// Whether nothing is under way: no offer, claim or load, and what is in the pool is committed.
    pub fn is_idle(&self) -> bool {
        self.offers.is_empty()
            && self.queue.is_empty()
            && self.claims.is_empty()
            && self.loads.is_empty()
            && self.asks.is_empty()
            && self.grants.values().all(|grant| matches!(grant.phase, Phase::Resident { .. }))
            && self.grants.len() == self.entries.len()
    }

    /// What is under way, for people.
    pub fn left(&self) -> String {
        let pool = self.pool.stats();
        format!(
            "{} offers ({} queued), {} claims, {} loads, {} asks, {} grants, {} entries; pages: {} granted, {} committed, {} quarantined",
            self.offers.len(),
            self.queue.len(),
            self.claims.len(),
            self.loads.len(),
            self.asks.len(),
            self.grants.len(),
            self.entries.len(),
            pool.granted,
            pool.committed,
            pool.quarantined,
        )
    }

    /// What every public call ends with: hand out the room there is, make room, tell the claims.
    fn settle(&mut self, now: Time) {
        self.collect(now, 0);
        self.pump(now);
        self.tell_claims(now);
    }

    fn send(&mut self, link: LinkId, message: Message) {
        self.actions.push_back(ConsumerAction::Send { link, message });
    }

    fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Drops an entry that says nothing.
    fn tidy(&mut self, key: &ChunkKey) {
        if self.entries.get(key).is_some_and(|entry| {
            entry.committed.is_none()
                && entry.writing.is_none()
                && entry.offers.is_empty()
                && entry.claims.is_empty()
                && entry.lost_until.is_none()
        }) {
            self.entries.remove(key);
        }
    }
}

fn unexpected(from: &str, message: &Message) -> Error {
    let debug = format!("{message:?}");
    let name = debug.split([' ', '{', '(']).next().unwrap_or_default();
    protocol(format!("a {from} sent {name}, which is not its to send"))
}
