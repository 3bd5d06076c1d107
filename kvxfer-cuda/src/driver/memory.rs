//! Memory of a device.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::Device;
use super::error::{CudaError, Result};
use super::handles::{DevicePtr, HandleKind, RawMemory};

/// How memory is shared with other processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// As a file descriptor, over a Unix socket. What to use wherever it is there.
    #[default]
    PosixFd,
    /// As 64 bytes, also between hosts of one fabric.
    Fabric,
    /// As 64 bytes on one host, without virtual memory management: the owner **must not free it while another
    /// process has it open**, and only the device itself maps it.
    Legacy,
}

impl fmt::Display for Sharing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PosixFd => "posix_fd",
            Self::Fabric => "fabric",
            Self::Legacy => "legacy",
        })
    }
}

/// What another process imports memory by.
#[derive(Debug)]
pub enum Handle {
    /// Of [`Sharing::PosixFd`]. It keeps the memory alive, unread in a socket as well.
    Fd(OwnedFd),
    /// Of [`Sharing::Fabric`].
    Fabric([u8; 64]),
    /// Of [`Sharing::Legacy`].
    Legacy([u8; 64]),
}

/// Physical memory: it has no address until it is mapped. It exists until its owner and all importers have
/// dropped and unmapped it, or died.
#[derive(Debug)]
pub struct Physical {
    device: Device,
    backing: Backing,
    bytes: u64,
    rdma: bool,
}

#[derive(Debug)]
enum Backing {
    Mappable(RawMemory, HandleKind),
    /// Plain memory, of this process or opened from another one.
    Plain(Plain),
}

impl Physical {
    pub(super) fn allocate(device: &Device, sharing: Sharing, bytes: u64) -> Result<Self> {
        let kind = match sharing {
            Sharing::PosixFd => HandleKind::PosixFd,
            Sharing::Fabric => HandleKind::Fabric,
            Sharing::Legacy => {
                // Less than such a block would be shared together with what else lies in it.
                let bytes = round(bytes, 2 << 20)?;
                let backing = Backing::Plain(Plain::new(device, bytes)?);
                return Ok(Self { device: device.clone(), backing, bytes, rdma: false });
            }
        };
        let _bound = device.bound()?;
        let (driver, raw) = (device.driver(), device.raw());
        // SAFETY: the device is the driver's.
        let bytes = round(bytes, unsafe { driver.memory_granularity(raw, kind) }?)?;
        let rdma = device.supports_rdma();
        // SAFETY: the context is current, the device the driver's.
        let memory = unsafe { driver.memory_create(raw, bytes, kind, rdma) }?;
        Ok(Self { device: device.clone(), backing: Backing::Mappable(memory, kind), bytes, rdma })
    }

    pub(super) fn import(device: &Device, fd: BorrowedFd<'_>, bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current; the driver checks what the descriptor is.
        let memory = unsafe { device.driver().memory_import(fd) }?;
        let backing = Backing::Mappable(memory, HandleKind::PosixFd);
        Ok(Self { device: device.clone(), backing, bytes, rdma: false })
    }

