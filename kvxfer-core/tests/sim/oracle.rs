//! What must hold, judged from outside the protocol: by what was said on the wire, by the writes that land, and by
//! the state of the pages after each event.

use std::collections::{BTreeMap, BTreeSet};

use kvxfer_core::pool::{Extent, PageState};
use kvxfer_core::session::{Consumer, Copied};
use kvxfer_core::wire::Message;
use kvxfer_core::wire::message::CommitOutcome;
use kvxfer_core::{ChunkKey, ClaimId, GrantId, Incarnation, LoadId, SegmentId, Time};

use crate::data::Word;
use crate::plan::Mode;
use crate::world::{Machine, World};

/// A grant, as the wire shows it.
#[derive(Debug)]
struct Ghost {
    key: ChunkKey,
    peer: Incarnation,
    link: usize,
    extents: Vec<Extent>,
    /// Why its writer can write no more, if it cannot.
    fenced: bool,
    /// The leave to write has ended: a commit that comes now is late.
    over: bool,
    indexed: bool,
    /// When its producer, or another one, was last told that it is here.
    promised: Time,
    fresh: BTreeSet<SegmentId>,
}

#[derive(Debug)]
struct Pins {
    link: usize,
    keys: Vec<ChunkKey>,
    ready: usize,
    /// Chunks that were said to be ready, until they are let go.
    held: Vec<Option<GrantId>>,
    released: Vec<bool>,
}

#[derive(Debug, Default)]
pub(crate) struct Oracle {
    grants: BTreeMap<(usize, GrantId), Ghost>,
    resident: BTreeMap<(usize, ChunkKey), GrantId>,
    pins: BTreeMap<(usize, ClaimId), Pins>,
    pages: BTreeMap<usize, Vec<(PageState, GrantId)>>,
    /// How many chunks it gave up so far because their claims were overdue.
    overdue: BTreeMap<usize, u64>,
    /// What was ever claimed there.
    claimed: BTreeSet<(usize, ChunkKey)>,
    /// Posts that have not ended, by poster, peer and grant.
    pub(crate) in_flight: BTreeMap<(usize, Incarnation, GrantId), u32>,
    pub(crate) tampered: BTreeSet<(usize, GrantId)>,
    /// Who was shown which memory, under which generation, and has not let go of it.
    shown: BTreeMap<(usize, Incarnation), u32>,
}

impl Oracle {
    /// A process ended, and with it all it held.
    pub(crate) fn forget(&mut self, proc: usize) {
        self.grants.retain(|(at, _), _| *at != proc);
        self.resident.retain(|(at, _), _| *at != proc);
        self.pins.retain(|(at, _), _| *at != proc);
        self.pages.remove(&proc);
        self.overdue.remove(&proc);
        self.claimed.retain(|(at, _)| *at != proc);
        self.in_flight.retain(|(at, ..), _| *at != proc);
        self.tampered.retain(|(at, _)| *at != proc);
    }
}

