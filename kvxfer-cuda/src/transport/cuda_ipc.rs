//! GPU to GPU: segments are imported and written by this GPU's copies.
//!
//! A segment travels as the POSIX descriptor of a physical allocation (CUDA VMM), through the Unix
//! socket. Nothing has to see the other process: no shared pid namespace, no ptrace. The bytes go over
//! NVLink or PCIe peer-to-peer, as the driver routes them. Two other kinds of handle travel in the blob:
//! a fabric's, also to other hosts of one NVLink domain, and that of legacy IPC.
//!
//! Posts run on the copier's side stream, so they end in later polls, whatever the budget of a poll. Posts
//! whose destinations overlap must not be under way at the same time.

mod blob;

use std::collections::HashMap;
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::sum::{word_key, words};
use kvxfer_core::transport::{Completion, Post, SegmentHandle, Transport};
use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};

use self::blob::Shared;
use super::overlap::Overlap;
use crate::device::{Copier, DevicePool, DeviceRegions, Done, Span};
use crate::driver::{Device, Handle, Mapped, PeerLink};
use crate::memory::inside;
use crate::planted::{Bug, planted};

/// The transport's name.
pub const NAME: PathName = PathName::CudaIpc;

/// Writes from this GPU into segments of other processes' GPUs.
#[derive(Debug)]
pub struct CudaIpc {
    device: Device,
    regions: Arc<DeviceRegions>,
    copier: Copier,
    segments: HashMap<(Incarnation, SegmentId), Attached>,
    /// Posts under way, by the copier's task.
    posts: HashMap<u64, Posted>,
    next_task: u64,
    spans: Vec<Span>,
    overlap: Overlap,
    done: Vec<Done>,
}

#[derive(Debug)]
struct Attached {
    mapped: Arc<Mapped>,
    bytes: u64,
    link: PeerLink,
}

#[derive(Debug)]
struct Posted {
    id: PostId,
    peer: Incarnation,
    /// What it writes to stays mapped until it ended, whoever detaches it.
    into: Vec<(SegmentId, Arc<Mapped>)>,
    /// One of those was detached: the consumer does not see the bytes.
    lost: bool,
}

impl CudaIpc {
    /// Writes from these regions with this copier.
    pub fn new(device: Device, regions: Arc<DeviceRegions>, copier: Copier) -> Self {
        Self {
            device,
            regions,
            copier,
            segments: HashMap::new(),
            posts: HashMap::new(),
            next_task: 0,
            spans: Vec::new(),
            overlap: Overlap::default(),
            done: Vec::new(),
        }
    }

    /// The copier: what the engine's streams and ours wait for.
    pub fn copier(&mut self) -> &mut Copier {
        &mut self.copier
    }

    /// Checks each write and turns it into a span. Which mappings they go to.
    fn plan(&mut self, post: &Post<'_>) -> Result<Vec<(SegmentId, Arc<Mapped>)>> {
        let mut into: Vec<(SegmentId, Arc<Mapped>)> = Vec::new();
        let mut index = 0;
        self.spans.clear();
        for write in post.writes {
            let attached = self.segments.get(&(post.peer, write.segment)).ok_or_else(|| {
                ErrorKind::NotFound.error(format!(
                    "segment {} of peer {} is not attached",
                    write.segment, post.peer
                ))
            })?;
            let src = self.regions.at(write.region, write.src, write.len)?;
            if !inside(attached.bytes, write.dst, write.len) {
                return Err(ErrorKind::OutOfBounds.error(format!(
                    "{} bytes from {} leave a segment of {} bytes",
                    write.len, write.dst, attached.bytes
                )));
            }
            if into.iter().all(|(segment, _)| *segment != write.segment) {
                into.push((write.segment, Arc::clone(&attached.mapped)));
            }
            if write.len > 0 {
                let dst = Some(attached.mapped.ptr().offset(write.dst));
                let key = word_key(post.seed, index);
                self.spans.push(Span { src, dst, len: write.len, key });
            }
            index += words(write.len);
        }
        self.overlap.refuse(post.writes)?;
        Ok(into)
    }

    /// Posts under way to what was detached end as lost.
    fn lose(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        for post in self.posts.values_mut().filter(|post| post.peer == peer) {
            let named = |&(id, _): &(SegmentId, _)| segment.is_none_or(|segment| segment == id);
            post.lost |= segment.is_none() || post.into.iter().any(named);
        }
    }
}

impl Drop for CudaIpc {
    fn drop(&mut self) {
        if let Err(error) = self.copier.drain(self.copier.patience()) {
            tracing::error!(%error, "copies to peers do not end: what they write to stays mapped");
            std::mem::forget((std::mem::take(&mut self.segments), std::mem::take(&mut self.posts)));
            std::mem::forget(Arc::clone(&self.regions));
        }
    }
}

