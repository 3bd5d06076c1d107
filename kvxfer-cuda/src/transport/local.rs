//! Same process: segments are found in a table that consumers put them in.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use kvxfer_core::path::PathName;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, Incarnation, Result, SegmentId};
use parking_lot::Mutex;

use super::{Attach, Mapped, blob, read_blob};
use crate::memory::{HostPool, Mapping, Regions};

/// What each consumer of this process exported, by its incarnation: generation and memory. An entry
/// without segments still tells that the consumer is here.
static HERE: LazyLock<Mutex<HashMap<Incarnation, Exported>>> = LazyLock::new(Mutex::default);

type Exported = HashMap<SegmentId, (u64, Arc<Mapping>)>;

/// The transport to agents of this process.
pub type Local = Mapped<ByName>;

/// Finds a segment in the process's table.
#[derive(Debug)]
pub struct ByName;

impl Local {
    /// Writes from these regions.
    pub fn new(regions: Arc<Regions>) -> Self {
        Self::over(ByName, regions)
    }

    /// Whether that peer is an agent of this process.
    pub fn reaches(peer: Incarnation) -> bool {
        HERE.lock().contains_key(&peer)
    }
}

/// A consumer's entries in the process's table, from its start to its close. Who attached a segment
/// keeps its memory alive, so removing the entries is safe at any time.
#[derive(Debug)]
pub struct LocalExports {
    owner: Incarnation,
}

impl LocalExports {
    /// Tells that this consumer is here.
    pub fn new(owner: Incarnation) -> Self {
        HERE.lock().entry(owner).or_default();
        Self { owner }
    }

    /// What the one writer of a segment needs: the generation, so that a handle from before
    /// [`HostPool::replace`] does not open what came after.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn export(&self, pool: &HostPool, segment: SegmentId) -> Result<SegmentHandle> {
        let generation = pool.generation(segment)?;
        let mapping = Arc::clone(pool.segment(segment)?);
        HERE.lock().entry(self.owner).or_default().insert(segment, (generation, mapping));
        let blob = blob(generation);
        Ok(SegmentHandle { blob, bytes: pool.segment_bytes(), fds: Vec::new() })
    }
}

impl Drop for LocalExports {
    fn drop(&mut self) {
        HERE.lock().remove(&self.owner);
    }
}

impl Attach for ByName {
    const NAME: PathName = PathName::Local;

    fn open(
        &self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<Arc<Mapping>> {
        let promised = read_blob(Self::NAME, &handle.blob)?;
        let (generation, mapping) = find(peer, segment).ok_or_else(|| {
            ErrorKind::NotFound
                .error(format!("peer {peer} exported no segment {segment} in this process"))
        })?;
        if (generation, mapping.bytes()) != (promised, handle.bytes) || !handle.fds.is_empty() {
            return Err(ErrorKind::Protocol.error(format!(
                "the segment is {} bytes of generation {generation}, {} of generation {promised} \
                 were promised, with {} descriptors",
                mapping.bytes(),
                handle.bytes,
                handle.fds.len()
            )));
        }
        Ok(mapping)
    }
}

/// A segment's generation and memory.
pub(super) fn find(peer: Incarnation, segment: SegmentId) -> Option<(u64, Arc<Mapping>)> {
    HERE.lock().get(&peer)?.get(&segment).cloned()
}
