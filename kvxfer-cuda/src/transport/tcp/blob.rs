//! What a segment's handle says: where to connect, and which memory is meant.

use std::net::{IpAddr, SocketAddr};

use kvxfer_core::Result;
use kvxfer_core::transport::SegmentHandle;

use super::frame::{Fields, Token, wrong};

const VERSION: u8 = 1;
/// The most addresses, and the most connections.
const ADDRESSES: usize = 8;
pub(super) const STREAMS: usize = 64;

/// A handle's blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blob {
    /// Of the segment's memory.
    pub(super) generation: u32,
    /// To be tried in turn; none where the connections are there already.
    pub(super) addresses: Vec<SocketAddr>,
    /// One for each connection.
    pub(super) tokens: Vec<Token>,
    /// Of the segment.
    pub(super) bytes: u64,
}

impl Blob {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut blob = vec![VERSION];
        blob.extend(self.generation.to_le_bytes());
        blob.push(self.addresses.len() as u8);
        for address in &self.addresses {
            match address.ip() {
                IpAddr::V4(ip) => {
                    blob.push(4);
                    blob.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    blob.push(6);
                    blob.extend(ip.octets());
                }
            }
            blob.extend(address.port().to_le_bytes());
        }
        blob.push(self.tokens.len() as u8);
        blob.extend(self.tokens.iter().flatten());
        blob.extend(self.bytes.to_le_bytes());
        blob
    }

    pub(super) fn decode(handle: &SegmentHandle) -> Result<Self> {
        let about = |error: kvxfer_core::Error| {
            wrong(format!("{} bytes do not describe a segment for tcp: {error}", handle.blob.len()))
        };
        let blob = Self::fields(&mut Fields(&handle.blob)).map_err(about)?;
        if blob.bytes != handle.bytes || !handle.fds.is_empty() {
            return Err(wrong(format!(
                "the segment is {} bytes, {} were promised, with {} descriptors",
                blob.bytes,
                handle.bytes,
                handle.fds.len()
            )));
        }
        Ok(blob)
    }

    fn fields(fields: &mut Fields<'_>) -> Result<Self> {
        let version = fields.u8()?;
        if version != VERSION {
            return Err(wrong(format!("it is of version {version}")));
        }
        let generation = fields.u32()?;
        let many = |count: u8, most: usize| match usize::from(count) {
            count if count <= most => Ok(count),
            count => Err(wrong(format!("{count} where {most} is the most"))),
        };
        let mut addresses = Vec::new();
        for _ in 0..many(fields.u8()?, ADDRESSES)? {
            let ip = match fields.u8()? {
                4 => IpAddr::from(fields.take::<4>()?),
                6 => IpAddr::from(fields.take::<16>()?),
                other => return Err(wrong(format!("an address of IPv{other}"))),
            };
            addresses.push(SocketAddr::new(ip, u16::from_le_bytes(fields.take()?)));
        }
        let mut tokens = Vec::new();
        for _ in 0..many(fields.u8()?, STREAMS)? {
            tokens.push(fields.take()?);
        }
        let bytes = fields.u64()?;
        if addresses.is_empty() != tokens.is_empty() {
            return Err(wrong("addresses and tokens come together"));
        }
        match fields.0 {
            [] => Ok(Self { generation, addresses, tokens, bytes }),
            rest => Err(wrong(format!("{} bytes too many", rest.len()))),
        }
    }
}
