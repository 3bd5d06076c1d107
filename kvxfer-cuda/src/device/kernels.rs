//! The copy kernel: what it reads, and how it is launched.

use std::ffi::CStr;

use crate::driver::{CudaError, Device, DevicePtr, Function, Stream};

/// Bytes of a tile: `KVX_TILE`.
const TILE: u64 = 512;
/// Sums per slot: `KVX_LANES`.
pub(super) const LANES: usize = 8;
/// Threads of a block.
const BLOCK: u32 = 1024;
const PTX: &CStr = c"";

/// One run of bytes: `kvx_item`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) src: u64,
    pub(super) dst: u64,
    pub(super) len: u64,
    pub(super) key: u64,
    pub(super) slot: u32,
    pub(super) first_tile: u32,
}

impl Item {
    pub(super) const BYTES: usize = 40;

    pub(super) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.src, self.dst, self.len, self.key];
        let last = u64::from(self.slot) | u64::from(self.first_tile) << 32;
        for (to, word) in bytes.chunks_exact_mut(8).zip(words.into_iter().chain([last])) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Tiles of a run.
pub(super) fn tiles(len: u64) -> u32 {
    len.div_ceil(TILE) as u32
}

/// The kernel, on a device.
#[derive(Debug)]
pub(super) struct Kernels {
    copy_sum: Function,
}

impl Kernels {
    pub(super) fn load(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { copy_sum: device.module(PTX)?.function(c"kvx_copy_sum")? })
    }

    /// Copies and sums on at most `sms` multiprocessors.
    pub(super) fn copy_sum(
        &self,
        stream: &Stream,
        items: DevicePtr,
        count: usize,
        tiles: u32,
        sums: DevicePtr,
        sms: u32,
    ) -> Result<(), CudaError> {
        let blocks = tiles.div_ceil(BLOCK / LANES as u32).clamp(1, sms.max(1));
        let mut args = [items.addr(), count as u64, tiles.into(), sums.addr()];
        stream.launch(&self.copy_sum, blocks, BLOCK, &mut args)
    }
}
