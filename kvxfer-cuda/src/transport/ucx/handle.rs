//! What a segment's handle says: how to connect, if that is not known, and the key to the segment's memory.

use kvxfer_core::transport::SegmentHandle;
use kvxfer_core::{ErrorKind, Result};

use crate::ucx::{RemoteAddress, RemoteMemory};

const VERSION: u8 = 1;

/// Version (1), bytes of the address (2, little-endian), the address, the memory.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Handle {
    /// Of the worker, in the first handle that a writer gets.
    pub(super) address: Option<RemoteAddress>,
    pub(super) memory: RemoteMemory,
}

impl Handle {
    pub(super) fn encode(&self) -> SegmentHandle {
        let address = self.address.as_ref().map_or_else(Vec::new, RemoteAddress::to_bytes);
        // What UCX packs is bounded far below that.
        let len = (address.len() as u16).to_le_bytes();
        let blob = [&[VERSION][..], &len, &address, &self.memory.to_bytes()].concat();
        SegmentHandle { blob, bytes: self.memory.bytes(), fds: Vec::new() }
    }

    pub(super) fn decode(handle: &SegmentHandle) -> Result<Self> {
        let wrong = || {
            let about = format!(
                "{} bytes do not describe a segment for {}",
                handle.blob.len(),
                super::NAME
            );
            ErrorKind::Protocol.error(about)
        };
        let ([version, low, high], rest) = handle.blob.split_first_chunk().ok_or_else(wrong)?;
        let len = usize::from(u16::from_le_bytes([*low, *high]));
        let (address, memory) = rest.split_at_checked(len).ok_or_else(wrong)?;
        if *version != VERSION {
            return Err(wrong());
        }
        let address = (len > 0).then(|| RemoteAddress::from_bytes(address)).transpose()?;
        let memory = RemoteMemory::from_bytes(memory)?;
        if memory.bytes() != handle.bytes || !handle.fds.is_empty() {
            return Err(ErrorKind::Protocol.error(format!(
                "the segment is {} bytes, {} were promised, with {} descriptors",
                memory.bytes(),
                handle.bytes,
                handle.fds.len()
            )));
        }
        Ok(Self { address, memory })
    }
}
