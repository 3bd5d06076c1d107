//! [`Driver`] over `libcuda`.
//!
//! The library is cudarc's to find and to open, and so are the types of structures. Its functions are not
//! used: they panic when the library or an entry point is missing, and give an enum back, which a code
//! of a newer driver would make undefined behaviour. So the entry points are looked up here, by their
//! versioned names, and answer integers.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;
use rustix::io::{FdFlags, fcntl_setfd};

use super::error::{CudaError, Result, code};
use super::handles::*;
use super::table::{Table, Untyped};
use super::{Attribute, Driver};
use crate::planted::{Bug, planted};

/// The driver of this machine, initialised. What the first call found, driver or error, is the answer to all.
///
/// # Errors
/// `NoLibrary`; `NoDevice`; `MissingSymbol` when the driver is too old; `Failed` when it doesn't start.
pub fn cuda() -> Result<Arc<dyn Driver>> {
    static CUDA: OnceLock<Result<Arc<dyn Driver>>> = OnceLock::new();
    CUDA.get_or_init(|| {
        let cuda = Cuda::open()?;
        // SAFETY: the first call is this one.
        unsafe { cuda.init() }.map_err(|error| match error.code() {
            Some(code::NO_DEVICE) => CudaError::NoDevice,
            Some(code::STUB_LIBRARY) => CudaError::NoLibrary {
                why: "the libcuda.so that was found is the toolkit's stub; the driver's has to come first",
            },
            _ => error,
        })?;
        Ok(Arc::new(cuda))
    })
    .clone()
}

/// The library's entry points. They stay: cudarc never closes it.
#[derive(Debug)]
struct Cuda {
    table: Table,
}

impl Cuda {
    fn open() -> Result<Self> {
        // SAFETY: opening the driver runs its constructors, which it is made for.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoLibrary { why: "libcuda.so.1 can't be opened" });
        }
        // SAFETY: as above.
        let library = unsafe { sys::culib() };
        let find = |name: &'static str| {
            // SAFETY: a function's address; it is given its type by the table.
            unsafe { library.get::<Untyped>(name.as_bytes()) }.ok().map(|symbol| *symbol)
        };
        // SAFETY: it is the driver's library, and it is never closed.
        Ok(Self { table: unsafe { Table::load(find) }? })
    }
}

fn check(call: &'static str, answer: c_int) -> Result<()> {
    match answer {
        0 => Ok(()),
        code::CAPTURE_UNSUPPORTED | code::CAPTURE_ISOLATION | code::CAPTURE_IMPLICIT => {
            Err(CudaError::Capturing)
        }
        code => Err(CudaError::Failed { call, code }),
    }
}

fn ready(call: &'static str, answer: c_int) -> Result<bool> {
    match answer {
        code::NOT_READY => Ok(false),
        other => check(call, other).map(|()| true),
    }
}

/// The answer of one entry point, with its name.
macro_rules! answer {
    ($entry:expr, $($arg:expr),*) => {{
        let entry = &$entry;
        // SAFETY: what the trait asks of whoever calls; what is passed by address is a local that outlives the call.
        (entry.name, unsafe { (entry.call)($($arg),*) })
    }};
}

macro_rules! call {
    ($entry:expr $(, $arg:expr)* $(,)?) => {{
        let (name, answer) = answer!($entry, $($arg),*);
        check(name, answer)
    }};
}

/// Non-blocking against the legacy default stream: an engine's work there never waits for ours.
const STREAM_NON_BLOCKING: c_uint = 1;
/// Whoever waits sleeps; no time is taken.
const EVENT_BLOCKING_SYNC_DISABLE_TIMING: c_uint = 1 | 2;
/// Pinned for all contexts.
const HOST_PORTABLE: c_uint = 1;
const IPC_LAZY_PEER_ACCESS: c_uint = 1;
const CAPTURE_GLOBAL: c_int = 0;
const CAPTURE_RELAXED: c_int = 2;
const P2P_PERFORMANCE_RANK: c_int = 1;
const P2P_NATIVE_ATOMICS: c_int = 3;
const POINTER_RDMA_CAPABLE: c_int = 15;
const GRANULARITY_RECOMMENDED: c_int = 1;
const POSIX_FD: c_int = HandleKind::PosixFd as c_int;
const FABRIC: c_int = HandleKind::Fabric as c_int;
const WAIT_GEQ: c_uint = 0;

