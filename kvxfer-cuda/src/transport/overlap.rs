//! Whether the writes of a post overlap.

use kvxfer_core::transport::Write;
use kvxfer_core::{ErrorKind, Result, SegmentId};

type Place = (SegmentId, u64, u64);

/// Finds writes of one post that go to the same bytes: they would leave a sum that fits nothing. Keeps
/// its scratch memory.
#[derive(Debug, Default)]
pub(super) struct Overlap {
    order: Vec<Place>,
}

impl Overlap {
    /// Refuses writes that overlap. The ranges were checked: none wraps.
    pub(super) fn refuse(&mut self, writes: &[Write]) -> Result<()> {
        let place = |write: &Write| (write.segment, write.dst, write.dst + write.len);
        let apart = |a: Place, b: Place| a.0 < b.0 || a.2 <= b.1;
        // They mostly come in order.
        let in_order = |writes: &[Write]| {
            let pairs = writes.windows(2);
            pairs.into_iter().all(|pair| {
                pair[0].segment <= pair[1].segment && apart(place(&pair[0]), place(&pair[1]))
            })
        };
        if in_order(writes) {
            return Ok(());
        }
        self.order.clear();
        self.order.extend(writes.iter().filter(|write| write.len > 0).map(place));
        self.order.sort_unstable();
        match self.order.windows(2).find(|pair| !apart(pair[0], pair[1])) {
            None => Ok(()),
            Some(pair) => Err(ErrorKind::OutOfBounds.error(format!(
                "two writes of a post overlap in segment {} at {}",
                pair[0].0, pair[1].1
            ))),
        }
    }
}
