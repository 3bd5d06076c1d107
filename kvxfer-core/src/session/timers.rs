//! Deadlines in order. Cancelling is forgetting: whoever is called checks that its timer still means anything.

use std::collections::BTreeSet;

use crate::Time;

#[derive(Debug)]
pub(super) struct Timers<T>(BTreeSet<(Time, T)>);

impl<T: Ord + Copy> Timers<T> {
    pub(super) fn new() -> Self {
        Self(BTreeSet::new())
    }

    pub(super) fn set(&mut self, at: Time, what: T) {
        self.0.insert((at, what));
    }

    pub(super) fn next(&self) -> Option<Time> {
        self.0.first().map(|&(at, _)| at)
    }

    /// The first timer that is due, taken out.
    pub(super) fn due(&mut self, now: Time) -> Option<T> {
        let &(at, what) = self.0.first()?;
        if at > now {
            return None;
        }
        self.0.pop_first();
        Some(what)
    }
}
