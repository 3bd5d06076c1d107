//! What UCX packs for a peer, as it travels over our control link.
//!
//! UCX reads what it packed without looking where it ends. So it gets only what a checksum shows to be whole, with
//! zeros behind it. That guards against mistakes; against malice, the link is authenticated, and who may speak on it
//! is trusted.

use kvxfer_core::sum::Sum;
use kvxfer_core::{ErrorKind, Result};

use super::Version;

const FORMAT: u8 = 1;
const SEED: u64 = 0x5543_5831;
/// More than UCX reads when it takes a number in what it packed for a length.
const PADDING: usize = 4096;
/// What a worker packs for all transports there are is a few hundred bytes.
const LONGEST: usize = 4096;

/// Where a peer's worker is, and which UCX it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAddress {
    pub(super) version: Version,
    pub(super) packed: Vec<u8>,
}

/// Memory of a peer: its address there, its size, and UCX's key to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteMemory {
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) packed: Vec<u8>,
}

impl RemoteAddress {
    /// The version of UCX there.
    pub fn version(&self) -> Version {
        self.version
    }

    /// As bytes, for the peer.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Version { major, minor, patch } = self.version;
        let version = [major, minor, patch].map(u16::to_le_bytes);
        seal(version.as_flattened(), &self.packed)
    }

    /// From a peer's bytes.
    ///
    /// # Errors
    /// `Protocol`: that is no address.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (head, packed) = open::<6>("address", bytes)?;
        let [major, minor, patch] =
            [0, 2, 4].map(|at| u16::from_le_bytes([head[at], head[at + 1]]));
        Ok(Self { version: Version { major, minor, patch }, packed })
    }
}

impl RemoteMemory {
    /// Bytes that can be written.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// As bytes, for the peer.
    pub fn to_bytes(&self) -> Vec<u8> {
        let head = [self.address, self.bytes].map(u64::to_le_bytes);
        seal(head.as_flattened(), &self.packed)
    }

    /// From a peer's bytes.
    ///
    /// # Errors
    /// `Protocol`: that describes no memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let (head, packed) = open::<16>("memory", bytes)?;
        let (address, bytes) = head.split_at(8);
        let number =
            |bytes: &[u8]| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        let (address, bytes) = (number(address), number(bytes));
        if address.checked_add(bytes).is_none() {
            return Err(
                ErrorKind::Protocol.error(format!("{bytes} bytes from {address:#x} are no memory"))
            );
        }
        Ok(Self { address, bytes, packed })
    }
}

/// What UCX may be given to read.
pub(super) fn padded(packed: &[u8]) -> Vec<u8> {
    [packed, &[0; PADDING]].concat()
}

fn sum_of(body: &[u8]) -> u64 {
    let mut sum = Sum::new(SEED);
    sum.update(body);
    sum.finish()
}

/// Format, head, what UCX packed, and a sum of all that.
fn seal(head: &[u8], packed: &[u8]) -> Vec<u8> {
    let body = [&[FORMAT], head, packed].concat();
    let sum = sum_of(&body).to_le_bytes();
    [&body[..], &sum].concat()
}

fn open<const HEAD: usize>(what: &str, bytes: &[u8]) -> Result<([u8; HEAD], Vec<u8>)> {
    let whole = || {
        let (body, sum) = bytes.split_last_chunk::<8>()?;
        let (&format, rest) = body.split_first()?;
        let (head, packed) = rest.split_first_chunk::<HEAD>()?;
        let good = format == FORMAT
            && !packed.is_empty()
            && packed.len() <= LONGEST
            && sum_of(body) == u64::from_le_bytes(*sum);
        good.then(|| (*head, packed.to_vec()))
    };
    whole().ok_or_else(|| {
        ErrorKind::Protocol.error(format!("{} bytes are no {what} for UCX", bytes.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_come_back_and_none_that_was_changed_is_taken() {
        let version = Version { major: 1, minor: 22, patch: 0 };
        let address = RemoteAddress { version, packed: vec![7; 100] };
        let memory = RemoteMemory { address: 4096, bytes: 8192, packed: vec![9; 30] };
        assert_eq!(RemoteAddress::from_bytes(&address.to_bytes()).unwrap(), address);
        assert_eq!(RemoteMemory::from_bytes(&memory.to_bytes()).unwrap(), memory);

        let good = memory.to_bytes();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(RemoteMemory::from_bytes(&bad).is_err(), "{at}");
            let error = RemoteMemory::from_bytes(&good[..at]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Protocol);
        }
        let wraps = RemoteMemory { address: u64::MAX, bytes: 2, packed: vec![1] };
        assert!(RemoteMemory::from_bytes(&wraps.to_bytes()).is_err());
        let long = RemoteAddress { version, packed: vec![0; LONGEST + 1] };
        assert!(RemoteAddress::from_bytes(&long.to_bytes()).is_err());
    }
}
