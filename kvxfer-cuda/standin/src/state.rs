//! The devices of this process, and the current one of each thread.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{LazyLock, OnceLock};

use parking_lot::Mutex;

use crate::abi::{Code, Result};
use crate::config::{Config, visible};
use crate::report::{Counted, Live};

/// A device by its place in the machine, hidden ones included: not the ordinal of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Gpu(pub(crate) u32);

struct State {
    devices: Vec<Device>,
    /// By the caller's ordinals.
    visible: Vec<Gpu>,
    /// Who may touch whose plain memory: from, to.
    peers: Mutex<BTreeSet<(Gpu, Gpu)>>,
}

#[derive(Default)]
struct Device {
    /// 0, or the code that everything on this device answers from now on.
    broken: AtomicI32,
    /// One for each time that its primary context is retained.
    retained: Mutex<Vec<Counted>>,
}

static CONFIG: LazyLock<Option<Config>> = LazyLock::new(|| {
    let text = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    Config::parse(&text)
        .inspect_err(|part| eprintln!("KVXFER_STANDIN: {part:?} can't be understood"))
        .ok()
});
static STATE: OnceLock<State> = OnceLock::new();

thread_local! {
    /// The stack of contexts of this thread; the last one is current.
    static CONTEXTS: RefCell<Vec<Gpu>> = const { RefCell::new(Vec::new()) };
}

/// # Errors
/// `UNKNOWN` when it can't be understood: why was printed.
pub(crate) fn config() -> Result<&'static Config> {
    CONFIG.as_ref().ok_or(Code::UNKNOWN)
}

/// What `cuInit` does.
///
/// # Errors
/// `NO_DEVICE` when none is visible; those of [`config`].
pub(crate) fn start() -> Result {
    let config = config()?;
    let choice = std::env::var("CUDA_VISIBLE_DEVICES").ok();
    let visible = visible(config, choice.as_deref());
    if visible.is_empty() {
        return Err(Code::NO_DEVICE);
    }
    STATE.get_or_init(|| State {
        devices: (0..config.devices).map(|_| Device::default()).collect(),
        visible,
        peers: Mutex::default(),
    });
    Ok(())
}

fn state() -> Result<&'static State> {
    STATE.get().ok_or(Code::NOT_INITIALIZED)
}

impl State {
    fn device(&self, gpu: Gpu) -> Result<&Device> {
        self.devices.get(gpu.0 as usize).ok_or(Code::INVALID_DEVICE)
    }
}

/// The devices that this process sees, by its ordinals.
///
/// # Errors
/// `NOT_INITIALIZED` before `cuInit`.
pub(crate) fn devices() -> Result<&'static [Gpu]> {
    Ok(&state()?.visible)
}

/// The device of that ordinal.
///
/// # Errors
/// `INVALID_DEVICE` when there is none.
pub(crate) fn gpu(ordinal: i32) -> Result<Gpu> {
    let index = usize::try_from(ordinal).map_err(|_| Code::INVALID_DEVICE)?;
    devices()?.get(index).copied().ok_or(Code::INVALID_DEVICE)
}

/// The ordinal of a device, if this process sees it.
pub(crate) fn ordinal(gpu: Gpu) -> Option<i32> {
    let index = devices().ok()?.iter().position(|visible| *visible == gpu)?;
    i32::try_from(index).ok()
}

/// The device whose context is current on this thread.
///
/// # Errors
/// `INVALID_CONTEXT` when none is; `CONTEXT_IS_DESTROYED` when nobody retains it any more; the device's
/// own error once it is broken.
pub(crate) fn current() -> Result<Gpu> {
    let gpu = bound()?.ok_or(Code::INVALID_CONTEXT)?;
    if !is_retained(gpu) {
        return Err(Code::CONTEXT_IS_DESTROYED);
    }
    check(gpu)?;
    Ok(gpu)
}

/// The device whose context is current, in whatever state it is.
///
/// # Errors
/// `NOT_INITIALIZED` before `cuInit`.
pub(crate) fn bound() -> Result<Option<Gpu>> {
    state()?;
    Ok(CONTEXTS.with_borrow(|stack| stack.last().copied()))
}

/// Makes a device's context current on this thread in place of the one that is; none: as if it were
/// popped.
pub(crate) fn bind(gpu: Option<Gpu>) {
    CONTEXTS.with_borrow_mut(|stack| {
        stack.pop();
        stack.extend(gpu);
    });
}

/// Puts a device's context on top of this thread's stack.
pub(crate) fn push(gpu: Gpu) {
    CONTEXTS.with_borrow_mut(|stack| stack.push(gpu));
}

/// Takes the top of this thread's stack away.
///
/// # Errors
/// `INVALID_CONTEXT` when the stack is empty.
pub(crate) fn pop() -> Result<Gpu> {
    CONTEXTS.with_borrow_mut(Vec::pop).ok_or(Code::INVALID_CONTEXT)
}

/// Retains a device's primary context.
///
/// # Errors
/// Those of [`check`].
pub(crate) fn retain(gpu: Gpu) -> Result {
    check(gpu)?;
    state()?.device(gpu)?.retained.lock().push(Counted::new(Live::Contexts));
    Ok(())
}

/// Whether somebody retains a device's primary context.
pub(crate) fn is_retained(gpu: Gpu) -> bool {
    let device = state().and_then(|state| state.device(gpu));
    device.is_ok_and(|device| !device.retained.lock().is_empty())
}

/// Gives back what [`retain`] took.
///
/// # Errors
/// `INVALID_CONTEXT` when nobody retains it.
pub(crate) fn release(gpu: Gpu) -> Result {
    let last = state()?.device(gpu)?.retained.lock().pop();
    last.map(drop).ok_or(Code::INVALID_CONTEXT)
}

/// # Errors
/// The device's own error once it is broken.
pub(crate) fn check(gpu: Gpu) -> Result {
    match state()?.device(gpu)?.broken.load(Ordering::Acquire) {
        0 => Ok(()),
        code => Err(Code(code)),
    }
}

/// From now on everything on this device answers that code; the first one stays.
pub(crate) fn break_device(gpu: Gpu, code: Code) {
    if let Ok(device) = state().and_then(|state| state.device(gpu)) {
        let _ = device.broken.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// Whether work of `from` may touch the plain memory of `to`.
pub(crate) fn is_peer(from: Gpu, to: Gpu) -> bool {
    from == to || state().is_ok_and(|state| state.peers.lock().contains(&(from, to)))
}

/// Lets work of `from` touch the plain memory of `to`, or no longer; whether that changed anything.
///
/// # Errors
/// `NOT_INITIALIZED` before `cuInit`.
pub(crate) fn set_peer(from: Gpu, to: Gpu, on: bool) -> Result<bool> {
    let mut peers = state()?.peers.lock();
    Ok(if on { peers.insert((from, to)) } else { peers.remove(&(from, to)) })
}
