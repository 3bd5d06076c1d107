//! The consumer's memory on a GPU.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};

use super::Span;
use crate::driver::{CudaError, Device, DevicePtr, Handle, Mapped, Sharing};
use crate::memory::{Bytes, inside};

/// How long a start waits for memory that importers of an earlier life of this agent still hold.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(50);

/// N equal segments of one GPU's memory. Each is a physical allocation of its own with its own
/// handle, so that one peer is given one segment and can reach nothing else.
///
/// What a writer imported exists as long as it has it, whatever is done here; but plain memory
/// ([`Sharing::Legacy`]) must not be freed before. So there a segment's old memory is kept until its writer
/// has let go, and what a writer may have open at the end is never freed by this process.
///
/// # Drop
/// Unmaps the segments. Whoever submitted copies from or to them has seen them end.
#[derive(Debug)]
pub struct DevicePool {
    device: Device,
    sharing: Sharing,
    segments: Vec<Segment>,
    segment_bytes: u64,
    retired: Vec<Retired>,
}

#[derive(Debug)]
struct Segment {
    mapped: Arc<Mapped>,
    generation: u64,
    /// Who was given its memory. One at a time: whoever had it before has let go of it.
    writer: Option<Incarnation>,
}

/// Memory that was replaced, and whose import may keep it from being free.
#[derive(Debug)]
struct Retired {
    writer: Incarnation,
    bytes: u64,
    /// Held for its effect on drop: plain memory.
    _plain: Option<Arc<Mapped>>,
}

/// Memory that is to take a segment's place, and what has to be copied to it first.
#[derive(Debug)]
pub struct Fresh {
    id: SegmentId,
    mapped: Arc<Mapped>,
    /// From the old memory to the new. Nothing in it is summed for anybody.
    pub spans: Vec<Span>,
}

impl DevicePool {
    /// Allocates `segments` segments of `segment_bytes` bytes, each rounded up to the GPU's granularity, to be
    /// shared as file descriptors.
    ///
    /// Blocks for up to 5 s where memory is short: a peer that imported from an earlier life of this
    /// process keeps its memory until it notices.
    ///
    /// # Errors
    /// `Config` when either is 0 or the GPU can't share memory; `Device` when the memory can't be had.
    pub fn new(device: &Device, segments: u32, segment_bytes: u64) -> Result<Self> {
        Self::new_as(device, Sharing::PosixFd, segments, segment_bytes)
    }

    /// The same, to be shared in another way.
    ///
    /// # Errors
    /// As [`DevicePool::new`].
    pub fn new_as(
        device: &Device,
        sharing: Sharing,
        segments: u32,
        segment_bytes: u64,
    ) -> Result<Self> {
        let total = segment_bytes.saturating_mul(segments.into());
        if total == 0 {
            return Err(ErrorKind::Config
                .error(format!("a pool of {segments} segments of {segment_bytes} bytes is empty"))
                .fix("set buffer_size"));
        }
        check_support(device, sharing)?;
        let start = Instant::now();
        let mut pool = Self {
            device: device.clone(),
            sharing,
            segments: Vec::with_capacity(segments as usize),
            segment_bytes,
            retired: Vec::new(),
        };
        while pool.segments.len() < segments as usize {
            match pool.allocate() {
                Ok(mapped) => {
                    pool.segments.push(Segment { mapped, generation: 0, writer: None });
                }
                Err(error) if error.is_out_of_memory() && start.elapsed() < PATIENCE => {
                    thread::sleep(RETRY);
                }
                Err(error) => return Err(pool.too_little(total, error)),
            }
        }
        // What was asked for need not be what is there: network cards go by what the driver says of
        // the mapping.
        let rdma = pool.segments.iter().all(|one| one.mapped.rdma_verified().unwrap_or(false));
        tracing::info!(gpu = %device.uuid(), name = device.name(), %sharing, segments, segment_bytes, rdma, "pool on a GPU");
        Ok(pool)
    }

    /// The GPU.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How many segments there are.
    pub fn segments(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Bytes of each segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// The memory behind a segment now. [`DevicePool::swap`] changes it, so ask each time.
    ///
    /// # Errors
    /// `NotFound`: no such segment. `OutOfBounds`: the range leaves it.
    pub fn at(&self, id: SegmentId, offset: u64, len: u64) -> Result<DevicePtr> {
        let segment = self.find(id)?;
        if !inside(self.segment_bytes, offset, len) {
            return Err(ErrorKind::OutOfBounds.error(format!(
                "{len} bytes from {offset} leave a segment of {} bytes",
                self.segment_bytes
            )));
        }
        Ok(segment.mapped.ptr().offset(offset))
    }

    /// By what the one peer that may write to a segment imports its memory.
    ///
    /// # Errors
    /// `NotFound`: no such segment. `Device`: the driver refuses.
    pub fn export(&mut self, id: SegmentId, writer: Incarnation) -> Result<Handle> {
        let count = self.segments.len();
        let segment = self.segments.get_mut(id.0 as usize).ok_or_else(|| no_segment(id, count))?;
        let handle = segment.mapped.physical().share()?;
        segment.writer = Some(writer);
        Ok(handle)
    }

    /// Bytes of the allocation behind a segment, which an importer maps as a whole.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn physical_bytes(&self, id: SegmentId) -> Result<u64> {
        self.find(id).map(|segment| segment.mapped.bytes())
    }

