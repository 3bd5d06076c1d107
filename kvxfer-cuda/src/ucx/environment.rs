//! Variables that UCX reads while it is loaded, and only there.
//!
//! Some of what UCX does to a process happens in its constructors, where `ucp_config_modify` comes too late, as was
//! measured (`docs/decisions/009-ucx.md`). `setenv` would be a way, but it may free the array that another thread's
//! `getenv` is walking. So the process gets another array for the time of the load, and the old one back.

use std::ffi::{CStr, c_char};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// What the engine's process is to be spared, unless its own environment says otherwise.
const QUIET: [&CStr; 5] = [
    // No patches of mmap, munmap, brk and so on in libc, under threads that may be calling them.
    c"UCX_MEM_MMAP_HOOK_MODE=none",
    // No handlers for SIGHUP, SIGSEGV, SIGBUS and so on: they are the engine's.
    c"UCX_DEBUG_SIGNO=0",
    c"UCX_ERROR_SIGNALS=",
    // No thread that serves a file system of its innards.
    c"UCX_VFS_ENABLE=n",
    // Its log goes to stdout otherwise, where the engine's output is.
    c"UCX_LOG_FILE=stderr",
];

unsafe extern "C" {
    static mut environ: *mut *mut c_char;
}

/// Runs `load` with `QUIET` in the environment. The process's own variables come first.
///
/// A thread that sets a variable at that very moment may make the new ones stay.
pub(super) fn quietly<T>(load: impl FnOnce() -> T) -> T {
    // SAFETY: libc has the variable for the whole life of the process; an aligned pointer is stored and loaded whole.
    let place = unsafe { AtomicPtr::from_ptr(&raw mut environ) };
    let own = place.load(Ordering::Acquire);
    let mut variables = Vec::new();
    let mut next = own;
    // SAFETY: a null-terminated array of strings, or null: what every `getenv` relies on.
    unsafe {
        while !next.is_null() && !(*next).is_null() {
            variables.push(*next);
            next = next.add(1);
        }
    }
    let set = |variable: &CStr| {
        let name =
            variable.to_bytes().split_inclusive(|&byte| byte == b'=').next().unwrap_or_default();
        // SAFETY: strings of the environment end in 0.
        let text = |one| unsafe { CStr::from_ptr(one) }.to_bytes();
        variables.iter().any(|&one| text(one).starts_with(name))
    };
    let ours: Vec<_> = QUIET.into_iter().filter(|one| !set(one)).collect();
    variables.extend(ours.iter().map(|one| one.as_ptr().cast_mut()));
    variables.push(ptr::null_mut());
    // It stays: another thread may be reading it when it is no longer the environment.
    let array = Vec::leak(variables).as_mut_ptr();
    place.store(array, Ordering::Release);
    let answer = load();
    // Unless someone made a newer one meanwhile.
    let _ = place.compare_exchange(array, own, Ordering::AcqRel, Ordering::Relaxed);
    answer
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    #[test]
    fn variables_are_there_for_the_load_and_gone_after_it() {
        let before: Vec<_> = env::vars_os().collect();
        let during = quietly(|| env::var("UCX_DEBUG_SIGNO"));
        assert_eq!(during.as_deref(), Ok("0"));
        assert_eq!(env::vars_os().collect::<Vec<_>>(), before);
    }
}
