//! The side that has computed the KV.
//!
//! An [`Offer`] is a request's chunks. For each configured consumer, each chunk has a [`Push`]: it waits for an
//! answer, is being written, or is done. The engine's worker half says step by step which chunks' blocks can be
//! read, at which layers ([`steps`]); writes are posted as soon as there is both leave to write and something to
//! read. A chunk that no consumer needs any more is reported to the observer, which then unpins its blocks.
//!
//! [`pushes`] has the rest of a grant's life: the posts, what is said when the last is terminal, and the deadlines.
//!
//! Invariants, checked by the fleet simulation:
//!
//! * a chunk's blocks are read only between the step that names them and the report that it is done;
//! * commit, abort and fence-acknowledgement are sent only when every post of the grant is terminal;
//! * done is final.

mod pushes;
mod steps;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::protocol;
use super::timers::Timers;
use crate::layout::KvLayout;
use crate::path::Ability;
use crate::pool::Extent;
use crate::wire::Message;
use crate::wire::message::{Chunk, CommitOutcome, Memory};
use crate::{BlockId, ChunkKey, GrantId, Incarnation, LinkId, OfferId, PostId, Result, Time};

pub use steps::PushRange;
use steps::{Source, Step};

/// What a producer is told about itself.
#[derive(Clone, Debug)]
pub struct ProducerConfig {
    /// Geometry.
    pub layout: KvLayout,
    /// How many consumers are configured.
    pub consumers: usize,
    /// How long the engine's blocks are held for a consumer that has no room (or is not there).
    pub hold: Duration,
    /// Where the engine keeps its KV.
    pub memory: Memory,
}

/// What a producer wants done, in this order.
#[derive(Debug)]
pub enum ProducerAction {
    /// Send a message.
    Send {
        /// On this link.
        link: LinkId,
        /// This.
        message: Message,
    },
    /// Write one layer of a chunk. Answer with [`Producer::posted`].
    Post {
        /// Names the answer.
        post: PostId,
        /// To this peer.
        peer: Incarnation,
        /// On this link's path.
        link: LinkId,
        /// Under this grant.
        grant: GrantId,
        /// The chunk's key (the checksum's seed).
        key: ChunkKey,
        /// Flat layer index.
        layer: u32,
        /// To here.
        extents: Arc<[Extent]>,
        /// From these blocks, by group.
        blocks: Arc<[Vec<BlockId>]>,
    },
    /// Let go of a segment of that peer; then the message says so.
    Detach {
        /// The link.
        link: LinkId,
        /// The peer.
        peer: Incarnation,
        /// The segment.
        segment: crate::SegmentId,
        /// Its generation.
        generation: u32,
    },
}

/// Counters, all since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProducerStats {
    /// Chunks offered, each counted once a consumer.
    pub offered: u64,
    /// Chunks written and committed.
    pub committed: u64,
    /// Commits that came too late.
    pub late: u64,
    /// Chunks the consumer had already.
    pub had: u64,
    /// Chunks not pushed: no room in time, refused, withdrawn, consumer gone.
    pub skipped: u64,
    /// Writes that failed.
    pub failed_posts: u64,
    /// Grants that were revoked.
    pub revoked: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Hold(OfferId),
    Renew(usize),
}

#[derive(Debug, Default)]
struct Consumer {
    link: Option<(LinkId, Incarnation)>,
    /// The newest grant heard of on this link. Numbers grow, so one that is no newer was repeated.
    newest: Option<GrantId>,
    renew_every: Option<Duration>,
    renewing: bool,
}

#[derive(Debug)]
struct Offer {
    observer: LinkId,
    request: Arc<str>,
    chunks: Vec<Chunk>,
    sources: Vec<Source>,
    /// By consumer, then chunk.
    pushes: Vec<Vec<Push>>,
    /// Which consumers were told.
    told: Vec<bool>,
    withdrawn: bool,
    /// Per chunk, consumers that are not done with it.
    open: Vec<u32>,
}

#[derive(Debug)]
enum Push {
    /// Offered, or to be offered; nothing is written.
    Waiting,
    /// There is leave to write.
    Granted(Box<Writing>),
    /// Nothing of the chunk is read for this consumer again.
    Done,
}

#[derive(Debug)]
struct Writing {
    peer: Incarnation,
    grant: GrantId,
    extents: Arc<[Extent]>,
    /// Which layers have been posted.
    posted: Vec<bool>,
    left: u32,
    in_flight: u32,
    sums: Vec<u64>,
    /// What to say when the posts are terminal, instead of a commit.
    ending: Option<Ending>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// A write failed, or the request is gone.
    Abort,
    /// The leave was revoked: acknowledge, and wait for a new one.
    Fence,
    /// The link is gone, and with it the offer. Should the same consumer be back, it will ask.
    Silence,
}

