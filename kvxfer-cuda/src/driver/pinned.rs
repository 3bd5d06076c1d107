//! Host memory that the device reaches.

use std::sync::Arc;

use super::Device;
use super::error::{CudaError, Result};

/// Pinned host memory, zeroed. The device may write to it at any time, so it is read and written through copies
/// only. A stream that uses it keeps it alive.
#[derive(Debug)]
pub struct Pinned {
    device: Device,
    ptr: *mut u8,
    bytes: u64,
}

// SAFETY: a pointer to memory that is reached by volatile accesses only.
unsafe impl Send for Pinned {}
// SAFETY: as above. Who reads what another thread, or the device, is writing gets bytes of both.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub(super) fn new(device: &Device, bytes: u64) -> Result<Arc<Self>> {
        let len = usize::try_from(bytes.max(1))
            .map_err(|_| CudaError::Unsupported { what: "host memory of that size" })?;
        let _bound = device.bound()?;
        // SAFETY: the context is current; the memory is `len` bytes, and ours.
        let ptr = unsafe {
            let ptr = device.driver().host_alloc(len)?;
            ptr.write_bytes(0, len);
            ptr
        };
        Ok(Arc::new(Self { device: device.clone(), ptr, bytes }))
    }

    /// Bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A pointer good for `len` bytes from `offset`, as long as this is.
    pub(super) fn at(&self, offset: u64, len: u64) -> Result<*mut u8> {
        match offset.checked_add(len) {
            // In bounds, so it loses no bits.
            Some(end) if end <= self.bytes => Ok(self.ptr.wrapping_add(offset as usize)),
            _ => Err(CudaError::OutOfBounds { offset, len, bytes: self.bytes }),
        }
    }

    /// Writes bytes from `offset` on. The device sees them in work that is queued afterwards.
    ///
    /// # Errors
    /// `OutOfBounds`.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        let to = self.at(offset, from.len() as u64)?;
        let words = to.cast::<u64>();
        if words.is_aligned() && from.len().is_multiple_of(8) {
            for (at, word) in from.chunks_exact(8).enumerate() {
                let mut bytes = [0; 8];
                bytes.copy_from_slice(word);
                // SAFETY: `at` checked the range; it is aligned.
                unsafe { words.add(at).write_volatile(u64::from_ne_bytes(bytes)) };
            }
        } else {
            for (at, &byte) in from.iter().enumerate() {
                // SAFETY: `at` checked the range.
                unsafe { to.add(at).write_volatile(byte) };
            }
        }
        Ok(())
    }

    /// Reads bytes from `offset` on: what the device wrote is there once its work is known to be done.
    ///
    /// # Errors
    /// `OutOfBounds`.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let from = self.at(offset, into.len() as u64)?;
        let words = from.cast::<u64>();
        if words.is_aligned() && into.len().is_multiple_of(8) {
            for (at, word) in into.chunks_exact_mut(8).enumerate() {
                // SAFETY: `at` checked the range; it is aligned.
                let value = unsafe { words.add(at).read_volatile() };
                word.copy_from_slice(&value.to_ne_bytes());
            }
        } else {
            for (at, byte) in into.iter_mut().enumerate() {
                // SAFETY: `at` checked the range.
                *byte = unsafe { from.add(at).read_volatile() };
            }
        }
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: streams keep what their work uses, so none does.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().host_free(self.ptr) });
    }
}
