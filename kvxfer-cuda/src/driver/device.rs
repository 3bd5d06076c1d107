//! One GPU.

use std::ffi::CStr;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::Arc;

use super::error::Result;
use super::handles::{RawContext, RawDevice};
use super::{
    Attribute, Buffer, Event, Handle, HandleKind, Mapped, Module, Physical, Pinned, Priority,
    Shared, Sharing, Stream,
};

/// The name of a GPU, or of a MIG slice, that all processes of all containers agree on. Ordinals are each
/// process's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// How one device reaches another one's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerLink {
    /// It is the same device.
    Same,
    /// NVLink: native atomics work across it.
    NvLink,
    /// PCIe, peer to peer.
    Pcie,
    /// Not at all.
    None {
        /// Why not.
        why: &'static str,
        /// What to do about it.
        fix: &'static str,
    },
}

impl fmt::Display for PeerLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Same => "same GPU",
            Self::NvLink => "NVLink",
            Self::Pcie => "PCIe",
            Self::None { why, .. } => why,
        })
    }
}

/// A GPU and its primary context, which is the one that torch uses. The context is kept until the last
/// clone, and the last object that was made of it, is dropped.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    driver: Shared,
    raw: RawDevice,
    ordinal: u32,
    uuid: Uuid,
    name: String,
    context: RawContext,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained by `Device::open`, and all that was made in it is gone. Without an answer that anyone
        // could use.
        let _ = unsafe { self.driver.context_release(self.raw) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {:?}, {})", self.0.ordinal, self.0.name, self.0.uuid)
    }
}

/// The device's context is current on this thread as long as it lives; then it is again what it was.
pub(super) struct Bound<'a> {
    device: &'a Device,
    former: Option<RawContext>,
}

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        if let Some(former) = self.former {
            // SAFETY: it was current on this thread, so it is a context or none at all. If it has been destroyed
            // since, the next call of whoever destroyed it says so.
            let _ = unsafe { self.device.0.driver.context_set(former) };
        }
    }
}

impl Device {
    /// How many devices this process sees.
    ///
    /// # Errors
    /// The driver's.
    pub fn count(driver: &Shared) -> Result<u32> {
        // SAFETY: needs nothing.
        unsafe { driver.device_count() }
    }

    /// The device with that number in this process. Retains its primary context, creating it if nobody did.
    ///
    /// # Errors
    /// The driver's: there is no such device, or no memory for a context.
    pub fn open(driver: Shared, ordinal: u32) -> Result<Self> {
        // SAFETY: `raw` comes from the first call.
        let (raw, uuid, name, context) = unsafe {
            let raw = driver.device(ordinal)?;
            let (uuid, name) = (Uuid(driver.device_uuid(raw)?), driver.device_name(raw)?);
            (raw, uuid, name, driver.context_retain(raw)?)
        };
        Ok(Self(Arc::new(Inner { driver, raw, ordinal, uuid, name, context })))
    }

    /// The handle of the device with that name, if this process sees it.
    fn lookup(driver: &Shared, uuid: Uuid) -> Result<Option<RawDevice>> {
        for ordinal in 0..Self::count(driver)? {
            // SAFETY: the handle comes from the driver.
            let (raw, found) = unsafe {
                let raw = driver.device(ordinal)?;
                (raw, driver.device_uuid(raw)?)
            };
            if found == uuid.0 {
                return Ok(Some(raw));
            }
        }
        Ok(None)
    }

    pub(super) fn driver(&self) -> &Shared {
        &self.0.driver
    }

    pub(super) fn raw(&self) -> RawDevice {
        self.0.raw
    }

