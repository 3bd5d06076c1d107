//! What a descriptor of physical memory says about it: its file's name.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::readlink;

use crate::state::Gpu;

const PREFIX: &str = "kvxfer-standin";

/// The memory may be exported as a POSIX descriptor; the bits are those of the driver.
pub(super) const POSIX: u32 = 1;
/// The memory may be exported as a fabric handle.
pub(super) const FABRIC: u32 = 8;
/// The memory may be reached by RDMA.
pub(super) const RDMA: u32 = 1 << 8;

/// Unique in a machine, as long as the memory lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Name {
    pub(super) gpu: Gpu,
    /// How it may be exported, and [`RDMA`].
    pub(super) flags: u32,
    /// The process that made it.
    pub(super) owner: u32,
    pub(super) number: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { gpu, flags, owner, number } = self;
        write!(f, "{PREFIX}.{}.{flags}.{owner}.{number}", gpu.0)
    }
}

impl Name {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_prefix(PREFIX)?.strip_prefix('.')?.split('.');
        let name = Self {
            gpu: Gpu(parts.next()?.parse().ok()?),
            flags: parts.next()?.parse().ok()?,
            owner: parts.next()?.parse().ok()?,
            number: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(name)
    }

    /// The name of the file behind a descriptor, if it is physical memory.
    pub(super) fn of(fd: impl AsFd) -> Option<Self> {
        let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        let path = readlink(link, Vec::new()).ok()?.into_string().ok()?;
        // Of a memfd, and of a file that was removed, the kernel says so behind it.
        Self::parse(path.trim_end_matches(" (deleted)").rsplit(['/', ':']).next()?)
    }
}