impl World {
    /// A consumer's machine says something.
    pub(crate) fn oracle_said(
        &mut self,
        proc: usize,
        consumer: &Consumer,
        link: kvxfer_core::LinkId,
        message: &Message,
    ) {
        let _ = consumer;
        let now = self.local(proc);
        let link = link.0 as usize - 1;
        match message {
            Message::Granted { offer, grants, .. } => {
                let peer = self.links[link].names[0];
                for granted in grants {
                    let key = self.oracle_key(proc, link, *offer, granted.chunk);
                    let ghost = Ghost {
                        key,
                        peer,
                        link,
                        extents: granted.extents.clone(),
                        fenced: false,
                        over: false,
                        indexed: false,
                        promised: Time::ZERO,
                        fresh: BTreeSet::new(),
                    };
                    if self.oracle.grants.insert((proc, granted.grant), ghost).is_some() {
                        self.fail(format!("grant {} was given twice", granted.grant));
                    }
                }
            }
            Message::Revoke { grant } => {
                if let Some(ghost) = self.oracle.grants.get_mut(&(proc, *grant)) {
                    ghost.over = true;
                }
            }
            Message::CommitAck { grant, outcome: CommitOutcome::Indexed } => {
                let Some(ghost) = self.oracle.grants.get_mut(&(proc, *grant)) else {
                    return self.fail(format!("grant {grant} is indexed and was never given"));
                };
                if !std::mem::replace(&mut ghost.indexed, true) {
                    ghost.promised = now;
                    let (key, over) = (ghost.key, ghost.over);
                    self.oracle.resident.insert((proc, key), *grant);
                    if over {
                        self.fail(format!("grant {grant} was indexed after its leave had ended"));
                    }
                }
            }
            Message::Have { offer, chunks } => {
                for &chunk in chunks {
                    let key = self.oracle_key(proc, link, *offer, chunk);
                    let here = self.oracle.resident.get(&(proc, key));
                    let ghost = here.and_then(|&grant| self.oracle.grants.get_mut(&(proc, grant)));
                    if let Some(ghost) = ghost {
                        ghost.promised = now;
                    }
                }
            }
            Message::Claimed { claim, status } => {
                let Some(pins) = self.oracle.pins.get_mut(&(proc, *claim)) else { return };
                let ready = status.ready as usize;
                if ready < pins.ready || ready > pins.keys.len() {
                    let was = pins.ready;
                    return self.fail(format!("claim {claim}: {ready} chunks ready after {was}"));
                }
                for at in std::mem::replace(&mut pins.ready, ready)..ready {
                    if pins.released[at] {
                        continue;
                    }
                    match self.oracle.resident.get(&(proc, pins.keys[at])) {
                        Some(&grant) => pins.held[at] = Some(grant),
                        None => {
                            let key = pins.keys[at];
                            return self.fail(format!("claim {claim}: {key} is ready, not here"));
                        }
                    }
                }
            }
            _ => {}
        }
    }

    /// A consumer's machine is about to hear something.
    pub(crate) fn oracle_heard(&mut self, proc: usize, link: usize, message: &Message) {
        if !self.links[link].up[1] {
            return;
        }
        match message {
            Message::Offer { offer, chunks, .. } => {
                self.offered.insert((link, *offer), chunks.iter().map(|c| c.key).collect());
            }
            Message::Commit { grant, .. }
            | Message::Abort { grant }
            | Message::FenceAck { grant } => {
                let peer = self.links[link].names[0];
                if let Some(ghost) = self.oracle.grants.get_mut(&(proc, *grant))
                    && ghost.peer == peer
                {
                    ghost.fenced = true;
                }
            }
            Message::Retired { segment, generation } => {
                let memory = self.procs[proc].backing[segment.0 as usize];
                let held = (memory, self.links[link].names[0]);
                if self.oracle.shown.get(&held) == Some(generation) {
                    self.oracle.shown.remove(&held);
                }
            }
            Message::Claim { claim, chunks, .. } => {
                let count = chunks.len();
                self.oracle.claimed.extend(chunks.iter().map(|chunk| (proc, chunk.key)));
                self.oracle.pins.entry((proc, *claim)).or_insert_with(|| Pins {
                    link,
                    keys: chunks.iter().map(|chunk| chunk.key).collect(),
                    ready: 0,
                    held: vec![None; count],
                    released: vec![false; count],
                });
            }
            Message::Release { claim, keep_from, keep_to } => {
                let Some(pins) = self.oracle.pins.get_mut(&(proc, *claim)) else { return };
                for at in 0..pins.held.len() {
                    if !(*keep_from..*keep_to).contains(&(at as u32)) {
                        pins.held[at] = None;
                        pins.released[at] = true;
                    }
                }
                if keep_from >= keep_to {
                    self.oracle.pins.remove(&(proc, *claim));
                }
            }
            _ => {}
        }
    }

    fn oracle_key(
        &self,
        _proc: usize,
        link: usize,
        offer: kvxfer_core::OfferId,
        chunk: u32,
    ) -> ChunkKey {
        let keys = self.offered.get(&(link, offer));
        keys.and_then(|keys| keys.get(chunk as usize)).copied().unwrap_or(ChunkKey([0; 32]))
    }

