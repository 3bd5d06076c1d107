//! Memory that UCX may use.

use std::ffi::c_void;
use std::ptr;
use std::slice;
use std::sync::Arc;

use kvxfer_core::transport::RegionId;
use kvxfer_core::{ErrorKind, Result};
use ucx_sys::*;

use super::{Context, RemoteMemory};
use crate::device::DeviceRegions;
use crate::driver::Mapped;
use crate::memory::{Mapping, Regions};

/// Memory of this process, and who keeps it.
#[derive(Clone, Debug)]
pub enum Memory {
    /// A segment in the host's memory.
    Segment(Arc<Mapping>),
    /// What the engine registered.
    Region(Arc<Regions>, RegionId),
    /// A segment on a GPU.
    DeviceSegment(Arc<Mapped>),
    /// What the engine registered on a GPU.
    DeviceRegion(Arc<DeviceRegions>, RegionId),
}

impl Memory {
    /// Address, bytes, and what UCX calls its kind.
    fn range(&self) -> Result<(u64, u64, ucs_memory_type_t)> {
        let host = |start: *mut u8| start.expose_provenance() as u64;
        Ok(match self {
            Self::Segment(mapping) => {
                (host(mapping.as_mut_ptr()), mapping.bytes(), UCS_MEMORY_TYPE_HOST)
            }
            Self::Region(regions, id) => {
                let bytes = regions.bytes(*id)?;
                (host(regions.at(*id, 0, bytes)?), bytes, UCS_MEMORY_TYPE_HOST)
            }
            Self::DeviceSegment(mapped) => {
                (mapped.ptr().addr(), mapped.bytes(), UCS_MEMORY_TYPE_CUDA)
            }
            Self::DeviceRegion(regions, id) => {
                let bytes = regions.bytes(*id)?;
                (regions.at(*id, 0, bytes)?.addr(), bytes, UCS_MEMORY_TYPE_CUDA)
            }
        })
    }
}

/// Memory that is registered with UCX, until it is dropped.
///
/// On a GPU: the thread that makes or drops it has the GPU's context, as after [`crate::driver::Device::bind`].
#[derive(Debug)]
pub struct Registration {
    context: Arc<Context>,
    raw: ucp_mem_h,
    start: u64,
    bytes: u64,
    kind: ucs_memory_type_t,
    /// Kept for as long as UCX may use it.
    _memory: Memory,
}

// SAFETY: a handle of a context that locks; the memory is `Send` and `Sync`.
unsafe impl Send for Registration {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Registration {}

impl Registration {
    /// Memory that puts of this process read.
    ///
    /// # Errors
    /// `NotFound`: no such region. Otherwise UCX's; on a host without enough lockable memory, say.
    pub fn source(context: &Arc<Context>, memory: Memory) -> Result<Self> {
        Self::new(context, memory, UCP_MEM_MAP_PROT_LOCAL_READ)
    }

    /// Memory that peers write. Nobody may read it from afar.
    ///
    /// # Errors
    /// As [`Registration::source`].
    pub fn target(context: &Arc<Context>, memory: Memory) -> Result<Self> {
        let local = UCP_MEM_MAP_PROT_LOCAL_READ | UCP_MEM_MAP_PROT_LOCAL_WRITE;
        Self::new(context, memory, local | UCP_MEM_MAP_PROT_REMOTE_WRITE)
    }

    fn new(context: &Arc<Context>, memory: Memory, prot: u32) -> Result<Self> {
        let (start, bytes, kind) = memory.range()?;
        let params = ucp_mem_map_params_t {
            field_mask: UCP_MEM_MAP_PARAM_FIELD_ADDRESS
                | UCP_MEM_MAP_PARAM_FIELD_LENGTH
                | UCP_MEM_MAP_PARAM_FIELD_PROT
                | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE,
            address: address(start).cast_mut(),
            length: bytes as usize,
            prot,
            memory_type: kind,
            ..zeroed()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the memory is there, and is kept for as long as it is registered.
        let status = unsafe { (context.ucp().ucp_mem_map)(context.raw(), &params, &mut raw) };
        context.check(&format!("registering {bytes} bytes at {start:#x}"), status).map_err(
            |error| match status {
                UCS_ERR_NO_MEMORY => error.fix("raise the limit on locked memory (ulimit -l)"),
                _ => error,
            },
        )?;
        Ok(Self { context: Arc::clone(context), raw, start, bytes, kind, _memory: memory })
    }

    /// What a peer needs to write here.
    ///
    /// # Errors
    /// UCX's.
    pub fn share(&self) -> Result<RemoteMemory> {
        let ucp = self.context.ucp();
        let (mut buffer, mut len) = (ptr::null_mut(), 0);
        // SAFETY: the handle is alive, and of that context.
        let status =
            unsafe { (ucp.ucp_rkey_pack)(self.context.raw(), self.raw, &mut buffer, &mut len) };
        self.context.check("packing a key", status)?;
        // SAFETY: UCX says how many bytes it wrote there; they are ours until released.
        let packed =
            unsafe { slice::from_raw_parts(buffer.cast_const().cast::<u8>(), len) }.to_vec();
        // SAFETY: packed above, and released once.
        unsafe { (ucp.ucp_rkey_buffer_release)(buffer) };
        Ok(RemoteMemory { address: self.start, bytes: self.bytes, packed })
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn raw(&self) -> ucp_mem_h {
        self.raw
    }

    pub(super) fn kind(&self) -> ucs_memory_type_t {
        self.kind
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// Where `len` bytes from `offset` are.
    ///
    /// # Errors
    /// `OutOfBounds`: the range leaves it.
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<*const c_void> {
        if crate::memory::inside(self.bytes, offset, len) {
            return Ok(address(self.start + offset));
        }
        Err(ErrorKind::OutOfBounds.error(format!(
            "{len} bytes from {offset} leave registered memory of {} bytes",
            self.bytes
        )))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // SAFETY: whatever uses the memory holds this, so nothing does any more.
        let status = unsafe { (self.context.ucp().ucp_mem_unmap)(self.context.raw(), self.raw) };
        if let Err(error) = self.context.check("letting memory go", status) {
            tracing::warn!(%error, bytes = self.bytes, "memory stays registered");
        }
    }
}

/// Of the host's memory it was exposed; a GPU's has none to expose.
fn address(address: u64) -> *const c_void {
    ptr::with_exposed_provenance(address as usize)
}