    /// How often a segment's memory was replaced.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn generation(&self, id: SegmentId) -> Result<u64> {
        self.find(id).map(|segment| segment.generation)
    }

    /// Memory to take a segment's place. The `live` (offset, length) ranges are to be copied as its
    /// `spans` say, on the stream that also reads the pool; then comes [`DevicePool::swap`]. Until that
    /// the segment is as it was.
    ///
    /// # Errors
    /// `NotFound`, `OutOfBounds` for a live range, or `Device` when there is no memory for both at once.
    pub fn fresh(&self, id: SegmentId, live: &[(u64, u64)]) -> Result<Fresh> {
        let from = live
            .iter()
            .map(|&(offset, len)| self.at(id, offset, len))
            .collect::<Result<Vec<_>>>()?;
        self.find(id)?;
        let mapped = self.allocate().map_err(|error| self.too_little(self.segment_bytes, error))?;
        let spans = from.into_iter().zip(live).map(|(src, &(offset, len))| Span {
            src,
            dst: Some(mapped.ptr().offset(offset)),
            len,
            key: 0,
        });
        Ok(Fresh { id, spans: spans.collect(), mapped })
    }

    /// Puts the fresh memory in place, after its spans were copied. Whoever still writes through an older
    /// export writes where nobody reads.
    ///
    /// Returns the old memory. Drop it when everything that was submitted before has ended: it is
    /// unmapped then. Its bytes count as [retired](Self::retired_bytes) until its writers let go.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn swap(&mut self, fresh: Fresh) -> Result<Arc<Mapped>> {
        let (id, count) = (fresh.id, self.segments.len());
        let segment = self.segments.get_mut(id.0 as usize).ok_or_else(|| no_segment(id, count))?;
        let old = std::mem::replace(&mut segment.mapped, fresh.mapped);
        segment.generation += 1;
        if let Some(writer) = segment.writer.take() {
            let plain = (self.sharing == Sharing::Legacy).then(|| Arc::clone(&old));
            self.retired.push(Retired { writer, bytes: old.bytes(), _plain: plain });
        }
        Ok(old)
    }

    /// A writer is dead, or has unmapped all that it was given before: what it kept is free.
    pub fn let_go(&mut self, writer: Incarnation) {
        self.retired.retain(|retired| retired.writer != writer);
        for segment in &mut self.segments {
            segment.writer = segment.writer.filter(|&holder| holder != writer);
        }
    }

    /// Whether memory that was replaced waits for that writer to let go.
    pub fn waits_for(&self, writer: Incarnation) -> bool {
        self.retired.iter().any(|retired| retired.writer == writer)
    }

    /// Bytes that were replaced and that their writers may still keep from being free.
    pub fn retired_bytes(&self) -> u64 {
        self.retired.iter().map(|retired| retired.bytes).sum()
    }

    /// Keeps the memory for good: copies that can't be called back may use it.
    pub fn leak(&mut self) {
        std::mem::forget((std::mem::take(&mut self.segments), std::mem::take(&mut self.retired)));
    }

    fn allocate(&self) -> std::result::Result<Arc<Mapped>, CudaError> {
        let physical = self.device.allocate_as(self.sharing, self.segment_bytes)?;
        self.device.map(Arc::new(physical)).map(Arc::new)
    }

    fn find(&self, id: SegmentId) -> Result<&Segment> {
        self.segments.get(id.0 as usize).ok_or_else(|| no_segment(id, self.segments.len()))
    }

    fn too_little(&self, bytes: u64, error: CudaError) -> Error {
        if !error.is_out_of_memory() {
            let error = Error::from(error);
            return match self.sharing {
                // The GPU could, and its host takes part in none.
                Sharing::Fabric => error.fix(
                    "start nvidia-imex and give the container its channel (/dev/nvidia-caps-imex-channels), or set \
                     sharing to posix_fd",
                ),
                _ => error,
            };
        }
        let held = match self.retired_bytes() {
            0 => String::new(),
            retired => format!(", and {} may be held by peers that were cut off", Bytes(retired)),
        };
        let free = self.device.memory().map_or(0, |(free, _)| free);
        ErrorKind::Device
            .error(format!(
                "the pool needs {} of GPU memory: {} are free on {}{held}",
                Bytes(bytes),
                Bytes(free),
                self.device.name()
            ))
            .fix("set buffer_size to less, or the engine's gpu_memory_utilization")
    }
}

impl Drop for DevicePool {
    fn drop(&mut self) {
        if self.sharing == Sharing::Legacy {
            let segments = self.segments.drain(..);
            let held: Vec<_> = segments.filter(|segment| segment.writer.is_some()).collect();
            if !held.is_empty() || !self.retired.is_empty() {
                tracing::warn!(gpu = %self.device.uuid(), "writers may have the pool's memory open: it is theirs until this process ends");
            }
            std::mem::forget((held, std::mem::take(&mut self.retired)));
        }
    }
}

fn check_support(device: &Device, sharing: Sharing) -> Result<()> {
    let (can, fix) = match sharing {
        Sharing::PosixFd => {
            (device.supports_posix_fd(), "set sharing to legacy, or kv_buffer_device to cpu")
        }
        Sharing::Fabric => (
            device.supports_fabric(),
            "set sharing to posix_fd; fabric needs GPUs of one NVLink domain",
        ),
        // Memory is freed when its writer has died, and under MPS a dead client's work may go on.
        Sharing::Legacy => (
            !device.is_mig() && !device.under_mps(),
            "set sharing to posix_fd; legacy needs a whole GPU, and no MPS",
        ),
    };
    if can {
        return Ok(());
    }
    Err(ErrorKind::Config
        .error(format!("{} can't share memory between processes as {sharing}", device.name()))
        .fix(fix))
}

fn no_segment(id: SegmentId, count: usize) -> Error {
    ErrorKind::NotFound.error(format!("segment {id} of a pool of {count} segments"))
}
