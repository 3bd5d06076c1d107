//! What is known to have happened before what.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Number of a stream; never used twice.
pub(super) type StreamId = u64;

/// Up to which item each stream is known to have run.
#[derive(Clone, Debug, Default)]
pub(super) struct Clock(BTreeMap<StreamId, u64>);

impl Clock {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    pub(super) fn join(&mut self, other: &Self) {
        for (&stream, &seq) in &other.0 {
            self.note(stream, seq);
        }
    }

    pub(super) fn note(&mut self, stream: StreamId, seq: u64) {
        let known = self.0.entry(stream).or_default();
        *known = seq.max(*known);
    }

    pub(super) fn knows(&self, stream: StreamId, seq: u64) -> bool {
        self.0.get(&stream).is_some_and(|known| *known >= seq)
    }

    pub(super) fn forget(&mut self, stream: StreamId) {
        self.0.remove(&stream);
    }
}

/// What whoever waited for an item knows: filled in when the item is done.
pub(super) type Mark = Arc<Mutex<Clock>>;

/// One item of one stream, to wait for. The item is done when its stream has run that far, or is gone.
#[derive(Clone, Debug)]
pub(super) struct Ticket {
    pub(super) stream: StreamId,
    pub(super) seq: u64,
    pub(super) mark: Mark,
}
