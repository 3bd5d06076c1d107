//! The checksum: its golden values, what it detects, and that it adds up from parts.

use kvxfer_core::sum::{STEP, Sum, seed, seed_at, term, word_key, words};
use kvxfer_core::{ChunkKey, GrantId};
use proptest::prelude::*;

fn sum(seed: u64, spans: &[&[u8]]) -> u64 {
    let mut sum = Sum::new(seed);
    spans.iter().for_each(|span| sum.update(span));
    sum.finish()
}

/// Computed by an independent implementation of the definition in the module's documentation.
#[test]
fn golden_values() {
    let ascending: Vec<u8> = (0..64).collect();
    assert_eq!(sum(0, &[]), 0);
    assert_eq!(sum(0, &[&[0; 8]]), 0xECE3_07D5_4F47_1442);
    assert_eq!(sum(1, &[&ascending]), 0x7A05_D2DE_9D4A_2242);
    assert_eq!(sum(u64::MAX, &[&[0xFF; 24]]), 0x8FEE_4EC2_DDAF_C6B5);
    assert_eq!(sum(7, &[b"abc", b"defghijkl"]), 0xBE4F_C58A_69AD_432B);

    let key = ChunkKey(std::array::from_fn(|i| i as u8));
    assert_eq!(seed(&key, 3, 1, GrantId(42), 4096), 0x7A6E_75F7_FB51_B028);
    assert_eq!(seed(&ChunkKey([0; 32]), 0, 0, GrantId(0), 0), 0x7F40_81EE_F340_E920);
}

#[test]
fn each_part_of_the_place_changes_the_seed() {
    let key = ChunkKey([7; 32]);
    let base = seed(&key, 1, 2, GrantId(3), 4);
    let mut seeds = vec![
        base,
        seed(&key, 2, 1, GrantId(3), 4),
        seed(&key, 0, 2, GrantId(3), 4),
        seed(&key, 1, 0, GrantId(3), 4),
        seed(&key, 1, 2, GrantId(4), 3),
        seed(&key, 1, 2, GrantId(0), 4),
        seed(&key, 1, 2, GrantId(3), 0),
    ];
    for byte in 0..32 {
        let mut other = key;
        other.0[byte] ^= 0x80;
        seeds.push(seed(&other, 1, 2, GrantId(3), 4));
    }
    let all = seeds.len();
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), all);
}

proptest! {
    #[test]
    fn is_the_sum_of_its_terms(bytes in proptest::collection::vec(any::<u8>(), 0..200), seed: u64) {
        let mut padded = bytes.clone();
        padded.resize(bytes.len().next_multiple_of(8), 0);
        let naive = padded.chunks(8).enumerate().fold(0u64, |value, (i, word)| {
            value.wrapping_add(term(u64::from_le_bytes(word.try_into().unwrap()), word_key(seed, i as u64)))
        });
        prop_assert_eq!(sum(seed, &[&bytes]), naive);
        prop_assert_eq!(word_key(seed, 1), word_key(seed, 0).wrapping_add(STEP));
    }

    #[test]
    fn parts_add_up_in_any_order(
        spans in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..70), 0..8),
        seed: u64,
        order: u64,
    ) {
        let whole = sum(seed, &spans.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let mut index = 0;
        let mut parts = Vec::new();
        for span in &spans {
            let mut part = Sum::at(seed, index);
            part.update(span);
            index += words(span.len() as u64);
            prop_assert_eq!(part.index(), index);
            let mut moved = Sum::new(seed_at(seed, index - words(span.len() as u64)));
            moved.update(span);
            prop_assert_eq!(moved.finish(), part.finish());
            parts.push(part.finish());
        }
        let turn = order as usize % parts.len().max(1);
        parts.rotate_left(turn);
        prop_assert_eq!(parts.into_iter().fold(0, u64::wrapping_add), whole);

        let mut even = Sum::new(seed);
        let mut odd = Sum::new(seed);
        for (i, span) in spans.iter().enumerate() {
            let (one, other) = if i % 2 == 0 { (&mut even, &mut odd) } else { (&mut odd, &mut even) };
            one.update(span);
            other.skip(words(span.len() as u64));
        }
        prop_assert_eq!(even.finish().wrapping_add(odd.finish()), whole);
    }

    #[test]
    fn a_change_in_one_half_word_is_always_detected(
        mut bytes in proptest::collection::vec(any::<u8>(), 4..100),
        seed: u64,
        at: prop::sample::Index,
        flip in prop_oneof![1..=u32::MAX, (0..32u32).prop_map(|bit| 1 << bit)],
    ) {
        bytes.truncate(bytes.len() / 4 * 4);
        let before = sum(seed, &[&bytes]);
        let at = at.index(bytes.len() / 4) * 4;
        for (byte, flip) in bytes[at..at + 4].iter_mut().zip(flip.to_le_bytes()) {
            *byte ^= flip;
        }
        prop_assert_ne!(sum(seed, &[&bytes]), before);
    }

    /// The same, where it is tightest: the other half at its extremes.
    #[test]
    fn half_word_changes_beside_extremes(
        half in any::<u32>(),
        flip in 1..=u32::MAX,
        other in prop_oneof![Just(0), Just(1), Just(u32::MAX), Just(1 << 31)],
    ) {
        let join = |lo: u32, hi: u32| term(u64::from(lo) | u64::from(hi) << 32, 0);
        prop_assert_ne!(join(half, other), join(half ^ flip, other));
        prop_assert_ne!(join(other, half), join(other, half ^ flip));
    }

    #[test]
    fn place_and_seed_matter(a: [u8; 64], b: [u8; 64], seed: u64, other: u64) {
        prop_assume!(a != b && seed != other);
        let value = sum(seed, &[&a, &b]);
        prop_assert_ne!(value, sum(seed, &[&b, &a]));
        prop_assert_ne!(value, sum(other, &[&a, &b]));
    }
}

/// A pool of zeros that was never written does not verify, whatever its size.
#[test]
fn zeros_do_not_sum_to_zero() {
    for len in (8..4096).step_by(8) {
        assert_ne!(sum(0, &[&vec![0; len]]), 0, "{len}");
    }
}
