//! Which committed chunks to give up, and when.
//!
//! The collector knows chunks by their grants and how many pages each has; it knows neither pages nor keys. It says
//! what to give up and forgets it; its caller condemns the pages, removes the chunk from the index, and frees.
//!
//! A chunk is given up for the first of these [`Reason`]s that holds, and never while it is pinned:
//!
//! | reason | holds when | kept back by |
//! |---|---|---|
//! | explicit | it was retired | |
//! | retrieved | a load took it, and the policy is to drop | expected claims, resident children |
//! | unclaimed | no load ever took it, and it lay unpinned for the TTL | expected claims, resident children |
//! | pressure | the pool is short of pages, and all others were used later | expected claims, resident children |
//! | overdue | a grant finds no room, and each claim that was expected is overdue | a prompt that goes on, resident children |
//!
//! A child is the chunk that follows in a prompt: it cannot be matched without its parent, so chains are given up from
//! their ends. Invariants:
//! * `candidates` holds exactly the chunks that are not kept back, each once, by (reason, last use, grant);
//! * `timers` holds exactly the chunks for which the time alone can change something, each once, under the
//!   next point at which it does;
//! * `children` of a chunk counts the resident chunks that name it as their parent.

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use crate::{Error, ErrorKind, GrantId, Result, Time};

/// What becomes of a chunk that a load has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AfterRetrieve {
    /// It is given up: the decode engine has it now.
    #[default]
    Drop,
    /// It stays for other prompts with the same prefix, until the pool is short of pages.
    Keep,
}

/// When to give chunks up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GcConfig {
    /// If not, only [`Collector::retire`] gives chunks up.
    pub enabled: bool,
    /// What becomes of a chunk that a load has taken.
    pub after_retrieve: AfterRetrieve,
    /// The part of the pool in use above which chunks are given up ...
    pub high_watermark: f32,
    /// ... until no more than this part is.
    pub low_watermark: f32,
    /// For how long a chunk that no load took may lie unpinned.
    pub unclaimed_ttl: Duration,
    /// How long an expected claim keeps its chunk even from a grant that finds no room. From then on it does only
    /// while there is room.
    pub overdue_after: Duration,
    /// How many chunks are given up in one tick at most.
    pub batch: usize,
}

impl Default for GcConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            after_retrieve: AfterRetrieve::Drop,
            high_watermark: 0.9,
            low_watermark: 0.8,
            unclaimed_ttl: Duration::from_secs(60),
            overdue_after: Duration::from_secs(10),
            batch: 256,
        }
    }
}

/// Why a chunk was given up. The order is the one in which they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// It was retired.
    Explicit,
    /// A load took it.
    Retrieved,
    /// No load took it in time.
    Unclaimed,
    /// The pool was short of pages.
    Pressure,
    /// A grant found no room, and the claims that were expected are overdue.
    Overdue,
}

/// A collector in numbers: what it holds, and what it gave up since the start, by [`Reason`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcStats {
    /// Chunks it holds.
    pub chunks: usize,
    /// Given up because they were retired.
    pub explicit: u64,
    /// Given up because a load took them.
    pub retrieved: u64,
    /// Given up because no load took them in time.
    pub unclaimed: u64,
    /// Given up because the pool was short of pages.
    pub pressure: u64,
    /// Given up for a grant that found no room, as the claims that were expected are overdue.
    pub overdue: u64,
}

/// A committed chunk.
#[derive(Debug)]
struct Chunk {
    parent: Option<GrantId>,
    children: u32,
    pages: u32,
    pins: u32,
    /// When each expected claim runs out, soonest first.
    expected: Vec<Time>,
    /// When the last of these is overdue. None once that time has come.
    overdue: Option<Time>,
    retrieved: bool,
    retired: bool,
    /// When it was committed or last unpinned.
    used: Time,
    /// When it has lain unclaimed for too long. None while it is pinned, once a load took it, and once that time
    /// has come.
    ttl: Option<Time>,
    /// Its key in `candidates`.
    candidate: Option<Reason>,
    /// Its key in `timers`.
    timer: Option<Time>,
}

/// Chooses the chunks to give up.
#[derive(Debug)]
pub struct Collector {
    config: GcConfig,
    chunks: HashMap<GrantId, Chunk>,
    candidates: BTreeSet<(Reason, Time, GrantId)>,
    timers: BTreeSet<(Time, GrantId)>,
    /// Above the high watermark, and not yet back at the low one.
    draining: bool,
    given_up: [u64; 5],
}

