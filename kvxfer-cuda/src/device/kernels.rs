//! The copy kernel of `kernels/kv.cu`: what it reads, and how it is launched.

use std::ffi::CStr;

use crate::driver::{CudaError, Device, DevicePtr, Function, Stream};

/// Bytes of a tile: `KVX_TILE`.
const TILE: u64 = 512;
/// Sums per slot, to be added: `KVX_LANES`.
pub(super) const LANES: usize = 8;
/// Threads of a block: the kernel's launch bound.
const BLOCK: u32 = 512;
/// Compiled from `kv.cu` for drivers of CUDA 12.0 and newer, which compile it for the GPU at hand.
const PTX: &CStr =
    match CStr::from_bytes_with_nul(concat!(include_str!("../../kernels/kv.ptx"), "\0").as_bytes())
    {
        Ok(ptx) => ptx,
        Err(_) => panic!("a zero byte in kv.ptx"),
    };

/// One run of bytes: `kvx_item`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) src: u64,
    /// 0: only summed.
    pub(super) dst: u64,
    /// At least 1.
    pub(super) len: u64,
    /// [`word_key`](kvxfer_core::sum::word_key) of its first word.
    pub(super) key: u64,
    /// Where its sum is added: [`LANES`] words for each slot.
    pub(super) slot: u32,
    /// [`tiles`] of all items before.
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

/// Tiles of a run. A launch has fewer than 2^31, so less than a TiB.
pub(super) fn tiles(len: u64) -> u32 {
    len.div_ceil(TILE) as u32
}

/// Blocks of a launch: no more than have a tile for each group of lanes, and one at least.
fn blocks(tiles: u32, sms: u32) -> u32 {
    tiles.div_ceil(BLOCK / LANES as u32).clamp(1, sms.max(1))
}

/// The kernel, on a device.
#[derive(Debug)]
pub(super) struct Kernels {
    copy_sum: Function,
}

impl Kernels {
    /// Has the driver compile it, which takes milliseconds the first time.
    ///
    /// # Errors
    /// The driver's: it is older than CUDA 12.0, or the GPU than sm_80.
    pub(super) fn load(device: &Device) -> Result<Self, CudaError> {
        Ok(Self { copy_sum: device.module(PTX)?.function(c"kvx_copy_sum")? })
    }

    /// Copies and sums on at most `sms` multiprocessors.
    ///
    /// `items` are `count` (at least 1) [`Item`]s on the device with that many `tiles` in all; `sums` are
    /// [`LANES`] words for each of their slots, which are added to.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn copy_sum(
        &self,
        stream: &Stream,
        items: DevicePtr,
        count: usize,
        tiles: u32,
        sums: DevicePtr,
        sms: u32,
    ) -> Result<(), CudaError> {
        let mut args = [items.addr(), count as u64, tiles.into(), sums.addr()];
        stream.launch(&self.copy_sum, blocks(tiles, sms), BLOCK, &mut args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = include_str!("../../kernels/kv.cu");

    /// The number that a `#define` of the source gives a name.
    fn defined(name: &str) -> u64 {
        let define = format!("#define {name} ");
        let line = SOURCE.lines().find_map(|line| line.strip_prefix(&define)).unwrap();
        let number = line.trim_end_matches(['u', 'l']);
        match number.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
            None => number.parse().unwrap(),
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_source() {
        assert_eq!(defined("KVX_TILE"), TILE);
        assert_eq!(defined("KVX_LANES"), LANES as u64);
        assert_eq!(defined("KVX_STEP"), kvxfer_core::sum::STEP);
        assert!(SOURCE.contains(&format!("__launch_bounds__({BLOCK}, ")));
    }

    /// The fields of the C struct, in order and with C's alignment, hold the item's values.
    #[test]
    fn an_item_is_laid_out_as_in_c() {
        let item = Item {
            src: 0x0102_0304_0506_0708,
            dst: 0x1112_1314_1516_1718,
            len: 0x2122_2324_2526_2728,
            key: 0x3132_3334_3536_3738,
            slot: 0x4142_4344,
            first_tile: 0x5152_5354,
        };
        let bytes = item.to_bytes();
        let start = SOURCE.find("struct kvx_item {").unwrap();
        let (_, body) = SOURCE[start..].split_once('\n').unwrap();
        let (body, _) = body.split_once("\n};").unwrap();
        let mut at = 0;
        for line in body.lines() {
            let (declaration, _) = line.split_once(';').unwrap();
            let (kind, name) = declaration.trim().split_once(' ').unwrap();
            let value = match name {
                "src" => item.src,
                "dst" => item.dst,
                "len" => item.len,
                "key" => item.key,
                "slot" => item.slot.into(),
                "first_tile" => item.first_tile.into(),
                other => panic!("a field that Item lacks: {other}"),
            };
            let size = match kind {
                "u64" => 8,
                "u32" => 4,
                other => panic!("a type without a size here: {other}"),
            };
            at = usize::next_multiple_of(at, size);
            assert_eq!(bytes[at..at + size], value.to_le_bytes()[..size], "{name}");
            at += size;
        }
        assert_eq!(at, Item::BYTES);
    }

    #[test]
    fn the_embedded_code_has_the_kernel_and_what_it_asks_for() {
        let ptx = PTX.to_str().unwrap();
        assert!(ptx.contains("\n.version 8.0\n.target sm_80\n"), "for CUDA 12.0, and sm_80 on");
        assert!(ptx.contains(".entry kvx_copy_sum("));
        assert!(ptx.contains(&format!("\n.maxntid {BLOCK}, 1, 1\n")));
    }

    #[test]
    fn a_grid_is_as_small_as_its_work_and_never_above_the_cap() {
        assert_eq!((tiles(1), tiles(512), tiles(513)), (1, 1, 2));
        assert_eq!((blocks(1, 16), blocks(64, 16), blocks(65, 16)), (1, 1, 2));
        assert_eq!((blocks(u32::MAX, 16), blocks(7, 0), blocks(0, 16)), (16, 1, 1));
    }
}
