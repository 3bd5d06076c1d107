//! What the engine registered.

use std::fmt::Debug;

use kvxfer_core::transport::RegionId;
use kvxfer_core::{ErrorKind, Result};

use super::inside;

/// An address of the host's or of a GPU's memory.
///
/// # Safety
/// It is a plain value, good on each thread, that [`Address::offset`] alone does arithmetic with. What
/// [`Address::of`] tells is all of the memory, which stays there while its owner moves.
pub unsafe trait Address: Copy + Debug {
    /// Memory of ours.
    type Owned: Debug;

    /// The number.
    fn addr(self) -> u64;

    /// The address that many bytes further on; wraps.
    #[must_use]
    fn offset(self, bytes: u64) -> Self;

    /// Where memory of ours begins, and its bytes.
    fn of(owned: &mut Self::Owned) -> (Self, u64);
}

// SAFETY: a vector's bytes are on the heap. Who may use the pointer on which thread is up to `Regions::register`.
unsafe impl Address for *mut u8 {
    type Owned = Vec<u8>;

    fn addr(self) -> u64 {
        self.addr() as u64
    }

    fn offset(self, bytes: u64) -> Self {
        self.wrapping_add(bytes as usize)
    }

    fn of(owned: &mut Vec<u8>) -> (Self, u64) {
        (owned.as_mut_ptr(), owned.len() as u64)
    }
}

/// Registered memory of this process's engine, by number. Filled before the agent starts, and shared
/// by all that reads or writes the engine's blocks.
#[derive(Debug)]
pub struct Regions<A: Address = *mut u8> {
    regions: Vec<Region<A>>,
    kept: Vec<A::Owned>,
}

#[derive(Clone, Copy, Debug)]
struct Region<A> {
    start: A,
    bytes: u64,
}

// SAFETY: a region is a promise about memory (see `register`), which holds on each thread. It is never
// reached through a reference.
unsafe impl<A: Address> Send for Region<A> {}
// SAFETY: as above; there is nothing to change in it.
unsafe impl<A: Address> Sync for Region<A> {}

impl<A: Address> Default for Regions<A> {
    fn default() -> Self {
        Self { regions: Vec::new(), kept: Vec::new() }
    }
}

impl<A: Address> Regions<A> {
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
    /// The memory stays valid for reads, and for writes where it is loaded into, until `self` and all
    /// that shares it is dropped, and posts and loads that name it have ended. Meanwhile nobody holds a Rust
    /// reference to it. A GPU's is of the GPU whose copies use it.
    pub unsafe fn register(&mut self, start: A, bytes: u64) -> Result<RegionId> {
        let fits = bytes > 0
            && isize::try_from(bytes).is_ok()
            && start.addr() > 0
            && start.addr().checked_add(bytes).is_some();
        if !fits {
            return Err(ErrorKind::OutOfBounds
                .error(format!("{bytes} bytes at {:#x} are no memory to register", start.addr())));
        }
        self.regions.push(Region { start, bytes });
        Ok(RegionId(self.regions.len() as u32 - 1))
    }

    /// Adds memory of our own, which is only read; its number is how many there were before.
    ///
    /// # Errors
    /// `OutOfBounds` when there are no bytes.
    pub fn keep(&mut self, mut memory: A::Owned) -> Result<RegionId> {
        let (start, bytes) = A::of(&mut memory);
        // SAFETY: the memory is dropped with `self`, and nobody else reaches it.
        let id = unsafe { self.register(start, bytes) }?;
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
    pub fn at(&self, id: RegionId, offset: u64, len: u64) -> Result<A> {
        let region = self.find(id)?;
        if !inside(region.bytes, offset, len) {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{len} bytes from {offset} leave region {} of {} bytes",
                id.0, region.bytes
            )));
        }
        Ok(region.start.offset(offset))
    }

    fn find(&self, id: RegionId) -> Result<&Region<A>> {
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
    use crate::driver::DevicePtr;

    fn ranges_are_checked<A: Address>(start: A) {
        let mut regions = Regions::new();
        // SAFETY: nothing is read or written there.
        let id = unsafe { regions.register(start, 100) }.unwrap();
        assert_eq!((id, regions.len(), regions.bytes(id).unwrap()), (RegionId(0), 1, 100));
        for (offset, len) in [(0, 0), (0, 100), (99, 1), (100, 0)] {
            assert_eq!(regions.at(id, offset, len).unwrap().addr() - start.addr(), offset);
        }
        for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
            let error = regions.at(id, offset, len).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{offset} {len}");
        }
        assert_eq!(regions.at(RegionId(1), 0, 1).unwrap_err().kind(), ErrorKind::NotFound);
    }

    fn what_is_no_memory_is_refused<A: Address>(address: fn(u64) -> A) {
        let mut regions = Regions::new();
        let refused =
            [(4096, 0), (0, 8), (4096, u64::MAX), (4096, 1 << 63), (u64::MAX, 1), (u64::MAX, 2)];
        for (start, bytes) in refused {
            // SAFETY: refused, so never used.
            let error = unsafe { regions.register(address(start), bytes) }.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{start} {bytes}");
        }
        assert!(regions.is_empty());
    }

    fn host(addr: u64) -> *mut u8 {
        std::ptr::without_provenance_mut(addr as usize)
    }

    fn device(addr: u64) -> DevicePtr {
        // SAFETY: nothing is copied from or to it.
        unsafe { DevicePtr::from_raw(addr) }
    }

    #[test]
    fn on_the_host() {
        ranges_are_checked(host(4096));
        what_is_no_memory_is_refused(host);
    }

    #[test]
    fn on_a_gpu() {
        ranges_are_checked(device(4096));
        what_is_no_memory_is_refused(device);
    }

    #[test]
    fn what_is_kept_is_registered_whole() {
        let mut regions = Regions::<*mut u8>::new();
        let id = regions.keep(vec![1, 2, 3]).unwrap();
        assert_eq!(regions.bytes(id).unwrap(), 3);
        // SAFETY: the bytes are kept, and nobody writes to them.
        assert_eq!(unsafe { *regions.at(id, 2, 1).unwrap() }, 3);
        assert_eq!(regions.keep(Vec::new()).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }
}