/// Physical memory of that device, to be shared in that way.
fn properties(device: RawDevice, kind: HandleKind, rdma: bool) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: sys::CUmemAllocationHandleType_enum(kind as c_uint),
        location: location(device),
        win32HandleMetaData: ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: u8::from(rdma),
            usage: 0,
            reserved: [0; 4],
        },
    }
}

fn location(device: RawDevice) -> sys::CUmemLocation {
    sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE, id: device.0 }
}

/// Sizes of device memory fit: CUDA runs on 64-bit hosts only.
fn size(bytes: u64) -> usize {
    bytes as usize
}

// SAFETY: the handles are the driver's own.
unsafe impl Driver for Cuda {
    unsafe fn init(&self) -> Result<()> {
        call!(self.table.init, 0)
    }

    unsafe fn version(&self) -> Result<i32> {
        let mut version = 0;
        call!(self.table.version, &raw mut version)?;
        Ok(version)
    }

    unsafe fn device_count(&self) -> Result<u32> {
        let mut count = 0;
        call!(self.table.device_count, &raw mut count)?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    unsafe fn device(&self, ordinal: u32) -> Result<RawDevice> {
        let mut device = RawDevice(0);
        let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        call!(self.table.device, &raw mut device, ordinal)?;
        Ok(device)
    }

    unsafe fn device_name(&self, device: RawDevice) -> Result<String> {
        let mut name = [0_u8; 256];
        // One byte less than there is, so that it ends in any case.
        let len = name.len() as c_int - 1;
        call!(self.table.device_name, name.as_mut_ptr().cast(), len, device)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    unsafe fn device_uuid(&self, device: RawDevice) -> Result<[u8; 16]> {
        let mut uuid = [0; 16];
        call!(self.table.device_uuid, &raw mut uuid, device)?;
        Ok(uuid)
    }

    unsafe fn device_attribute(&self, device: RawDevice, attribute: Attribute) -> Result<i32> {
        let mut value = 0;
        call!(self.table.device_attribute, &raw mut value, attribute as c_int, device)?;
        Ok(value)
    }

    unsafe fn can_access_peer(&self, device: RawDevice, peer: RawDevice) -> Result<bool> {
        let mut can = 0;
        call!(self.table.can_access_peer, &raw mut can, device, peer)?;
        Ok(can != 0)
    }

    unsafe fn native_peer_atomics(&self, device: RawDevice, peer: RawDevice) -> Result<bool> {
        let mut can = 0;
        call!(self.table.p2p_attribute, &raw mut can, P2P_NATIVE_ATOMICS, device, peer)?;
        Ok(can != 0)
    }

    unsafe fn peer_rank(&self, device: RawDevice, peer: RawDevice) -> Result<i32> {
        let mut rank = 0;
        call!(self.table.p2p_attribute, &raw mut rank, P2P_PERFORMANCE_RANK, device, peer)?;
        Ok(rank)
    }

    unsafe fn total_memory(&self, device: RawDevice) -> Result<u64> {
        let mut bytes = 0_usize;
        call!(self.table.total_memory, &raw mut bytes, device)?;
        Ok(bytes as u64)
    }

    unsafe fn context_retain(&self, device: RawDevice) -> Result<RawContext> {
        let mut context = RawContext::NULL;
        call!(self.table.context_retain, &raw mut context, device)?;
        Ok(context)
    }

    unsafe fn context_release(&self, device: RawDevice) -> Result<()> {
        call!(self.table.context_release, device)
    }

    unsafe fn context_current(&self) -> Result<RawContext> {
        let mut context = RawContext::NULL;
        call!(self.table.context_current, &raw mut context)?;
        Ok(context)
    }

    unsafe fn context_set(&self, context: RawContext) -> Result<()> {
        call!(self.table.context_set, context)
    }

    unsafe fn capture_apart(&self) -> Result<()> {
        let mut mode = CAPTURE_RELAXED;
        call!(self.table.capture_mode, &raw mut mode)
    }

    unsafe fn memory_info(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        call!(self.table.memory_info, &raw mut free, &raw mut total)?;
        Ok((free as u64, total as u64))
    }

    unsafe fn memory_granularity(&self, device: RawDevice, kind: HandleKind) -> Result<u64> {
        let (mut bytes, wanted) = (0, properties(device, kind, false));
        call!(
            self.table.memory_granularity,
            &raw mut bytes,
            &raw const wanted,
            GRANULARITY_RECOMMENDED
        )?;
        Ok(bytes as u64)
    }

    unsafe fn memory_create(
        &self,
        device: RawDevice,
        bytes: u64,
        kind: HandleKind,
        rdma: bool,
    ) -> Result<RawMemory> {
        let (mut memory, wanted) = (RawMemory(0), properties(device, kind, rdma));
        call!(self.table.memory_create, &raw mut memory, size(bytes), &raw const wanted, 0)?;
        Ok(memory)
    }

    unsafe fn memory_release(&self, memory: RawMemory) -> Result<()> {
        call!(self.table.memory_release, memory)
    }

    unsafe fn memory_export(&self, memory: RawMemory) -> Result<OwnedFd> {
        let mut fd: c_int = -1;
        call!(self.table.memory_export, (&raw mut fd).cast(), memory, POSIX_FD, 0)?;
        if fd < 0 {
            return Err(CudaError::Failed {
                call: self.table.memory_export.name,
                code: code::INVALID_VALUE,
            });
        }
        // SAFETY: the driver made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // It would keep the memory alive in each process that is started from now on. Fails only on what
        // is no descriptor.
        let _ = fcntl_setfd(&fd, FdFlags::CLOEXEC);
        Ok(fd)
    }

    unsafe fn memory_import(&self, fd: BorrowedFd<'_>) -> Result<RawMemory> {
        let mut memory = RawMemory(0);
        let fd = ptr::without_provenance_mut(fd.as_raw_fd() as usize);
        call!(self.table.memory_import, &raw mut memory, fd, POSIX_FD)?;
        Ok(memory)
    }

    unsafe fn fabric_export(&self, memory: RawMemory) -> Result<[u8; 64]> {
        let mut handle = [0_u8; 64];
        call!(self.table.memory_export, (&raw mut handle).cast(), memory, FABRIC, 0)?;
        Ok(handle)
    }

    unsafe fn fabric_import(&self, mut handle: [u8; 64]) -> Result<RawMemory> {
        let mut memory = RawMemory(0);
        call!(self.table.memory_import, &raw mut memory, (&raw mut handle).cast(), FABRIC)?;
        Ok(memory)
    }

    unsafe fn address_reserve(&self, bytes: u64) -> Result<DevicePtr> {
        let mut ptr = null();
        call!(self.table.address_reserve, &raw mut ptr, size(bytes), 0, null(), 0)?;
        Ok(ptr)
    }

    unsafe fn address_free(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        call!(self.table.address_free, ptr, size(bytes))
    }

    unsafe fn map(&self, ptr: DevicePtr, bytes: u64, memory: RawMemory) -> Result<()> {
        call!(self.table.map, ptr, size(bytes), 0, memory, 0)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        call!(self.table.unmap, ptr, size(bytes))
    }

    unsafe fn set_access(&self, ptr: DevicePtr, bytes: u64, device: RawDevice) -> Result<()> {
        let access = sys::CUmemAccessDesc {
            location: location(device),
            flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        call!(self.table.set_access, ptr, size(bytes), &raw const access, 1)
    }

    unsafe fn rdma_capable(&self, ptr: DevicePtr) -> Result<bool> {
        // The driver writes one byte, or one integer: headers and documentation differ.
        let mut value: c_ulonglong = 0;
        call!(self.table.pointer_attribute, (&raw mut value).cast(), POINTER_RDMA_CAPABLE, ptr)?;
        Ok(value != 0)
    }

    unsafe fn alloc(&self, bytes: u64) -> Result<DevicePtr> {
        let mut ptr = null();
        call!(self.table.alloc, &raw mut ptr, size(bytes))?;
        Ok(ptr)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        call!(self.table.free, ptr)
    }

    unsafe fn ipc_handle(&self, ptr: DevicePtr) -> Result<[u8; 64]> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        call!(self.table.ipc_handle, &raw mut handle, ptr)?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    unsafe fn ipc_open(&self, handle: [u8; 64]) -> Result<DevicePtr> {
        let mut ptr = null();
        let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as c_char) };
        call!(self.table.ipc_open, &raw mut ptr, handle, IPC_LAZY_PEER_ACCESS)?;
        Ok(ptr)
    }

    unsafe fn ipc_close(&self, ptr: DevicePtr) -> Result<()> {
        call!(self.table.ipc_close, ptr)
    }

    unsafe fn allocation_bytes(&self, ptr: DevicePtr) -> Result<u64> {
        let (mut start, mut bytes) = (null(), 0);
        call!(self.table.address_range, &raw mut start, &raw mut bytes, ptr)?;
        Ok((start.addr() + bytes as u64).saturating_sub(ptr.addr()))
    }

    unsafe fn host_alloc(&self, bytes: usize) -> Result<*mut u8> {
        let mut ptr = ptr::null_mut();
        call!(self.table.host_alloc, &raw mut ptr, bytes, HOST_PORTABLE)?;
        Ok(ptr.cast())
    }

    unsafe fn host_free(&self, ptr: *mut u8) -> Result<()> {
        call!(self.table.host_free, ptr.cast())
    }

    unsafe fn lowest_priority(&self) -> Result<i32> {
        let (mut lowest, mut highest) = (0, 0);
        call!(self.table.priority_range, &raw mut lowest, &raw mut highest)?;
        Ok(lowest)
    }

    unsafe fn stream_create(&self, priority: i32) -> Result<RawStream> {
        let mut stream = RawStream::NULL;
        call!(self.table.stream_create, &raw mut stream, STREAM_NON_BLOCKING, priority)?;
        Ok(stream)
    }

    unsafe fn stream_destroy(&self, stream: RawStream) -> Result<()> {
        call!(self.table.stream_destroy, stream)
    }

    unsafe fn stream_is_idle(&self, stream: RawStream) -> Result<bool> {
        let (name, answer) = answer!(self.table.stream_query, stream);
        ready(name, answer)
    }

    unsafe fn stream_synchronize(&self, stream: RawStream) -> Result<()> {
        call!(self.table.stream_synchronize, stream)
    }

    unsafe fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        call!(self.table.stream_wait, stream, event, 0)
    }

