use kvxfer_core::sum::Sum;
use proptest::prelude::*;

use super::*;

/// Those of this machine.
fn kernels() -> Vec<Kernel> {
    let all = [
        (Kernel::Words, true),
        #[cfg(target_arch = "x86_64")]
        (Kernel::Avx2, is_x86_feature_detected!("avx2")),
        #[cfg(target_arch = "x86_64")]
        (Kernel::Avx512, is_x86_feature_detected!("avx512f")),
    ];
    all.into_iter().filter_map(|(kernel, here)| here.then_some(kernel)).collect()
}

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut word = seed | 1;
    (0..len)
        .map(|_| {
            word = word.wrapping_mul(STEP).rotate_left(23) ^ seed;
            word as u8
        })
        .collect()
}

const GUARD: u8 = 0xA5;
const LINE: usize = 64;

/// `len` bytes at that distance from a cache line's start, with a guarded line on both sides.
struct Field {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Field {
    fn new(len: usize, offset: usize) -> Self {
        let memory = vec![GUARD; len + 4 * LINE];
        let start = LINE + memory.as_ptr().align_offset(LINE) + offset;
        Self { memory, start, len }
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        self.memory[self.start..][..self.len].as_mut_ptr()
    }

    fn filled(mut self, bytes: &[u8]) -> Self {
        self.memory[self.start..][..self.len].copy_from_slice(bytes);
        self
    }

    fn holds(&self, bytes: &[u8]) -> bool {
        let (before, rest) = self.memory.split_at(self.start);
        let (inside, after) = rest.split_at(self.len);
        inside == bytes && before.iter().chain(after).all(|&byte| byte == GUARD)
    }
}

fn check(content: &[u8], from: usize, to: usize, seed: u64, index: u64) {
    let len = content.len();
    let mut expected = Sum::at(seed, index);
    expected.update(content);
    let expected = expected.finish();
    let mut source = Field::new(len, from).filled(content);
    let src = source.as_mut_ptr().cast_const();
    for kernel in kernels() {
        let case = format!("{kernel:?}: {len} bytes, {from} to {to}");
        // SAFETY: `src` has `len` bytes.
        let sum = unsafe { run::<SUM>(kernel, std::ptr::null_mut(), src, len, seed, index) };
        assert_eq!(sum, expected, "{case}, summed");

        let mut stored = Field::new(len, to);
        // SAFETY: both fields have `len` bytes.
        let sum = unsafe { run::<STORE>(kernel, stored.as_mut_ptr(), src, len, seed, index) };
        assert_eq!(sum, expected, "{case}, stored");
        assert!(stored.holds(content), "{case}, stored");

        if to.is_multiple_of(8) {
            let mut streamed = Field::new(len, to);
            // SAFETY: both fields have `len` bytes, and `to` is a multiple of 8.
            let sum =
                unsafe { run::<STREAM>(kernel, streamed.as_mut_ptr(), src, len, seed, index) };
            drain();
            assert_eq!(sum, expected, "{case}, streamed");
            assert!(streamed.holds(content), "{case}, streamed");
        }
    }
}

#[test]
fn each_short_length_at_each_alignment() {
    let content = bytes(600, 7);
    for len in 0..=content.len() {
        let (from, to) = (len * 5 % LINE, len * 3 % LINE);
        check(&content[..len], from, to, 11, len as u64);
        check(&content[..len], 0, from & !7, 11, 0);
    }
    for offset in 0..LINE {
        for len in [1, 7, 8, 9, 63, 64, 65, 255, 256, 257, 511, 512] {
            check(&content[..len], offset, 0, u64::MAX, u64::MAX);
            check(&content[..len], 0, offset, u64::MAX, u64::MAX - 3);
            check(&content[..len], offset, offset, 0, 0);
        }
    }
}

proptest! {
    #[test]
    fn copies_and_sums_agree_with_the_definition(
        len in 1_usize..20_000, from in 0..LINE, to in 0..LINE, seed: u64, index: u64,
    ) {
        check(&bytes(len, seed), from, to, seed, index);
    }

    #[test]
    fn parts_add_up(len in 1_usize..5_000, cut in 0_usize..5_000, seed: u64, index: u64) {
        let content = bytes(len, seed);
        let cut = cut.min(len) & !7;
        let src = content.as_ptr();
        // SAFETY: both parts lie in `content`.
        let (whole, first, second) = unsafe {
            (
                sum_of(src, len, seed, index),
                sum_of(src, cut, seed, index),
                sum_of(src.add(cut), len - cut, seed, index.wrapping_add(words(cut as u64))),
            )
        };
        prop_assert_eq!(whole, first.wrapping_add(second));
    }
}

/// The promise that everything rests on: whatever is written to the source meanwhile, the sum is that
/// of what was stored.
#[test]
fn the_sum_is_that_of_the_stored_bytes_while_the_source_changes() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::{Duration, Instant};
    const WORDS: usize = 512;
    let source: Vec<AtomicU64> = (0..WORDS as u64).map(AtomicU64::new).collect();
    let stop = AtomicBool::new(false);
    let deadline = Instant::now() + Duration::from_secs(20);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0_u64;
            while !stop.load(Ordering::Relaxed) && Instant::now() < deadline {
                round = round.wrapping_add(STEP);
                source.iter().for_each(|word| word.store(round, Ordering::Relaxed));
            }
        });
        let (mut changed, mut stored) = (0, vec![0_u8; WORDS * 8]);
        // Until the source was seen to change often; usually at once, later on a busy machine.
        while changed < 200 && Instant::now() < deadline {
            for kernel in kernels() {
                let before = stored.clone();
                // SAFETY: both have `WORDS` words; that the source changes is the point.
                let sum = unsafe {
                    run::<STORE>(
                        kernel,
                        stored.as_mut_ptr(),
                        source.as_ptr().cast(),
                        WORDS * 8,
                        3,
                        0,
                    )
                };
                let mut expected = Sum::new(3);
                expected.update(&stored);
                assert_eq!(sum, expected.finish(), "{kernel:?}");
                changed += usize::from(before != stored);
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(changed >= 10, "the source hardly changed: nothing was tested");
    });
}
