//! A consumer's memory, and what moves bytes out of it.
//!
//! In host memory the progress thread moves them, and each call has ended when it returns. A GPU's bytes move by
//! themselves: what ended comes out of [`Store::poll`].

mod device;
mod host;

use std::sync::Arc;

use kvxfer_core::path::PathName;
#[cfg(feature = "faults")]
use kvxfer_core::pool::Extent;
use kvxfer_core::session::Copied;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, Incarnation, LinkId, LoadId, Result, SegmentId};

use super::loads::{Piece, Planned};
use super::register::EngineMemory;
use crate::driver::Event;
use crate::transport::cuda_ipc;
use crate::transport::local::LocalExports;
use crate::transport::shm;

pub(super) use device::DeviceStore;
pub(super) use host::HostStore;

/// What a store has finished.
pub(super) enum Ended {
    /// A chunk was copied, or not.
    Copied(Copied),
    /// The end of a segment was compared with what its writer says it wrote.
    Verified { link: LinkId, segment: SegmentId, probe: u64, result: Result<()> },
    /// Fresh memory is behind a segment.
    Replaced(SegmentId),
}

/// A probe to compare.
#[derive(Clone, Copy)]
pub(super) struct Check {
    pub(super) link: LinkId,
    pub(super) segment: SegmentId,
    pub(super) probe: u64,
    pub(super) sum: u64,
    pub(super) path: PathName,
}

impl Check {
    /// Whether what is there is what its writer says it wrote.
    fn compare(&self, sum: u64) -> Result<()> {
        let &Self { path, segment, .. } = self;
        if sum == self.sum {
            return Ok(());
        }
        let error = ErrorKind::NoPath.error(format!(
            "what the producer writes to segment {segment} by {path} does not arrive"
        ));
        Err(match path {
        PathName::CudaIpc => error.fix(
            "an IOMMU or PCIe access control may drop writes between the GPUs: turn them off (iommu=pt, ACS), or set \
             kv_buffer_device to cpu",
        ),
        PathName::Local | PathName::Shm => error.fix("memory is not shared as it should be: report this"),
        PathName::Ucx | PathName::Tcp => error.fix("what is between the hosts loses or changes bytes: report this"),
    })
    }
}

pub(super) enum Store {
    Host(HostStore),
    Device(Box<DeviceStore>),
}

impl Store {
    /// Whether the caller's thread moves the bytes.
    pub(super) fn moves_now(&self) -> bool {
        matches!(self, Self::Host(_))
    }

    /// What a segment's one writer needs to reach it by that path.
    pub(super) fn export(
        &mut self,
        path: PathName,
        exports: &LocalExports,
        segment: SegmentId,
        writer: Incarnation,
    ) -> Result<SegmentHandle> {
        match self {
            Self::Host(store) if path == PathName::Local => exports.export(&store.pool, segment),
            Self::Host(store) => shm::export(&store.pool, segment),
            Self::Device(store) => cuda_ipc::export(&mut store.pool, segment, writer),
        }
    }

    /// Copies one layer of a chunk and has it compared with its checksum.
    ///
    /// # Errors
    /// `Corrupt`, or retryable: nothing of it was taken.
    pub(super) fn copy(
        &mut self,
        planned: &Planned,
        pieces: &[Piece],
        memory: &EngineMemory,
        wanted: u64,
    ) -> Result<()> {
        match (self, memory) {
            (Self::Host(store), EngineMemory::Host(regions)) => {
                store.copy(planned, pieces, regions, wanted)
            }
            (Self::Device(store), EngineMemory::Device(regions)) => {
                store.copy(planned, pieces, regions)
            }
            _ => Err(ErrorKind::Config.error("the engine's memory is not where the pool is")),
        }
    }

    /// All layers of a chunk were handed over, or one was refused.
    pub(super) fn whole(
        &mut self,
        place: (LoadId, u32),
        result: Result<()>,
        ended: &mut Vec<Ended>,
    ) {
        match self {
            Self::Host(_) => ended.push(super::loads::copied(place, result)),
            Self::Device(store) => store.whole(place, result, ended),
        }
    }

    pub(super) fn verify(&mut self, check: Check, ended: &mut Vec<Ended>) {
        match self {
            Self::Host(store) => {
                let Check { link, segment, probe, .. } = check;
                let result = store.verify(check);
                ended.push(Ended::Verified { link, segment, probe, result });
            }
            Self::Device(store) => store.verify(check),
        }
    }

    /// Puts fresh memory behind a segment, with the live ranges (offset, bytes) copied over.
    ///
    /// # Errors
    /// There is no memory for both at once.
    pub(super) fn replace(
        &mut self,
        segment: SegmentId,
        live: &[(u64, u64)],
        ended: &mut Vec<Ended>,
    ) -> Result<()> {
        match self {
            Self::Host(store) => {
                store.pool.replace(segment, live)?;
                ended.push(Ended::Replaced(segment));
                Ok(())
            }
            Self::Device(store) => store.replace(segment, live),
        }
    }

    /// Whether nothing is under way.
    pub(super) fn is_idle(&self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Device(store) => store.is_idle(),
        }
    }

    /// What is copied from now on comes after that event of the engine's.
    ///
    /// # Errors
    /// The GPU is broken.
    pub(super) fn wait_for(&mut self, event: &Arc<Event>) -> Result<()> {
        match self {
            Self::Host(_) => Ok(()),
            Self::Device(store) => store.wait_for(event),
        }
    }

    /// Appends what ended.
    pub(super) fn poll(&mut self, ended: &mut Vec<Ended>) {
        if let Self::Device(store) = self {
            store.poll(ended);
        }
    }

    /// What has not begun ends with an error.
    pub(super) fn give_up(&mut self) {
        if let Self::Device(store) = self {
            store.give_up();
        }
    }

    /// Gives up what has not begun. Whether it is known that nothing is under way; if not, nothing waits for it any
    /// more, and the memory is kept.
    pub(super) fn has_ended(&mut self) -> bool {
        match self {
            Self::Host(_) => true,
            Self::Device(store) => store.has_ended(),
        }
    }

    /// Whether the end of that peer's process is still to be told.
    pub(super) fn waits_for(&self, peer: Incarnation) -> bool {
        matches!(self, Self::Device(store) if store.pool.waits_for(peer))
    }

    /// That peer's process ended.
    pub(super) fn dead(&mut self, peer: Incarnation) {
        if let Self::Device(store) = self {
            store.pool.let_go(peer);
        }
    }

    /// Spoils a chunk, for tests.
    #[cfg(feature = "faults")]
    pub(super) fn flip(&mut self, extent: &Extent, page_bytes: u64) {
        let offset = u64::from(extent.page) * page_bytes;
        match self {
            Self::Host(store) => store.flip(extent.segment, offset),
            Self::Device(store) => store.flip(extent.segment, offset),
        }
    }
}