    pub(super) fn import_handle(device: &Device, handle: &Handle, bytes: u64) -> Result<Self> {
        let backing = match handle {
            Handle::Fd(fd) => return Self::import(device, fd.as_fd(), bytes),
            Handle::Fabric(handle) => {
                let _bound = device.bound()?;
                // SAFETY: the context is current; the driver checks the handle.
                let memory = unsafe { device.driver().fabric_import(*handle) }?;
                Backing::Mappable(memory, HandleKind::Fabric)
            }
            Handle::Legacy(handle) => Backing::Plain(Plain::open(device, *handle, bytes)?),
        };
        Ok(Self { device: device.clone(), backing, bytes, rdma: false })
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
    /// `Unsupported` for memory that is shared in another way; else the driver's.
    pub fn export(&self) -> Result<OwnedFd> {
        match self.share()? {
            Handle::Fd(fd) => Ok(fd),
            _ => Err(CudaError::Unsupported { what: "a descriptor of memory without descriptors" }),
        }
    }

    /// By what another process imports it.
    ///
    /// # Errors
    /// The driver's; imported memory can't be exported again.
    pub fn share(&self) -> Result<Handle> {
        let _bound = self.device.bound()?;
        let driver = self.device.driver();
        // SAFETY: the handle, or the address, is alive.
        unsafe {
            match &self.backing {
                Backing::Mappable(memory, HandleKind::PosixFd) => {
                    driver.memory_export(*memory).map(Handle::Fd)
                }
                Backing::Mappable(memory, HandleKind::Fabric) => {
                    driver.fabric_export(*memory).map(Handle::Fabric)
                }
                Backing::Plain(plain) => driver.ipc_handle(plain.ptr).map(Handle::Legacy),
            }
        }
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let Backing::Mappable(memory, _) = self.backing else { return };
        // SAFETY: released once. It stays as long as it is mapped somewhere.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().memory_release(memory) });
    }
}

/// `bytes`, but some, as a multiple of `unit`.
fn round(bytes: u64, unit: u64) -> Result<u64> {
    let multiple = bytes.max(1).checked_next_multiple_of(unit.max(1));
    multiple.ok_or(CudaError::Unsupported { what: "memory of 2^64 bytes" })
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
    device: Device,
    ptr: DevicePtr,
    /// Plain memory has its address already.
    reserved: Option<Reserved>,
    physical: Arc<Physical>,
}

impl Mapped {
    pub(super) fn new(device: &Device, physical: Arc<Physical>) -> Result<Self> {
        let bytes = physical.bytes;
        let memory = match &physical.backing {
            Backing::Mappable(memory, _) => *memory,
            Backing::Plain(plain) if plain.device.raw() == device.raw() => {
                let (device, ptr) = (device.clone(), plain.ptr);
                return Ok(Self { device, ptr, reserved: None, physical });
            }
            Backing::Plain(_) => {
                return Err(CudaError::Unsupported { what: "plain memory of another device" });
            }
        };
        let _bound = device.bound()?;
        let driver = device.driver();
        // SAFETY: the context is current; each range is the one that was just made.
        unsafe {
            let ptr = driver.address_reserve(bytes)?;
            let reserved = Reserved { device: device.clone(), ptr, bytes };
            driver.map(ptr, bytes, memory)?;
            let mapped = Self { device: device.clone(), ptr, reserved: Some(reserved), physical };
            driver.set_access(ptr, bytes, device.raw())?;
            Ok(mapped)
        }
    }

    /// Its first byte.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.physical.bytes
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
        let _bound = self.device.bound()?;
        // SAFETY: an address that is mapped.
        unsafe { self.device.driver().rdma_capable(self.ptr) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let Some(Reserved { ptr, bytes, .. }) = &self.reserved else { return };
        let driver = self.device.driver();
        // SAFETY: mapped by `new`, all of it. That no work uses it is up to the owner; the driver survives it.
        let _ = self.device.bound().and_then(|_bound| unsafe { driver.unmap(*ptr, *bytes) });
    }
}

/// Memory of the plain allocator.
#[derive(Debug)]
struct Plain {
    device: Device,
    ptr: DevicePtr,
    opened: bool,
}

impl Plain {
    fn new(device: &Device, bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current.
        let ptr = unsafe { device.driver().alloc(bytes.max(1)) }?;
        Ok(Self { device: device.clone(), ptr, opened: false })
    }

    fn open(device: &Device, handle: [u8; 64], bytes: u64) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current; the driver checks the handle.
        let ptr = unsafe { device.driver().ipc_open(handle) }?;
        let plain = Self { device: device.clone(), ptr, opened: true };
        // Nothing is mapped here, where the driver would find that there is less than was said.
        // SAFETY: it was just opened.
        let there = unsafe { device.driver().allocation_bytes(ptr) }?;
        if there < bytes {
            return Err(CudaError::OutOfBounds { offset: 0, len: bytes, bytes: there });
        }
        Ok(plain)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let driver = self.device.driver();
        // SAFETY: allocated or opened by this object, and given back once.
        let _ = self.device.bound().and_then(|_bound| unsafe {
            if self.opened { driver.ipc_close(self.ptr) } else { driver.free(self.ptr) }
        });
    }
}

/// Plain device memory, not shared. Dropping it may wait for all work of the device; **work of other streams
/// that uses it should be done by then.**
#[derive(Debug)]
pub struct Buffer {
    plain: Plain,
    bytes: u64,
}

impl Buffer {
    pub(super) fn new(device: &Device, bytes: u64) -> Result<Self> {
        Ok(Self { plain: Plain::new(device, bytes)?, bytes })
    }

    /// Its first byte.
    pub fn ptr(&self) -> DevicePtr {
        self.plain.ptr
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
