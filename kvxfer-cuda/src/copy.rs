//! Copies that sum what they store.
//!
//! The engine may write to a block while it is read. So each word is loaded once, into a register;
//! that register is hashed and stored, and the sum is always that of the bytes which arrived. The
//! loads are inline assembly (or volatile): the compiler can neither repeat nor split them, and no
//! Rust reference to such memory is ever made.
//!
//! The sum is that of [`kvxfer_core::sum`]: of one span, whose first word has index `index`.

use kvxfer_core::sum::{STEP, term, word_key, words};

/// How stores reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stores {
    /// Through the cache: for what this core reads next.
    Cached,
    /// Past the cache, where the machine and the alignment allow (`dst` a multiple of 8 bytes): for
    /// what another process reads, or nobody reads soon. Ends with a [`drain`].
    Streaming,
}

/// Copies `len` bytes and returns the checksum of what was stored. Any alignment, any length.
///
/// # Safety
/// `src` is valid for reads of `len` bytes, and `dst` for writes; the two do not overlap. Others may
/// write to either meanwhile: then which bytes are stored is open, but their sum is returned.
pub unsafe fn copy_summed(
    dst: *mut u8,
    src: *const u8,
    len: usize,
    seed: u64,
    index: u64,
    stores: Stores,
) -> u64 {
    let kernel = Kernel::best();
    // SAFETY: the caller's promise; the kernel is one that this machine has.
    unsafe {
        match stores {
            Stores::Streaming if dst.addr().is_multiple_of(8) => {
                run::<STREAM>(kernel, dst, src, len, seed, index)
            }
            _ => run::<STORE>(kernel, dst, src, len, seed, index),
        }
    }
}

/// The checksum of `len` bytes of memory that others may write to.
///
/// # Safety
/// `src` is valid for reads of `len` bytes.
pub unsafe fn sum_of(src: *const u8, len: usize, seed: u64, index: u64) -> u64 {
    // SAFETY: the caller's promise; SUM stores nothing, so `dst` is never used.
    unsafe { run::<SUM>(Kernel::best(), std::ptr::null_mut(), src, len, seed, index) }
}

/// Makes all [`Stores::Streaming`] stores of this thread visible before anything it does next, so
/// before it tells anyone that they are there. Once for many copies.
pub fn drain() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SFENCE is part of SSE, which each x86-64 has. It touches no memory.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
}

const SUM: u8 = 0;
const STORE: u8 = 1;
const STREAM: u8 = 2;

/// What moves the bulk of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    /// Word by word.
    Words,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The widest one that this machine has. (The standard library remembers what it detected.)
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") {
                return Self::Avx2;
            }
        }
        Self::Words
    }

    /// Bytes per vector: what streaming stores are aligned to.
    fn bytes(self) -> usize {
        match self {
            Self::Words => 8,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => 32,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 64,
        }
    }
}

/// One span: words up to an aligned destination, vectors, words, the last bytes.
///
/// # Safety
/// As [`copy_summed`] and, without stores, [`sum_of`]; `kernel` exists on this machine; `dst` is a
/// multiple of 8 for `STREAM`.
unsafe fn run<const MODE: u8>(
    kernel: Kernel,
    mut dst: *mut u8,
    mut src: *const u8,
    len: usize,
    seed: u64,
    index: u64,
) -> u64 {
    // A destination off the words' grid never becomes aligned: its stores straddle cache lines.
    let alignable = MODE != SUM && dst.addr().is_multiple_of(8);
    let head = if alignable { dst.addr().wrapping_neg() % kernel.bytes() } else { 0 };

    let mut sum = 0_u64;
    let mut key = word_key(seed, index);
    let mut left = len;
    let mut part = |part: Kernel, bytes: usize| {
        let count = bytes / part.bytes();
        let moved = count * part.bytes();
        // SAFETY: `moved <= bytes <= left`, and `src` and `dst` have gone forward by `len - left`.
        // A vector part comes after `head`, which aligned `dst`.
        let value = unsafe {
            match part {
                Kernel::Words => word_by_word::<MODE>(dst, src, count, key),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => x86::avx2::<MODE>(dst, src, count, key),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => x86::avx512::<MODE>(dst, src, count, key),
            }
        };
        sum = sum.wrapping_add(value);
        key = key.wrapping_add(STEP.wrapping_mul(words(moved as u64)));
        src = src.wrapping_add(moved);
        dst = dst.wrapping_add(moved);
        left -= moved;
        left
    };

    let rest = part(Kernel::Words, head.min(len) & !7);
    let rest = part(kernel, rest);
    let rest = part(Kernel::Words, rest);
    if rest > 0 {
        // SAFETY: fewer than 8 bytes are left, and they are in bounds.
        sum = sum.wrapping_add(unsafe { last_bytes::<MODE>(dst, src, rest, key) });
    }
    sum
}

