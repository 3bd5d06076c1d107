//! The CUDA driver, and the objects that own what it hands out.
//!
//! * [`Driver`]: the calls that we need, raw. [`cuda()`] is the one of this machine: `libcuda.so.1`, opened when it is
//!   first asked for. That it is missing, or shows no device, or lacks an entry point, is an error like any other.
//! * [`Visible`]: a GPU that can be asked about itself, and used by nobody.
//! * [`Device`] and what it makes: [`Stream`], [`Event`], [`Physical`] and [`Mapped`] memory, [`Buffer`], [`Pinned`],
//!   [`Module`]. Each frees what it holds when it is dropped, and keeps the device's context alive until then.
//!
//! All `unsafe` about CUDA is in this module. Two rules hold it together:
//!
//! * A method that needs the device's context makes it current and restores the thread's own afterwards, so
//!   that the engine's threads can call us. A thread of ours calls [`Device::bind`] once; then this costs nothing.
//! * Work is asynchronous, and device memory that it uses is not kept alive by it: whoever queues work
//!   waits for its end before it drops the memory. Host memory and modules are kept by the stream.

mod cuda;
mod device;
mod error;
mod event;
mod handles;
mod memory;
mod module;
mod pinned;
mod stream;
mod table;
mod visible;

use std::ffi::CStr;
use std::fmt::Debug;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

pub use cuda::cuda;
pub use device::Device;
pub use error::{CudaError, Result};
pub use event::{EngineStream, Event};
pub use handles::{
    Copy, DevicePtr, HandleKind, RawContext, RawDevice, RawEvent, RawFunction, RawMemory,
    RawModule, RawStream,
};
pub use memory::{Buffer, Handle, Mapped, Physical, Sharing};
pub use module::{Function, Module};
pub use pinned::Pinned;
pub use stream::{Priority, Stream};
pub use visible::{PeerLink, Uuid, Visible};

/// A number that a device tells about itself: `CUdevice_attribute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Attribute {
    /// Its multiprocessors.
    Multiprocessors = 16,
    /// Its compute capability, the number before the point.
    ComputeMajor = 75,
    /// The number behind it.
    ComputeMinor = 76,
    /// Whether physical memory and addresses can be had apart from each other (VMM).
    VirtualMemory = 102,
    /// Whether memory can be shared as a file descriptor.
    PosixFd = 103,
    /// Whether mapped physical memory can be reached by a network card.
    RdmaMapped = 110,
    /// Whether plain memory can be reached by a network card.
    Rdma = 116,
    /// Whether memory can be given to a network card's driver as a dma-buf.
    DmaBuf = 124,
    /// Whether memory can be shared between hosts of one fabric.
    Fabric = 128,
    /// Whether contexts go through an MPS server.
    Mps = 133,
}

/// The driver's calls, as it offers them. Which entry point each is, and with which flags, is said in `cuda.rs`.
///
/// # Safety
/// Of each call, by whoever makes it: the driver is initialised; each handle came from this driver and is not
/// destroyed yet; the context that a call is about is current on this thread; ranges lie in memory that is
/// allocated and stays so until the work is done, and what is written there is nobody else's to read; a
/// kernel's parameters are as it declares them. Of whoever implements it: a handle that is handed out is good
/// until it is destroyed.
#[expect(missing_docs, reason = "they are the driver's own, and named after them")]
#[expect(clippy::missing_safety_doc, reason = "one contract for all: that of the trait")]
pub unsafe trait Driver: Debug + Send + Sync {
    unsafe fn init(&self) -> Result<()>;
    unsafe fn version(&self) -> Result<i32>;

    unsafe fn device_count(&self) -> Result<u32>;
    unsafe fn device(&self, ordinal: u32) -> Result<RawDevice>;
    unsafe fn device_name(&self, device: RawDevice) -> Result<String>;
    unsafe fn device_uuid(&self, device: RawDevice) -> Result<[u8; 16]>;
    unsafe fn device_attribute(&self, device: RawDevice, attribute: Attribute) -> Result<i32>;
    unsafe fn can_access_peer(&self, device: RawDevice, peer: RawDevice) -> Result<bool>;
    unsafe fn native_peer_atomics(&self, device: RawDevice, peer: RawDevice) -> Result<bool>;
    unsafe fn peer_rank(&self, device: RawDevice, peer: RawDevice) -> Result<i32>;
    unsafe fn total_memory(&self, device: RawDevice) -> Result<u64>;

    unsafe fn context_retain(&self, device: RawDevice) -> Result<RawContext>;
    unsafe fn context_release(&self, device: RawDevice) -> Result<()>;
    unsafe fn context_current(&self) -> Result<RawContext>;
    unsafe fn context_set(&self, context: RawContext) -> Result<()>;
    /// This thread's calls don't invalidate captures of other threads from now on.
    unsafe fn capture_apart(&self) -> Result<()>;

