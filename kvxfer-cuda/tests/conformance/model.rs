//! The same, done naively.

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{RegionId, Write};
use kvxfer_core::{Incarnation, PostId, SegmentId};

use crate::bench::{BYTES, Bench, REGIONS, SEGMENTS};

pub const ZERO: SegmentId = SegmentId(0);
pub const ONE: SegmentId = SegmentId(1);

/// What the memory of a bench holds.
pub struct Model {
    regions: Vec<Vec<u8>>,
    segments: [Vec<Vec<u8>>; 2],
}

impl Model {
    /// Fills the bench's regions with bytes of that seed.
    pub fn new(bench: &mut dyn Bench, seed: u64) -> Self {
        let regions: Vec<_> = (0..REGIONS).map(|id| bytes(BYTES, seed + u64::from(id))).collect();
        for (id, bytes) in (0..).zip(&regions) {
            bench.fill(RegionId(id), 0, bytes);
        }
        let segments = || vec![vec![0; BYTES as usize]; SEGMENTS as usize];
        Self { regions, segments: [segments(), segments()] }
    }

    /// Performs a post and returns its sum.
    pub fn post(&mut self, consumer: usize, seed: u64, writes: &[Write]) -> u64 {
        let mut sum = Sum::new(seed);
        for write in writes {
            let bytes =
                &self.regions[write.region.0 as usize][write.src as usize..][..write.len as usize];
            sum.update(bytes);
            self.segments[consumer][write.segment.0 as usize][write.dst as usize..]
                [..write.len as usize]
                .copy_from_slice(bytes);
        }
        sum.finish()
    }

    /// The consumer's memory was replaced.
    pub fn clear(&mut self, consumer: usize, segment: SegmentId) {
        self.segments[consumer][segment.0 as usize].fill(0);
    }

    /// All consumers see what they should.
    #[track_caller]
    pub fn check(&self, bench: &dyn Bench) {
        for (consumer, segments) in self.segments.iter().enumerate() {
            for (id, expected) in (0..).zip(segments) {
                let seen = bench.read(consumer, SegmentId(id), 0, BYTES);
                let differs = (seen != *expected)
                    .then(|| seen.iter().zip(expected).position(|(seen, told)| seen != told));
                assert_eq!(differs, None, "consumer {consumer}, segment {id}: first difference");
            }
        }
    }
}

/// The end of a post, in a form that compares: its number, its peer, its sum.
pub type End = (PostId, Incarnation, Option<u64>);

/// Settles the bench; what ended, by number.
pub fn ends(bench: &mut dyn Bench) -> Vec<End> {
    let mut ends: Vec<_> =
        bench.settle().into_iter().map(|end| (end.id, end.peer, end.result.ok())).collect();
    ends.sort_unstable();
    ends
}

pub fn write(region: u32, src: u64, segment: SegmentId, dst: u64, len: u64) -> Write {
    Write { region: RegionId(region), src, segment, dst, len }
}

pub fn bytes(len: u64, seed: u64) -> Vec<u8> {
    let mut word = seed.wrapping_mul(2).wrapping_add(1);
    (0..len)
        .map(|_| {
            word = word.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(seed | 1);
            (word >> 56) as u8
        })
        .collect()
}
