//! Same host: the consumer's memfd comes with its handle, is mapped once, and is then stored into.

use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, Incarnation, Result, SegmentId};
use rustix::fs::fstat;

use super::{Attach, Mapped, blob, read_blob};
use crate::memory::{HostPool, Mapping, Regions};

/// The transport to other processes of this host.
pub type Shm = Mapped<ByDescriptor>;

/// Finds a segment in the descriptor that comes with its handle.
#[derive(Debug)]
pub struct ByDescriptor;

impl Shm {
    /// Writes from these regions.
    pub fn new(regions: Arc<Regions>) -> Self {
        Self::over(ByDescriptor, regions)
    }
}

/// What the one writer of a segment needs: the memfd, and its inode, so that a descriptor that was
/// exchanged on the way is noticed.
///
/// # Errors
/// As [`HostPool::export`].
pub fn export(pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle> {
    let fd = pool.export(segment)?;
    let inode = fstat(&fd)
        .map_err(|error| ErrorKind::Io.error(format!("segment {segment}: {error}")))?
        .st_ino;
    Ok(SegmentHandle { blob: blob(inode), bytes: pool.segment_bytes(), fds: vec![fd] })
}

impl Attach for ByDescriptor {
    const NAME: PathName = PathName::Shm;

    fn open(&self, _: Incarnation, _: SegmentId, handle: SegmentHandle) -> Result<Arc<Mapping>> {
        let inode = read_blob(Self::NAME, &handle.blob)?;
        let [fd] = &handle.fds[..] else {
            return Err(ErrorKind::Protocol
                .error(format!("{} descriptors, one is needed", handle.fds.len())));
        };
        match fstat(fd) {
            Ok(stat) if stat.st_ino == inode => {}
            stat => {
                let got = stat.map(|stat| stat.st_ino);
                return Err(ErrorKind::Protocol
                    .error(format!("the descriptor is {got:?}, inode {inode} was promised")));
            }
        }
        Mapping::import(fd, handle.bytes).map(Arc::new)
    }
}
