//! What the driver hands out, as plain values. They own nothing: the objects in the modules beside this one do.

use std::ffi::{c_int, c_void};
use std::ptr;

macro_rules! opaque {
    ($($(#[$doc:meta])* $name:ident)*) => {$(
        $(#[$doc])*
        #[repr(transparent)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name(pub *mut c_void);

        impl $name {
            /// No object; for streams, the legacy default stream.
            pub const NULL: Self = Self(ptr::null_mut());
        }

        // SAFETY: it is a name that only the driver looks behind, and the driver may be called with it
        // from any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}
    )*};
}

opaque! {
    /// `CUcontext`.
    RawContext
    /// `CUstream`.
    RawStream
    /// `CUevent`.
    RawEvent
    /// `CUmodule`.
    RawModule
    /// `CUfunction`.
    RawFunction
}

/// `CUdevice`, which is also the ordinal.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawDevice(pub c_int);

/// `CUmemGenericAllocationHandle`: physical memory.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawMemory(pub u64);

/// An address in a device's address space. The host must not touch what is there.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DevicePtr(u64);

impl DevicePtr {
    /// An address that came from elsewhere: from an engine's tensor.
    ///
    /// # Safety
    /// Work that is given this address, or one made of it by [`DevicePtr::offset`], reads and writes there without
    /// any check. So as long as such work may be queued, the addresses that are used have to lie in device
    /// memory that is allocated, and that may be changed where they are written to.
    pub const unsafe fn from_raw(addr: u64) -> Self {
        Self(addr)
    }

    /// The number.
    pub const fn addr(self) -> u64 {
        self.0
    }

    /// The address that many bytes further on; wraps.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// What physical memory can be exported as: `CUmemAllocationHandleType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum HandleKind {
    /// A file descriptor.
    PosixFd = 1,
    /// 64 bytes, good on each host of a fabric.
    Fabric = 8,
}

/// One copy of a batch: `len` bytes from `src` to `dst`, which must not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Where the bytes go.
    pub dst: DevicePtr,
    /// Where they are.
    pub src: DevicePtr,
    /// How many; none is allowed.
    pub len: u64,
}
