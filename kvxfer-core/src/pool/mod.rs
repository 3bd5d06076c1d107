//! The consumer's memory: segments, pages, extents, stamps.
//!
//! This is book-keeping only: a pool knows which page is whose and touches no memory.
//!
//! ```text
//!        grant            commit              condemn
//!  Free ───────► Granted ────────► Committed ─────────► Condemned
//!   ▲               │ └──────┐   ┌──────┘                   │
//!   │               │        ▼   ▼ quarantine               │
//!   │               │     Quarantined                       │
//!   └───── free ────┴──────────┴────────────────────────────┘
//! ```
//!
//! Invariants:
//! * every page that is not `Free` carries the number of the grant that holds it, and each transition compares the state
//!   and the number on *all* pages it is about before it changes the first one;
//! * a segment has at most one writer, an unassigned one has only free pages, and a writer gets pages in its own
//!   segments only;
//! * an extent lies in one segment and belongs to one piece.
//!
//! `free` trusts its caller that the pages' writer is fenced and that nothing reads them any more.

mod error;
#[cfg(test)]
mod model;
mod runs;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{GrantId, Incarnation, SegmentId};
pub use error::{Full, NotIdle, StampMismatch};
use runs::{Run, Runs};

/// A run of consecutive pages in one segment, holding consecutive blocks of one group of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extent {
    /// The segment.
    pub segment: SegmentId,
    /// Its first page.
    pub page: u32,
    /// How many pages, at least one.
    pub pages: u16,
    /// The KV-cache group whose blocks lie here.
    pub group: u16,
}

/// The size of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// How many segments.
    pub segments: u32,
    /// How many pages each of them has, at least one.
    pub pages_per_segment: u32,
}

/// What a page is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Nobody's.
    Free,
    /// Its writer may write it.
    Granted,
    /// Written whole; may be read.
    Committed,
    /// Given up, and freed once nothing reads it.
    Condemned,
    /// Lost, while its writer could still write it. Freed by a fence.
    Quarantined,
}

/// A pool in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// All pages. The next five add up to it.
    pub pages: u32,
    /// Pages in [`PageState::Free`].
    pub free: u32,
    /// Pages in [`PageState::Granted`].
    pub granted: u32,
    /// Pages in [`PageState::Committed`].
    pub committed: u32,
    /// Pages in [`PageState::Condemned`].
    pub condemned: u32,
    /// Pages in [`PageState::Quarantined`].
    pub quarantined: u32,
    /// Segments that have a writer.
    pub segments_assigned: u32,
    /// The longest run of free pages.
    pub largest_free_run: u32,
    /// Pieces granted since the start.
    pub pieces_granted: u64,
    /// Extents they were granted in: over `pieces_granted`, the fragmentation that writers see.
    pub extents_granted: u64,
}

/// `stamp` of a free page is the last grant that held it: of use to a person who reads an error.
#[derive(Clone, Copy, Debug)]
struct Page {
    stamp: GrantId,
    state: PageState,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    writer: Option<Incarnation>,
    free: u32,
}

/// The pages, and whose they are.
#[derive(Debug)]
pub struct Pool {
    per_segment: u32,
    pages: Vec<Page>,
    segments: Vec<Segment>,
    runs: Runs,
    counts: [u32; 5],
    pieces_granted: u64,
    extents_granted: u64,
}

impl Pool {
    /// A pool of free pages and unassigned segments.
    ///
    /// # Panics
    /// If segments have no pages, or all of them together more than a `u32` counts.
    pub fn new(Geometry { segments, pages_per_segment }: Geometry) -> Self {
        let pages =
            segments.checked_mul(pages_per_segment).expect("a pool's pages are counted in 32 bits");
        assert!(pages_per_segment > 0, "a segment has at least one page");
        Self {
            per_segment: pages_per_segment,
            pages: vec![Page { stamp: GrantId(0), state: PageState::Free }; pages as usize],
            segments: vec![Segment { writer: None, free: pages_per_segment }; segments as usize],
            runs: Runs::new(segments, pages_per_segment),
            counts: [pages, 0, 0, 0, 0],
            pieces_granted: 0,
            extents_granted: 0,
        }
    }

