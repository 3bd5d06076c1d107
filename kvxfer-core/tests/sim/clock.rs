//! Time as one host sees it.

/// A host's monotonic clock: its own origin and pace, and it may stand still.
pub(crate) struct Clock {
    pub(crate) local: u64,
    pub(crate) global: u64,
    pub(crate) pace: u64,
    pub(crate) frozen: bool,
}

impl Clock {
    pub(crate) fn at(&self, now: u64) -> u64 {
        match self.frozen {
            true => self.local,
            false => self.local + (now - self.global) * self.pace / 1000,
        }
    }
}