    /// A segment is shown to a producer: nobody else may still reach that memory.
    pub(crate) fn oracle_shown(
        &mut self,
        memory: usize,
        link: kvxfer_core::LinkId,
        generation: u32,
    ) {
        let peer = self.links[link.0 as usize - 1].names[0];
        let others = (memory, Incarnation([0; 16]))..=(memory, Incarnation([0xFF; 16]));
        let other = self.oracle.shown.range(others).map(|(&(_, who), _)| who).find(|w| *w != peer);
        if let Some(other) = other {
            self.fail(format!("{peer} is shown memory that {other} has not let go of"));
        }
        self.oracle.shown.insert((memory, peer), generation);
    }

    pub(crate) fn oracle_down(&mut self, proc: usize, link: usize) {
        for ((at, _), ghost) in &mut self.oracle.grants {
            ghost.over |= *at == proc && ghost.link == link;
        }
        self.oracle.pins.retain(|(at, _), pins| *at != proc || pins.link != link);
    }

    pub(crate) fn oracle_dead(&mut self, proc: usize, peer: Incarnation) {
        let memories = &self.memories;
        self.oracle.shown.retain(|(at, who), _| memories[*at].owner.0 != proc || *who != peer);
        for ((at, _), ghost) in &mut self.oracle.grants {
            if *at == proc && ghost.peer == peer {
                ghost.fenced = true;
                ghost.over = true;
            }
        }
    }

    pub(crate) fn oracle_replaced(&mut self, proc: usize, segment: SegmentId) {
        for ((at, _), ghost) in &mut self.oracle.grants {
            if *at == proc {
                ghost.fresh.insert(segment);
                ghost.fenced |= ghost.extents.iter().all(|e| ghost.fresh.contains(&e.segment));
            }
        }
    }

    pub(crate) fn oracle_copied(&mut self, proc: usize, copied: &Copied) {
        let Some(loading) = self.loadings.get(&(proc, copied.load)) else { return };
        let claim = loading.claim();
        if let Some(pins) = self.oracle.pins.get_mut(&(proc, claim)) {
            pins.held[copied.chunk as usize] = None;
            pins.released[copied.chunk as usize] = true;
        }
    }

    pub(crate) fn oracle_load_over(&mut self, proc: usize, claim: ClaimId) {
        self.oracle.pins.remove(&(proc, claim));
    }

    /// A corrupt copy is explained only by a page that was tampered with.
    pub(crate) fn explain_corruption(&mut self, proc: usize, load: LoadId, grant: GrantId) {
        if !self.oracle.tampered.contains(&(proc, grant)) {
            self.fail(format!("load {load}: grant {grant} is corrupt, and nobody tampered"));
        }
    }

    /// Words that say how a grant ends: nothing may be under way.
    pub(crate) fn check_terminal(&mut self, proc: usize, link: usize, message: &Message) {
        let (Message::Commit { grant, .. }
        | Message::Abort { grant }
        | Message::FenceAck { grant }) = message
        else {
            return;
        };
        let peer = self.links[link].names[1];
        let left = self.oracle.in_flight.get(&(proc, peer, *grant)).copied().unwrap_or(0);
        if left > 0 {
            self.fail(format!("{message:?} was said with {left} posts under way"));
        }
    }

    /// A word is about to land: the page must be that grant's, and not read by anyone.
    pub(crate) fn check_write(
        &mut self,
        memory: usize,
        word: &Word,
        grant: GrantId,
        poster: usize,
    ) {
        let (proc, epoch) = self.memories[memory].owner;
        let process = &self.procs[proc];
        if !process.alive
            || process.epoch != epoch
            || process.backing[word.segment.0 as usize] != memory
        {
            return self.counts.step("write swallowed by old memory", self.now);
        }
        let Machine::Consumer(consumer) = &process.machine else { return };
        let (state, stamp) = consumer.page(word.segment, word.page);
        match state {
            PageState::Granted if stamp == grant => {}
            PageState::Quarantined if stamp == grant => {
                self.counts.step("write to a quarantined page", self.now);
            }
            _ => {
                let poster = self.label(poster);
                self.fail(format!(
                    "{poster} wrote under grant {grant} to page {} of segment {}, which is {state:?}, stamped {stamp}",
                    word.page, word.segment
                ));
            }
        }
    }