/// # Safety
/// As [`run`], for `count` words.
unsafe fn word_by_word<const MODE: u8>(
    dst: *mut u8,
    src: *const u8,
    count: usize,
    mut key: u64,
) -> u64 {
    let mut sum = 0_u64;
    for i in 0..count {
        // SAFETY: word `i` of `count`.
        let word = unsafe { load_word(src.add(i * 8)) };
        sum = sum.wrapping_add(term(word, key));
        key = key.wrapping_add(STEP);
        if MODE != SUM {
            // SAFETY: word `i` of `count`.
            unsafe { dst.add(i * 8).cast::<u64>().write_unaligned(word.to_le()) };
        }
    }
    sum
}

/// # Safety
/// As [`run`], for fewer than 8 bytes.
unsafe fn last_bytes<const MODE: u8>(dst: *mut u8, src: *const u8, count: usize, key: u64) -> u64 {
    let mut word = [0; 8];
    for (i, byte) in word.iter_mut().enumerate().take(count) {
        // SAFETY: byte `i` of `count`.
        *byte = unsafe { src.add(i).read_volatile() };
        if MODE != SUM {
            // SAFETY: byte `i` of `count`.
            unsafe { dst.add(i).write(*byte) };
        }
    }
    term(u64::from_le_bytes(word), key)
}

