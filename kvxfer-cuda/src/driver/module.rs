//! Kernels.

use std::ffi::CStr;
use std::sync::Arc;

use super::Device;
use super::error::Result;
use super::handles::{RawFunction, RawModule};

/// Compiled code on a device.
#[derive(Debug)]
pub struct Module(Arc<Loaded>);

#[derive(Debug)]
pub(super) struct Loaded {
    device: Device,
    raw: RawModule,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // SAFETY: streams keep what they launched, so no kernel of it runs.
        let _ = self
            .device
            .bound()
            .and_then(|_bound| unsafe { self.device.driver().module_unload(self.raw) });
    }
}

impl Module {
    pub(super) fn new(device: &Device, ptx: &CStr) -> Result<Self> {
        let _bound = device.bound()?;
        // SAFETY: the context is current.
        let raw = unsafe { device.driver().module_load(ptx) }?;
        Ok(Self(Arc::new(Loaded { device: device.clone(), raw })))
    }

    /// The kernel with that name. All its parameters have to be 8 bytes, and there are at most
    /// [`Function::MOST_PARAMETERS`].
    ///
    /// # Errors
    /// The driver's, when there is none.
    pub fn function(&self, name: &CStr) -> Result<Function> {
        let _bound = self.0.device.bound()?;
        // SAFETY: the module is alive.
        let raw = unsafe { self.0.device.driver().module_function(self.0.raw, name) }?;
        Ok(Function { module: Arc::clone(&self.0), raw })
    }
}

/// A kernel. Keeps its module.
#[derive(Clone, Debug)]
pub struct Function {
    pub(super) module: Arc<Loaded>,
    pub(super) raw: RawFunction,
}

impl Function {
    /// No kernel has more.
    pub const MOST_PARAMETERS: usize = 16;
}