    /// What must hold after each event of a process.
    pub(crate) fn check(&mut self, proc: usize) {
        let Machine::Consumer(consumer) = &self.procs[proc].machine else { return };
        let geometry = self.plan.geometry();
        let page = |at: u32| {
            let per = geometry.pages_per_segment;
            consumer.page(SegmentId(at / per), at % per)
        };
        let count = geometry.segments * geometry.pages_per_segment;
        let local = self.local(proc);
        let now: Vec<_> = (0..count).map(page).collect();
        let mut wrong = None;
        if consumer.pages_leaked() != 0 {
            wrong = Some(format!("{} pages leaked", consumer.pages_leaked()));
        }
        if let Some(before) = self.oracle.pages.get(&proc) {
            for (at, (old, new)) in before.iter().zip(&now).enumerate() {
                let writing = matches!(old.0, PageState::Granted | PageState::Quarantined);
                let gone = new.0 == PageState::Free || new.1 != old.1;
                let ghost = self.oracle.grants.get(&(proc, old.1));
                if writing && gone && !ghost.is_some_and(|ghost| ghost.fenced) {
                    wrong = Some(format!(
                        "page {at} was {old:?} and is {new:?}, without a fence of its writer"
                    ));
                }
                // More than one claim may be expected: only of one that never had any it is known from outside.
                let held = |ghost: &Ghost| {
                    let firm = ghost.promised + self.plan.firm();
                    firm > local && !self.oracle.claimed.contains(&(proc, ghost.key))
                };
                if old.0 == PageState::Committed && gone && ghost.is_some_and(held) {
                    wrong = Some(format!(
                        "page {at} was {old:?}, promised and never claimed, and is {new:?}"
                    ));
                }
                if new.0 != PageState::Free && !self.oracle.grants.contains_key(&(proc, new.1)) {
                    wrong = Some(format!("page {at} is {new:?}, and no such grant was given"));
                }
            }
        }
        for ((_, claim), pins) in self.oracle.pins.range((proc, ClaimId(0))..(proc + 1, ClaimId(0)))
        {
            for grant in pins.held.iter().flatten() {
                let Some(ghost) = self.oracle.grants.get(&(proc, *grant)) else { continue };
                let pages = Self::pages_of(&ghost.extents);
                let held = |(s, p): (u32, u32)| {
                    now[(s * geometry.pages_per_segment + p) as usize]
                        == (PageState::Committed, *grant)
                };
                if !pages.into_iter().all(held) && !self.oracle.tampered.contains(&(proc, *grant)) {
                    wrong = Some(format!("claim {claim} lost grant {grant}, which was ready"));
                }
            }
        }
        let overdue = consumer.stats().overdue;
        for _ in self.oracle.overdue.insert(proc, overdue).unwrap_or(0)..overdue {
            self.counts.step("given up: overdue", self.now);
        }
        self.oracle.pages.insert(proc, now);
        if let Some(wrong) = wrong {
            let label = self.label(proc);
            self.fail(format!("{label}: {wrong}"));
        }
    }

    /// Nothing is left when everything has ended.
    pub(crate) fn check_end(&mut self) {
        let mut left = Vec::new();
        for proc in 0..self.procs.len() {
            let label = self.label(proc);
            let process = &self.procs[proc];
            if !process.alive {
                left.push(format!("{label} is not running"));
            }
            match &process.machine {
                Machine::Observer(observer) if !observer.is_idle() => {
                    left.push(format!("{label} still has offers or claims"));
                }
                Machine::Producer(producer) if !producer.is_idle() => {
                    left.push(format!("{label} still has {} offers", producer.open_offers()));
                }
                Machine::Consumer(consumer) => {
                    let pool = consumer.pool();
                    let kept = if self.plan.keeps() { pool.committed } else { 0 };
                    if pool.free + kept != pool.pages || !consumer.is_idle() {
                        left.push(format!("{label} still has {}", consumer.left()));
                    }
                }
                _ => {}
            }
        }
        if self.prefills.iter().any(|engine| !engine.is_idle()) {
            left.push("a prefill engine still pins blocks".into());
        }
        if self.decodes.iter().any(|engine| !engine.is_idle()) || !self.loadings.is_empty() {
            left.push("a decode engine still waits".into());
        }
        if self.plan.mode != Mode::Rough && self.counts.requests == 0 {
            left.push("there were no requests".into());
        }
        if !left.is_empty() {
            self.fail(format!("at the end: {}", left.join("; ")));
        }
    }
}