/// The producer's state machine.
#[derive(Debug)]
pub struct Producer {
    config: ProducerConfig,
    consumers: Vec<Consumer>,
    offers: BTreeMap<OfferId, Offer>,
    /// By who gave it: a consumer that was restarted counts from the start again. Consumer, offer, chunk.
    grants: BTreeMap<(Incarnation, GrantId), (usize, OfferId, u32)>,
    posts: HashMap<PostId, (Incarnation, GrantId, u32)>,
    step: Step,
    next_post: u64,
    timers: Timers<Timer>,
    actions: VecDeque<ProducerAction>,
    done: BTreeMap<OfferId, Vec<u32>>,
    stats: ProducerStats,
}

impl Producer {
    /// A producer that is connected to nobody.
    ///
    /// # Errors
    /// The layout is invalid.
    pub fn new(config: ProducerConfig) -> Result<Self> {
        config.layout.validate()?;
        Ok(Self {
            consumers: (0..config.consumers).map(|_| Consumer::default()).collect(),
            step: Step::new(config.layout.layers() as usize),
            config,
            offers: BTreeMap::new(),
            grants: BTreeMap::new(),
            posts: HashMap::new(),
            next_post: 0,
            timers: Timers::new(),
            actions: VecDeque::new(),
            done: BTreeMap::new(),
            stats: ProducerStats::default(),
        })
    }

    /// The link to a configured consumer is up, and this is what we are able to do towards it.
    pub fn consumer_connected(
        &mut self,
        index: usize,
        link: LinkId,
        peer: Incarnation,
        paths: Vec<Ability>,
    ) {
        self.consumer_gone(index);
        self.consumers[index].link = Some((link, peer));
        let (layout, memory) = (self.config.layout.clone(), self.config.memory);
        self.send(link, Message::Attach { layout, memory, paths });
        // Also those of requests that have ended meanwhile, if their blocks are still held.
        let waiting: Vec<OfferId> = self
            .offers
            .iter()
            .filter(|(_, offer)| {
                let waits = |push: &Push| matches!(push, Push::Waiting);
                !offer.told[index] && offer.pushes[index].iter().any(waits)
            })
            .map(|(&id, _)| id)
            .collect();
        for offer in waiting {
            self.tell(index, offer);
        }
        self.settle();
    }

    fn tell(&mut self, index: usize, id: OfferId) {
        let Some((link, _)) = self.consumers[index].link else { return };
        let Some(offer) = self.offers.get_mut(&id) else { return };
        offer.told[index] = true;
        let message = Message::Offer {
            offer: id,
            request: offer.request.to_string(),
            chunks: offer.chunks.clone(),
        };
        self.stats.offered += offer.chunks.len() as u64;
        let gone = |push: &Push| !matches!(push, Push::Waiting);
        let pushes = (0..).zip(&offer.pushes[index]);
        let chunks: Vec<u32> = pushes.filter(|(_, push)| gone(push)).map(|(at, _)| at).collect();
        self.send(link, message);
        if !chunks.is_empty() {
            self.send(link, Message::Withdraw { offer: id, chunks });
        }
    }

    /// A link ended.
    pub fn disconnected(&mut self, now: Time, link: LinkId) {
        let at = |consumer: &Consumer| consumer.link.is_some_and(|(other, _)| other == link);
        if let Some(index) = self.consumers.iter().position(at) {
            self.consumer_gone(index);
        } else {
            let offers: Vec<OfferId> = self
                .offers
                .iter()
                .filter(|(_, offer)| offer.observer == link)
                .map(|(&id, _)| id)
                .collect();
            self.step.forget_observer(link);
            for offer in offers {
                self.withdraw(now, offer);
            }
        }
        self.settle();
    }

    fn consumer_gone(&mut self, index: usize) {
        if std::mem::take(&mut self.consumers[index]).link.is_none() {
            return;
        }
        let offers: Vec<OfferId> = self.offers.keys().copied().collect();
        for offer in offers {
            if self.offers[&offer].told[index] {
                self.end_pushes(index, offer, Ending::Silence, |_| true);
            }
        }
    }

    /// A message from the engine's scheduler half.
    ///
    /// # Errors
    /// The protocol does not allow it: the caller closes the link.
    pub fn received_from_observer(
        &mut self,
        now: Time,
        link: LinkId,
        message: Message,
    ) -> Result<()> {
        match message {
            Message::Offer { offer, request, chunks } => {
                self.offer(now, link, offer, request, chunks)?;
            }
            Message::Withdraw { offer, .. } => self.withdraw(now, offer),
            Message::Ping | Message::Bye { .. } => {}
            other => return Err(protocol(format!("an observer sent {other:?} to a producer"))),
        }
        self.settle();
        Ok(())
    }