    /// Makes the context current on this thread, for a while.
    pub(super) fn bound(&self) -> Result<Bound<'_>> {
        // SAFETY: the context is retained.
        let former = unsafe {
            let current = self.0.driver.context_current()?;
            if current == self.0.context {
                None
            } else {
                self.0.driver.context_set(self.0.context)?;
                Some(current)
            }
        };
        Ok(Bound { device: self, former })
    }

    /// Makes this thread one of this device: its context stays current here, and what the thread does never
    /// invalidates a graph that another thread captures meanwhile. For threads of ours only.
    ///
    /// # Errors
    /// The driver's.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained, for as long as the thread's owner keeps the device.
        unsafe {
            self.0.driver.context_set(self.0.context)?;
            self.0.driver.capture_apart()
        }
    }

    /// Its number in this process.
    pub fn ordinal(&self) -> u32 {
        self.0.ordinal
    }

    /// Its name everywhere.
    pub fn uuid(&self) -> Uuid {
        self.0.uuid
    }

    /// The product.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Whether it is a slice of a GPU, which can't share memory with other processes' slices.
    pub fn is_mig(&self) -> bool {
        self.0.name.contains("MIG")
    }

    /// Whether an MPS server works for this process: then a client's death doesn't end its work. Drivers before CUDA
    /// 12.4 don't tell; then what the environment tells has to do.
    pub fn under_mps(&self) -> bool {
        self.attribute(Attribute::Mps).map_or_else(
            |_| {
                std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").is_some()
                    || Path::new("/tmp/nvidia-mps").exists()
            },
            |value| value != 0,
        )
    }

    /// The CUDA version of the driver: 12080 is 12.8.
    ///
    /// # Errors
    /// The driver's.
    pub fn driver_version(&self) -> Result<i32> {
        // SAFETY: needs nothing.
        unsafe { self.0.driver.version() }
    }

    fn attribute(&self, attribute: Attribute) -> Result<i32> {
        // SAFETY: the handle is the driver's.
        unsafe { self.0.driver.device_attribute(self.0.raw, attribute) }
    }

    /// Its multiprocessors.
    ///
    /// # Errors
    /// The driver's.
    pub fn multiprocessors(&self) -> Result<u32> {
        Ok(u32::try_from(self.attribute(Attribute::Multiprocessors)?).unwrap_or(1))
    }

    /// Bytes (free, in all). What other processes hold, and memory that only an importer keeps alive, is not
    /// free.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let _bound = self.bound()?;
        // SAFETY: the context is current.
        unsafe { self.0.driver.memory_info() }
    }

    /// How this device reaches the memory of the one with that name. Retains no context there.
    ///
    /// # Errors
    /// The driver's.
    pub fn link_to(&self, other: Uuid) -> Result<PeerLink> {
        if self.is_mig() {
            return Ok(PeerLink::None {
                why: "it is a MIG slice, which shares no memory with other processes",
                fix: "give kvxfer whole GPUs, or set kv_buffer_device to cpu",
            });
        }
        if self.0.uuid == other {
            return Ok(PeerLink::Same);
        }
        let Some(peer) = Self::lookup(&self.0.driver, other)? else {
            return Ok(PeerLink::None {
                why: "that GPU is not visible to this process",
                fix: "let both containers see both GPUs (--gpus all), and choose with \
                      CUDA_VISIBLE_DEVICES",
            });
        };
        // SAFETY: both handles are the driver's.
        unsafe {
            if !self.0.driver.can_access_peer(self.0.raw, peer)? {
                return Ok(PeerLink::None {
                    why: "the driver allows no peer access between the two",
                    fix: "choose GPUs that nvidia-smi topo -p2p w shows as OK, or set \
                          kv_buffer_device to cpu",
                });
            }
            let nvlink = self.0.driver.native_peer_atomics(self.0.raw, peer)?;
            Ok(if nvlink { PeerLink::NvLink } else { PeerLink::Pcie })
        }
    }

    /// Physical memory comes in multiples of that many bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn granularity(&self) -> Result<u64> {
        // SAFETY: the handle is the driver's.
        unsafe { self.0.driver.memory_granularity(self.0.raw, HandleKind::PosixFd) }
    }

    /// Whether its memory can be shared as a file descriptor. What the driver doesn't know, it can't do.
    pub fn supports_posix_fd(&self) -> bool {
        self.attribute(Attribute::PosixFd).is_ok_and(|value| value != 0)
    }

    /// Whether its memory can be shared between hosts. What the driver doesn't know, it can't do.
    pub fn supports_fabric(&self) -> bool {
        self.attribute(Attribute::Fabric).is_ok_and(|value| value != 0)
    }

    /// Whether mapped memory may be asked to be reachable by a network card.
    pub(super) fn supports_rdma(&self) -> bool {
        self.attribute(Attribute::RdmaMapped).is_ok_and(|value| value != 0)
    }

    /// A new stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn stream(&self, priority: Priority) -> Result<Stream> {
        Stream::new(self, priority)
    }

    /// A new event, which counts as done until it is recorded.
    ///
    /// # Errors
    /// The driver's.
    pub fn event(&self) -> Result<Event> {
        Event::new(self)
    }

    /// Physical memory of this device, not mapped yet; `bytes` are rounded up to the granularity.
    ///
    /// # Errors
    /// The driver's; see [`CudaError::is_out_of_memory`](super::CudaError::is_out_of_memory).
    pub fn allocate(&self, bytes: u64) -> Result<Physical> {
        self.allocate_as(Sharing::PosixFd, bytes)
    }

    /// The same, to be shared in another way.
    ///
    /// # Errors
    /// As [`Device::allocate`]; also when the device, or its host, can't share in that way.
    pub fn allocate_as(&self, sharing: Sharing, bytes: u64) -> Result<Physical> {
        Physical::allocate(self, sharing, bytes)
    }

    /// Physical memory that another process exported, of whichever device of this host. The descriptor can
    /// be closed afterwards. `bytes` is what the other side says it has; that it is less shows when it is mapped.
    ///
    /// # Errors
    /// The driver's: it is no such memory, or its device is hidden from this process.
    pub fn import(&self, fd: BorrowedFd<'_>, bytes: u64) -> Result<Physical> {
        Physical::import(self, fd, bytes)
    }

    /// The same by any handle; what it is, is the other side's word.
    ///
    /// # Errors
    /// As [`Device::import`]; a legacy handle of this very process is refused too.
    pub fn import_handle(&self, handle: &Handle, bytes: u64) -> Result<Physical> {
        Physical::import_handle(self, handle, bytes)
    }

    /// Maps physical memory for this device, which may be another one than where the memory lies.
    ///
    /// # Errors
    /// The driver's: the memory has fewer bytes than were said, or this device can't reach where it lies.
    pub fn map(&self, physical: Arc<Physical>) -> Result<Mapped> {
        Mapped::new(self, physical)
    }

    /// Plain device memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn buffer(&self, bytes: u64) -> Result<Buffer> {
        Buffer::new(self, bytes)
    }

    /// Host memory that the device reads and writes by itself.
    ///
    /// # Errors
    /// The driver's.
    pub fn pinned(&self, bytes: u64) -> Result<Arc<Pinned>> {
        Pinned::new(self, bytes)
    }

    /// Compiles and loads PTX.
    ///
    /// # Errors
    /// The driver's: it is too old for that PTX, for one.
    pub fn module(&self, ptx: &CStr) -> Result<Module> {
        Module::new(self, ptx)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CudaError, cuda};
    use super::*;

    #[test]
    fn a_uuid_prints_as_nvidia_smi_prints_it() {
        let uuid = Uuid(std::array::from_fn(|at| at as u8 * 17));
        assert_eq!(uuid.to_string(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn without_a_library_everything_is_the_same_error() {
        let Err(error) = cuda() else { return };
        assert!(matches!(error, CudaError::NoLibrary { .. } | CudaError::NoDevice), "{error}");
        assert_eq!(cuda().unwrap_err(), error);
        assert_eq!(super::super::device_count(), Err(error));
    }
}