impl Collector {
    /// A collector without chunks, if the configuration makes sense.
    pub fn new(config: GcConfig) -> Result<Self> {
        let (low, high) = (config.low_watermark, config.high_watermark);
        let wrong = |about: String, fix| Err(Error::new(ErrorKind::Config, about).fix(fix));
        // Written so that NaN fails it too.
        if !(0.0 < low && low <= high && high <= 1.0) {
            let about = format!(
                "the watermarks of the garbage collector are {low} (low) and {high} (high)"
            );
            return wrong(about, "set them so that 0 < low <= high <= 1");
        }
        if config.batch == 0 {
            return wrong("the garbage collector's batch is 0".into(), "set it to at least 1");
        }
        if config.unclaimed_ttl.is_zero() {
            return wrong(
                "chunks would be dropped before anyone could claim them".into(),
                "set a TTL above 0",
            );
        }
        Ok(Self {
            config,
            chunks: HashMap::new(),
            candidates: BTreeSet::new(),
            timers: BTreeSet::new(),
            draining: false,
            given_up: [0; 5],
        })
    }

    /// A chunk was committed. `parent` is the chunk before it in its prompt; one that is not here does not count.
    pub fn insert(&mut self, now: Time, grant: GrantId, parent: Option<GrantId>, pages: u32) {
        if self.chunks.contains_key(&grant) {
            return;
        }
        let parent = parent.filter(|parent| self.chunks.contains_key(parent));
        let chunk = Chunk {
            parent,
            children: 0,
            pages,
            pins: 0,
            expected: Vec::new(),
            overdue: None,
            retrieved: false,
            retired: false,
            used: now,
            ttl: Some(now.saturating_add(self.config.unclaimed_ttl)),
            candidate: None,
            timer: None,
        };
        self.chunks.insert(grant, chunk);
        self.change(grant, |_| ());
        if let Some(parent) = parent {
            self.change(parent, |chunk| chunk.children += 1);
        }
    }

    /// A claim holds the chunk; if claims were expected, it is the one expected soonest. Tells whether it is here.
    pub fn pin(&mut self, grant: GrantId) -> bool {
        self.change(grant, |chunk| {
            chunk.pins += 1;
            chunk.ttl = None;
            if !chunk.expected.is_empty() {
                chunk.expected.remove(0);
            }
        })
    }

    /// A claim lets go of the chunk, after a load took it or not. If nobody else holds it, this was its last use,
    /// and if no load ever took it, it is unclaimed anew.
    pub fn unpin(&mut self, now: Time, grant: GrantId, retrieved: bool) {
        let ttl = self.config.unclaimed_ttl;
        self.change(grant, |chunk| {
            chunk.pins = chunk.pins.saturating_sub(1);
            chunk.used = now;
            chunk.retrieved |= retrieved;
            chunk.ttl = (chunk.pins == 0 && !chunk.retrieved).then(|| now.saturating_add(ttl));
        });
    }

    /// One claim of the chunk is expected from now on, for as long as unclaimed chunks may lie. Counts: two that are
    /// expected are two pins that take them.
    pub fn expect(&mut self, now: Time, grant: GrantId) {
        let until = now.saturating_add(self.config.unclaimed_ttl);
        let overdue = now.saturating_add(self.config.overdue_after);
        self.change(grant, |chunk| {
            let at = chunk.expected.partition_point(|other| *other <= until);
            chunk.expected.insert(at, until);
            chunk.overdue = chunk.overdue.max(Some(overdue));
        });
    }

    /// The chunk is to be given up as soon as nobody holds it, whoever else may expect or follow it.
    pub fn retire(&mut self, grant: GrantId) {
        self.change(grant, |chunk| chunk.retired = true);
    }

    /// The chunk is gone; someone else saw to it.
    pub fn forget(&mut self, grant: GrantId) {
        self.remove(grant);
    }

    /// Appends what to give up now to `out`, in that order, and forgets it.
    ///
    /// `used_pages` are those in use that have not been given up yet: condemned pages are not among them, or the same
    /// shortage would be answered twice. `wanted_pages` is what the next grant needs and does not find. `goes_on` tells
    /// whether more of a chunk's prompt is to come, so that it is not overdue yet. If a whole batch was appended, or [`Self::next_deadline`] is past, there may be more.
    pub fn tick(
        &mut self,
        now: Time,
        used_pages: u32,
        total_pages: u32,
        wanted_pages: u32,
        goes_on: impl Fn(GrantId) -> bool,
        out: &mut Vec<GrantId>,
    ) {
        self.run_out(now);
        let part = |watermark: f32| (f64::from(watermark) * f64::from(total_pages)).round() as u32;
        let (low, high) = (part(self.config.low_watermark), part(self.config.high_watermark));
        self.draining |= used_pages > high;
        // What never fits is not worth emptying the pool for.
        let room = total_pages.checked_sub(wanted_pages).unwrap_or(total_pages);
        let mut used = used_pages;
        for _ in 0..self.config.batch {
            self.draining &= used > low;
            // Those that go on are passed over each time: there are as many as prompts that are being sent.
            let goes = |reason: Reason, grant| reason != Reason::Overdue || !goes_on(grant);
            let next = self.candidates.iter().find(|(reason, _, grant)| goes(*reason, *grant));
            let Some(&(reason, _, grant)) = next else { break };
            let needed = match reason {
                Reason::Pressure => self.draining || used > room,
                Reason::Overdue => used > room,
                Reason::Explicit | Reason::Retrieved | Reason::Unclaimed => true,
            };
            if !needed {
                break;
            }
            used = used.saturating_sub(self.remove(grant));
            self.given_up[reason as usize] += 1;
            out.push(grant);
        }
        self.draining &= used > low;
    }

