//! Which work runs next: whatever hurts a program most that forgot to order it.
//!
//! Work that somebody waits for runs, with all that it waits for. Everything else is legal at any time,
//! and there are two ways to be wrong about it: a program that reads too early is found out when what
//! should have been waited for runs *late*, and one that overwrites too early when what should have
//! waited runs *at once*. So the adversary takes turns between both, drawn from the seed.

use super::clock::StreamId;

/// A stream whose first item may run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) stream: StreamId,
    /// Place of its first item in the order of submission.
    pub(super) first: u64,
    /// Place of its last one.
    pub(super) last: u64,
    /// Somebody waits for its first item.
    pub(super) demanded: bool,
}

/// How to treat work that nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    /// It runs only where that reverses the order of submission.
    Late,
    /// It runs first, the newest stream ahead of the others.
    Early,
    /// Anything that may run, by lot.
    Lots,
}

/// Steps of work that nobody waits for between two that somebody waits for, at most.
const PATIENCE: u32 = 256;

/// Steps in one mood, on average.
const STEADY: u64 = 8;

#[derive(Debug)]
pub(super) struct Adversary {
    seed: u64,
    state: u64,
    mood: Mood,
    /// Steps since one that was waited for.
    strayed: u32,
}

impl Adversary {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, state: seed, mood: Mood::Late, strayed: 0 }
    }

    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// One that draws the lots of a single step.
    pub(super) fn with_state(seed: u64, state: u64) -> Self {
        Self { state, ..Self::new(seed) }
    }

    /// A number below `n`, which is not 0 (SplitMix64).
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n.max(1)
    }

    /// Changes the mood now and then. Seed 0 stays with `Late`.
    fn waver(&mut self) {
        if self.seed == 0 || self.below(STEADY) != 0 {
            return;
        }
        self.mood = match self.below(5) {
            0 | 1 => Mood::Late,
            2 | 3 => Mood::Early,
            _ => Mood::Lots,
        };
    }

    /// The stream to run next. `oldest` is the first item in the order of submission that somebody
    /// waits for, ready or not; without one nothing runs.
    pub(super) fn choose(&mut self, ready: &[Ready], oldest: Option<u64>) -> Option<StreamId> {
        let oldest = oldest?;
        self.waver();
        if self.strayed >= PATIENCE
            && let Some(choice) = ready.iter().filter(|r| r.demanded).min_by_key(|r| r.first)
        {
            self.strayed = 0;
            return Some(choice.stream);
        }
        let choice = match self.mood {
            Mood::Late => {
                ready.iter().filter(|r| r.demanded || r.first > oldest).max_by_key(|r| r.first)
            }
            Mood::Early => ready.iter().max_by_key(|r| (!r.demanded, r.last)),
            Mood::Lots => ready.get(self.below(ready.len() as u64) as usize),
        }?;
        self.strayed = if choice.demanded { 0 } else { self.strayed + 1 };
        Some(choice.stream)
    }

    /// Puts a list in an order that nobody may rely on: reversed, and under a seed mixed as well.
    pub(super) fn shuffle<T>(&mut self, list: &mut [T]) {
        list.reverse();
        if self.seed != 0 {
            for last in (2..list.len()).rev() {
                list.swap(last, self.below(last as u64 + 1) as usize);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Ready = Ready { stream: 1, first: 10, last: 90, demanded: false };
    const WANTED: Ready = Ready { stream: 2, first: 20, last: 20, demanded: true };
    const NEW: Ready = Ready { stream: 3, first: 30, last: 30, demanded: false };

    #[test]
    fn what_nobody_waits_for_runs_late_unless_it_is_newer() {
        let mut adversary = Adversary::new(0);
        assert_eq!(adversary.choose(&[OLD, NEW], None), None);
        assert_eq!(adversary.choose(&[OLD, WANTED], Some(20)), Some(2));
        assert_eq!(adversary.choose(&[OLD, WANTED, NEW], Some(20)), Some(3));
        // What is waited for can't run yet: that is no reason to run what is older.
        assert_eq!(adversary.choose(&[OLD], Some(20)), None);
    }

    #[test]
    fn nobody_waits_for_ever() {
        for seed in 0..20 {
            let mut adversary = Adversary::new(seed);
            let mut streams =
                (0..=PATIENCE).map(|_| adversary.choose(&[OLD, WANTED, NEW], Some(20)));
            assert!(streams.any(|stream| stream == Some(2)), "seed {seed}");
        }
    }

    #[test]
    fn all_moods_come_and_no_order_stays() {
        let mut adversary = Adversary::new(1);
        let chosen = |adversary: &mut Adversary| adversary.choose(&[OLD, WANTED], Some(20));
        let choices: Vec<_> = (0..1000).map(|_| chosen(&mut adversary)).collect();
        assert!(choices.contains(&Some(1)) && choices.contains(&Some(2)));
        for seed in 0..20 {
            let mut list: Vec<u32> = (0..50).collect();
            Adversary::new(seed).shuffle(&mut list);
            assert!(!list.is_sorted());
            list.sort_unstable();
            assert!(list.into_iter().eq(0..50));
        }
    }
}
