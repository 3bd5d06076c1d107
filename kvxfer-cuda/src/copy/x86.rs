//! Vector kernels: they sum, and store or stream or neither, whole vectors.

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
