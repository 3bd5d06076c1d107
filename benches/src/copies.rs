//! What the machine can do: bare copies, without a library, a checksum or a check.

/// `memcpy` of the C library.
///
/// # Safety
/// Both are valid for `len` bytes and do not overlap.
pub unsafe fn memcpy(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller's promise. (Of a length that the compiler does not know this is a call of `memcpy`.)
    unsafe { dst.copy_from_nonoverlapping(src, std::hint::black_box(len)) };
}

/// Stores past the cache, the widest there are; `None` where this machine has no AVX-512.
///
/// The copy is for `len` a multiple of 64 and `dst` aligned to it; [`kvxfer_cuda::copy::drain`] once at the end.
pub fn streaming() -> Option<unsafe fn(*mut u8, *const u8, usize)> {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return Some(stream_avx512);
    }
    None
}

/// # Safety
/// As [`memcpy`]; the machine has AVX-512; `len` is a multiple of 64 and `dst` aligned to it.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn stream_avx512(dst: *mut u8, src: *const u8, len: usize) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_stream_si512};
    let (to, from) = (dst.cast::<__m512i>(), src.cast::<__m512i>());
    for at in 0..len / 64 {
        // SAFETY: vector `at` of `len / 64`; the caller aligned `dst`.
        unsafe { _mm512_stream_si512(to.add(at), _mm512_loadu_si512(from.add(at))) };
    }
}
