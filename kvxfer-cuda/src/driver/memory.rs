//! Memory of a device.

use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Device;
use super::error::{CudaError, Result};
use super::handles::{DevicePtr, RawMemory};

/// Physical memory: it has no address until it is mapped. It exists until its owner and all importers have
/// dropped and unmapped it, or died.
#[derive(Debug)]
pub struct Physical {
    device: Device,
    raw: RawMemory,
    bytes: u64,
    rdma: bool,
}

impl Physical {
    pub(super) fn allocate(device: &Device, bytes: u64) -> Result<Self> {
        let granularity = device.granularity()?.max(1);
        let bytes = bytes
            .max(1)
            .checked_next_multiple_of(granularity)
            .ok_or(CudaError::Unsupported { what: "memory of 2^64 bytes" })?;
        let rdma = device.supports_rdma();
        let _bound = device.bound()?;
        // SAFETY: the context is current, the device the driver's.
        let raw = unsafe { device.driver().memory_create(device.raw(), bytes, rdma) }?;
        Ok(Self { device: device.clone(), raw, bytes, rdma })
    }

    pub(super) fn import(device: &Device, fd: BorrowedFd<'_>, bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current; the driver checks what the descriptor is.
        let raw = unsafe { device.driver().memory_import(fd) }?;
        Ok(Self { device: device.clone(), raw, bytes, rdma: false })
    }

    /// Bytes; of imported memory what the other side says.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it was asked to be reachable by a network card. See [`Mapped::rdma_verified`].
    pub fn rdma_capable(&self) -> bool {
        self.rdma
    }

    /// A descriptor that another process can import. It keeps the memory alive, unread in a socket as well.
    ///
    /// # Errors
    /// The driver's.
    pub fn export(&self) -> Result<OwnedFd> {
        let _bound = self.device.bound()?;
        // SAFETY: the handle is alive.
        unsafe { self.device.driver().memory_export(self.raw) }
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        // SAFETY: released once. It stays as long as it is mapped somewhere.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().memory_release(self.raw) });
    }
}

/// A range of addresses, of nothing yet.
#[derive(Debug)]
struct Reserved {
    device: Device,
    ptr: DevicePtr,
    bytes: u64,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: nothing is mapped there (any more).
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().address_free(self.ptr, self.bytes) });
    }
}

/// Mapped physical memory. Unmapped when it is dropped: **all work that uses it has to be done by then**, else that
/// work, and with it the device's context in this process, fails.
#[derive(Debug)]
pub struct Mapped {
    reserved: Reserved,
    physical: Arc<Physical>,
}

impl Mapped {
    pub(super) fn new(device: &Device, physical: Arc<Physical>) -> Result<Self> {
        let bytes = physical.bytes;
        let _bound = device.bound()?;
        let driver = device.driver();
        // SAFETY: the context is current; each range is the one that was just made.
        unsafe {
            let ptr = driver.address_reserve(bytes)?;
            let reserved = Reserved { device: device.clone(), ptr, bytes };
            driver.map(ptr, bytes, physical.raw)?;
            let mapped = Self { reserved, physical };
            driver.set_access(ptr, bytes, device.raw())?;
            Ok(mapped)
        }
    }

    /// Its first byte.
    pub fn ptr(&self) -> DevicePtr {
        self.reserved.ptr
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.reserved.bytes
    }

    /// What is mapped.
    pub fn physical(&self) -> &Arc<Physical> {
        &self.physical
    }

    /// Whether a network card can reach it, as the driver says: to ask for it is only a request.
    ///
    /// # Errors
    /// The driver's.
    pub fn rdma_verified(&self) -> Result<bool> {
        let _bound = self.reserved.device.bound()?;
        // SAFETY: an address that is mapped.
        unsafe { self.reserved.device.driver().rdma_capable(self.ptr()) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let Reserved { device, ptr, bytes } = &self.reserved;
        // SAFETY: mapped by `new`, all of it. That no work uses it is up to the owner; the driver survives it.
        let _ = device.bound().and_then(|_bound| unsafe { device.driver().unmap(*ptr, *bytes) });
    }
}

/// The name of plain memory in other processes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

impl fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IpcHandle")
    }
}

/// Plain device memory, of this process or opened from another one. Dropping it may wait for all work of
/// the device; **work of other streams that uses it should be done by then.**
#[derive(Debug)]
pub struct Buffer {
    device: Device,
    ptr: DevicePtr,
    bytes: u64,
    opened: bool,
}

impl Buffer {
    pub(super) fn new(device: &Device, bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current.
        let ptr = unsafe { device.driver().alloc(bytes.max(1)) }?;
        Ok(Self { device: device.clone(), ptr, bytes, opened: false })
    }

    pub(super) fn open(device: &Device, handle: IpcHandle, bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current; the driver checks the handle.
        let ptr = unsafe { device.driver().ipc_open(handle.0) }?;
        Ok(Self { device: device.clone(), ptr, bytes, opened: true })
    }

    /// Its first byte.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Bytes; of memory of another process what that one says.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// By what another process opens it. The driver may share a whole block of 2 MiB: memory that is to be
    /// shared should be a multiple of that.
    ///
    /// # Errors
    /// The driver's.
    pub fn ipc_handle(&self) -> Result<IpcHandle> {
        let _bound = self.device.bound()?;
        // SAFETY: the address of an allocation.
        unsafe { self.device.driver().ipc_handle(self.ptr) }.map(IpcHandle)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let driver = self.device.driver();
        // SAFETY: allocated or opened by this object, and given back once.
        let _ = self.device.bound().and_then(|_bound| unsafe {
            if self.opened { driver.ipc_close(self.ptr) } else { driver.free(self.ptr) }
        });
    }
}
