//! What the engine registered on a GPU.

use kvxfer_core::transport::RegionId;
use kvxfer_core::{ErrorKind, Result};

use crate::driver::{Buffer, DevicePtr};
use crate::memory::inside;

/// Registered memory of this process's engine on one GPU, by number. Filled before the agent starts, and
/// shared by all that reads or writes the engine's blocks.
#[derive(Debug, Default)]
pub struct DeviceRegions {
    regions: Vec<Region>,
    kept: Vec<Buffer>,
}

#[derive(Clone, Copy, Debug)]
struct Region {
    start: DevicePtr,
    bytes: u64,
}

impl DeviceRegions {
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
    /// The memory is of the GPU whose copies use it, and stays allocated until `self` and everything that
    /// shares it is dropped, and copies that name it have ended.
    pub unsafe fn register(&mut self, start: DevicePtr, bytes: u64) -> Result<RegionId> {
        let fits = bytes > 0 && start.addr() > 0 && start.addr().checked_add(bytes).is_some();
        if !fits {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{bytes} bytes at {:#x} are no device memory to register",
                start.addr()
            )));
        }
        self.regions.push(Region { start, bytes });
        Ok(RegionId(self.regions.len() as u32 - 1))
    }

    /// Adds memory of our own; its number is how many there were before.
    ///
    /// # Errors
    /// As [`DeviceRegions::register`].
    pub fn keep(&mut self, memory: Buffer) -> Result<RegionId> {
        // SAFETY: the memory is dropped with `self`.
        let id = unsafe { self.register(memory.ptr(), memory.bytes()) }?;
        self.kept.push(memory);
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

    /// An address valid for `len` bytes from `offset` of a region.
    ///
    /// # Errors
    /// `NotFound`: no such region. `OutOfBounds`: the range leaves it.
    pub fn at(&self, id: RegionId, offset: u64, len: u64) -> Result<DevicePtr> {
        let region = self.find(id)?;
        if !inside(region.bytes, offset, len) {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{len} bytes from {offset} leave region {} of {} bytes",
                id.0, region.bytes
            )));
        }
        Ok(region.start.offset(offset))
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

    fn ptr(addr: u64) -> DevicePtr {
        // SAFETY: nothing is copied from or to it.
        unsafe { DevicePtr::from_raw(addr) }
    }

    #[test]
    fn ranges_are_checked() {
        let mut regions = DeviceRegions::new();
        // SAFETY: nothing is copied from or to it.
        let id = unsafe { regions.register(ptr(4096), 100) }.unwrap();
        assert_eq!((id, regions.len(), regions.bytes(id).unwrap()), (RegionId(0), 1, 100));
        for (offset, len) in [(0, 0), (0, 100), (99, 1), (100, 0)] {
            assert_eq!(regions.at(id, offset, len).unwrap().addr(), 4096 + offset);
        }
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let error = regions.at(id, offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{offset} {len}");
        }
        assert_eq!(regions.at(RegionId(1), 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let mut regions = DeviceRegions::new();
        for (start, bytes) in [(4096, 0), (0, 8), (4096, u64::MAX), (u64::MAX, 2)] {
            // SAFETY: refused, so never used.
            assert!(unsafe { regions.register(ptr(start), bytes) }.is_err());
        }
        assert!(regions.is_empty());
    }
}
