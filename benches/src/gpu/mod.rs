//! What needs a GPU, or the stand-in for its driver: see the `gpu-check` binary.

use std::sync::Arc;

use kvxfer_cuda::driver::{CudaError, Device, Driver, cuda};

pub mod check;
pub mod consumer;
pub mod rates;
pub mod standin;
pub mod suite;
pub mod summary;
pub mod work;

/// The driver of this machine.
pub type Machine = Arc<dyn Driver>;

/// The driver and its devices.
///
/// # Errors
/// There is none, or one of its devices can't be used.
pub fn devices() -> Result<(Machine, Vec<Device>), CudaError> {
    let driver = cuda()?;
    let count = Device::count(&driver)?;
    let open = |ordinal| Device::open(Arc::clone(&driver), ordinal);
    let devices = (0..count).map(open).collect::<Result<Vec<_>, _>>()?;
    if devices.is_empty() {
        return Err(CudaError::NoDevice);
    }
    Ok((driver, devices))
}

/// Whether the driver is the stand-in, of which no speed may be told. [`devices`] has found one.
pub fn on_standin() -> bool {
    // SAFETY: the library is there, as there are devices; the symbol is only looked for.
    unsafe { cudarc::driver::sys::culib().get::<unsafe extern "C" fn()>(b"kvxfer_standin_report") }
        .is_ok()
}
