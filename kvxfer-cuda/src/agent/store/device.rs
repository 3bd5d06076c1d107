//! A pool on a GPU: its copier moves the bytes, and tells when they have moved.
//!
//! One task a layer and chunk, one a probe, one a segment whose memory is replaced; they end in the order in
//! which they were handed over. A chunk has ended when all tasks of it have, failed or not: until then
//! something may write to the engine's blocks.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use kvxfer_core::sum::word_key;
use kvxfer_core::transport::PROBE_BYTES;
use kvxfer_core::{Error, LoadId, Result, SegmentId};

use super::{Check, Ended};
use crate::agent::loads::{Part, Piece, Planned, copied};
use crate::device::{Copier, DevicePool, DeviceRegions, Done, Fresh, Span};
use crate::driver::{Event, Mapped};
use crate::planted::{Bug, planted};

enum Task {
    Layer { part: Part, sum: u64 },
    Check(Check),
    Replace { segment: SegmentId, fresh: Fresh },
}

/// A chunk whose layers are being copied.
struct Chunk {
    /// Tasks that have not ended.
    left: u32,
    /// Whether all were handed over.
    whole: bool,
    result: Result<()>,
}

pub(in crate::agent) struct DeviceStore {
    pub(super) pool: DevicePool,
    copier: Copier,
    tasks: HashMap<u64, Task>,
    next_task: u64,
    chunks: HashMap<(LoadId, u32), Chunk>,
    /// For which the copier had no room yet.
    waiting: VecDeque<(Task, Vec<Span>)>,
    /// Memory that was replaced, and the first task that can't name it.
    old: Vec<(u64, Arc<Mapped>)>,
    spans: Vec<Span>,
    done: Vec<Done>,
    said_broken: bool,
}

impl DeviceStore {
    pub(in crate::agent) fn new(pool: DevicePool, copier: Copier) -> Self {
        Self {
            pool,
            copier,
            tasks: HashMap::new(),
            next_task: 0,
            chunks: HashMap::new(),
            waiting: VecDeque::new(),
            old: Vec::new(),
            spans: Vec::new(),
            done: Vec::new(),
            said_broken: false,
        }
    }

    /// What is copied from now on comes after that event.
    ///
    /// # Errors
    /// The GPU is broken.
    pub(in crate::agent) fn wait_for(&mut self, event: &Arc<Event>) -> Result<()> {
        self.copier.wait_for(event)
    }

    pub(super) fn copy(
        &mut self,
        planned: &Planned,
        pieces: &[Piece],
        regions: &DeviceRegions,
    ) -> Result<()> {
        self.spans.clear();
        for &Piece { segment, offset, into, len, word } in pieces {
            let dst = into.map(|(region, at)| regions.at(region, at, len)).transpose()?;
            let src = self.pool.at(segment, offset, len)?;
            self.spans.push(Span { src, dst, len, key: word_key(planned.seed, word) });
        }
        self.copier.submit(self.next_task, &self.spans)?;
        let &Planned { part, sum, .. } = planned;
        self.began(Task::Layer { part, sum });
        let begun = Chunk { left: 0, whole: false, result: Ok(()) };
        self.chunks.entry((part.load, part.chunk)).or_insert(begun).left += 1;
        Ok(())
    }

    pub(super) fn whole(
        &mut self,
        place: (LoadId, u32),
        result: Result<()>,
        ended: &mut Vec<Ended>,
    ) {
        let none = Chunk { left: 0, whole: true, result: Ok(()) };
        let chunk = self.chunks.entry(place).or_insert(none);
        chunk.whole = true;
        if result.is_err() {
            chunk.result = result;
        }
        self.settle(place, ended);
    }

    fn settle(&mut self, place: (LoadId, u32), ended: &mut Vec<Ended>) {
        let over = |chunk: &Chunk| chunk.whole && (chunk.left == 0 || planted(Bug::PageFreedEarly));
        if self.chunks.get(&place).is_some_and(over)
            && let Some(chunk) = self.chunks.remove(&place)
        {
            ended.push(copied(place, chunk.result));
        }
    }