    fn offer(
        &mut self,
        now: Time,
        observer: LinkId,
        id: OfferId,
        request: String,
        chunks: Vec<Chunk>,
    ) -> Result<()> {
        if self.offers.contains_key(&id) || self.step.is_repeated(observer, id) || chunks.is_empty()
        {
            return Ok(());
        }
        let count = chunks.len();
        let consumers = self.consumers.len();
        let sources = self.step.claim_early(observer, id, count);
        let held = sources.iter().any(Source::is_held);
        let void: Vec<bool> = sources.iter().map(Source::is_void).collect();
        let offer = Offer {
            observer,
            request: request.into(),
            chunks,
            sources,
            pushes: (0..consumers).map(|_| (0..count).map(|_| Push::Waiting).collect()).collect(),
            told: vec![false; consumers],
            withdrawn: false,
            open: vec![consumers as u32; count],
        };
        self.offers.insert(id, offer);
        for index in 0..consumers {
            self.tell(index, id);
            if void.contains(&true) {
                self.withdraw_chunks(index, id, |chunk| void[chunk]);
            }
        }
        if consumers == 0 {
            self.done.insert(id, (0..count as u32).collect());
        }
        if held {
            self.timers.set(now + self.config.hold, Timer::Hold(id));
        }
        Ok(())
    }

    /// The request ended: what has not been handed over will not be.
    fn withdraw(&mut self, now: Time, id: OfferId) {
        let Some(offer) = self.offers.get_mut(&id) else { return };
        offer.withdrawn = true;
        let missing: Vec<bool> = offer.sources.iter().map(|source| !source.is_held()).collect();
        for index in 0..self.consumers.len() {
            self.withdraw_chunks(index, id, |chunk| missing[chunk]);
        }
        self.timers.set(now + self.config.hold, Timer::Hold(id));
    }

    /// A message from a consumer.
    ///
    /// # Errors
    /// The protocol does not allow it: the caller closes the link.
    pub fn received_from_consumer(
        &mut self,
        now: Time,
        link: LinkId,
        message: Message,
    ) -> Result<()> {
        let of = |(at, consumer): (usize, &Consumer)| {
            let (_, peer) = consumer.link.filter(|&(other, _)| other == link)?;
            Some((at, peer))
        };
        let Some((index, peer)) = self.consumers.iter().enumerate().find_map(of) else {
            return Ok(());
        };
        match message {
            Message::Granted { offer, deadline_ms, grants } => {
                let every = Duration::from_millis(u64::from(deadline_ms.max(3)) / 3);
                self.consumers[index].renew_every = Some(every);
                for granted in grants {
                    self.granted(index, link, peer, offer, granted)?;
                }
                self.keep_renewing(now, index);
            }
            Message::Have { offer, chunks } => {
                for chunk in chunks {
                    if self.is_waiting(index, offer, chunk) {
                        self.stats.had += 1;
                        self.finish(index, offer, chunk);
                    }
                }
            }
            Message::Refused { offer, chunks, .. } => {
                for chunk in chunks {
                    if self.is_waiting(index, offer, chunk) {
                        self.stats.skipped += 1;
                        self.finish(index, offer, chunk);
                    }
                }
            }
            Message::CommitAck { outcome, .. } => {
                self.stats.late += u64::from(outcome == CommitOutcome::Expired);
            }
            Message::Revoke { grant } => self.revoked(link, peer, grant),
            Message::Retire { segment, generation } => {
                let detach = ProducerAction::Detach { link, peer, segment, generation };
                self.actions.push_back(detach);
            }
            Message::Ask { ask } => self.send(link, Message::Told { ask }),
            Message::Busy { .. }
            | Message::Pending { .. }
            | Message::Attached { .. }
            | Message::Ping
            | Message::Bye { .. } => {}
            other => return Err(protocol(format!("a consumer sent {other:?}"))),
        }
        self.settle();
        Ok(())
    }

    /// What every public call ends with: report the chunks that are read no more, forget finished offers.
    fn settle(&mut self) {
        for (id, chunks) in std::mem::take(&mut self.done) {
            let Some(offer) = self.offers.get(&id) else { continue };
            let link = offer.observer;
            if offer.open.iter().all(|&open| open == 0) {
                self.offers.remove(&id);
            }
            self.send(link, Message::Pushed { offer: id, chunks });
        }
    }

    /// Fires what is due. Input that has already arrived is fed first.
    pub fn tick(&mut self, now: Time) {
        while let Some(timer) = self.timers.due(now) {
            match timer {
                Timer::Hold(offer) => self.hold_due(now, offer),
                Timer::Renew(index) => {
                    self.consumers[index].renewing = false;
                    self.renew(index);
                    self.keep_renewing(now, index);
                }
            }
        }
        self.settle();
    }

    /// When [`Producer::tick`] has something to do next.
    pub fn next_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<ProducerAction> {
        self.actions.pop_front()
    }

    /// Counters.
    pub fn stats(&self) -> ProducerStats {
        self.stats
    }

    /// Whether nothing is under way.
    pub fn is_idle(&self) -> bool {
        self.offers.is_empty() && self.grants.is_empty() && self.posts.is_empty()
    }

    /// Offers that are not over.
    pub fn open_offers(&self) -> usize {
        self.offers.len()
    }

    fn send(&mut self, link: LinkId, message: Message) {
        self.actions.push_back(ProducerAction::Send { link, message });
    }
}

/// Whether a chunk's request ended before its blocks were handed over, so that waiting for a new grant is vain.
fn offer_is_over(offer: Option<&Offer>, chunk: u32) -> bool {
    offer.is_none_or(|offer| offer.withdrawn && !offer.sources[chunk as usize].is_held())
}
