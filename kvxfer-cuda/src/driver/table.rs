//! The entry points of the library, by name.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::mem;

use cudarc::driver::sys;

use super::error::{CudaError, Result};
use super::handles::*;

/// An entry point and its name.
#[derive(Debug)]
pub(super) struct Entry<F> {
    pub(super) name: &'static str,
    pub(super) call: F,
}

/// An entry point of a type that is not known yet.
pub(super) type Untyped = unsafe extern "C" fn() -> c_int;

macro_rules! table {
    (
        required { $($field:ident: $symbol:ident($($arg:ty),*);)* }
        optional { $($maybe:ident: $new:ident($($new_arg:ty),*);)* }
    ) => {
        /// The entry points.
        #[derive(Debug)]
        pub(super) struct Table {
            $(pub(super) $field: Entry<unsafe extern "C" fn($($arg),*) -> c_int>,)*
            $(pub(super) $maybe: Option<Entry<unsafe extern "C" fn($($new_arg),*) -> c_int>>,)*
        }

        impl Table {
            /// # Safety
            /// `find` gives for each name what the driver has under it, and that stays loaded.
            pub(super) unsafe fn load(find: impl Fn(&'static str) -> Option<Untyped>) -> Result<Self> {
                Ok(Self {
                    $($field: {
                        let name = stringify!($symbol);
                        let call = find(name).ok_or(CudaError::MissingSymbol { symbol: name })?;
                        // SAFETY: the driver's header declares that name with these types.
                        Entry { name, call: unsafe { mem::transmute::<Untyped, unsafe extern "C" fn($($arg),*) -> c_int>(call) } }
                    },)*
                    $($maybe: {
                        let name = stringify!($new);
                        // SAFETY: as above.
                        find(name).map(|call| Entry { name, call: unsafe { mem::transmute::<Untyped, unsafe extern "C" fn($($new_arg),*) -> c_int>(call) } })
                    },)*
                })
            }
        }
    };
}

table! {
    required {
        init: cuInit(c_uint);
        version: cuDriverGetVersion(*mut c_int);
        device_count: cuDeviceGetCount(*mut c_int);
        device: cuDeviceGet(*mut RawDevice, c_int);
        device_name: cuDeviceGetName(*mut c_char, c_int, RawDevice);
        device_uuid: cuDeviceGetUuid_v2(*mut [u8; 16], RawDevice);
        device_attribute: cuDeviceGetAttribute(*mut c_int, c_int, RawDevice);
        total_memory: cuDeviceTotalMem_v2(*mut usize, RawDevice);
        can_access_peer: cuDeviceCanAccessPeer(*mut c_int, RawDevice, RawDevice);
        p2p_attribute: cuDeviceGetP2PAttribute(*mut c_int, c_int, RawDevice, RawDevice);
        context_retain: cuDevicePrimaryCtxRetain(*mut RawContext, RawDevice);
        context_release: cuDevicePrimaryCtxRelease_v2(RawDevice);
        context_current: cuCtxGetCurrent(*mut RawContext);
        context_set: cuCtxSetCurrent(RawContext);
        priority_range: cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
        capture_mode: cuThreadExchangeStreamCaptureMode(*mut c_int);
        memory_info: cuMemGetInfo_v2(*mut usize, *mut usize);
        memory_granularity: cuMemGetAllocationGranularity(*mut usize, *const sys::CUmemAllocationProp, c_int);
        memory_create: cuMemCreate(*mut RawMemory, usize, *const sys::CUmemAllocationProp, c_ulonglong);
        memory_release: cuMemRelease(RawMemory);
        memory_export: cuMemExportToShareableHandle(*mut c_void, RawMemory, c_int, c_ulonglong);
        memory_import: cuMemImportFromShareableHandle(*mut RawMemory, *mut c_void, c_int);
        address_reserve: cuMemAddressReserve(*mut DevicePtr, usize, usize, DevicePtr, c_ulonglong);
        address_free: cuMemAddressFree(DevicePtr, usize);
        map: cuMemMap(DevicePtr, usize, usize, RawMemory, c_ulonglong);
        unmap: cuMemUnmap(DevicePtr, usize);
        set_access: cuMemSetAccess(DevicePtr, usize, *const sys::CUmemAccessDesc, usize);
        pointer_attribute: cuPointerGetAttribute(*mut c_void, c_int, DevicePtr);
        alloc: cuMemAlloc_v2(*mut DevicePtr, usize);
        free: cuMemFree_v2(DevicePtr);
        ipc_handle: cuIpcGetMemHandle(*mut sys::CUipcMemHandle, DevicePtr);
        ipc_open: cuIpcOpenMemHandle_v2(*mut DevicePtr, sys::CUipcMemHandle, c_uint);
        ipc_close: cuIpcCloseMemHandle(DevicePtr);
        address_range: cuMemGetAddressRange_v2(*mut DevicePtr, *mut usize, DevicePtr);
        host_alloc: cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        host_free: cuMemFreeHost(*mut c_void);
        stream_create: cuStreamCreateWithPriority(*mut RawStream, c_uint, c_int);
        stream_destroy: cuStreamDestroy_v2(RawStream);
        stream_query: cuStreamQuery(RawStream);
        stream_synchronize: cuStreamSynchronize(RawStream);
        stream_wait: cuStreamWaitEvent(RawStream, RawEvent, c_uint);
        stream_is_capturing: cuStreamIsCapturing(RawStream, *mut c_int);
        event_create: cuEventCreate(*mut RawEvent, c_uint);
        event_destroy: cuEventDestroy_v2(RawEvent);
        event_record: cuEventRecord(RawEvent, RawStream);
        event_query: cuEventQuery(RawEvent);
        event_synchronize: cuEventSynchronize(RawEvent);
        copy: cuMemcpyAsync(DevicePtr, DevicePtr, usize, RawStream);
        upload: cuMemcpyHtoDAsync_v2(DevicePtr, *const c_void, usize, RawStream);
        download: cuMemcpyDtoHAsync_v2(*mut c_void, DevicePtr, usize, RawStream);
        fill: cuMemsetD8Async(DevicePtr, u8, usize, RawStream);
        module_load: cuModuleLoadData(*mut RawModule, *const c_void);
        module_unload: cuModuleUnload(RawModule);
        module_function: cuModuleGetFunction(*mut RawFunction, RawModule, *const c_char);
        launch: cuLaunchKernel(RawFunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, RawStream, *mut *mut u64, *mut *mut c_void);
    }
    optional {
        // 13.0 and newer.
        copy_batch_v2: cuMemcpyBatchAsync_v2(*mut DevicePtr, *mut DevicePtr, *mut usize, usize, *mut sys::CUmemcpyAttributes, *mut usize, usize, RawStream);
        // 12.8 and newer; tells where it failed.
        copy_batch_v1: cuMemcpyBatchAsync(*mut DevicePtr, *mut DevicePtr, *mut usize, usize, *mut sys::CUmemcpyAttributes, *mut usize, usize, *mut usize, RawStream);
        hold: cuStreamWaitValue32_v2(RawStream, DevicePtr, u32, c_uint);
        capture_begin: cuStreamBeginCapture_v2(RawStream, c_int);
        capture_end: cuStreamEndCapture(RawStream, *mut *mut c_void);
        graph_destroy: cuGraphDestroy(*mut c_void);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn nothing() -> c_int {
        0
    }

    /// A library that lacks these.
    fn without(missing: &[&str]) -> Result<Table> {
        let find = |name| (!missing.contains(&name)).then_some(nothing as Untyped);
        // SAFETY: nothing is called.
        unsafe { Table::load(find) }
    }

    #[test]
    fn a_missing_entry_point_is_named() {
        for symbol in ["cuInit", "cuMemCreate", "cuLaunchKernel"] {
            assert_eq!(without(&[symbol]).unwrap_err(), CudaError::MissingSymbol { symbol });
        }
        let first = without(&["cuLaunchKernel", "cuMemMap"]).unwrap_err();
        assert_eq!(first, CudaError::MissingSymbol { symbol: "cuMemMap" });
    }

    #[test]
    fn newer_entry_points_may_be_missing() {
        let all = without(&[]).unwrap();
        assert!(all.copy_batch_v2.is_some() && all.copy_batch_v1.is_some() && all.hold.is_some());
        let old = without(&["cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync"]).unwrap();
        assert!(old.copy_batch_v2.is_none() && old.copy_batch_v1.is_none() && old.hold.is_some());
    }
}
