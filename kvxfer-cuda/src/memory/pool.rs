//! The consumer's memory.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvxfer_core::{Error, ErrorKind, Result, SegmentId};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;

use super::available::{Bytes, available};
use super::mapping::{Mapping, SEALS};
use crate::copy::{self, Stores};

/// N equal segments of host memory, each a memfd of its own. All of it is allocated at the start: a
/// store to it never faults for want of memory.
#[derive(Debug)]
pub struct HostPool {
    segments: Vec<Segment>,
    segment_bytes: u64,
}

#[derive(Debug)]
struct Segment {
    fd: OwnedFd,
    mapping: Arc<Mapping>,
    generation: u64,
}

impl HostPool {
    /// Allocates `segments` segments of `segment_bytes` bytes.
    ///
    /// # Errors
    /// `Config` when either is 0; `Io` when the memory can't be had.
    pub fn new(segments: u32, segment_bytes: u64) -> Result<Self> {
        let total = segment_bytes.saturating_mul(segments.into());
        if total == 0 {
            return Err(ErrorKind::Config
                .error(format!("a pool of {segments} segments of {segment_bytes} bytes is empty"))
                .fix("set buffer_size"));
        }
        reserve(total)?;
        let segments = (0..segments)
            .map(|_| Segment::new(segment_bytes).map_err(|error| too_little(total, &error)))
            .collect::<Result<_>>()?;
        Ok(Self { segments, segment_bytes })
    }

    /// How many segments there are.
    pub fn segments(&self) -> u32 {
        self.segments.len() as u32
    }

    /// Bytes of each segment.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// The memory behind a segment now. [`HostPool::replace`] changes it, so ask each time.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn segment(&self, id: SegmentId) -> Result<&Arc<Mapping>> {
        self.find(id).map(|segment| &segment.mapping)
    }

    /// A descriptor of a segment's memory, for the one peer that may write to it.
    ///
    /// # Errors
    /// `NotFound`: no such segment. `Io`: no descriptor is free.
    pub fn export(&self, id: SegmentId) -> Result<OwnedFd> {
        self.find(id)?.fd.try_clone().map_err(|error| {
            ErrorKind::Io
                .error(format!("segment {id} can't be exported: {error}"))
                .fix("raise the limit on open files")
        })
    }

    /// How often a segment's memory was replaced.
    ///
    /// # Errors
    /// `NotFound`: no such segment.
    pub fn generation(&self, id: SegmentId) -> Result<u64> {
        self.find(id).map(|segment| segment.generation)
    }

    /// Puts fresh memory behind a segment, with the `live` (offset, length) ranges copied over and
    /// zeros elsewhere. Whoever still writes through an older export writes where nobody reads.
    ///
    /// Returns the new generation. The old memory is freed when its last importer lets go of it.
    ///
    /// # Errors
    /// `NotFound`, `OutOfBounds` for a live range, or `Io` when there is no memory for a moment with
    /// both. The segment is then as it was.
    pub fn replace(&mut self, id: SegmentId, live: &[(u64, u64)]) -> Result<u64> {
        let bytes = self.segment_bytes;
        let old = self.find(id)?;
        for &(offset, len) in live {
            old.mapping.at(offset, len)?;
        }
        reserve(bytes)?;
        let mut new = Segment::new(bytes).map_err(|error| too_little(bytes, &error))?;
        new.generation = old.generation + 1;
        for &(offset, len) in live {
            let from = old.mapping.at(offset, len)?;
            let to = new.mapping.at(offset, len)?;
            // SAFETY: `at` checked both ranges; they are of two mappings, both alive.
            unsafe { copy::copy_summed(to, from, len as usize, 0, 0, Stores::Cached) };
        }
        let generation = new.generation;
        self.segments[id.0 as usize] = new;
        Ok(generation)
    }

    fn find(&self, id: SegmentId) -> Result<&Segment> {
        self.segments.get(id.0 as usize).ok_or_else(|| {
            ErrorKind::NotFound
                .error(format!("segment {id} of a pool of {} segments", self.segments.len()))
        })
    }
}

