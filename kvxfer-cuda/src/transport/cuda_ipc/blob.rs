//! What a segment's handle says, beside a descriptor or instead of one.
//!
//! All numbers are little-endian: version, the kind of the memory's handle, the GPU's UUID, the segment's generation,
//! its bytes, those of the allocation, the 64 bytes of a handle that is no descriptor, and the checksum of all that.
//! Versions start at 1.

use std::os::fd::OwnedFd;

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, Result};

use super::NAME;
use crate::driver::{Handle, Uuid};

const VERSION: u8 = 1;
const POSIX_FD: u8 = 0;
const FABRIC: u8 = 1;
const LEGACY: u8 = 2;

/// A segment of a pool, as its writer is told of it.
#[derive(Debug)]
pub(super) struct Shared {
    /// The GPU that it is on.
    pub(super) uuid: Uuid,
    pub(super) generation: u64,
    pub(super) bytes: u64,
    /// Bytes of its allocation.
    pub(super) physical: u64,
    /// What imports it.
    pub(super) by: Handle,
}

impl Shared {
    pub(super) fn write(self) -> SegmentHandle {
        let (kind, name, fds) = match self.by {
            Handle::Fd(fd) => (POSIX_FD, None, vec![fd]),
            Handle::Fabric(name) => (FABRIC, Some(name), vec![]),
            Handle::Legacy(name) => (LEGACY, Some(name), vec![]),
        };
        let mut blob = vec![VERSION, kind];
        blob.extend(self.uuid.0);
        for number in [self.generation, self.bytes, self.physical] {
            blob.extend(number.to_le_bytes());
        }
        blob.extend(name.iter().flatten());
        blob.extend(check(&blob).to_le_bytes());
        SegmentHandle { blob, bytes: self.bytes, fds }
    }

    /// # Errors
    /// `Protocol`: it says nothing that is understood here.
    pub(super) fn read(handle: SegmentHandle) -> Result<Self> {
        let SegmentHandle { blob, bytes, fds } = handle;
        let (length, descriptors) = (blob.len(), fds.len());
        let malformed = || {
            ErrorKind::Protocol.error(format!(
                "{length} bytes and {descriptors} descriptors do not describe a segment of {bytes} bytes for {NAME}"
            ))
        };
        let (kind, rest) = parse(&blob).ok_or_else(malformed)?;
        if !matches!(kind, POSIX_FD | FABRIC | LEGACY) {
            return Err(ErrorKind::Protocol
                .error(format!("the peer shares GPU memory in a way that is unknown here ({kind})"))
                .fix("run the same version of kvxfer on both sides"));
        }
        let shared = fields(kind, rest, fds).ok_or_else(malformed)?;
        let fits = shared.bytes == bytes && bytes <= shared.physical;
        if fits { Ok(shared) } else { Err(malformed()) }
    }
}

/// The kind, and what follows it.
fn parse(blob: &[u8]) -> Option<(u8, &[u8])> {
    let (told, &sum) = blob.split_last_chunk()?;
    let (&[version, kind], rest) = told.split_first_chunk()?;
    (version == VERSION && u64::from_le_bytes(sum) == check(told)).then_some((kind, rest))
}

fn fields(kind: u8, rest: &[u8], fds: Vec<OwnedFd>) -> Option<Shared> {
    let (&uuid, rest) = rest.split_first_chunk()?;
    let (numbers, name) = rest.split_first_chunk::<24>()?;
    let &[generation, bytes, physical] = numbers.as_chunks().0 else { return None };
    let [generation, bytes, physical] = [generation, bytes, physical].map(u64::from_le_bytes);
    let by = match (kind, <[OwnedFd; 1]>::try_from(fds)) {
        (POSIX_FD, Ok([fd])) if name.is_empty() => Handle::Fd(fd),
        (FABRIC, Err(none)) if none.is_empty() => Handle::Fabric(name.try_into().ok()?),
        (LEGACY, Err(none)) if none.is_empty() => Handle::Legacy(name.try_into().ok()?),
        _ => return None,
    };
    Some(Shared { uuid: Uuid(uuid), generation, bytes, physical, by })
}

fn check(blob: &[u8]) -> u64 {
    let mut sum = Sum::new(0);
    sum.update(blob);
    sum.finish()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    const KINDS: [fn() -> Handle; 3] =
        [|| Handle::Fd(fd()), || Handle::Fabric([5; 64]), || Handle::Legacy([6; 64])];

    fn handle(by: Handle) -> SegmentHandle {
        Shared { uuid: Uuid([7; 16]), generation: 8, bytes: 4096, physical: 1 << 21, by }.write()
    }

    /// The same with other bytes under a checksum that fits them.
    fn signed(by: Handle, spoil: impl FnOnce(&mut Vec<u8>)) -> SegmentHandle {
        let mut handle = handle(by);
        handle.blob.truncate(handle.blob.len() - 8);
        spoil(&mut handle.blob);
        handle.blob.extend(check(&handle.blob).to_le_bytes());
        handle
    }

    #[track_caller]
    fn refused(handle: SegmentHandle, why: &str) {
        let error = Shared::read(handle).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains(why), "{error}");
    }

    #[test]
    fn what_is_written_is_read() {
        for by in KINDS {
            let read = Shared::read(handle(by())).unwrap();
            match (by(), read.by) {
                (Handle::Fd(_), Handle::Fd(_)) => {}
                (Handle::Fabric(name), Handle::Fabric(told))
                | (Handle::Legacy(name), Handle::Legacy(told)) => assert_eq!(name, told),
                (by, told) => panic!("{by:?} is read as {told:?}"),
            }
            assert_eq!((read.uuid, read.generation), (Uuid([7; 16]), 8));
            assert_eq!((read.bytes, read.physical), (4096, 1 << 21));
        }
    }

    #[test]
    fn a_kind_of_a_later_version_is_named() {
        let later = signed(Handle::Fabric([5; 64]), |blob| blob[1] = 3);
        refused(later, "unknown here (3) (run the same version");
    }

    #[test]
    fn each_kind_has_what_it_needs_and_nothing_more() {
        for (kind, by) in (0..).zip(KINDS) {
            let mut more = handle(by());
            more.fds.push(fd());
            refused(more, "do not describe");
            refused(signed(by(), |blob| blob.push(0)), "do not describe");
            refused(signed(by(), |blob| blob.truncate(blob.len() - 1)), "do not describe");
            for other in (0..3).filter(|&other| (other == POSIX_FD) != (kind == POSIX_FD)) {
                refused(signed(by(), |blob| blob[1] = other), "do not describe");
            }
        }
        let none = SegmentHandle { fds: vec![], ..handle(Handle::Fd(fd())) };
        refused(none, "do not describe");
    }

    #[test]
    fn numbers_that_contradict_each_other_are_refused() {
        // Fewer bytes in the allocation than in the segment, and other bytes than the message says.
        let small = signed(Handle::Legacy([6; 64]), |blob| blob[34..42].fill(0));
        refused(small, "do not describe");
        refused(
            SegmentHandle { bytes: 4097, ..handle(Handle::Legacy([6; 64])) },
            "do not describe",
        );
        refused(signed(Handle::Legacy([6; 64]), |blob| blob[0] = 2), "do not describe");
    }

    #[test]
    fn each_byte_counts() {
        for by in KINDS {
            for at in 0..handle(by()).blob.len() {
                let mut spoilt = handle(by());
                spoilt.blob[at] ^= 1;
                refused(spoilt, "do not describe");
            }
        }
    }
}
