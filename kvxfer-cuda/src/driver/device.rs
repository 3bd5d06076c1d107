//! One GPU, in use.

use std::ffi::CStr;
use std::fmt;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::error::Result;
use super::handles::RawContext;
use super::{
    Buffer, Event, Handle, HandleKind, Mapped, Module, Physical, Pinned, Priority, Shared, Sharing,
    Stream, Visible,
};

/// A GPU and its primary context, which is the one that torch uses. The context is kept until the last
/// clone, and the last object that was made of it, is dropped.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    visible: Visible,
    context: RawContext,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: retained by `Device::open`, and all that was made in it is gone. Without an answer that anyone
        // could use.
        let _ = unsafe { self.visible.driver().context_release(self.visible.raw()) };
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {:?}, {})", self.ordinal(), self.name(), self.uuid())
    }
}

/// What can be asked without the context.
impl Deref for Device {
    type Target = Visible;

    fn deref(&self) -> &Visible {
        &self.0.visible
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
            let _ = unsafe { self.device.driver().context_set(former) };
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
        let visible = Visible::open(driver, ordinal)?;
        // SAFETY: the handle is the driver's.
        let context = unsafe { visible.driver().context_retain(visible.raw())? };
        Ok(Self(Arc::new(Inner { visible, context })))
    }

    /// Makes the context current on this thread, for a while.
    pub(super) fn bound(&self) -> Result<Bound<'_>> {
        // SAFETY: the context is retained.
        let former = unsafe {
            let current = self.driver().context_current()?;
            if current == self.0.context {
                None
            } else {
                self.driver().context_set(self.0.context)?;
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
            self.driver().context_set(self.0.context)?;
            self.driver().capture_apart()
        }
    }

    /// Bytes (free, in all). What other processes hold, and memory that only an importer keeps alive, is not
    /// free.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let _bound = self.bound()?;
        // SAFETY: the context is current.
        unsafe { self.driver().memory_info() }
    }

    /// Physical memory comes in multiples of that many bytes.
    ///
    /// # Errors
    /// The driver's.
    pub fn granularity(&self) -> Result<u64> {
        // SAFETY: the handle is the driver's.
        unsafe { self.driver().memory_granularity(self.raw(), HandleKind::PosixFd) }
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
    /// As [`Device::import`]; a legacy handle of this very process, or of less memory than was said, is refused too.
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

    #[test]
    fn without_a_library_everything_is_the_same_error() {
        let Err(error) = cuda() else { return };
        assert!(matches!(error, CudaError::NoLibrary { .. } | CudaError::NoDevice), "{error}");
        assert_eq!(cuda().unwrap_err(), error);
        assert_eq!(super::super::device_count(), Err(error));
    }
}
