//! Device addresses: reserved without access rights, so that host code which dereferences one gets
//! SIGSEGV. The bytes are reached through a twin of the range that nobody outside knows.

use crate::abi::{Code, Result};
use crate::state::Gpu;

/// A moment in the life of the address space: work that was submitted then means the memory that lay
/// behind its addresses then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp(u64);

/// The present moment.
pub(crate) fn now() -> Stamp {
    Stamp(0)
}

/// A pointer to the bytes behind `len` bytes from `addr`, of device memory or of pinned host memory,
/// for `gpu` to read, or to write as well, as work that was submitted at `since`.
///
/// It stays good to dereference for ever. Memory that is unmapped later turns into bytes that mean
/// nothing: call this when the work runs, and again after each piece to learn whether the piece counts.
///
/// # Errors
/// `ILLEGAL_ADDRESS` when some of it is not mapped, was mapped only after `since`, or the device has no
/// such right.
pub(crate) fn resolve(addr: u64, len: u64, write: bool, gpu: Gpu, since: Stamp) -> Result<*mut u8> {
    let _ = (addr, len, write, gpu, since);
    Err(Code::ILLEGAL_ADDRESS)
}
