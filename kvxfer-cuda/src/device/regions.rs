//! What the engine registered on a GPU.

use crate::driver::{Buffer, DevicePtr};
use crate::memory::{Address, Regions};

/// Registered memory of this process's engine on one GPU, by number.
pub type DeviceRegions = Regions<DevicePtr>;

// SAFETY: a number that only the driver looks behind; a buffer stays where it was allocated.
unsafe impl Address for DevicePtr {
    type Owned = Buffer;

    fn addr(self) -> u64 {
        self.addr()
    }

    fn offset(self, bytes: u64) -> Self {
        self.offset(bytes)
    }

    fn of(owned: &mut Buffer) -> (Self, u64) {
        (owned.ptr(), owned.bytes())
    }
}