    /// Grants `writer` room for all `pieces`, each a group and how many pages it needs, or for none of them. The
    /// extents are appended in the order of the pieces, their pages stamped with `grant`.
    ///
    /// All pieces lie side by side if one free run of the writer's can hold them, so that they leave one hole behind.
    /// Otherwise each gets the run that fits it best; then an unassigned segment is broken into; and only
    /// when there is none either is a piece split, over the longest runs there are.
    pub fn grant(
        &mut self,
        writer: Incarnation,
        grant: GrantId,
        pieces: &[(u16, u32)],
        out: &mut Vec<Extent>,
    ) -> Result<(), Full> {
        let total = total(pieces);
        let one = u32::try_from(total)
            .ok()
            .and_then(|total| Some((self.runs.best(Some(writer), total)?, total)));
        if let Some((run, total)) = one {
            self.runs.take(run, total);
            let mut first = run.first;
            for &(group, pages) in pieces {
                self.stamp(grant, group, first, pages, out);
                first += pages;
            }
        } else if self.fits(writer, pieces) {
            for &(group, pages) in pieces {
                let mut left = pages;
                // `fits` counted the pages, so a run is found for as long as some are left.
                while left > 0
                    && let Some(run) = self.find(writer, left)
                {
                    let pages = run.pages.min(left);
                    self.runs.take(run, pages);
                    self.stamp(grant, group, run.first, pages, out);
                    left -= pages;
                }
                debug_assert_eq!(left, 0);
            }
        } else {
            return Err(Full { pages: total, never_fits: total > self.pages.len() as u64 });
        }
        self.pieces_granted += pieces.iter().filter(|piece| piece.1 > 0).count() as u64;
        Ok(())
    }

    /// Whether these pieces could be granted to `writer` now.
    pub fn fits(&self, writer: Incarnation, pieces: &[(u16, u32)]) -> bool {
        total(pieces) <= u64::from(self.free_for(writer))
    }

    /// Free pages that `writer` could be granted: its own and nobody's.
    pub fn free_for(&self, writer: Incarnation) -> u32 {
        let open = |segment: &&Segment| segment.writer.is_none_or(|owner| owner == writer);
        self.segments.iter().filter(open).map(|segment| segment.free).sum()
    }

    /// Granted pages were written whole.
    pub fn commit(&mut self, grant: GrantId, extents: &[Extent]) -> Result<(), StampMismatch> {
        self.turn(grant, extents, &[PageState::Granted], PageState::Committed)
    }

    /// Committed pages are given up.
    pub fn condemn(&mut self, grant: GrantId, extents: &[Extent]) -> Result<(), StampMismatch> {
        self.turn(grant, extents, &[PageState::Committed], PageState::Condemned)
    }

    /// Granted or committed pages are lost, and their writer is not fenced.
    pub fn quarantine(&mut self, grant: GrantId, extents: &[Extent]) -> Result<(), StampMismatch> {
        let from = [PageState::Granted, PageState::Committed];
        self.turn(grant, extents, &from, PageState::Quarantined)
    }

    /// Granted, condemned or quarantined pages become free. The caller has seen to it that their writer is fenced,
    /// and that nothing reads them.
    pub fn free(&mut self, grant: GrantId, extents: &[Extent]) -> Result<(), StampMismatch> {
        let from = [PageState::Granted, PageState::Condemned, PageState::Quarantined];
        self.turn(grant, extents, &from, PageState::Free)?;
        for extent in extents.iter().filter(|extent| extent.pages > 0) {
            let segment = &mut self.segments[extent.segment.0 as usize];
            let pages = u32::from(extent.pages);
            segment.free += pages;
            let first = extent.segment.0 * self.per_segment + extent.page;
            self.runs.give(Run { writer: segment.writer, pages, first });
        }
        Ok(())
    }

    /// Whether all these pages are committed under that grant. To be asked before a load reads them.
    pub fn check(&self, grant: GrantId, extents: &[Extent]) -> Result<(), StampMismatch> {
        self.holds(grant, extents, &[PageState::Committed])
    }

    /// Who may write that segment.
    pub fn writer(&self, segment: SegmentId) -> Option<Incarnation> {
        self.segments.get(segment.0 as usize)?.writer
    }

    /// The segments that are that writer's.
    pub fn segments_of(&self, writer: Incarnation) -> impl Iterator<Item = SegmentId> {
        let of = move |segment: &SegmentId| self.writer(*segment) == Some(writer);
        (0..self.segments.len() as u32).map(SegmentId).filter(of)
    }

    /// Takes an idle segment away from its writer, which the caller has fenced. Taking it from nobody is fine.
    pub fn unassign(&mut self, segment: SegmentId) -> Result<(), NotIdle> {
        let entry = self.segments.get_mut(segment.0 as usize).ok_or(NotIdle(segment))?;
        if !self.runs.is_idle(segment.0) {
            return Err(NotIdle(segment));
        }
        let writer = entry.writer.take();
        let first = segment.0 * self.per_segment;
        self.runs.assign(Run { writer, pages: self.per_segment, first }, None);
        Ok(())
    }

    /// A segment of another writer than that one which is idle, and could be taken away.
    pub fn idle_segment(&self, other_than: Incarnation) -> Option<SegmentId> {
        let others = |id: &SegmentId| self.writer(*id).is_some_and(|writer| writer != other_than);
        let mut ids = (0..self.segments.len() as u32).map(SegmentId);
        ids.find(|id| others(id) && self.runs.is_idle(id.0))
    }

