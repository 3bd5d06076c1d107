//! Errors on order: the n-th call of an entry point fails, for this once or for good.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{Code, Result};
use crate::{exec, state};

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// It does nothing but answer the code.
    Once,
    /// The same, and the context of the calling thread is broken from then on.
    Sticky,
    /// It answers 0; what it queued fails with the code when its turn comes, and breaks the device. With
    /// code 0 it never ends.
    Late,
}

thread_local! {
    /// What the work is to fail with that the present call queues.
    static LATE: Cell<Option<Code>> = const { Cell::new(None) };
}

/// What the work that is being queued is to fail with.
pub(crate) fn late() -> Option<Code> {
    LATE.take()
}

/// One line of the configuration.
#[derive(Debug)]
pub(crate) struct Fault {
    /// The call, without the suffix of its version: `cuMemAlloc` is `cuMemAlloc_v2` as well.
    pub(crate) call: String,
    /// Which call fails, from 1; 0: each.
    pub(crate) nth: u64,
    pub(crate) code: Code,
    pub(crate) when: When,
    pub(crate) calls: AtomicU64,
}

/// Asked before each entry point does anything.
///
/// # Errors
/// The code that was ordered for this call.
pub(crate) fn before(name: &str) -> Result {
    LATE.set(None);
    for fault in state::config()?.faults.iter().filter(|fault| fault.call == base_name(name)) {
        let call = fault.calls.fetch_add(1, Ordering::Relaxed) + 1;
        if fault.nth == 0 || fault.nth == call {
            match fault.when {
                When::Late => LATE.set(Some(fault.code)),
                When::Once => return Err(fault.code),
                When::Sticky => {
                    if let Ok(device) = state::current() {
                        exec::fail(device, fault.code);
                    }
                    return Err(fault.code);
                }
            }
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
