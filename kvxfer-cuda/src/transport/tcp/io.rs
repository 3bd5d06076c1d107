//! Scatter and gather, straight from and into memory that others use as well.
//!
//! No Rust reference to such memory is made: the kernel reads and writes it through pointers that were checked
//! and whose owner is borrowed until the call is over.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use kvxfer_core::Result;
use kvxfer_core::transport::RegionId;

use crate::copy::sum_of;
use crate::memory::{Mapping, Regions};

/// The most pieces of one call. The kernel takes 1024.
const PIECES: usize = 256;

const NOTHING: libc::iovec = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };

struct Pieces {
    list: [libc::iovec; PIECES],
    count: usize,
    bytes: u64,
}

impl Pieces {
    fn new() -> Self {
        Self { list: [NOTHING; PIECES], count: 0, bytes: 0 }
    }

    /// Whoever calls this sees that the pointer is valid for as many bytes until the list is used.
    fn push(&mut self, start: *mut u8, len: u64) {
        if len > 0 {
            self.list[self.count] = libc::iovec { iov_base: start.cast(), iov_len: len as usize };
            self.count += 1;
            self.bytes += len;
        }
    }
}

/// What one call sends, in order.
pub(super) struct Gather<'a>(Pieces, PhantomData<&'a ()>);

impl<'a> Gather<'a> {
    pub(super) fn new() -> Self {
        Self(Pieces::new(), PhantomData)
    }

    /// Bytes of ours.
    pub(super) fn bytes(&mut self, bytes: &'a [u8]) {
        self.0.push(bytes.as_ptr().cast_mut(), bytes.len() as u64);
    }

    /// Bytes of the engine's.
    pub(super) fn region(
        &mut self,
        regions: &'a Regions,
        region: RegionId,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.0.push(regions.at(region, offset, len)?, len);
        Ok(())
    }

    pub(super) fn is_full(&self) -> bool {
        self.0.count == PIECES
    }

    /// Bytes of all.
    pub(super) fn len(&self) -> u64 {
        self.0.bytes
    }

    /// How many bytes the socket took.
    pub(super) fn send(mut self, socket: impl AsFd) -> io::Result<u64> {
        let message = libc::msghdr {
            msg_iov: self.0.list.as_mut_ptr(),
            msg_iovlen: self.0.count as _,
            // SAFETY: no address and no control data; zeros are what a message without them has.
            ..unsafe { std::mem::zeroed() }
        };
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: each piece is valid for reads of its length while `'a` lasts, as is the list.
        retried(|| unsafe { libc::sendmsg(fd, &message, libc::MSG_NOSIGNAL) })
    }
}

/// Where one call puts what has come, in order.
pub(super) struct Scatter<'a>(Pieces, PhantomData<&'a mut ()>);

impl<'a> Scatter<'a> {
    pub(super) fn new() -> Self {
        Self(Pieces::new(), PhantomData)
    }

    /// Memory of ours; behind all pages.
    pub(super) fn buffer(&mut self, buffer: &'a mut [u8]) {
        self.0.push(buffer.as_mut_ptr(), buffer.len() as u64);
    }

    /// Part of a segment.
    pub(super) fn page(&mut self, mapping: &'a Mapping, offset: u64, len: u64) -> Result<()> {
        self.0.push(mapping.at(offset, len)?, len);
        Ok(())
    }

    /// Whether there is no room for a page, and a buffer behind it.
    pub(super) fn is_full(&self) -> bool {
        self.0.count >= PIECES - 1
    }

    /// Room in all.
    pub(super) fn len(&self) -> u64 {
        self.0.bytes
    }

    /// How many bytes came; 0 is the end.
    pub(super) fn receive(self, socket: impl AsFd) -> io::Result<u64> {
        let fd = socket.as_fd().as_raw_fd();
        // SAFETY: each piece is valid for writes of its length while `'a` lasts, and nobody holds a reference to it.
        retried(|| unsafe { libc::readv(fd, self.0.list.as_ptr(), self.0.count as _) })
    }
}

fn retried(mut call: impl FnMut() -> isize) -> io::Result<u64> {
    loop {
        match u64::try_from(call()) {
            Ok(bytes) => return Ok(bytes),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// The checksum of part of a region; see [`sum_of`].
pub(in crate::transport) fn sum(
    regions: &Regions,
    region: RegionId,
    offset: u64,
    len: u64,
    seed: u64,
    index: u64,
) -> Result<u64> {
    let start = regions.at(region, offset, len)?;
    // SAFETY: `at` checked the range, and the regions are borrowed.
    Ok(unsafe { sum_of(start, len as usize, seed, index) })
}
