//! The engine's memory, as regions.

use std::sync::Arc;

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::LayerMemory;
use kvxfer_core::sum::STEP;
use kvxfer_core::transport::{PROBE_BYTES, RegionId};
use kvxfer_core::{ErrorKind, Incarnation, Result};

use super::KvLayer;
use crate::memory::Regions;

/// Bytes of the region that probes are written from.
pub(super) const PATTERN_BYTES: u64 = 64 << 10;
const _: () = assert!(PATTERN_BYTES > PROBE_BYTES);

/// What an engine registered.
#[derive(Clone)]
pub(super) struct Registered {
    pub(super) regions: Arc<Regions>,
    pub(super) layers: Vec<LayerMemory>,
    /// Bytes of ours that no other agent has.
    pub(super) pattern: RegionId,
}

/// Registers each layer's memory as a region of its own.
pub(super) fn register(
    layout: &KvLayout,
    layers: &[KvLayer],
    us: Incarnation,
) -> Result<Registered> {
    if layers.len() != layout.layers() as usize {
        return Err(ErrorKind::Config.error(format!(
            "{} layers were registered, the layout has {}",
            layers.len(),
            layout.layers()
        )));
    }
    let mut regions = Regions::new();
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
        let region = unsafe { regions.register(layer.address as *mut u8, size) }?;
        memory.push(LayerMemory { region, base: 0, stride: layer.stride, blocks: layer.blocks });
    }
    let pattern = regions.keep(pattern(us))?;
    Ok(Registered { regions: Arc::new(regions), layers: memory, pattern })
}

/// Bytes that follow from who we are, and look like noise.
fn pattern(us: Incarnation) -> Vec<u8> {
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
