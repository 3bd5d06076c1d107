//! Reproducible scatter.

use kvxfer_core::sum::STEP;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number below `bound`, which is far below 2^32.
    pub fn below(&mut self, bound: u32) -> u32 {
        (((self.draw() >> 32) * u64::from(bound)) >> 32) as u32
    }

    /// The first `count` of the numbers below `of`, shuffled.
    pub fn pick(&mut self, count: u32, of: u32) -> Vec<u32> {
        let mut all: Vec<u32> = (0..of).collect();
        for i in 0..count {
            all.swap(i as usize, (i + self.below(of - i)) as usize);
        }
        all.truncate(count as usize);
        all
    }
}

/// A word of test data: a function of where it stands.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_are_distinct_and_scattered() {
        let mut picked = Random(1).pick(100, 200);
        assert!(picked.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count() < 10);
        picked.sort_unstable();
        picked.dedup();
        assert!(picked.len() == 100 && picked.iter().all(|&id| id < 200));
        assert_eq!(Random(2).pick(5, 5).len(), 5);
    }
}
