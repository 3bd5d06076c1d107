//! Device addresses: reserved without access rights, so that host code which dereferences one gets
//! SIGSEGV. The bytes are reached through a twin of the range, which nobody outside knows.
//!
//! No address is given out twice.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::{Arc, LazyLock};

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

use super::physical::Physical;
use crate::abi::{Code, Result};
use crate::devices::GRANULARITY;
use crate::report::Counted;
use crate::state::{self, Gpu};

/// Bytes of addresses. Those of the twins are as many.
const BYTES: u64 = 8 << 40;

/// A moment in the life of the address space: work that was submitted then means the memory that lay
/// behind its addresses then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(u64);

/// What lies behind a range of addresses.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Bytes that may be touched.
    pub(super) len: u64,
    pub(super) kind: Kind,
    /// Devices that may read; whether they may write. Host memory: all may.
    pub(super) rights: BTreeMap<Gpu, bool>,
    /// When it came; no two are the same.
    pub(super) since: Stamp,
    pub(super) _count: Counted,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// Mapped by `cuMemMap`.
    Virtual(Arc<Physical>),
    /// Allocated by `cuMemAlloc`; peers may be let in.
    Plain(Arc<Physical>),
    /// Opened by `cuIpcOpenMemHandle`.
    Opened(Arc<Physical>),
    /// Host memory that the driver allocated.
    Pinned,
    /// Host memory of the caller's, anywhere.
    Registered,
}

/// The ranges by their first address.
pub(super) struct Ranges {
    /// Nothing from here on was ever given out.
    next: u64,
    stamp: u64,
    /// Reserved by `cuMemAddressReserve`: bytes.
    pub(super) reserved: BTreeMap<u64, (u64, Counted)>,
    mapped: BTreeMap<u64, Mapping>,
}

struct Space {
    start: u64,
    /// Add this to an address to reach its twin.
    to_twin: u64,
    ranges: RwLock<Ranges>,
}

static SPACE: LazyLock<Option<Space>> = LazyLock::new(|| {
    let reserve = || {
        // SAFETY: fresh addresses: nobody's memory is replaced.
        let start = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(
                ptr::null_mut(),
                (BYTES + GRANULARITY) as usize,
                ProtFlags::empty(),
                flags,
            )
        };
        start.map(|start| (start as u64).next_multiple_of(GRANULARITY)).ok()
    };
    let (start, twin) = (reserve()?, reserve()?);
    let ranges =
        Ranges { next: start, stamp: 0, reserved: BTreeMap::new(), mapped: BTreeMap::new() };
    Some(Space { start, to_twin: twin.wrapping_sub(start), ranges: RwLock::new(ranges) })
});

fn space() -> Result<&'static Space> {
    state::devices()?;
    SPACE.as_ref().ok_or(Code::OUT_OF_MEMORY)
}

/// # Errors
/// `NOT_INITIALIZED`; `OUT_OF_MEMORY` when there are no addresses at all.
pub(super) fn ranges() -> Result<RwLockReadGuard<'static, Ranges>> {
    Ok(space()?.ranges.read())
}

/// # Errors
/// Those of [`ranges`].
pub(super) fn ranges_mut() -> Result<RwLockWriteGuard<'static, Ranges>> {
    Ok(space()?.ranges.write())
}

/// The present moment.
pub(crate) fn now() -> Stamp {
    Stamp(ranges().map_or(0, |ranges| ranges.stamp))
}

/// A pointer to the bytes behind `len` bytes from `addr`, of device memory or of pinned host memory,
/// for `gpu` to read, or to write as well, as work that was submitted at `since`.
///
/// It stays good to dereference for ever, but for registered host memory, which is the caller's. Memory
/// that is unmapped later turns into bytes that mean nothing: call this when the work runs, and again
/// after each piece to learn whether the piece counts.
///
/// # Errors
/// `ILLEGAL_ADDRESS` when some of it is not mapped, was mapped only after `since`, or the device has no
/// such right.
pub(crate) fn resolve(addr: u64, len: u64, write: bool, gpu: Gpu, since: Stamp) -> Result<*mut u8> {
    let ranges = ranges()?;
    let end = addr.checked_add(len).ok_or(Code::ILLEGAL_ADDRESS)?;
    let mut at = addr;
    let in_space = loop {
        let (start, mapping) = ranges.find(at).ok_or(Code::ILLEGAL_ADDRESS)?;
        if mapping.since > since || !mapping.allows(gpu, write) {
            return Err(Code::ILLEGAL_ADDRESS);
        }
        at = start + mapping.len;
        if at >= end {
            break !matches!(mapping.kind, Kind::Registered);
        }
    };
    let to_twin = if in_space { space()?.to_twin } else { 0 };
    Ok(ptr::with_exposed_provenance_mut(addr.wrapping_add(to_twin) as usize))
}

/// Whether an address is host memory that no device may touch.
pub(crate) fn is_pageable(addr: u64) -> bool {
    let Ok(space) = space() else { return false };
    !(space.start..space.start + BYTES).contains(&addr) && space.ranges.read().find(addr).is_none()
}

impl Mapping {
    fn allows(&self, gpu: Gpu, write: bool) -> bool {
        match &self.kind {
            Kind::Pinned | Kind::Registered => true,
            Kind::Plain(physical) if state::is_peer(gpu, physical.name.gpu) => true,
            _ => self.rights.get(&gpu).is_some_and(|may_write| *may_write || !write),
        }
    }

    /// No other mapping of this process ever had it.
    pub(super) fn number(&self) -> u64 {
        self.since.0
    }

