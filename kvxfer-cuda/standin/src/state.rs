//! The devices of this process, and the current one of each thread.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::abi::{Code, Result};
use crate::config::Config;

/// A device by its place in the machine, hidden ones included: not the ordinal of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Gpu(pub(crate) u32);

struct State {
    config: Config,
    devices: Vec<Device>,
}

#[derive(Default)]
struct Device {
    /// 0, or the code that everything on this device answers from now on.
    broken: AtomicI32,
}

static STATE: OnceLock<std::result::Result<State, String>> = OnceLock::new();

thread_local! {
    static CURRENT: Cell<Option<Gpu>> = const { Cell::new(None) };
}

/// The configuration, once `cuInit` has been called.
pub(crate) fn config() -> Option<&'static Config> {
    STATE.get()?.as_ref().ok().map(|state| &state.config)
}

/// What `cuInit` does.
///
/// # Errors
/// `UNKNOWN` when the configuration can't be understood: it is printed.
pub(crate) fn start() -> Result {
    let state = STATE.get_or_init(|| {
        let text = std::env::var("KVXFER_STANDIN").unwrap_or_default();
        Config::parse(&text)
            .map(|config| State {
                devices: (0..config.devices).map(|_| Device::default()).collect(),
                config,
            })
            .inspect_err(|part| eprintln!("KVXFER_STANDIN: {part:?} can't be understood"))
    });
    state.as_ref().map(|_| ()).map_err(|_| Code::UNKNOWN)
}

fn state() -> Result<&'static State> {
    STATE.get().and_then(|state| state.as_ref().ok()).ok_or(Code::NOT_INITIALIZED)
}

/// The device whose context is current on this thread.
///
/// # Errors
/// `INVALID_CONTEXT` when none is; the device's own error once it is broken.
pub(crate) fn current() -> Result<Gpu> {
    state()?;
    let gpu = CURRENT.get().ok_or(Code::INVALID_CONTEXT)?;
    check(gpu)?;
    Ok(gpu)
}

/// Makes a device's context current on this thread, or none.
pub(crate) fn set_current(gpu: Option<Gpu>) {
    CURRENT.set(gpu);
}

/// # Errors
/// The device's own error once it is broken.
pub(crate) fn check(gpu: Gpu) -> Result {
    match state()?.devices.get(gpu.0 as usize) {
        None => Err(Code::INVALID_DEVICE),
        Some(device) => match device.broken.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(Code(code)),
        },
    }
}

/// From now on everything on this device answers that code; the first one stays.
pub(crate) fn break_device(gpu: Gpu, code: Code) {
    if let Ok(state) = state()
        && let Some(device) = state.devices.get(gpu.0 as usize)
    {
        let _ = device.broken.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }
}
