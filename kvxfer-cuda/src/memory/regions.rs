//! What the engine registered.

use kvxfer_core::transport::RegionId;
use kvxfer_core::{ErrorKind, Result};

use super::inside;

/// Registered memory of this process's engine, by number. Filled before the agent starts, and shared
/// by all that reads or writes the engine's blocks.
#[derive(Debug, Default)]
pub struct Regions {
    regions: Vec<Region>,
    kept: Vec<Vec<u8>>,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    start: *mut u8,
    bytes: u64,
}

// SAFETY: a region is a promise about memory (see `register`), which holds on each thread. It is never
// reached through a reference.
unsafe impl Send for Region {}
// SAFETY: as above; there is nothing to change in it.
unsafe impl Sync for Region {}

impl Regions {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds memory; its number is how many there were before.
    ///
    /// # Errors
    /// `OutOfBounds` when the range is empty, starts at null, or wraps around.
    ///
    /// # Safety
    /// The memory stays valid for reads, and for writes where it is loaded into, until `self` and every
    /// transport that shares it is dropped. Nobody holds a Rust reference to it while posts or loads
    /// that name it are under way.
    pub unsafe fn register(&mut self, start: *mut u8, bytes: u64) -> Result<RegionId> {
        let fits = isize::try_from(bytes).is_ok_and(|len| {
            len > 0 && !start.is_null() && start.addr().checked_add(len as usize).is_some()
        });
        if !fits {
            return Err(ErrorKind::OutOfBounds
                .error(format!("{bytes} bytes at {start:p} are no memory to register")));
        }
        self.regions.push(Region { start, bytes });
        Ok(RegionId(self.regions.len() as u32 - 1))
    }

    /// Adds memory of our own, which is only read; its number is how many there were before.
    ///
    /// # Errors
    /// `OutOfBounds` when there are no bytes.
    pub fn keep(&mut self, mut bytes: Vec<u8>) -> Result<RegionId> {
        // SAFETY: the bytes are dropped with `self`, and nobody else reaches them.
        let id = unsafe { self.register(bytes.as_mut_ptr(), bytes.len() as u64) }?;
        self.kept.push(bytes);
        Ok(id)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.regions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Bytes of a region.
    ///
    /// # Errors
    /// `NotFound`: no such region.
    pub fn bytes(&self, id: RegionId) -> Result<u64> {
        self.find(id).map(|region| region.bytes)
    }

    /// A pointer valid for `len` bytes from `offset` of a region.
    ///
    /// # Errors
    /// `NotFound`: no such region. `OutOfBounds`: the range leaves it.
    pub fn at(&self, id: RegionId, offset: u64, len: u64) -> Result<*mut u8> {
        let region = self.find(id)?;
        if !inside(region.bytes, offset, len) {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{len} bytes from {offset} leave region {} of {} bytes",
                id.0, region.bytes
            )));
        }
        // In bounds, so it neither wraps nor loses bits of `offset`.
        Ok(region.start.wrapping_add(offset as usize))
    }

    fn find(&self, id: RegionId) -> Result<&Region> {
        self.regions.get(id.0 as usize).ok_or_else(|| {
            ErrorKind::NotFound.error(format!(
                "region {} of {} registered",
                id.0,
                self.regions.len()
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let mut memory = [0_u8; 100];
        let mut regions = Regions::new();
        // SAFETY: `memory` outlives `regions` and is not touched.
        let id = unsafe { regions.register(memory.as_mut_ptr(), 100) }.unwrap();
        assert_eq!((id, regions.len(), regions.bytes(id).unwrap()), (RegionId(0), 1, 100));
        for (offset, len) in [(0, 0), (0, 100), (99, 1), (100, 0)] {
            let pointer = regions.at(id, offset, len).unwrap();
            assert_eq!(pointer.addr() - memory.as_ptr().addr(), offset as usize);
        }
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let error = regions.at(id, offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{offset} {len}");
        }
        assert_eq!(regions.at(RegionId(1), 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let mut regions = Regions::new();
        let start = std::ptr::dangling_mut();
        for (start, bytes) in
            [(start, 0), (std::ptr::null_mut(), 8), (start, u64::MAX), (start, 1 << 63)]
        {
            // SAFETY: refused, so never used.
            assert!(unsafe { regions.register(start, bytes) }.is_err());
        }
        assert!(regions.is_empty());
    }
}