impl Segment {
    fn new(bytes: u64) -> std::io::Result<Self> {
        let fd = memfd()?;
        ftruncate(&fd, bytes)?;
        fallocate(&fd, FallocateFlags::empty(), 0, bytes)?;
        fcntl_add_seals(&fd, SEALS)?;
        let mapping = Arc::new(Mapping::map(&fd, bytes)?);
        Ok(Self { fd, mapping, generation: 0 })
    }
}

fn memfd() -> rustix::io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create("kvxfer-pool", flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 knows no NOEXEC_SEAL.
        Err(Errno::INVAL) => memfd_create("kvxfer-pool", flags),
        created => created,
    }
}

/// Refuses what the host or a container does not have, before the kernel kills somebody for it.
fn reserve(bytes: u64) -> Result<()> {
    match available() {
        Some(available) if available < bytes => {
            Err(too_little(bytes, &format_args!("{} are available", Bytes(available))))
        }
        _ => Ok(()),
    }
}

fn too_little(bytes: u64, why: &dyn std::fmt::Display) -> Error {
    ErrorKind::Io
        .error(format!("the pool needs {} of shared memory: {why}", Bytes(bytes)))
        .fix("set buffer_size to less, or raise the container's memory limit")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(mapping: &Mapping, offset: u64, value: u8) {
        // SAFETY: one byte that `at` checked.
        unsafe { mapping.at(offset, 1).unwrap().write_volatile(value) };
    }

    fn get(mapping: &Mapping, offset: u64) -> u8 {
        // SAFETY: one byte that `at` checked.
        unsafe { mapping.at(offset, 1).unwrap().read_volatile() }
    }

    #[test]
    fn segments_are_apart_and_exports_reach_one() {
        let pool = HostPool::new(3, 8192).unwrap();
        assert_eq!((pool.segments(), pool.segment_bytes()), (3, 8192));
        let peer = Mapping::import(pool.export(SegmentId(1)).unwrap(), 8192).unwrap();
        put(&peer, 8191, 9);
        let seen = [0, 1, 2].map(|id| get(pool.segment(SegmentId(id)).unwrap(), 8191));
        assert_eq!(seen, [0, 9, 0]);
        assert_eq!(pool.export(SegmentId(3)).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(pool.segment(SegmentId(3)).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn fresh_memory_keeps_what_is_live_and_hides_the_old_writer() {
        let mut pool = HostPool::new(1, 8192).unwrap();
        let id = SegmentId(0);
        let zombie = Mapping::import(pool.export(id).unwrap(), 8192).unwrap();
        [(10, 1), (11, 2), (13, 3)].into_iter().for_each(|(at, value)| put(&zombie, at, value));

        assert_eq!(pool.replace(id, &[(8000, 193)]).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(pool.generation(id).unwrap(), 0);
        assert_eq!(pool.replace(id, &[(10, 2), (8191, 1)]).unwrap(), 1);
        assert_eq!(pool.generation(id).unwrap(), 1);

        put(&zombie, 11, 99);
        let now = pool.segment(id).unwrap();
        assert_eq!([10, 11, 13].map(|at| get(now, at)), [1, 2, 0]);
        let heir = Mapping::import(pool.export(id).unwrap(), 8192).unwrap();
        put(&heir, 13, 4);
        assert_eq!(get(now, 13), 4);
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_with_a_fix() {
        let error = HostPool::new(1 << 20, 1 << 40).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        let text = error.to_string();
        assert!(text.starts_with("the pool needs 1048576 TiB of shared memory: "), "{text}");
        assert!(text.contains("buffer_size"), "{text}");
        for (segments, bytes) in [(0, 4096), (1, 0)] {
            assert_eq!(HostPool::new(segments, bytes).unwrap_err().kind(), ErrorKind::Config);
        }
    }
}