    pub(super) fn verify(&mut self, check: Check) {
        let start = self.pool.segment_bytes() - PROBE_BYTES;
        let span = self.pool.at(check.segment, start, PROBE_BYTES).map(|src| Span {
            src,
            dst: None,
            len: PROBE_BYTES,
            key: word_key(check.probe, 0),
        });
        self.waiting.push_back((Task::Check(check), span.into_iter().collect()));
    }

    pub(super) fn replace(&mut self, segment: SegmentId, live: &[(u64, u64)]) -> Result<()> {
        let fresh = self.pool.fresh(segment, live)?;
        let spans = fresh.spans.clone();
        self.waiting.push_back((Task::Replace { segment, fresh }, spans));
        Ok(())
    }

    fn began(&mut self, task: Task) {
        self.tasks.insert(self.next_task, task);
        self.next_task += 1;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.tasks.is_empty() && self.waiting.is_empty()
    }

    pub(super) fn give_up(&mut self) {
        self.waiting.clear();
        self.copier.give_up(&crate::agent::closed());
    }

    pub(super) fn has_ended(&mut self) -> bool {
        self.copier.drain(Duration::ZERO).is_ok()
    }

    pub(super) fn poll(&mut self, ended: &mut Vec<Ended>) {
        while let Some((_, spans)) = self.waiting.front() {
            let submitted = self.copier.submit(self.next_task, spans);
            if submitted.as_ref().is_err_and(Error::retryable) {
                break;
            }
            let Some((task, _)) = self.waiting.pop_front() else { break };
            match submitted {
                Ok(()) => self.began(task),
                Err(error) => self.end(task, Err(error), ended),
            }
        }
        let mut done = std::mem::take(&mut self.done);
        self.copier.poll(&mut done);
        for Done { task, result } in done.drain(..) {
            if let Some(task) = self.tasks.remove(&task) {
                self.end(task, result, ended);
            }
        }
        self.done = done;
        let oldest = self.next_task - self.tasks.len() as u64;
        self.old.retain(|&(first, _)| first > oldest);
        if !self.said_broken
            && let Some(error) = self.copier.is_broken()
        {
            self.said_broken = true;
            tracing::error!(gpu = %self.pool.device().uuid(), %error, "nothing is loaded from this GPU's pool any more");
        }
    }

    fn end(&mut self, task: Task, result: Result<u64>, ended: &mut Vec<Ended>) {
        match task {
            Task::Layer { part, sum } => {
                let place = (part.load, part.chunk);
                let Some(chunk) = self.chunks.get_mut(&place) else { return };
                chunk.left -= 1;
                let result = result.and_then(|got| match got == sum {
                    true => Ok(()),
                    false => Err(part.corrupt()),
                });
                if chunk.result.is_ok() {
                    chunk.result = result;
                }
                self.settle(place, ended);
            }
            Task::Check(check) => {
                let Check { link, segment, probe, .. } = check;
                let result = result.and_then(|got| check.compare(got));
                ended.push(Ended::Verified { link, segment, probe, result });
            }
            Task::Replace { segment, fresh } => {
                match result.and_then(|_| self.pool.swap(fresh)) {
                    Ok(old) => {
                        self.old.push((self.next_task, old));
                        ended.push(Ended::Replaced(segment));
                    }
                    // The pages stay quarantined: less room, nothing wrong.
                    Err(error) => {
                        tracing::error!(%error, %segment, "cannot replace a segment's memory");
                    }
                }
            }
        }
    }

    #[cfg(feature = "faults")]
    pub(super) fn flip(&self, segment: SegmentId, offset: u64) {
        let spoilt = self.pool.at(segment, offset, 8).and_then(|at| {
            let stream = self.pool.device().stream(crate::driver::Priority::Default)?;
            stream.fill(at, 0xA5, 8)?;
            crate::device::finish(stream, Duration::from_secs(5))
        });
        if let Err(error) = spoilt {
            tracing::error!(%error, "a fault that was asked for can't be had");
        }
    }
}

impl Drop for DeviceStore {
    fn drop(&mut self) {
        if let Err(error) = self.copier.drain(self.copier.patience()) {
            tracing::error!(%error, "copies of the pool do not end: its memory is kept");
            self.pool.leak();
            std::mem::forget((std::mem::take(&mut self.old), std::mem::take(&mut self.tasks)));
        }
    }
}
