//! Physical memory, and the handles that a caller has of it.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::fstat;
use rustix::io::fcntl_dupfd_cloexec;

use super::ledger::{self, Charge};
use super::name::Name;
use crate::abi::{Code, Result};
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

/// A piece of a device's memory, own or imported. It lives until its last handle, mapping and exported
/// descriptor is gone, in whichever process.
#[derive(Debug)]
pub(super) struct Physical {
    // Closed before the ledger looks whether it was the last.
    pub(super) fd: OwnedFd,
    _charge: Charge,
    pub(super) name: Name,
    pub(super) bytes: u64,
    pub(super) imported: bool,
    /// The value of the handles to it.
    number: u64,
    _count: Counted,
}

struct Held {
    physical: Arc<Physical>,
    /// One for each reference.
    references: Vec<Counted>,
}

static NEXT: AtomicU64 = AtomicU64::new(0x1001);
static HANDLES: Mutex<BTreeMap<u64, Held>> = Mutex::new(BTreeMap::new());

impl Physical {
    /// Fresh memory of a device.
    ///
    /// # Errors
    /// `OUT_OF_MEMORY`.
    pub(super) fn create(gpu: Gpu, bytes: u64, flags: u32) -> Result<Self> {
        let (fd, charge) = ledger::take(gpu, bytes, flags)?;
        let name = Name::of(&fd).ok_or(Code::UNKNOWN)?;
        Ok(Self::new(fd, charge, name, bytes, false))
    }

    /// Memory that somebody exported. `fd` stays the caller's.
    ///
    /// # Errors
    /// `INVALID_VALUE` when it is no such descriptor; `INVALID_DEVICE` when its device is hidden.
    pub(super) fn import(fd: BorrowedFd<'_>) -> Result<Self> {
        let own = fcntl_dupfd_cloexec(fd, 3).map_err(|_| Code::INVALID_VALUE)?;
        let name = Name::of(&own).ok_or(Code::INVALID_VALUE)?;
        let config = state::config()?;
        if name.gpu.0 >= config.devices || config.hidden.contains(&name.gpu.0) {
            return Err(Code::INVALID_DEVICE);
        }
        let stat = fstat(&own).map_err(|_| Code::INVALID_VALUE)?;
        let bytes = u64::try_from(stat.st_size).map_err(|_| Code::INVALID_VALUE)?;
        let charge = ledger::hold(&own)?;
        Ok(Self::new(own, charge, name, bytes, true))
    }

    fn new(fd: OwnedFd, charge: Charge, name: Name, bytes: u64, imported: bool) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let count = Counted::new(Live::Allocations);
        Self { fd, _charge: charge, name, bytes, imported, number, _count: count }
    }

    /// Whether it may be exported as that kind of handle. What is imported may not.
    ///
    /// # Errors
    /// `INVALID_VALUE` when it may not.
    pub(super) fn shareable(&self, kind: u32) -> Result {
        let may = !self.imported && self.name.flags & kind == kind;
        may.then_some(()).ok_or(Code::INVALID_VALUE)
    }
}

/// Adds a reference to the handle of some memory; the handle's value.
pub(super) fn add_handle(physical: Arc<Physical>) -> u64 {
    let number = physical.number;
    let mut handles = HANDLES.lock();
    let held = handles.entry(number).or_insert_with(|| Held { physical, references: Vec::new() });
    held.references.push(Counted::new(Live::Handles));
    number
}

/// The memory behind a handle.
///
/// # Errors
/// `INVALID_VALUE` when there is no such handle.
pub(super) fn behind(handle: u64) -> Result<Arc<Physical>> {
    state::devices()?;
    let handles = HANDLES.lock();
    handles.get(&handle).map(|held| held.physical.clone()).ok_or(Code::INVALID_VALUE)
}

/// Gives one reference back.
///
/// # Errors
/// `INVALID_VALUE` when there is no such handle.
pub(super) fn release_handle(handle: u64) -> Result {
    state::devices()?;
    let mut handles = HANDLES.lock();
    let held = handles.get_mut(&handle).ok_or(Code::INVALID_VALUE)?;
    held.references.pop();
    let last = if held.references.is_empty() { handles.remove(&handle) } else { None };
    // Freeing memory takes other locks.
    drop(handles);
    drop(last);
    Ok(())
}

/// A descriptor by its number, of a caller who says that it is open.
///
/// # Errors
/// `INVALID_VALUE` when it is negative.
pub(super) fn descriptor<'a>(fd: c_int) -> Result<BorrowedFd<'a>> {
    if fd < 0 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: not -1; it is used at once, and when it isn't open that use answers EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
