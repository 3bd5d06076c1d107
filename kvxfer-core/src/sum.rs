//! The checksum of stored bytes.
//!
//! It travels beside every layer of every chunk, is computed by whoever stored the bytes, and once
//! more by the consumer from its private copy. It is a sum, so the parts of a layer can be added
//! in any order by any number of threads (on a GPU: without barriers), and it mixes each word with
//! its position, so parts that changed places are noticed.
//!
//! # Definition
//!
//! All arithmetic wraps modulo 2^64. The bytes are read as little-endian 64-bit words `w_i`, with
//! `i` counted from 0 over all spans of a post in turn. A span whose length is not a multiple
//! of 8 is padded with zeros *by itself*: it takes `ceil(len / 8)` indices.
//!
//! ```text
//! k_i   = seed + (i + 1) · 0x9E3779B97F4A7C15
//! x_i   = w_i xor k_i                              = lo + 2^32 · hi
//! t_i   = x_i + lo · hi                            = (2^32 + lo) · (1 + hi) - 2^32
//! value = t_0 + t_1 + …
//! ```
//!
//! # What it detects
//!
//! *Any change confined to one 32-bit half of one word*, always: xor with `k_i` keeps it in that half.
//! By the second form of `t_i`, a change of `lo` by `d` changes the sum by `d · (1 + hi)`, where
//! 0 < |d| < 2^32 and 0 < 1 + hi <= 2^32, so by less than 2^64 and not by 0. A change of `hi` by
//! `d` changes it by `d · (2^32 + lo)`, less than 2^65, so it could only vanish by being
//! exactly 2^64; `2^32 + lo` would be a power of two, so 2^32, and `|d|` would be 2^32, which it is
//! not.
//!
//! *Stale, missing, exchanged or foreign data* over many words: missed with a chance of about 2^-64.
//! That is a heuristic, not a theorem: one seed drives all keys. *The same bit flipped in two words* is
//! the worst pattern known: missed with a chance of about 2^-33 over the seed (the two `1 + hi` have
//! to be equal and the signs opposite).
//!
//! It is a guard against faults, not against forgers: the seed is no secret.

use crate::{ChunkKey, GrantId};

/// What the key of a word grows by from one word to the next: 2^64 over the golden ratio, odd.
pub const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// A checksum under way: one seed, the index of the next word, the sum so far.
///
/// Sums over separate parts of the same post, each started [at](Sum::at) the index of its first word,
/// add up (wrapping) to the sum of the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    seed: u64,
    index: u64,
    value: u64,
}

impl Sum {
    /// Starts at word 0.
    pub fn new(seed: u64) -> Self {
        Self::at(seed, 0)
    }

    /// Starts at that word.
    pub fn at(seed: u64, index: u64) -> Self {
        Self { seed, index, value: 0 }
    }

    /// Adds one span and advances by [`words`] of its length.
    pub fn update(&mut self, bytes: &[u8]) {
        let (whole, rest) = bytes.as_chunks::<8>();
        let mut key = word_key(self.seed, self.index);
        let mut value = self.value;
        for word in whole {
            value = value.wrapping_add(term(u64::from_le_bytes(*word), key));
            key = key.wrapping_add(STEP);
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            word[..rest.len()].copy_from_slice(rest);
            value = value.wrapping_add(term(u64::from_le_bytes(word), key));
        }
        self.value = value;
        self.index = self.index.wrapping_add(words(bytes.len() as u64));
    }

    /// Passes over that many words, whose sum someone else adds.
    pub fn skip(&mut self, words: u64) {
        self.index = self.index.wrapping_add(words);
    }

    /// Index of the next word.
    pub fn index(&self) -> u64 {
        self.index
    }

    /// The sum of what was added.
    pub fn finish(self) -> u64 {
        self.value
    }
}

/// Words that a span of `len` bytes takes: `ceil(len / 8)`.
#[inline]
pub const fn words(len: u64) -> u64 {
    len.div_ceil(8)
}

/// `k_i` of the definition: the key of the word at `index`. The next word's is larger by [`STEP`].
#[inline]
pub const fn word_key(seed: u64, index: u64) -> u64 {
    seed.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP))
}

/// The seed under which word 0 has the key that the word at `index` has under `seed`.
///
/// So a post of the blocks from the j-th on of a chunk, posted with `seed_at(seed, j *
/// words(block))`, completes with its share of the chunk's sum: `Sum::at(s, i)` and
/// `Sum::new(seed_at(s, i))` add the same.
#[inline]
pub const fn seed_at(seed: u64, index: u64) -> u64 {
    seed.wrapping_add(index.wrapping_mul(STEP))
}

/// `t_i` of the definition: what a word adds to the sum. For loops that copy and add at once.
///
/// Xor, shift, one 32×32→64-bit multiplication and an addition, all of which SSE2 and up have for
/// vectors.
#[inline]
pub const fn term(word: u64, key: u64) -> u64 {
    let x = word ^ key;
    x.wrapping_add((x & 0xFFFF_FFFF).wrapping_mul(x >> 32))
}

/// The seed for one layer of one granted chunk, so that the right bytes in the wrong place, or of an
/// earlier grant, do not verify. `layer` is the flat index, `len` the bytes summed.
///
/// Folds the eight numbers (the key as four little-endian words, then the others in the order of
/// the parameters) into a state that starts at 0: `h = mix((h xor number) + STEP)`, where `mix` is
/// the finaliser of SplitMix64 (Steele, Lea, Flood 2014; shifts and factors by Stafford, variant
/// 13). Each step is a bijection, so two inputs that differ in one number never share a seed.
pub fn seed(key: &ChunkKey, layer: u32, group: u16, grant: GrantId, len: u64) -> u64 {
    let (words, _) = key.0.as_chunks::<8>();
    let place = [u64::from(layer), u64::from(group), grant.0, len];
    words
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .chain(place)
        .fold(0, |state: u64, number| mix((state ^ number).wrapping_add(STEP)))
}

const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