    /// Of the current context: bytes (free, in all).
    unsafe fn memory_info(&self) -> Result<(u64, u64)>;
    unsafe fn memory_granularity(&self, device: RawDevice, kind: HandleKind) -> Result<u64>;
    unsafe fn memory_create(
        &self,
        device: RawDevice,
        bytes: u64,
        kind: HandleKind,
        rdma: bool,
    ) -> Result<RawMemory>;
    unsafe fn memory_release(&self, memory: RawMemory) -> Result<()>;
    unsafe fn memory_export(&self, memory: RawMemory) -> Result<OwnedFd>;
    unsafe fn memory_import(&self, fd: BorrowedFd<'_>) -> Result<RawMemory>;
    unsafe fn fabric_export(&self, memory: RawMemory) -> Result<[u8; 64]>;
    unsafe fn fabric_import(&self, handle: [u8; 64]) -> Result<RawMemory>;
    unsafe fn address_reserve(&self, bytes: u64) -> Result<DevicePtr>;
    unsafe fn address_free(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;
    unsafe fn map(&self, ptr: DevicePtr, bytes: u64, memory: RawMemory) -> Result<()>;
    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;
    unsafe fn set_access(&self, ptr: DevicePtr, bytes: u64, device: RawDevice) -> Result<()>;
    unsafe fn rdma_capable(&self, ptr: DevicePtr) -> Result<bool>;

    unsafe fn alloc(&self, bytes: u64) -> Result<DevicePtr>;
    unsafe fn free(&self, ptr: DevicePtr) -> Result<()>;
    unsafe fn ipc_handle(&self, ptr: DevicePtr) -> Result<[u8; 64]>;
    unsafe fn ipc_open(&self, handle: [u8; 64]) -> Result<DevicePtr>;
    unsafe fn ipc_close(&self, ptr: DevicePtr) -> Result<()>;
    /// From `ptr` to the end of the allocation that it lies in.
    unsafe fn allocation_bytes(&self, ptr: DevicePtr) -> Result<u64>;
    unsafe fn host_alloc(&self, bytes: usize) -> Result<*mut u8>;
    unsafe fn host_free(&self, ptr: *mut u8) -> Result<()>;

    /// The numerically highest, which is the lowest.
    unsafe fn lowest_priority(&self) -> Result<i32>;
    unsafe fn stream_create(&self, priority: i32) -> Result<RawStream>;
    unsafe fn stream_destroy(&self, stream: RawStream) -> Result<()>;
    unsafe fn stream_is_idle(&self, stream: RawStream) -> Result<bool>;
    unsafe fn stream_synchronize(&self, stream: RawStream) -> Result<()>;
    unsafe fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()>;
    /// Until the word at `ptr` is at least `value`.
    unsafe fn stream_hold(&self, stream: RawStream, ptr: DevicePtr, value: u32) -> Result<()>;
    unsafe fn stream_is_capturing(&self, stream: RawStream) -> Result<bool>;
    unsafe fn capture_begin(&self, stream: RawStream) -> Result<()>;
    /// Ends it and throws the graph away.
    unsafe fn capture_end(&self, stream: RawStream) -> Result<()>;

    unsafe fn event_create(&self) -> Result<RawEvent>;
    unsafe fn event_destroy(&self, event: RawEvent) -> Result<()>;
    unsafe fn event_record(&self, event: RawEvent, stream: RawStream) -> Result<()>;
    unsafe fn event_is_done(&self, event: RawEvent) -> Result<bool>;
    unsafe fn event_synchronize(&self, event: RawEvent) -> Result<()>;

    unsafe fn copy(&self, copy: Copy, stream: RawStream) -> Result<()>;
    /// `dsts`, `srcs` and `sizes` are equally long, and not empty; no size is 0.
    unsafe fn copy_batch(
        &self,
        dsts: &mut [DevicePtr],
        srcs: &mut [DevicePtr],
        sizes: &mut [usize],
        stream: RawStream,
    ) -> Result<()>;
    unsafe fn upload(
        &self,
        dst: DevicePtr,
        src: *const u8,
        len: usize,
        stream: RawStream,
    ) -> Result<()>;
    unsafe fn download(
        &self,
        dst: *mut u8,
        src: DevicePtr,
        len: usize,
        stream: RawStream,
    ) -> Result<()>;
    unsafe fn fill(&self, dst: DevicePtr, byte: u8, len: usize, stream: RawStream) -> Result<()>;

    unsafe fn module_load(&self, image: &CStr) -> Result<RawModule>;
    unsafe fn module_unload(&self, module: RawModule) -> Result<()>;
    unsafe fn module_function(&self, module: RawModule, name: &CStr) -> Result<RawFunction>;
    /// `params` points to as many values as the kernel has parameters, or more.
    unsafe fn launch(
        &self,
        function: RawFunction,
        grid: u32,
        block: u32,
        stream: RawStream,
        params: &mut [*mut u64],
    ) -> Result<()>;
}

/// How many devices this process sees. A shorthand for `Device::count(&cuda()?)`.
///
/// # Errors
/// Those of [`cuda()`].
pub fn device_count() -> Result<u32> {
    Device::count(&cuda()?)
}

/// The driver as the objects hold it.
type Shared = Arc<dyn Driver>;
