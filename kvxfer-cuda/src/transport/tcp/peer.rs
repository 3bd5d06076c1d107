//! A peer of the sender's: its segments, its streams, and the posts that none of these has begun.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Instant;

use kvxfer_core::transport::Write;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result, SegmentId};

use super::blob::Blob;
use super::frame::{Opening, Token};
use super::queue::{Piece, Queue, Queued};
use super::stream::{Phase, Stream};
use crate::memory::{Regions, inside};
use crate::transport::watch::Watch;

/// Bits of a token that are the stream's number; the others are the peer's.
const STREAM_BITS: u32 = 8;

pub(super) fn token(peer: u64, stream: u64) -> u64 {
    peer << STREAM_BITS | stream
}

pub(super) fn peer_and_stream(token: u64) -> (u64, usize) {
    (token >> STREAM_BITS, (token & ((1 << STREAM_BITS) - 1)) as usize)
}

pub(super) struct Peer {
    pub(super) name: Incarnation,
    number: u64,
    pub(super) segments: HashMap<SegmentId, Segment>,
    addresses: Vec<SocketAddr>,
    secrets: Vec<Token>,
    pub(super) streams: Vec<Stream>,
    /// Accepted, and begun by no stream.
    pub(super) waiting: Queue,
    /// Why there are no streams any more.
    pub(super) lost: Option<Error>,
}

#[derive(Clone, Copy)]
pub(super) struct Segment {
    pub(super) generation: u32,
    pub(super) bytes: u64,
}

impl Peer {
    pub(super) fn new(name: Incarnation, number: u64, blob: &Blob) -> Self {
        Self {
            name,
            number,
            segments: HashMap::new(),
            addresses: blob.addresses.clone(),
            secrets: blob.tokens.clone(),
            streams: Vec::new(),
            waiting: Queue::default(),
            lost: None,
        }
    }

    /// Starts a stream, at the `nth` address or the first one behind it to which that is possible.
    pub(super) fn dial(
        &mut self,
        watch: &Watch,
        writer: Incarnation,
        stream: usize,
        nth: usize,
        until: Instant,
    ) -> Result<()> {
        let opening = Opening { stream: stream as u32, token: self.secrets[stream], writer };
        let mut failed = None;
        for (nth, address) in self.addresses.iter().enumerate().skip(nth) {
            match Stream::start(nth, *address, opening, until) {
                Ok(started) => {
                    let token = token(self.number, stream as u64);
                    watch.add(started.socket(), token, started.interest)?;
                    match self.streams.get_mut(stream) {
                        Some(stream) => *stream = started,
                        None => self.streams.push(started),
                    }
                    return Ok(());
                }
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// The address that is left to be tried when a stream fails.
    pub(super) fn next_address(&self, stream: usize) -> Option<usize> {
        let stream = self.streams.get(stream)?;
        let next = stream.nth + 1;
        let connecting = matches!(stream.phase, Phase::Opening { connected: false, .. });
        (connecting && next < self.addresses.len()).then_some(next)
    }

    /// Ends its connections; the posts that end with them.
    pub(super) fn lose(&mut self, why: &Error) -> impl Iterator<Item = Queued> + use<> {
        self.segments.clear();
        self.lost = Some(why.clone());
        let waiting = std::mem::take(&mut self.waiting);
        let streams = std::mem::take(&mut self.streams).into_iter().map(Stream::abort);
        streams.chain([waiting]).flat_map(|queue| queue.posts)
    }

    /// Whether a segment, or any, is attached or named by a post.
    pub(super) fn holds(&self, segment: Option<SegmentId>) -> bool {
        let mut queues = self.streams.iter().map(|stream| &stream.queue).chain([&self.waiting]);
        match segment {
            Some(segment) => {
                self.segments.contains_key(&segment) || queues.any(|queue| queue.names(segment))
            }
            None => !self.segments.is_empty() || queues.any(|queue| !queue.posts.is_empty()),
        }
    }

    /// Checks each write and queues it. How many bytes they are; on an error some may be queued.
    pub(super) fn queue(&mut self, regions: &Regions, writes: &[Write]) -> Result<u64> {
        let mut bytes = 0;
        let mut last: Option<(SegmentId, Segment)> = None;
        for write in writes {
            let segment = match last {
                Some((id, segment)) if id == write.segment => segment,
                _ => *self.segments.get(&write.segment).ok_or_else(|| {
                    ErrorKind::NotFound.error(format!(
                        "segment {} of peer {} is not attached",
                        write.segment, self.name
                    ))
                })?,
            };
            last = Some((write.segment, segment));
            regions.at(write.region, write.src, write.len)?;
            if !inside(segment.bytes, write.dst, write.len) {
                return Err(ErrorKind::OutOfBounds.error(format!(
                    "{} bytes from {} leave a segment of {} bytes",
                    write.len, write.dst, segment.bytes
                )));
            }
            if write.len > 0 {
                self.waiting.writes.push_back(Piece {
                    region: write.region,
                    src: write.src,
                    segment: write.segment,
                    generation: segment.generation,
                    dst: write.dst,
                    len: write.len,
                });
                bytes += write.len;
            }
        }
        Ok(bytes)
    }
}
