//! What is moved: blocks of a region to blocks of a segment, layer by layer.

use kvxfer_core::SegmentId;
use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{RegionId, Write};

use crate::random::{Random, mix};

/// Which segment they all go to.
pub const SEGMENT: SegmentId = SegmentId(0);
/// Of the checksums.
pub const SEED: u64 = 42;
/// What a segment holds where nothing arrived.
pub const POISON: u8 = 0xEE;

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Bytes of one layer: one post.
    pub layer: u64,
    /// Layers of one round.
    pub layers: u64,
    /// Timed rounds.
    pub rounds: usize,
    /// Sizes of blocks, in bytes.
    pub blocks: &'static [u64],
}

/// For a GPU: a prompt of 8,192 tokens has layers of 32 MiB in the models that are common.
pub const FULL: Size = Size {
    layer: 32 << 20,
    layers: 16,
    rounds: 12,
    blocks: &[4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 32 << 20],
};
/// To see that this program works.
pub const SMALL: Size =
    Size { layer: 256 << 10, layers: 3, rounds: 2, blocks: &[4 << 10, 64 << 10, 256 << 10] };

impl Size {
    /// Bytes of one round.
    pub fn moved(&self) -> u64 {
        self.layer * self.layers
    }

    /// Bytes on either side: twice what is moved, so that blocks can lie apart.
    pub fn pool(&self) -> u64 {
        2 * self.moved()
    }
}

/// Where the blocks of a round are, and where they go.
#[derive(Clone, Copy, Debug)]
pub struct Job {
    /// Bytes of a block.
    pub block: u64,
    /// At random places on both sides, or one behind the other. The latter are all the same one copy each, though the
    /// planner would make one of all that are neighbours on both sides.
    pub scattered: bool,
    /// Of the places.
    pub seed: u64,
}

impl Job {
    /// For the other process.
    pub fn words(&self) -> [u64; 3] {
        [self.block, self.scattered.into(), self.seed]
    }

    /// What [`Job::words`] said.
    pub fn of([block, scattered, seed]: [u64; 3]) -> Self {
        Self { block, scattered: scattered == 1, seed }
    }

    /// The blocks' numbers: (source, destination).
    pub fn table(&self, size: &Size) -> Vec<(u32, u32)> {
        let (count, of) = ((size.moved() / self.block) as u32, (size.pool() / self.block) as u32);
        if !self.scattered {
            return (0..count).map(|id| (id, id)).collect();
        }
        let mut random = Random(self.seed);
        let from = random.pick(count, of);
        from.into_iter().zip(random.pick(count, of)).collect()
    }

    /// The writes of each layer.
    pub fn layers(&self, size: &Size) -> Vec<Vec<Write>> {
        let write = |&(from, to): &(u32, u32)| Write {
            region: RegionId(0),
            src: u64::from(from) * self.block,
            segment: SEGMENT,
            dst: u64::from(to) * self.block,
            len: self.block,
        };
        let a_layer = (size.layer / self.block) as usize;
        self.table(size).chunks(a_layer).map(|layer| layer.iter().map(write).collect()).collect()
    }
}

/// The bytes of the source from `offset` on; both are multiples of 8.
pub fn content(offset: u64, into: &mut [u8]) {
    for (word, at) in into.chunks_exact_mut(8).zip(offset / 8..) {
        word.copy_from_slice(&mix(at).to_le_bytes());
    }
}

/// The checksum of a layer, by the host.
pub fn sum(writes: &[Write]) -> u64 {
    let mut sum = Sum::new(SEED);
    let mut bytes = Vec::new();
    for write in writes {
        bytes.resize(write.len as usize, 0);
        content(write.src, &mut bytes);
        sum.update(&bytes);
    }
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_has_a_place_of_its_own() {
        for scattered in [false, true] {
            let job = Job { block: 4096, scattered, seed: 7 };
            let table = Job::of(job.words()).table(&SMALL);
            assert_eq!(table.len() as u64 * job.block, SMALL.moved());
            for side in [|&(from, _): &(u32, u32)| from, |&(_, to): &(u32, u32)| to] {
                let mut ids: Vec<_> = table.iter().map(side).collect();
                ids.sort_unstable();
                ids.dedup();
                assert_eq!(ids.len(), table.len());
                assert!(u64::from(*ids.last().unwrap()) < SMALL.pool() / job.block);
            }
            let layers = job.layers(&SMALL);
            assert_eq!(layers.len() as u64, SMALL.layers);
            assert!(layers.iter().all(|layer| layer.len() == layers[0].len()));
        }
        assert_eq!(Job { block: 4096, scattered: false, seed: 1 }.table(&SMALL)[1], (1, 1));
    }
}
