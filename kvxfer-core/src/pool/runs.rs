//! The free runs of a pool, found by length and by either end.
//!
//! Invariants:
//! * every free page lies in exactly one run; runs don't overlap, don't cross segments, and never touch within
//!   a segment (they are joined when given back), so a segment is idle when one run covers it;
//! * `tags[p]` is the length of the run that begins or ends at page p, and 0 at every page in use; inside a run
//!   it means nothing.
//!
//! Why an ordered set and no bitmap: a scan takes time with the fragmentation of the pool, and has to visit every run
//! to find the best one. Here every question is one descent. Best fit with the lowest address among equals is what keeps
//! long runs long under churn, and idle segments, being the longest runs of all, are broken into last.

use std::collections::BTreeSet;

use crate::Incarnation;

/// A run of free pages. The order of the fields is the policy: the runs of one writer lie together, shortest first,
/// and among equals by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Run {
    /// Who may be granted it; nobody yet where the segment is unassigned.
    pub(super) writer: Option<Incarnation>,
    pub(super) pages: u32,
    /// The first page, counted over the whole pool.
    pub(super) first: u32,
}

#[derive(Debug)]
pub(super) struct Runs {
    index: BTreeSet<Run>,
    tags: Vec<u32>,
    per_segment: u32,
}

impl Runs {
    /// One run for each segment, nobody's.
    pub(super) fn new(segments: u32, per_segment: u32) -> Self {
        let tags = vec![0; segments as usize * per_segment as usize];
        let mut runs = Self { index: BTreeSet::new(), tags, per_segment };
        for segment in 0..segments {
            runs.insert(Run { writer: None, pages: per_segment, first: segment * per_segment });
        }
        runs
    }

    /// The shortest run of that writer which holds as many pages.
    pub(super) fn best(&self, writer: Option<Incarnation>, pages: u32) -> Option<Run> {
        self.index
            .range(Run { writer, pages, first: 0 }..)
            .next()
            .copied()
            .filter(|run| run.writer == writer)
    }

    /// The longest run of that writer.
    pub(super) fn longest(&self, writer: Option<Incarnation>) -> Option<Run> {
        let last = Run { writer, pages: u32::MAX, first: u32::MAX };
        self.index.range(..=last).next_back().copied().filter(|run| run.writer == writer)
    }

    /// The length of the longest run of anyone. Visits all runs.
    pub(super) fn largest(&self) -> u32 {
        self.index.iter().map(|run| run.pages).max().unwrap_or(0)
    }

    /// Takes the first pages off a run.
    pub(super) fn take(&mut self, run: Run, pages: u32) {
        self.remove(run);
        if run.pages > pages {
            self.insert(Run { pages: run.pages - pages, first: run.first + pages, ..run });
        }
    }

    /// Gives pages of one segment back, joined with the runs on either side.
    pub(super) fn give(&mut self, mut run: Run) {
        let start = run.first - run.first % self.per_segment;
        let end = run.first + run.pages;
        if run.first > start {
            let pages = self.tags[run.first as usize - 1];
            if pages > 0 {
                let left = Run { pages, first: run.first - pages, ..run };
                self.remove(left);
                run = Run { pages: pages + run.pages, ..left };
            }
        }
        if end < start + self.per_segment {
            let pages = self.tags[end as usize];
            if pages > 0 {
                self.remove(Run { pages, first: end, ..run });
                run.pages += pages;
            }
        }
        self.insert(run);
    }

    /// Whether all of that segment is free.
    pub(super) fn is_idle(&self, segment: u32) -> bool {
        self.tags[(segment * self.per_segment) as usize] == self.per_segment
    }

    /// Makes a run someone else's.
    pub(super) fn assign(&mut self, run: Run, writer: Option<Incarnation>) -> Run {
        self.index.remove(&run);
        let run = Run { writer, ..run };
        self.index.insert(run);
        run
    }

    fn insert(&mut self, run: Run) {
        self.tag(run, run.pages);
        self.index.insert(run);
    }

    fn remove(&mut self, run: Run) {
        self.tag(run, 0);
        self.index.remove(&run);
    }

    fn tag(&mut self, run: Run, tag: u32) {
        self.tags[run.first as usize] = tag;
        self.tags[(run.first + run.pages - 1) as usize] = tag;
    }

    #[cfg(test)]
    pub(super) fn iter(&self) -> impl Iterator<Item = Run> {
        self.index.iter().copied()
    }

    #[cfg(test)]
    pub(super) fn tags(&self) -> &[u32] {
        &self.tags
    }
}
