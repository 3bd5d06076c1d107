//! The engine's memory, as regions.

use std::sync::Arc;

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::LayerMemory;
use kvxfer_core::sum::STEP;
use kvxfer_core::transport::{PROBE_BYTES, RegionId};
use kvxfer_core::{ErrorKind, Incarnation, Result};

use super::KvLayer;
use crate::device::DeviceRegions;
use crate::driver::{Buffer, DevicePtr};
use crate::memory::Regions;

/// Bytes of the region that probes are written from.
pub(super) const PATTERN_BYTES: u64 = PROBE_BYTES + (64 << 10);

/// Where the regions are.
#[derive(Clone)]
pub(super) enum EngineMemory {
    Host(Arc<Regions>),
    Device(Arc<DeviceRegions>),
}

/// What an engine registered.
#[derive(Clone)]
pub(super) struct Registered {
    pub(super) memory: EngineMemory,
    pub(super) layers: Vec<LayerMemory>,
    /// Bytes of ours that no other agent has.
    pub(super) pattern: RegionId,
}

/// Registers each layer's memory as a region of its own, and the [pattern], which for KV on a GPU is there already.
pub(super) fn register(
    layout: &KvLayout,
    layers: &[KvLayer],
    us: Incarnation,
    on_gpu: &mut Option<Buffer>,
) -> Result<Registered> {
    if layers.len() != layout.layers() as usize {
        return Err(ErrorKind::Config.error(format!(
            "{} layers were registered, the layout has {}",
            layers.len(),
            layout.layers()
        )));
    }
    let (mut regions, mut on_device) = (Regions::new(), DeviceRegions::new());
    let mut memory = Vec::with_capacity(layers.len());
    for (flat, layer) in (0..).zip(layers) {
        let bytes = layout.layer(flat).and_then(|(group, at)| layout.block_bytes(group, at));
        if layer.stride < u64::from(bytes.unwrap_or(u32::MAX)) {
            return Err(ErrorKind::Config.error(format!(
                "layer {flat}: {} bytes between blocks of {bytes:?} bytes",
                layer.stride
            )));
        }
        let size = layer.stride.checked_mul(layer.blocks.into()).ok_or_else(|| {
            ErrorKind::Config.error(format!("layer {flat}: more memory than there is"))
        })?;
        // SAFETY: the promise of whoever called `Agent::register`.
        let region = unsafe {
            match on_gpu {
                None => regions.register(layer.address as *mut u8, size),
                Some(_) => on_device.register(DevicePtr::from_raw(layer.address as u64), size),
            }
        }?;
        memory.push(LayerMemory { region, base: 0, stride: layer.stride, blocks: layer.blocks });
    }
    let (pattern, memory_of) = match on_gpu.take() {
        None => (regions.keep(pattern(us))?, EngineMemory::Host(Arc::new(regions))),
        Some(buffer) => {
            let pattern = on_device.keep(buffer)?;
            (pattern, EngineMemory::Device(Arc::new(on_device)))
        }
    };
    Ok(Registered { memory: memory_of, layers: memory, pattern })
}

/// Bytes that follow from who we are, and look like noise.
pub(super) fn pattern(us: Incarnation) -> Vec<u8> {
    let (halves, _) = us.0.as_chunks::<8>();
    let mut state = halves.iter().fold(0, |state, half| state ^ u64::from_le_bytes(*half));
    let words = std::iter::repeat_with(|| {
        // SplitMix64.
        state = state.wrapping_add(STEP);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    });
    words.take(PATTERN_BYTES as usize / 8).flat_map(u64::to_le_bytes).collect()
}
