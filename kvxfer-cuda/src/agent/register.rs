//! The engine's memory, as regions.

use kvxfer_core::layout::KvLayout;
use kvxfer_core::plan::LayerMemory;
use kvxfer_core::{ErrorKind, Result};

use super::KvLayer;
use crate::memory::Regions;

/// Registers each layer's memory as a region of its own.
pub(super) fn regions(
    layout: &KvLayout,
    layers: &[KvLayer],
) -> Result<(Regions, Vec<LayerMemory>)> {
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
    Ok((regions, memory))
}
