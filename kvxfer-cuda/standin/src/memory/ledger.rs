//! Who uses how much of which device: across processes when a folder is shared, else in this one.
//!
//! In the folder each piece of physical memory is a file, locked for as long as anybody has it open or
//! mapped: the kernel drops the lock with the last descriptor, wherever that is, in a socket's queue
//! too, and however its process ended. So a file that can be locked is nobody's, and is swept.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, flock, ftruncate, memfd_create, open};
use rustix::io::Errno;

use super::name::Name;
use crate::abi::{Code, Result};
use crate::state::{self, Gpu};

/// What this process alone uses, by the number of the piece: when no folder is shared.
static OWN: Mutex<BTreeMap<u64, (Gpu, u64)>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Held after the descriptor of a piece of physical memory is closed: then the piece may be free.
#[derive(Debug)]
pub(super) struct Charge(Option<u64>);

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(number) = self.0 {
            OWN.lock().remove(&number);
        }
        if let Some(folder) = folder()
            && let Ok(_lock) = lock(folder)
        {
            let _ = sweep(folder);
        }
    }
}

/// Takes `bytes` of a device; the descriptor's name says what it is.
///
/// # Errors
/// `OUT_OF_MEMORY` when the device has less than that.
pub(super) fn take(gpu: Gpu, bytes: u64, flags: u32) -> Result<(OwnedFd, Charge)> {
    let memory = state::config()?.memory;
    let fits = |used: u64| used.checked_add(bytes).is_some_and(|sum| sum <= memory);
    let name = |number| Name { gpu, flags, owner: std::process::id(), number };
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let Some(folder) = folder() else {
        let mut own = OWN.lock();
        if !fits(own.values().filter(|(of, _)| *of == gpu).map(|(_, bytes)| bytes).sum()) {
            return Err(Code::OUT_OF_MEMORY);
        }
        let fd = memfd_create(name(number).to_string(), MemfdFlags::CLOEXEC)
            .and_then(|fd| ftruncate(&fd, bytes).map(|()| fd))
            .map_err(|_| Code::OUT_OF_MEMORY)?;
        own.insert(number, (gpu, bytes));
        return Ok((fd, Charge(Some(number))));
    };
    let made = lock(folder).and_then(|_lock| {
        if !fits(sweep(folder)?.get(&gpu).copied().unwrap_or(0)) {
            return Err(Errno::NOMEM);
        }
        let path = folder.join(name(number).to_string());
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = open(path, flags, Mode::RUSR | Mode::WUSR)?;
        flock(&fd, FlockOperation::NonBlockingLockShared)?;
        ftruncate(&fd, bytes)?;
        Ok(fd)
    });
    match made {
        Ok(fd) => Ok((fd, Charge(None))),
        Err(Errno::NOMEM | Errno::NOSPC) => Err(Code::OUT_OF_MEMORY),
        Err(_) => Err(Code::UNKNOWN),
    }
}

/// Holds on to memory of somebody's: `fd` shares the owner's description, or is a new one of the same
/// file.
///
/// # Errors
/// `MAP_FAILED` when it is gone.
pub(super) fn hold(fd: impl AsFd) -> Result<Charge> {
    let held = match folder() {
        Some(folder) => {
            lock(folder).and_then(|_lock| flock(fd, FlockOperation::NonBlockingLockShared))
        }
        None => Ok(()),
    };
    held.map(|()| Charge(None)).map_err(|_| Code::MAP_FAILED)
}

/// Bytes in use of a device.
pub(super) fn used(gpu: Gpu) -> u64 {
    match folder() {
        Some(folder) => {
            let used = lock(folder).and_then(|_lock| sweep(folder));
            used.ok().and_then(|used| used.get(&gpu).copied()).unwrap_or(0)
        }
        None => OWN.lock().values().filter(|(of, _)| *of == gpu).map(|(_, bytes)| bytes).sum(),
    }
}

fn folder() -> Option<&'static Path> {
    state::config().ok()?.ledger.as_deref()
}

/// One process at a time looks at the folder. Unlocked by closing it.
fn lock(folder: &Path) -> rustix::io::Result<OwnedFd> {
    let path = folder.join("lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let file = match open(&path, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::NOENT) => {
            fs::create_dir_all(folder).map_err(|_| Errno::NOENT)?;
            open(&path, flags, Mode::RUSR | Mode::WUSR)?
        }
        opened => opened?,
    };
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Removes what nobody holds; returns the bytes that are left of each device.
fn sweep(folder: &Path) -> rustix::io::Result<BTreeMap<Gpu, u64>> {
    let mut used = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(|_| Errno::IO)?.flatten() {
        let Some(name) = entry.file_name().to_str().and_then(Name::parse) else { continue };
        let Ok(file) = File::open(entry.path()) else { continue };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_file(entry.path());
        } else if let Ok(metadata) = file.metadata() {
            *used.entry(name.gpu).or_default() += metadata.len();
        }
    }
    Ok(used)
}