    /// When the next tick is due for what the collector knows by itself: the next TTL or expected claim runs out. A
    /// point in the past if something can be given up already.
    pub fn next_deadline(&self) -> Option<Time> {
        match self.candidates.first() {
            Some((Reason::Explicit | Reason::Retrieved | Reason::Unclaimed, ..)) => {
                Some(Time::ZERO)
            }
            Some((Reason::Pressure, ..)) if self.draining => Some(Time::ZERO),
            _ => self.timers.first().map(|(due, _)| *due),
        }
    }

    /// Whether a claim holds that chunk.
    pub fn is_pinned(&self, grant: GrantId) -> bool {
        self.chunks.get(&grant).is_some_and(|chunk| chunk.pins > 0)
    }

    /// How many chunks there are.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The collector in numbers.
    pub fn stats(&self) -> GcStats {
        let [explicit, retrieved, unclaimed, pressure, overdue] = self.given_up;
        GcStats { chunks: self.len(), explicit, retrieved, unclaimed, pressure, overdue }
    }

    /// Lets TTLs and expected claims run out.
    fn run_out(&mut self, now: Time) {
        while let Some(&(due, grant)) = self.timers.first()
            && due <= now
        {
            self.change(grant, |chunk| {
                chunk.ttl = chunk.ttl.filter(|ttl| *ttl > now);
                chunk.expected.retain(|until| *until > now);
                chunk.overdue = chunk.overdue.filter(|overdue| *overdue > now);
            });
        }
    }

    /// Changes a chunk and moves it to where it belongs then. The only way in which chunks change.
    fn change(&mut self, grant: GrantId, change: impl FnOnce(&mut Chunk)) -> bool {
        let Some(chunk) = self.chunks.get_mut(&grant) else { return false };
        let before = (chunk.candidate.map(|reason| (reason, chunk.used, grant)), chunk.timer);
        change(chunk);
        chunk.candidate = chunk.reason(&self.config);
        chunk.timer = if self.config.enabled { chunk.due() } else { None };
        let after = (chunk.candidate.map(|reason| (reason, chunk.used, grant)), chunk.timer);
        if before.0 != after.0 {
            before.0.map(|key| self.candidates.remove(&key));
            self.candidates.extend(after.0);
        }
        if before.1 != after.1 {
            before.1.map(|due| self.timers.remove(&(due, grant)));
            self.timers.extend(after.1.map(|due| (due, grant)));
        }
        true
    }

    /// Removes a chunk; tells how many pages it had.
    fn remove(&mut self, grant: GrantId) -> u32 {
        let Some(chunk) = self.chunks.remove(&grant) else { return 0 };
        chunk.candidate.map(|reason| self.candidates.remove(&(reason, chunk.used, grant)));
        chunk.timer.map(|due| self.timers.remove(&(due, grant)));
        if let Some(parent) = chunk.parent {
            // A parent that is gone left before its child, retired or forgotten; its number is never used again.
            self.change(parent, |parent| parent.children = parent.children.saturating_sub(1));
        }
        chunk.pages
    }
}

impl Chunk {
    /// Why it can be given up, if it can.
    fn reason(&self, config: &GcConfig) -> Option<Reason> {
        if self.pins > 0 {
            None
        } else if self.retired {
            Some(Reason::Explicit)
        } else if !config.enabled || self.children > 0 {
            None
        } else if !self.expected.is_empty() {
            self.overdue.is_none().then_some(Reason::Overdue)
        } else if self.retrieved && config.after_retrieve == AfterRetrieve::Drop {
            Some(Reason::Retrieved)
        } else if !self.retrieved && self.ttl.is_none() {
            Some(Reason::Unclaimed)
        } else {
            Some(Reason::Pressure)
        }
    }

    /// When the time alone next changes something about it.
    fn due(&self) -> Option<Time> {
        let overdue = self.overdue.filter(|_| !self.expected.is_empty());
        self.expected.first().copied().into_iter().chain(self.ttl).chain(overdue).min()
    }
}