/// Loads one little-endian word, once.
///
/// # Safety
/// `src` is valid for reads of 8 bytes.
#[inline(always)]
unsafe fn load_word(src: *const u8) -> u64 {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let word;
        // SAFETY: reads 8 bytes at any alignment, nothing else.
        unsafe {
            std::arch::asm!("mov {}, [{}]", lateout(reg) word, in(reg) src,
                options(readonly, nostack, preserves_flags));
        }
        word
    }
    #[cfg(all(target_arch = "aarch64", target_endian = "little", not(miri)))]
    {
        let word;
        // SAFETY: reads 8 bytes at any alignment, nothing else.
        unsafe {
            std::arch::asm!("ldr {}, [{}]", lateout(reg) word, in(reg) src,
                options(readonly, nostack, preserves_flags));
        }
        word
    }
    #[cfg(any(
        not(any(target_arch = "x86_64", all(target_arch = "aarch64", target_endian = "little"))),
        miri
    ))]
    // SAFETY: byte `i` of 8.
    u64::from_le_bytes(std::array::from_fn(|i| unsafe { src.add(i).read_volatile() }))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    use super::{STEP, STORE, STREAM};

    /// A kernel over whole vectors, four at a time.
    macro_rules! kernel {
        (
            $name:ident, $feature:literal, $vector:ty, $bytes:literal, $register:ident, $mov:literal,
            $set1:ident, $zero:ident, $add:ident, $xor:ident, $shift:expr,
            $mul:ident, $store:ident, $stream:ident
        ) => {
            /// # Safety
            /// The machine has the feature. As [`super::run`], for `count` vectors; for `STREAM`
            /// `dst` is aligned to one.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name<const MODE: u8>(
                dst: *mut u8,
                src: *const u8,
                count: usize,
                key: u64,
            ) -> u64 {
                const LANES: u64 = $bytes / 8;
                let add = |keys, words: u64| $add(keys, $set1(STEP.wrapping_mul(words) as i64));
                let put = |at: usize, vector: $vector| {
                    let to = dst.wrapping_add(at).cast::<$vector>();
                    // SAFETY: the vector at `at` is one of `count`; alignment as promised.
                    unsafe {
                        match MODE {
                            STORE => $store(to.cast(), vector),
                            STREAM => $stream(to.cast(), vector),
                            _ => {}
                        }
                    }
                };
                let term = |vector, keys| {
                    let x = $xor(vector, keys);
                    $add(x, $mul(x, $shift(x)))
                };

                let first: [u64; LANES as usize] =
                    std::array::from_fn(|i| key.wrapping_add(STEP.wrapping_mul(i as u64)));
                // SAFETY: plain values of the same size.
                let first: $vector = unsafe { std::mem::transmute(first) };
                let mut keys =
                    [first, add(first, LANES), add(first, 2 * LANES), add(first, 3 * LANES)];
                let mut sums = [$zero(); 4];
                let mut at = 0;
                while at + 4 * $bytes <= count * $bytes {
                    let (a, b, c, d): ($vector, $vector, $vector, $vector);
                    // SAFETY: reads these four of the `count` vectors, at any alignment.
                    unsafe {
                        asm!(
                            concat!($mov, " {a}, [{p}]"),
                            concat!($mov, " {b}, [{p} + {one}]"),
                            concat!($mov, " {c}, [{p} + {one} * 2]"),
                            concat!($mov, " {d}, [{p} + {one} * 3]"),
                            p = in(reg) src.add(at), one = const $bytes,
                            a = out($register) a, b = out($register) b,
                            c = out($register) c, d = out($register) d,
                            options(readonly, nostack, preserves_flags),
                        );
                    }
                    for (i, vector) in [a, b, c, d].into_iter().enumerate() {
                        put(at + i * $bytes, vector);
                        sums[i] = $add(sums[i], term(vector, keys[i]));
                        keys[i] = add(keys[i], 4 * LANES);
                    }
                    at += 4 * $bytes;
                }
                while at < count * $bytes {
                    let vector: $vector;
                    // SAFETY: reads one of the `count` vectors, at any alignment.
                    unsafe {
                        asm!(
                            concat!($mov, " {a}, [{p}]"),
                            p = in(reg) src.add(at), a = out($register) vector,
                            options(readonly, nostack, preserves_flags),
                        );
                    }
                    put(at, vector);
                    sums[0] = $add(sums[0], term(vector, keys[0]));
                    keys[0] = add(keys[0], LANES);
                    at += $bytes;
                }
                let sum = $add($add(sums[0], sums[1]), $add(sums[2], sums[3]));
                // SAFETY: plain values of the same size.
                let sum: [u64; LANES as usize] = unsafe { std::mem::transmute(sum) };
                sum.into_iter().fold(0, u64::wrapping_add)
            }
        };
    }

    kernel! {
        avx512, "avx512f", __m512i, 64, zmm_reg, "vmovdqu64",
        _mm512_set1_epi64, _mm512_setzero_si512, _mm512_add_epi64, _mm512_xor_si512,
        _mm512_srli_epi64::<32>, _mm512_mul_epu32, _mm512_storeu_si512, _mm512_stream_si512
    }
    kernel! {
        avx2, "avx2", __m256i, 32, ymm_reg, "vmovdqu",
        _mm256_set1_epi64x, _mm256_setzero_si256, _mm256_add_epi64, _mm256_xor_si256,
        _mm256_srli_epi64::<32>, _mm256_mul_epu32, _mm256_storeu_si256, _mm256_stream_si256
    }
}

#[cfg(test)]
mod tests;
