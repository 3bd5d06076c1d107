//! One mapped segment.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU8, Ordering};

use kvxfer_core::{ErrorKind, Result};
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};

use super::inside;

/// What no segment may ever do under its mappings: shrink, grow, or be unsealed later.
pub(super) const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

const SMALLEST_PAGE: usize = 4096;

/// A segment mapped for reading and writing. It is unmapped when the last owner drops it.
#[derive(Debug)]
pub struct Mapping {
    raw: MmapRaw,
}

impl Mapping {
    /// Maps a descriptor that came from somebody else, whose size its owner says is `bytes`.
    ///
    /// # Errors
    /// `Protocol` when it is not a memfd sealed against shrinking and growing, or has another size:
    /// touching it could then kill this process. `Io` when it can't be mapped.
    pub fn import(fd: impl AsFd, bytes: u64) -> Result<Self> {
        let fd = fd.as_fd();
        let seals = fcntl_get_seals(fd).map_err(|error| {
            ErrorKind::Protocol.error(format!("the segment is no sealed memfd: {error}"))
        })?;
        if !seals.contains(SEALS) {
            return Err(ErrorKind::Protocol.error(format!(
                "the segment is sealed {seals:?}, it has to be {SEALS:?}: its size could change"
            )));
        }
        // Only after the seals: now the size is final.
        let stat = fstat(fd).map_err(|error| {
            ErrorKind::Io.error(format!("the segment's size can't be read: {error}"))
        })?;
        if u64::try_from(stat.st_size) != Ok(bytes) {
            return Err(ErrorKind::Protocol
                .error(format!("the segment is {} bytes, {bytes} were promised", stat.st_size)));
        }
        Self::map(fd, bytes)
            .map_err(|error| ErrorKind::Io.error(format!("mapping {bytes} bytes failed: {error}")))
    }

    /// Maps all of a memfd of that size, and touches each page so that no write faults later.
    pub(super) fn map(fd: impl AsFd, bytes: u64) -> io::Result<Self> {
        let len = usize::try_from(bytes).map_err(|_| io::ErrorKind::FileTooLarge)?;
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is empty"));
        }
        let raw = MmapOptions::new().len(len).map_raw(fd.as_fd().as_raw_fd())?;
        raw.advise(Advice::DontFork)?;
        let mapping = Self { raw };
        // Before Linux 5.14 there is no such advice.
        if let Err(error) = mapping.raw.advise(Advice::PopulateWrite) {
            match error.kind() {
                io::ErrorKind::InvalidInput => mapping.touch(),
                _ => return Err(error),
            }
        }
        Ok(mapping)
    }

    /// Writes to each page what it holds already.
    fn touch(&self) {
        for offset in (0..self.raw.len()).step_by(SMALLEST_PAGE) {
            // SAFETY: `offset` is inside the mapping, which is writable and outlives the reference;
            // adding nothing atomically loses no one's write.
            let byte = unsafe { AtomicU8::from_ptr(self.raw.as_mut_ptr().add(offset)) };
            byte.fetch_or(0, Ordering::Relaxed);
        }
    }

    /// Its first byte. Valid as long as the mapping, for [`Mapping::bytes`].
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.raw.as_mut_ptr()
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> u64 {
        self.raw.len() as u64
    }

    /// A pointer valid for `len` bytes from `offset`, as long as the mapping is.
    ///
    /// # Errors
    /// `OutOfBounds` when the range leaves the mapping.
    pub fn at(&self, offset: u64, len: u64) -> Result<*mut u8> {
        if !inside(self.bytes(), offset, len) {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{len} bytes from {offset} leave a segment of {} bytes",
                self.bytes()
            )));
        }
        // In bounds, so it neither wraps nor loses bits of `offset`.
        Ok(self.raw.as_mut_ptr().wrapping_add(offset as usize))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    fn memfd(bytes: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, bytes).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    #[test]
    fn only_sealed_memory_of_the_promised_size_is_mapped() {
        let good = memfd(8192, SEALS);
        assert_eq!(Mapping::import(&good, 8192).unwrap().bytes(), 8192);
        for seals in [
            SealFlags::empty(),
            SealFlags::SHRINK,
            SealFlags::SHRINK | SealFlags::GROW,
            SealFlags::GROW | SealFlags::SEAL,
        ] {
            let error = Mapping::import(memfd(8192, seals), 8192).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{seals:?}");
        }
        for bytes in [0, 4096, 8191, 8193, u64::MAX] {
            let error = Mapping::import(&good, bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol, "{bytes}");
        }
        assert!(Mapping::import(memfd(0, SEALS), 0).is_err());
        let (pipe, _writer) = io::pipe().unwrap();
        assert_eq!(Mapping::import(pipe, 8192).unwrap_err().kind(), ErrorKind::Protocol);
    }

    #[test]
    fn memory_sealed_against_writing_is_an_error_not_a_fault() {
        let fd = memfd(4096, SEALS | SealFlags::WRITE);
        assert_eq!(Mapping::import(fd, 4096).unwrap_err().kind(), ErrorKind::Io);
    }

    #[test]
    fn ranges_are_checked() {
        let mapping = Mapping::import(memfd(100, SEALS), 100).unwrap();
        for (offset, len) in [(0, 0), (0, 100), (99, 1), (100, 0)] {
            let pointer = mapping.at(offset, len).unwrap();
            assert_eq!(pointer.addr() - mapping.as_mut_ptr().addr(), offset as usize);
        }
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let error = mapping.at(offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{offset} {len}");
        }
    }

    #[test]
    fn touching_changes_nothing() {
        let mapping = Mapping::import(memfd(20_000, SEALS), 20_000).unwrap();
        let last = mapping.at(16_384, 1).unwrap();
        // SAFETY: one byte inside the mapping.
        unsafe { last.write_volatile(7) };
        mapping.touch();
        // SAFETY: as above.
        assert_eq!(unsafe { last.read_volatile() }, 7);
    }
}
