//! Errors on order: the n-th call of an entry point fails, for this once or for good.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{Code, Result};
use crate::{exec, state};

/// One line of the configuration.
#[derive(Debug)]
pub(crate) struct Fault {
    /// The call, without the suffix of its version: `cuMemAlloc` is `cuMemAlloc_v2` as well.
    pub(crate) call: String,
    /// Which call fails, from 1; 0: each.
    pub(crate) nth: u64,
    pub(crate) code: Code,
    /// Whether the context of the calling thread is broken from then on.
    pub(crate) sticky: bool,
    pub(crate) calls: AtomicU64,
}

/// Asked before each entry point does anything.
///
/// # Errors
/// The code that was ordered for this call.
pub(crate) fn before(name: &str) -> Result {
    for fault in state::config()?.faults.iter().filter(|fault| fault.call == base_name(name)) {
        let call = fault.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if fault.nth == 0 || fault.nth == call {
            if fault.sticky
                && let Ok(device) = state::current()
            {
                exec::fail(device, fault.code);
            }
            return Err(fault.code);
        }
    }
    Ok(())
}

/// `cuMemAlloc` of `cuMemAlloc_v2`.
pub(crate) fn base_name(name: &str) -> &str {
    match name.rsplit_once("_v") {
        Some((base, version)) if version.bytes().all(|byte| byte.is_ascii_digit()) => base,
        _ => name,
    }
}
