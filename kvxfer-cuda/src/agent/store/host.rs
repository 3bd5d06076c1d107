//! A pool in host memory: this thread moves the bytes.

use std::sync::Arc;

use kvxfer_core::transport::PROBE_BYTES;
use kvxfer_core::{Result, SegmentId};

use super::Check;
use crate::agent::loads::{Piece, Planned};
use crate::copy::{Drain, Stores, copy_summed, sum_of};
use crate::memory::{HostPool, Mapping, Regions};

pub(in crate::agent) struct HostStore {
    pub(super) pool: HostPool,
}

impl HostStore {
    /// What is behind a segment now.
    pub(in crate::agent) fn segment(&self, segment: SegmentId) -> Result<&Arc<Mapping>> {
        self.pool.segment(segment)
    }

    pub(in crate::agent) fn new(pool: HostPool) -> Self {
        Self { pool }
    }

    pub(super) fn copy(
        &self,
        planned: &Planned,
        pieces: &[Piece],
        regions: &Regions,
        wanted: u64,
    ) -> Result<()> {
        let mut sum = 0_u64;
        // Gone before anybody is told that the blocks are filled.
        let drain = Drain::new();
        let stores = Stores::for_load(wanted, &drain);
        for &Piece { segment, offset, into, len, word } in pieces {
            let src = self.pool.segment(segment)?.at(offset, len)?;
            let part = match into {
                Some((region, at)) => {
                    let dst = regions.at(region, at, len)?;
                    // SAFETY: `at` checked both ranges; the engine gave these blocks to this load alone, so the
                    // pool and they do not overlap and nobody else writes to them.
                    unsafe { copy_summed(dst, src, len as usize, planned.seed, word, stores) }
                }
                // SAFETY: `at` checked the range.
                None => unsafe { sum_of(src, len as usize, planned.seed, word) },
            };
            sum = sum.wrapping_add(part);
        }
        match sum == planned.sum {
            true => Ok(()),
            false => Err(planned.part.corrupt()),
        }
    }

    pub(super) fn verify(&self, check: Check) -> Result<()> {
        let start = self.pool.segment_bytes() - PROBE_BYTES;
        let at = self.pool.segment(check.segment)?.at(start, PROBE_BYTES)?;
        // SAFETY: `at` checked the range.
        check.compare(unsafe { sum_of(at, PROBE_BYTES as usize, check.probe, 0) })
    }

    #[cfg(feature = "faults")]
    pub(super) fn flip(&self, segment: kvxfer_core::SegmentId, offset: u64) {
        if let Ok(byte) = self.pool.segment(segment).and_then(|map| map.at(offset, 1)) {
            // SAFETY: `at` checked the range. That the byte is another one then is the purpose.
            unsafe { *byte ^= 1 };
        }
    }
}