    unsafe fn stream_hold(&self, stream: RawStream, ptr: DevicePtr, value: u32) -> Result<()> {
        match &self.table.hold {
            Some(hold) => call!(hold, stream, ptr, value, WAIT_GEQ),
            None => Err(CudaError::MissingSymbol { symbol: "cuStreamWaitValue32_v2" }),
        }
    }

    unsafe fn stream_is_capturing(&self, stream: RawStream) -> Result<bool> {
        let mut status = 0;
        match call!(self.table.stream_is_capturing, stream, &raw mut status) {
            // The legacy stream while another one is captured.
            Err(CudaError::Capturing) => Ok(true),
            result => result.map(|()| status != 0),
        }
    }

    unsafe fn capture_begin(&self, stream: RawStream) -> Result<()> {
        match &self.table.capture_begin {
            Some(begin) => call!(begin, stream, CAPTURE_GLOBAL),
            None => Err(CudaError::MissingSymbol { symbol: "cuStreamBeginCapture_v2" }),
        }
    }

    unsafe fn capture_end(&self, stream: RawStream) -> Result<()> {
        let (Some(end), Some(destroy)) = (&self.table.capture_end, &self.table.graph_destroy)
        else {
            return Err(CudaError::MissingSymbol { symbol: "cuStreamEndCapture" });
        };
        let mut graph = ptr::null_mut();
        call!(end, stream, &raw mut graph)?;
        if graph.is_null() { Ok(()) } else { call!(destroy, graph) }
    }