impl Transport for CudaIpc {
    fn name(&self) -> PathName {
        NAME
    }

    fn attach(
        &mut self,
        peer: Incarnation,
        segment: SegmentId,
        handle: SegmentHandle,
    ) -> Result<()> {
        let attached = open(&self.device, handle)?;
        self.lose(peer, Some(segment));
        self.segments.insert((peer, segment), attached);
        Ok(())
    }

    fn detach(&mut self, peer: Incarnation, segment: Option<SegmentId>) {
        self.lose(peer, segment);
        self.segments.retain(|&(owner, id), _| {
            owner != peer || segment.is_some_and(|segment| id != segment)
        });
    }

    fn holds(&self, peer: Incarnation, segment: Option<SegmentId>) -> bool {
        let named = |id: SegmentId| segment.is_none_or(|segment| segment == id);
        let writes = |post: &Posted| {
            post.peer == peer
                && post.into.iter().any(|&(id, _)| named(id))
                && !planted(Bug::SegmentHandedOnEarly)
        };
        self.segments.keys().any(|&(owner, id)| owner == peer && named(id))
            || self.posts.values().any(writes)
    }

    fn post(&mut self, post: Post<'_>) -> Result<()> {
        let into = self.plan(&post)?;
        let task = self.next_task;
        self.copier.submit(task, &self.spans)?;
        self.next_task += 1;
        self.posts.insert(task, Posted { id: post.id, peer: post.peer, into, lost: false });
        Ok(())
    }

    fn poll(&mut self, _budget: u64, out: &mut Vec<Completion>) {
        self.copier.poll(&mut self.done);
        for Done { task, result } in self.done.drain(..) {
            let Some(Posted { id, peer, lost, .. }) = self.posts.remove(&task) else { continue };
            let result = if lost { Err(let_go(peer, id)) } else { result };
            out.push(Completion { id, peer, result });
        }
    }

    fn pending(&self) -> usize {
        self.posts.len()
    }

    fn rests(&mut self) -> bool {
        // The copier wakes its owner.
        true
    }

    fn lanes(&self, peer: Incarnation) -> Option<String> {
        let mut of_peer = self.segments.iter().filter(|((owner, _), _)| *owner == peer);
        of_peer.next().map(|(_, attached)| attached.link.to_string())
    }
}

fn let_go(peer: Incarnation, id: PostId) -> Error {
    ErrorKind::PeerLost.error(format!("{NAME} let go of peer {peer} with post {id} under way"))
}

/// What the one writer of a segment needs.
///
/// # Errors
/// As [`DevicePool::export`].
pub fn export(
    pool: &mut DevicePool,
    segment: SegmentId,
    writer: Incarnation,
) -> Result<SegmentHandle> {
    let by = pool.export(segment, writer)?;
    let (uuid, bytes) = (pool.device().uuid(), pool.segment_bytes());
    let (generation, physical) = (pool.generation(segment)?, pool.physical_bytes(segment)?);
    Ok(Shared { uuid, generation, bytes, physical, by }.write())
}

fn open(device: &Device, handle: SegmentHandle) -> Result<Attached> {
    let Shared { uuid, bytes, physical, by, .. } = Shared::read(handle)?;
    let link = match (device.link_to(uuid)?, &by) {
        // On another host, say. Whether the fabric reaches it, the import tells.
        (PeerLink::None { .. }, Handle::Fabric(_)) => PeerLink::NvLink,
        (PeerLink::None { why, fix }, _) => {
            return Err(ErrorKind::NoPath
                .error(format!("{} can't write to the peer's {uuid}: {why}", device.name()))
                .fix(fix));
        }
        (link, _) => link,
    };
    let fix = match &by {
        Handle::Fd(_) => {
            "let both containers see both GPUs (--gpus all), and choose with CUDA_VISIBLE_DEVICES"
        }
        Handle::Fabric(_) => {
            "have both hosts in one NVLink domain, with nvidia-imex running and its channel in both containers, or \
             set sharing to posix_fd on one host"
        }
        Handle::Legacy(_) => {
            "have the two in processes of their own, whose containers share PIDs and IPC (--pid=host --ipc=host), or \
             set sharing to posix_fd"
        }
    };
    let mapped = device
        .import_handle(&by, physical)
        .and_then(|physical| device.map(Arc::new(physical)))
        .map_err(|error| {
            ErrorKind::NoPath
                .error(format!("the peer's segment on {uuid} can't be imported: {error}"))
                .fix(fix)
        })?;
    Ok(Attached { mapped: Arc::new(mapped), bytes, link })
}
