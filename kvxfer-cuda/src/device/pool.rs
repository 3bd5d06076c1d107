//! The consumer's memory on a GPU.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};

use super::Span;
use crate::driver::{CudaError, Device, DevicePtr, Mapped};
use crate::memory::{Bytes, inside};

/// How long a start waits for memory that importers of an earlier life of this agent still hold.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_millis(50);

/// N equal segments of one GPU's memory. Each is a physical allocation of its own with its own file
/// descriptor, so that one peer is given one segment and can reach nothing else.
///
/// # Drop
/// Unmaps the segments. Whoever submitted copies from or to them has seen them end.
#[derive(Debug)]
pub struct DevicePool {
    device: Device,
    segments: Vec<Segment>,
    segment_bytes: u64,
    /// Whose imports may keep which memory from being free, in bytes.
    retired: Vec<(Incarnation, u64)>,
}

#[derive(Debug)]
struct Segment {
    mapped: Arc<Mapped>,
    generation: u64,
    /// Who was given its memory.
    writers: Vec<Incarnation>,
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
    /// Allocates `segments` segments of `segment_bytes` bytes, each rounded up to the GPU's granularity.
    ///
    /// Blocks for up to 5 s where memory is short: a peer that imported from an earlier life of this
    /// process keeps its memory until it notices.
    ///
    /// # Errors
    /// `Config` when either is 0 or the GPU can't share memory; `Device` when the memory can't be had.
    pub fn new(device: &Device, segments: u32, segment_bytes: u64) -> Result<Self> {
        let total = segment_bytes.saturating_mul(segments.into());
        if total == 0 {
            return Err(ErrorKind::Config
                .error(format!("a pool of {segments} segments of {segment_bytes} bytes is empty"))
                .fix("set buffer_size"));
        }
        if !device.supports_posix_fd() {
            return Err(ErrorKind::Config
                .error(format!("{} can't share memory between processes", device.name()))
                .fix("set kv_buffer_device to cpu"));
        }
        let start = Instant::now();
        let mut pool = Self {
            device: device.clone(),
            segments: Vec::with_capacity(segments as usize),
            segment_bytes,
            retired: Vec::new(),
        };
        while pool.segments.len() < segments as usize {
            match map(device, segment_bytes) {
                Ok(mapped) => {
                    pool.segments.push(Segment { mapped, generation: 0, writers: Vec::new() });
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
        tracing::info!(gpu = %device.uuid(), name = device.name(), segments, segment_bytes, rdma, "pool on a GPU");
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

    /// A descriptor of a segment's memory, for the one peer that may write to it.
    ///
    /// # Errors
    /// `NotFound`: no such segment. `Device`: the driver refuses.
    pub fn export(&mut self, id: SegmentId, writer: Incarnation) -> Result<OwnedFd> {
        let count = self.segments.len();
        let segment = self.segments.get_mut(id.0 as usize).ok_or_else(|| no_segment(id, count))?;
        let fd = segment.mapped.physical().export()?;
        if !segment.writers.contains(&writer) {
            segment.writers.push(writer);
        }
        Ok(fd)
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
        let mapped = map(&self.device, self.segment_bytes)
            .map_err(|error| self.too_little(self.segment_bytes, error))?;
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
        let bytes = old.bytes();
        self.retired.extend(segment.writers.drain(..).map(|writer| (writer, bytes)));
        Ok(old)
    }

    /// A writer is dead, or has unmapped all that it was given before: what it kept is free.
    pub fn let_go(&mut self, writer: Incarnation) {
        self.retired.retain(|&(holder, _)| holder != writer);
    }

    /// Bytes that were replaced and that their writers may still keep from being free.
    pub fn retired_bytes(&self) -> u64 {
        self.retired.iter().map(|&(_, bytes)| bytes).sum()
    }

    /// Keeps the memory for good: copies that can't be called back may use it.
    pub fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.segments));
    }

    fn find(&self, id: SegmentId) -> Result<&Segment> {
        self.segments.get(id.0 as usize).ok_or_else(|| no_segment(id, self.segments.len()))
    }

    fn too_little(&self, bytes: u64, error: CudaError) -> Error {
        if !error.is_out_of_memory() {
            return error.into();
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

fn map(device: &Device, bytes: u64) -> std::result::Result<Arc<Mapped>, CudaError> {
    let physical = Arc::new(device.allocate(bytes)?);
    device.map(physical).map(Arc::new)
}

fn no_segment(id: SegmentId, count: usize) -> Error {
    ErrorKind::NotFound.error(format!("segment {id} of a pool of {count} segments"))
}