    unsafe fn event_create(&self) -> Result<RawEvent> {
        let mut event = RawEvent::NULL;
        call!(self.table.event_create, &raw mut event, EVENT_BLOCKING_SYNC_DISABLE_TIMING)?;
        Ok(event)
    }

    unsafe fn event_destroy(&self, event: RawEvent) -> Result<()> {
        call!(self.table.event_destroy, event)
    }

    unsafe fn event_record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        call!(self.table.event_record, event, stream)
    }

    unsafe fn event_is_done(&self, event: RawEvent) -> Result<bool> {
        let (name, answer) = answer!(self.table.event_query, event);
        ready(name, answer)
    }

    unsafe fn event_synchronize(&self, event: RawEvent) -> Result<()> {
        call!(self.table.event_synchronize, event)
    }

    unsafe fn copy(&self, copy: Copy, stream: RawStream) -> Result<()> {
        call!(self.table.copy, copy.dst, copy.src, size(copy.len), stream)
    }

    unsafe fn copy_batch(
        &self,
        dsts: &mut [DevicePtr],
        srcs: &mut [DevicePtr],
        sizes: &mut [usize],
        stream: RawStream,
    ) -> Result<()> {
        // In stream order: any other reads the sources at some time that we can't know.
        let nowhere = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let order = if planted(Bug::BatchOutOfOrder) {
            sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_ANY
        } else {
            sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: order,
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: 0,
        };
        // From the first copy on.
        let mut from = 0;
        let (dst, src, size) = (dsts.as_mut_ptr(), srcs.as_mut_ptr(), sizes.as_mut_ptr());
        let count = sizes.len();
        let (attributes, from) = (&raw mut attributes, &raw mut from);
        let result = if let Some(v2) = &self.table.copy_batch_v2 {
            call!(v2, dst, src, size, count, attributes, from, 1, stream)
        } else if let Some(v1) = &self.table.copy_batch_v1 {
            let mut failed = 0;
            call!(v1, dst, src, size, count, attributes, from, 1, &raw mut failed, stream)
        } else {
            Err(CudaError::MissingSymbol { symbol: "cuMemcpyBatchAsync" })
        };
        match result {
            Err(
                CudaError::MissingSymbol { .. }
                | CudaError::Failed { code: code::NOT_SUPPORTED, .. },
            ) => dsts.iter().zip(srcs).zip(sizes).try_for_each(|((dst, src), size)| {
                call!(self.table.copy, *dst, *src, *size, stream)
            }),
            result => result,
        }
    }

    unsafe fn upload(
        &self,
        dst: DevicePtr,
        src: *const u8,
        len: usize,
        stream: RawStream,
    ) -> Result<()> {
        call!(self.table.upload, dst, src.cast(), len, stream)
    }

    unsafe fn download(
        &self,
        dst: *mut u8,
        src: DevicePtr,
        len: usize,
        stream: RawStream,
    ) -> Result<()> {
        call!(self.table.download, dst.cast(), src, len, stream)
    }

    unsafe fn fill(&self, dst: DevicePtr, byte: u8, len: usize, stream: RawStream) -> Result<()> {
        call!(self.table.fill, dst, byte, len, stream)
    }

    unsafe fn module_load(&self, image: &CStr) -> Result<RawModule> {
        let mut module = RawModule::NULL;
        call!(self.table.module_load, &raw mut module, image.as_ptr().cast())?;
        Ok(module)
    }

    unsafe fn module_unload(&self, module: RawModule) -> Result<()> {
        call!(self.table.module_unload, module)
    }

    unsafe fn module_function(&self, module: RawModule, name: &CStr) -> Result<RawFunction> {
        let mut function = RawFunction::NULL;
        call!(self.table.module_function, &raw mut function, module, name.as_ptr())?;
        Ok(function)
    }

    unsafe fn launch(
        &self,
        function: RawFunction,
        grid: u32,
        block: u32,
        stream: RawStream,
        params: &mut [*mut u64],
    ) -> Result<()> {
        call!(
            self.table.launch,
            function,
            grid,
            1,
            1,
            block,
            1,
            1,
            0,
            stream,
            params.as_mut_ptr(),
            ptr::null_mut()
        )
    }
}

/// Where no memory is.
const fn null() -> DevicePtr {
    // SAFETY: it is overwritten, or asks for no particular address.
    unsafe { DevicePtr::from_raw(0) }
}
