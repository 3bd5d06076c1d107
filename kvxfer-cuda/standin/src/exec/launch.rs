//! Kernels, run as host code of the same source (`kvxfer-cuda/kernels`).

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::ops::Range;

use super::race::Touched;
use crate::abi::{Code, Result};
use crate::memory::{self, Stamp};
use crate::state::Gpu;

type Translate = unsafe extern "C" fn(*mut c_void, c_ulonglong, c_ulonglong, c_int) -> *mut c_void;

unsafe extern "C" {
    // kernels/host.h
    fn kvx_run(
        kernel: *const c_char,
        grid: c_uint,
        block: c_uint,
        args: *const c_ulonglong,
        translate: Translate,
        context: *mut c_void,
    ) -> c_int;
}

/// Parameters of a kernel, at most; all of 8 bytes.
pub(super) const PARAMETERS: usize = 16;

/// A kernel with its parameters.
#[derive(Debug)]
pub(super) struct Launch {
    pub(super) kernel: CString,
    pub(super) grid: u32,
    pub(super) block: u32,
    pub(super) args: [u64; PARAMETERS],
    pub(super) seen: Touched,
}

/// What the kernel's translation works with.
struct Reach {
    gpu: Gpu,
    since: Stamp,
    seen: Touched,
}

impl Launch {
    pub(super) fn run(&mut self, gpu: Gpu, since: Stamp) -> Result {
        let mut reach = Reach { gpu, since, seen: Touched::default() };
        // SAFETY: the name ends with NUL, `args` has room for the parameters of any kernel, and `reach`
        // outlives the call, in which only `translate` uses it.
        let code = unsafe {
            kvx_run(
                self.kernel.as_ptr(),
                self.grid,
                self.block,
                self.args.as_ptr(),
                translate,
                (&raw mut reach).cast(),
            )
        };
        merge(&mut reach.seen.reads);
        merge(&mut reach.seen.writes);
        self.seen = reach.seen;
        match code {
            0 => Ok(()),
            code if code < 0 => Err(Code::NOT_FOUND),
            code => Err(Code(code)),
        }
    }

    pub(super) fn touched(&self) -> Touched {
        self.seen.clone()
    }
}

/// # Safety
/// `context` is the [`Reach`] of a running kernel.
unsafe extern "C" fn translate(
    context: *mut c_void,
    address: u64,
    len: u64,
    write: c_int,
) -> *mut c_void {
    // SAFETY: what the caller promised; nothing else holds a reference meanwhile.
    let reach = unsafe { &mut *context.cast::<Reach>() };
    let write = write != 0;
    match memory::resolve(address, len, write, reach.gpu, reach.since) {
        Ok(at) => {
            let list = if write { &mut reach.seen.writes } else { &mut reach.seen.reads };
            add(list, address..address.saturating_add(len));
            at.cast()
        }
        Err(_) => std::ptr::null_mut(),
    }
}

/// Adds a range, merged with the last one where they touch.
fn add(list: &mut Vec<Range<u64>>, range: Range<u64>) {
    match list.last_mut() {
        Some(last) if last.start <= range.start && range.start <= last.end => {
            last.end = last.end.max(range.end)
        }
        _ => list.push(range),
    }
}

/// Makes as few of the ranges as there can be: threads take turns in going through memory, a word each, and whoever
/// looks for races would look at each word.
fn merge(list: &mut Vec<Range<u64>>) {
    list.sort_unstable_by_key(|range| range.start);
    list.dedup_by(|next, last| {
        let touch = next.start <= last.end;
        if touch {
            last.end = last.end.max(next.end);
        }
        touch
    });
}

/// Whether there is host code for a kernel of that name.
pub(super) fn exists(kernel: &CStr) -> bool {
    let args = [0; PARAMETERS];
    // SAFETY: no threads, so no access; otherwise as above.
    unsafe { kvx_run(kernel.as_ptr(), 0, 0, args.as_ptr(), translate, std::ptr::null_mut()) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_range_in_whichever_order_its_words_came() {
        let mut list = vec![16..32, 48..64, 0..16, 20..24, 32..40, 100..101];
        merge(&mut list);
        assert_eq!(list, [0..40, 48..64, 100..101]);
    }
}
