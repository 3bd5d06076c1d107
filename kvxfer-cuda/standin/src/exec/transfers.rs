//! Entry points for copies and fills.

use std::ffi::c_void;

use super::copies::{Copies, End, Fill, Span};
use super::run::{wait, with};
use super::streams::{enqueue, run_now};
use super::work::Work;
use crate::abi::{Code, Result};
use crate::contexts::Context;
use crate::memory;
use crate::state::{self, Gpu};

/// One end of a copy as the caller names it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) address: u64,
    /// Who touches it.
    pub(super) gpu: Gpu,
}

impl Place {
    /// The end, if it is memory that devices may touch; looked at as a driver looks at it, now.
    ///
    /// # Errors
    /// `INVALID_VALUE` when some of it is none.
    pub(super) fn end(self, len: u64, write: bool) -> Result<End> {
        memory::resolve(self.address, len, write, self.gpu, memory::now())
            .map_err(|_| Code::INVALID_VALUE)?;
        Ok(End::At(self.address, self.gpu))
    }

    fn is_pageable(self) -> bool {
        memory::is_pageable(self.address)
    }
}

/// The bytes of a place as they are now.
///
/// # Errors
/// Those of [`Place::end`].
///
/// # Safety
/// Pageable memory there is good for reading `len` bytes.
pub(super) unsafe fn read_now(src: Place, len: u64) -> Result<End> {
    let at = if src.is_pageable() {
        src.address as *const u8
    } else {
        let at = memory::resolve(src.address, len, false, src.gpu, memory::now());
        at.map_err(|_| Code::INVALID_VALUE)?.cast_const()
    };
    let mut bytes = vec![0; len as usize];
    // SAFETY: good for `len` bytes: promised by the caller, or by `resolve`.
    unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len()) };
    Ok(End::staged(bytes))
}

/// When a copy returns.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Return {
    /// When it is queued; pageable memory makes it earlier or later, as with a driver.
    Queued,
    Done,
}

/// A copy on a stream of the current device.
///
/// # Safety
/// Pageable memory at either end is good for `len` bytes.
unsafe fn transfer(dst: Place, src: Place, len: usize, stream: u64, end: Return) -> Result {
    let gpu = state::current()?;
    let len = len as u64;
    if len == 0 {
        return with(|queues| super::streams::stream_for_work(queues, gpu, stream)).map(|_| ());
    }
    let from = if src.is_pageable() {
        // Pageable memory is staged before the call returns.
        // SAFETY: the caller's promise.
        unsafe { read_now(src, len) }?
    } else {
        src.end(len, false)?
    };
    let to =
        if dst.is_pageable() { End::staged(vec![0; len as usize]) } else { dst.end(len, true)? };
    let work = Work::Copies(Copies::new(vec![Span { dst: to.clone(), src: from, len }]));
    if end == Return::Done {
        run_now(gpu, work)?;
    } else {
        let ticket = enqueue(gpu, stream, work)?;
        if let (End::Staged(_), Some(ticket)) = (&to, ticket) {
            wait(&ticket, gpu)?;
        }
    }
    if let End::Staged(bytes) = &to {
        let bytes = bytes.lock();
        // SAFETY: the caller's promise.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), dst.address as *mut u8, bytes.len())
        };
    }
    Ok(())
}

/// A copy whose both ends the current device touches.
///
/// # Safety
/// As for [`transfer`].
unsafe fn plain(dst: u64, src: u64, len: usize, stream: u64, end: Return) -> Result {
    let gpu = state::current()?;
    // SAFETY: the caller's promise.
    unsafe { transfer(Place { address: dst, gpu }, Place { address: src, gpu }, len, stream, end) }
}

fn peer(context: Context) -> Result<Gpu> {
    context.gpu()?.ok_or(Code::INVALID_CONTEXT)
}