    /// What a page is doing, and the grant it is stamped with; if it is free, the last one.
    ///
    /// # Panics
    /// If the pool has no such page.
    pub fn page(&self, segment: SegmentId, page: u32) -> (PageState, GrantId) {
        assert!(page < self.per_segment, "a segment has {} pages", self.per_segment);
        let page = self.pages[(segment.0 * self.per_segment + page) as usize];
        (page.state, page.stamp)
    }

    /// How many pages there are.
    pub fn pages(&self) -> u32 {
        self.pages.len() as u32
    }

    /// How many pages are in a state.
    pub fn count(&self, state: PageState) -> u32 {
        self.counts[state as usize]
    }

    /// The pool in numbers. Visits every free run, so not for each step.
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            pages: self.pages(),
            free: self.count(PageState::Free),
            granted: self.count(PageState::Granted),
            committed: self.count(PageState::Committed),
            condemned: self.count(PageState::Condemned),
            quarantined: self.count(PageState::Quarantined),
            segments_assigned: self
                .segments
                .iter()
                .filter(|segment| segment.writer.is_some())
                .count() as u32,
            largest_free_run: self.runs.largest(),
            pieces_granted: self.pieces_granted,
            extents_granted: self.extents_granted,
        }
    }

    /// The run to take the next `left` pages of a piece from, or as many of them as it has.
    fn find(&mut self, writer: Incarnation, left: u32) -> Option<Run> {
        self.runs
            .best(Some(writer), left.min(self.per_segment))
            .or_else(|| {
                let run = self.runs.best(None, 1)?;
                self.segments[(run.first / self.per_segment) as usize].writer = Some(writer);
                Some(self.runs.assign(run, Some(writer)))
            })
            .or_else(|| self.runs.longest(Some(writer)))
    }

    /// Hands out pages that were just taken from the free runs; they lie in one segment.
    fn stamp(&mut self, grant: GrantId, group: u16, first: u32, pages: u32, out: &mut Vec<Extent>) {
        let (segment, page) = (first / self.per_segment, first % self.per_segment);
        let longest = u32::from(u16::MAX);
        for offset in (0..pages).step_by(longest as usize) {
            let pages = (pages - offset).min(longest) as u16;
            out.push(Extent { segment: SegmentId(segment), page: page + offset, pages, group });
            self.extents_granted += 1;
        }
        if pages > 0 {
            self.pages[first as usize..(first + pages) as usize]
                .fill(Page { stamp: grant, state: PageState::Granted });
            self.segments[segment as usize].free -= pages;
            self.counts[PageState::Free as usize] -= pages;
            self.counts[PageState::Granted as usize] += pages;
        }
    }

    /// Takes all these pages to another state, if they are `grant`'s and in one of the states `from`.
    fn turn(
        &mut self,
        grant: GrantId,
        extents: &[Extent],
        from: &[PageState],
        to: PageState,
    ) -> Result<(), StampMismatch> {
        self.holds(grant, extents, from)?;
        for extent in extents {
            for page in self.span(extent).into_iter().flatten() {
                let state = std::mem::replace(&mut self.pages[page].state, to);
                self.counts[state as usize] -= 1;
                self.counts[to as usize] += 1;
            }
        }
        Ok(())
    }

    fn holds(
        &self,
        grant: GrantId,
        extents: &[Extent],
        states: &[PageState],
    ) -> Result<(), StampMismatch> {
        for (index, extent) in extents.iter().enumerate() {
            let wrong = |page, found| StampMismatch { grant, segment: extent.segment, page, found };
            let span = self.span(extent).ok_or(wrong(extent.page, None))?;
            let odd = |page: &Page| page.stamp != grant || !states.contains(&page.state);
            if let Some(at) = self.pages[span.clone()].iter().position(odd) {
                let page = self.pages[span.start + at];
                return Err(wrong(extent.page + at as u32, Some((page.state, page.stamp))));
            }
            // A page that is named twice would be freed twice.
            if extents[..index].iter().any(|other| overlap(extent, other)) {
                return Err(wrong(extent.page, None));
            }
        }
        Ok(())
    }

    /// The pages of an extent, if the pool has them.
    fn span(&self, extent: &Extent) -> Option<Range<usize>> {
        let end = extent.page.checked_add(u32::from(extent.pages))?;
        let inside = extent.segment.0 < self.segments.len() as u32 && end <= self.per_segment;
        let start = inside.then(|| (extent.segment.0 * self.per_segment + extent.page) as usize)?;
        Some(start..start + usize::from(extent.pages))
    }
}

fn total(pieces: &[(u16, u32)]) -> u64 {
    pieces.iter().map(|piece| u64::from(piece.1)).sum()
}

/// Whether two extents within a pool share a page.
fn overlap(a: &Extent, b: &Extent) -> bool {
    a.segment == b.segment
        && a.page < b.page + u32::from(b.pages)
        && b.page < a.page + u32::from(a.pages)
}
