//! Copies that sum what they store.
//!
//! The engine may write to a block while it is read. So each word is loaded once, into a register;
//! that register is hashed and stored, and the sum is always that of the bytes which arrived. The
//! loads are inline assembly (or volatile): the compiler can neither repeat nor split them, and no
//! Rust reference to such memory is ever made.
//!
//! The sum is that of [`kvxfer_core::sum`]: of one span, whose first word has index `index`.
//!
//! # Which stores
//!
//! Measured by `ratios.rs` here, best of 8 interleaved rounds, two Xeon cores with AVX-512 under a load
//! of about 3: read the ratios. Scattered pieces, 256 MiB in all, into a pre-faulted memfd, GB/s:
//!
//! | piece | libc memcpy, no sum | memcpy, then sum | cached | streaming | streaming / cached |
//! |---|---|---|---|---|---|
//! | 256 B | 3.6 | 2.1 | 2.1 | 1.9 | 0.92 |
//! | 512 B | 4.0 | 3.0 | 3.2 | 3.8 | 1.17 |
//! | 1 KiB | 4.1 | 3.3 | 3.8 | 4.4 | 1.18 |
//! | 4 KiB | 6.5 | 4.3 | 5.8 | 7.5 | 1.28 |
//! | 32 KiB | 7.2 | 5.9 | 6.4 | 8.9 | 1.39 |
//! | 256 KiB | 7.3 | 6.3 | 6.5 | 9.2 | 1.40 |
//! | 1 MiB | 7.3 | 5.7 | 6.7 | 9.0 | 1.35 |
//!
//! So the sum costs nothing where memory is the limit, and a peer's segment gets streaming stores
//! ([`Stores::for_peer`]). One [`drain`] per piece halves 256-byte pieces and is lost in the noise from
//! 2 KiB on; transports drain once per poll.
//!
//! A load is read soon after. A working set copied in pieces of 32 KiB and then read once, both timed:
//! streaming / cached is 0.55 for 256 KiB, 0.59 for 1 MiB, 0.75 for 4 MiB, 0.84 for 16 MiB, 1.19 for
//! 64 MiB and 1.20 for 256 MiB: [`Stores::for_load`] asks how much is loaded.

use kvxfer_core::sum::{STEP, term, word_key, words};

/// How stores reach memory.
#[derive(Clone, Copy, Debug)]
pub enum Stores<'a> {
    /// Through the cache: for what this core reads next.
    Cached,
    /// Past the cache, where the machine and the alignment allow (`dst` a multiple of 8 bytes): for
    /// what another process reads, or nobody reads soon. They are there for others once the [`Drain`] is gone.
    Streaming(&'a Drain),
}

impl<'a> Stores<'a> {
    /// For a write of that many bytes into memory that another process reads.
    pub fn for_peer(len: u64, drain: &'a Drain) -> Self {
        if len < 512 { Self::Cached } else { Self::Streaming(drain) }
    }

    /// For a load of that many bytes in all, which this process reads when the load is done.
    pub fn for_load(bytes: u64, drain: &'a Drain) -> Self {
        if bytes < 32 << 20 { Self::Cached } else { Self::Streaming(drain) }
    }
}

/// Ends with a [`drain`]. No streaming store is made without one, so none is forgotten; whoever returns to those who
/// tell others has let go of it. No test would notice one that is missing: it takes another core, and luck.
#[derive(Debug)]
#[must_use]
pub struct Drain(());

impl Drain {
    /// For the stores from here to where it is dropped.
    #[expect(clippy::new_without_default, reason = "where it ends matters, so it is made by name")]
    pub fn new() -> Self {
        Self(())
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        drain();
    }
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
    stores: Stores<'_>,
) -> u64 {
    let kernel = Kernel::best();
    // SAFETY: the caller's promise; the kernel is one that this machine has.
    unsafe {
        match stores {
            Stores::Streaming(_) if dst.addr().is_multiple_of(8) => {
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

#[cfg(test)]
mod ratios;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;