/// A fill of `count` values of `width` bytes. Never waited for, as with a driver: the calls without
/// a stream use the NULL stream.
fn fill(dst: u64, value: u32, width: u64, count: usize, stream: u64) -> Result {
    let gpu = state::current()?;
    let len = (count as u64).checked_mul(width).ok_or(Code::INVALID_VALUE)?;
    if !dst.is_multiple_of(width) {
        return Err(Code::INVALID_VALUE);
    }
    if len > 0 {
        Place { address: dst, gpu }.end(len, true)?;
    }
    enqueue(gpu, stream, Work::Fill(Fill { dst, gpu, value, width, len, done: 0 })).map(|_| ())
}

entries! {
    fn cuMemcpy(dst: u64, src: u64, len: usize) {
        // SAFETY: the caller of a copy promises that its host memory is good.
        unsafe { plain(dst, src, len, 0, Return::Done) }
    }

    fn cuMemcpyAsync(dst: u64, src: u64, len: usize, stream: u64) {
        // SAFETY: as above.
        unsafe { plain(dst, src, len, stream, Return::Queued) }
    }

    fn cuMemcpyHtoD_v2(dst: u64, src: *const c_void, len: usize) {
        // SAFETY: as above.
        unsafe { plain(dst, src as u64, len, 0, Return::Done) }
    }

    fn cuMemcpyHtoDAsync_v2(dst: u64, src: *const c_void, len: usize, stream: u64) {
        // SAFETY: as above.
        unsafe { plain(dst, src as u64, len, stream, Return::Queued) }
    }

    fn cuMemcpyDtoH_v2(dst: *mut c_void, src: u64, len: usize) {
        // SAFETY: as above.
        unsafe { plain(dst as u64, src, len, 0, Return::Done) }
    }

    fn cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: u64, len: usize, stream: u64) {
        // SAFETY: as above.
        unsafe { plain(dst as u64, src, len, stream, Return::Queued) }
    }

    /// Not waited for, as with a driver.
    fn cuMemcpyDtoD_v2(dst: u64, src: u64, len: usize) {
        // SAFETY: as above.
        unsafe { plain(dst, src, len, 0, Return::Queued) }
    }

    fn cuMemcpyDtoDAsync_v2(dst: u64, src: u64, len: usize, stream: u64) {
        // SAFETY: as above.
        unsafe { plain(dst, src, len, stream, Return::Queued) }
    }

    /// Not waited for, as with a driver.
    fn cuMemcpyPeer(dst: u64, to: Context, src: u64, from: Context, len: usize) {
        let (dst, src) = (Place { address: dst, gpu: peer(to)? }, Place { address: src, gpu: peer(from)? });
        // SAFETY: as above.
        unsafe { transfer(dst, src, len, 0, Return::Queued) }
    }

    fn cuMemcpyPeerAsync(dst: u64, to: Context, src: u64, from: Context, len: usize, stream: u64) {
        let (dst, src) = (Place { address: dst, gpu: peer(to)? }, Place { address: src, gpu: peer(from)? });
        // SAFETY: as above.
        unsafe { transfer(dst, src, len, stream, Return::Queued) }
    }

    fn cuMemsetD8_v2(dst: u64, value: u8, count: usize) {
        fill(dst, value.into(), 1, count, 0)
    }

    fn cuMemsetD8Async(dst: u64, value: u8, count: usize, stream: u64) {
        fill(dst, value.into(), 1, count, stream)
    }

    fn cuMemsetD16_v2(dst: u64, value: u16, count: usize) {
        fill(dst, value.into(), 2, count, 0)
    }

    fn cuMemsetD16Async(dst: u64, value: u16, count: usize, stream: u64) {
        fill(dst, value.into(), 2, count, stream)
    }

    fn cuMemsetD32_v2(dst: u64, value: u32, count: usize) {
        fill(dst, value, 4, count, 0)
    }

    fn cuMemsetD32Async(dst: u64, value: u32, count: usize, stream: u64) {
        fill(dst, value, 4, count, stream)
    }
}