    /// The device memory behind it.
    pub(super) fn physical(&self) -> Option<&Arc<Physical>> {
        match &self.kind {
            Kind::Virtual(physical) | Kind::Plain(physical) | Kind::Opened(physical) => {
                Some(physical)
            }
            Kind::Pinned | Kind::Registered => None,
        }
    }
}

impl Ranges {
    /// Addresses for `bytes`, with a gap behind them that is never mapped.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` when there are not as many left.
    pub(super) fn take(&mut self, bytes: u64, align: u64) -> Result<u64> {
        let start = self.next.checked_next_multiple_of(align.max(GRANULARITY));
        let next = start.and_then(|start| start.checked_add(bytes)?.checked_add(GRANULARITY));
        match (start, next) {
            (Some(start), Some(next)) if next <= space()?.start + BYTES => {
                self.next = next;
                Ok(start)
            }
            _ => Err(Code::OUT_OF_MEMORY),
        }
    }

    /// The mapping that holds an address, and its first one.
    pub(super) fn find(&self, addr: u64) -> Option<(u64, &Mapping)> {
        let (start, mapping) = self.mapped.range(..=addr).next_back()?;
        (addr - start < mapping.len).then_some((*start, mapping))
    }

    /// The mapping that starts there.
    pub(super) fn at(&self, start: u64) -> Option<&Mapping> {
        self.mapped.get(&start)
    }

    /// As [`Ranges::at`], to change it.
    pub(super) fn at_mut(&mut self, start: u64) -> Option<&mut Mapping> {
        self.mapped.get_mut(&start)
    }

    /// Whether no mapping touches a range that isn't empty.
    pub(super) fn is_free(&self, start: u64, len: u64) -> bool {
        let before = self.mapped.range(..start + len).next_back();
        before.is_none_or(|(at, mapping)| at + mapping.len <= start)
    }

    /// The first addresses of the mappings that make up a range, each one whole.
    ///
    /// # Errors
    /// `INVALID_VALUE` when the range is not made of whole mappings of [`Kind::Virtual`].
    pub(super) fn whole(&self, start: u64, len: u64) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        let end = start.checked_add(len).ok_or(Code::INVALID_VALUE)?;
        let mut at = start;
        while at < end {
            let mapping = self.at(at).ok_or(Code::INVALID_VALUE)?;
            if !matches!(mapping.kind, Kind::Virtual(_)) {
                return Err(Code::INVALID_VALUE);
            }
            found.push(at);
            at += mapping.len;
        }
        if at == end && !found.is_empty() { Ok(found) } else { Err(Code::INVALID_VALUE) }
    }

    /// Puts memory behind addresses of the space: `extent` bytes, whole pages of which `len` may be
    /// touched.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY` when it can't be mapped.
    pub(super) fn map(
        &mut self,
        start: u64,
        len: u64,
        kind: Kind,
        fd: impl AsFd,
        count: Counted,
    ) -> Result<&mut Mapping> {
        let fd = fd.as_fd();
        let pages = len.next_multiple_of(PAGE);
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let place = |at: u64| {
            // SAFETY: inside the space or its twin, which nothing but this module maps; no Rust
            // reference points there.
            unsafe {
                let flags = MapFlags::SHARED | MapFlags::FIXED;
                mmap(address(at), pages as usize, rights, flags, fd, 0)
            }
        };
        place(start.wrapping_add(space()?.to_twin)).map_err(|_| Code::OUT_OF_MEMORY)?;
        if matches!(kind, Kind::Pinned) {
            // The host may touch this.
            place(start).map_err(|_| Code::OUT_OF_MEMORY)?;
        }
        Ok(self.insert(start, len, kind, count))
    }

    /// Adds host memory of the caller's.
    pub(super) fn insert(
        &mut self,
        start: u64,
        len: u64,
        kind: Kind,
        count: Counted,
    ) -> &mut Mapping {
        self.stamp += 1;
        let since = Stamp(self.stamp);
        let mapping = Mapping { len, kind, rights: BTreeMap::new(), since, _count: count };
        self.mapped.entry(start).insert_entry(mapping).into_mut()
    }

    /// Takes memory away from its addresses. To be dropped when `self` is unlocked.
    ///
    /// # Errors
    /// `INVALID_VALUE` when no mapping starts there; `UNKNOWN` when the system refuses.
    pub(super) fn unmap(&mut self, start: u64) -> Result<Mapping> {
        let mapping = self.at(start).ok_or(Code::INVALID_VALUE)?;
        let pages = mapping.len.next_multiple_of(PAGE);
        let replace = |at: u64, rights| {
            // SAFETY: as in `map`: this mapping's own addresses.
            unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
                mmap_anonymous(address(at), pages as usize, rights, flags)
            }
        };
        if !matches!(mapping.kind, Kind::Registered) {
            // Work that is under way goes on to nowhere.
            let twin = start.wrapping_add(space()?.to_twin);
            replace(twin, ProtFlags::READ | ProtFlags::WRITE).map_err(|_| Code::UNKNOWN)?;
        }
        if matches!(mapping.kind, Kind::Pinned) {
            replace(start, ProtFlags::empty()).map_err(|_| Code::UNKNOWN)?;
        }
        self.mapped.remove(&start).ok_or(Code::INVALID_VALUE)
    }
}

const PAGE: u64 = 4096;

fn address(at: u64) -> *mut c_void {
    ptr::with_exposed_provenance_mut(at as usize)
}

#[cfg(test)]
mod tests;
