//! One data connection, at the target.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvxfer_core::{Error, ErrorKind, Incarnation, PostId, Result, SegmentId};
use rustix::net::{RecvFlags, SendFlags};

use super::frame::{Ack, Head, SPANS, Span, wrong};
use super::io::Scatter;
use super::socket;
use crate::memory::Mapping;
use crate::transport::target::{Incoming, Leave};
use crate::transport::watch::Interest;

/// Bytes of a turn: of a call, mostly.
const TURN: u64 = 512 << 10;
/// What a frame costs of the budget at least.
const FRAME_COST: u64 = 512;
/// Bytes of acknowledgements that a writer may leave unread before nothing more of its is read.
pub(super) const UNREAD: usize = 64 << 10;

/// The segments that were exported.
#[derive(Debug, Default)]
pub(super) struct Exports(pub(super) HashMap<SegmentId, Export>);

#[derive(Debug)]
pub(super) struct Export {
    pub(super) writer: Incarnation,
    pub(super) generation: u32,
    pub(super) memory: Arc<Mapping>,
}

impl Exports {
    /// The memory that a writer means. `None` when it was replaced.
    fn find(&self, writer: Incarnation, span: &Span) -> Result<Option<&Mapping>> {
        let export = self.0.get(&span.segment).filter(|export| export.writer == writer);
        let export = export.ok_or_else(|| {
            ErrorKind::Protocol
                .error(format!("it wrote to segment {}, which is not its", span.segment))
        })?;
        Ok((export.generation == span.generation).then_some(&*export.memory))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Head,
    Spans,
    Bytes,
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Its next turn.
    More,
    /// The socket.
    Idle,
}

pub(super) struct Receive {
    socket: OwnedFd,
    pub(super) writer: Incarnation,
    /// As the poller knows it.
    pub(super) interest: Interest,
    /// Whether it has a turn coming.
    pub(super) queued: bool,
    stage: Stage,
    /// The next frame's head, and the spans as they came: of whichever the stage is, as many bytes are there.
    head: [u8; Head::BYTES],
    raw: Vec<u8>,
    filled: usize,
    frame: Option<Head>,
    spans: Vec<Span>,
    /// The next byte to be stored: of which span, and where in it.
    span: usize,
    at: u64,
    /// The post of which more frames come.
    unfinished: Option<PostId>,
    /// All of its bytes so far were stored.
    stored: bool,
    /// Acknowledgements to be sent.
    acks: Vec<u8>,
}

impl Receive {
    pub(super) fn new(socket: OwnedFd, writer: Incarnation, interest: Interest) -> Self {
        Self {
            socket,
            writer,
            interest,
            queued: false,
            stage: Stage::Head,
            head: [0; Head::BYTES],
            raw: Vec::with_capacity(SPANS * Span::BYTES),
            filled: 0,
            frame: None,
            spans: Vec::with_capacity(SPANS),
            span: 0,
            at: 0,
            unfinished: None,
            stored: true,
            acks: Vec::new(),
        }
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    #[cfg(test)]
    pub(super) fn unread(&self) -> usize {
        self.acks.len()
    }

    /// What the socket is to be watched for now.
    pub(super) fn wants(&self) -> Interest {
        Interest { read: self.acks.len() < UNREAD, write: !self.acks.is_empty() }
    }

    /// Stores what has come, for a turn, and acknowledges what is complete.
    pub(super) fn turn(
        &mut self,
        exports: &Exports,
        leave: Leave<'_>,
        budget: &mut u64,
    ) -> Result<Turn> {
        let mut left = TURN.min(*budget);
        let before = left;
        let mut turn = Turn::More;
        while left > 0 && turn == Turn::More && self.wants().read {
            turn = match self.stage {
                Stage::Head => self.read_head()?,
                Stage::Spans => {
                    left = left.saturating_sub(FRAME_COST);
                    self.read_spans()?
                }
                Stage::Bytes => self.store(exports, leave, &mut left)?,
            };
        }
        *budget -= before - left;
        self.acknowledge()?;
        // Until acknowledgements are read, only the socket can tell when there is more to do.
        if self.wants().read { Ok(turn) } else { Ok(Turn::Idle) }
    }

    fn read_head(&mut self) -> Result<Turn> {
        let room = &mut self.head[self.filled..];
        if !room.is_empty() {
            match received(rustix::net::recv(&self.socket, room, RecvFlags::empty()))? {
                None => return Ok(Turn::Idle),
                Some(bytes) => self.filled += bytes,
            }
        }
        if self.filled < Head::BYTES {
            return Ok(Turn::Idle);
        }
        let head = Head::decode(&self.head)?;
        if let Some(post) = self.unfinished.filter(|&post| post != head.post) {
            return Err(wrong(format!("post {} came in the middle of post {post}", head.post)));
        }
        self.raw.resize(head.spans as usize * Span::BYTES, 0);
        self.frame = Some(head);
        self.filled = 0;
        self.stage = Stage::Spans;
        Ok(Turn::More)
    }

    fn read_spans(&mut self) -> Result<Turn> {
        let room = &mut self.raw[self.filled..];
        match received(rustix::net::recv(&self.socket, room, RecvFlags::empty()))? {
            None => return Ok(Turn::Idle),
            Some(bytes) => self.filled += bytes,
        }
        if self.filled < self.raw.len() {
            return Ok(Turn::Idle);
        }
        if let Some(head) = &self.frame {
            Span::decode_all(head, &self.raw, &mut self.spans)?;
        }
        (self.filled, self.span, self.at) = (0, 0, 0);
        self.stage = Stage::Bytes;
        Ok(Turn::More)
    }

    /// One call, straight into the pages; behind the last of them comes the next frame's head. No pointer to a page is
    /// made before its owner gave leave, and none is kept.
    fn store(&mut self, exports: &Exports, leave: Leave<'_>, left: &mut u64) -> Result<Turn> {
        let Some(frame) = self.frame else { return Err(wrong("bytes without a frame")) };
        let mut into = Scatter::new();
        let (mut span, mut at) = (self.span, self.at);
        while span < self.spans.len() && into.len() < *left && !into.is_full() {
            let to = self.spans[span];
            let Some(memory) = exports.find(self.writer, &to)? else { break };
            let &Span { segment, offset, len, .. } = &to;
            // Checks the whole span, before the owner is asked about it.
            memory.at(offset, len)?;
            leave(&Incoming { writer: self.writer, grant: frame.grant, segment, offset, len })?;
            let part = (len - at).min(*left - into.len());
            into.page(memory, offset + at, part)?;
            at += part;
            if at == len {
                (span, at) = (span + 1, 0);
            }
        }
        if into.len() == 0 {
            return self.drop_stale(left);
        }
        let pages = into.len();
        if span == self.spans.len() {
            into.buffer(&mut self.head);
        }
        let room = into.len();
        let bytes = match into.receive(&self.socket) {
            Ok(0) => return Err(gone("it was closed")),
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Turn::Idle),
            Err(error) => return Err(gone(&error.to_string())),
        };
        let stored = bytes.min(pages);
        *left -= stored;
        self.filled = (bytes - stored) as usize;
        self.advance(stored);
        Ok(if bytes < room { Turn::Idle } else { Turn::More })
    }

    /// Reads, and drops, bytes for memory that is not behind its segment any more.
    fn drop_stale(&mut self, left: &mut u64) -> Result<Turn> {
        let mut nowhere = [0; 16 << 10];
        let len = (self.spans[self.span].len - self.at).min(nowhere.len() as u64);
        let room = &mut nowhere[..len as usize];
        let Some(bytes) = received(rustix::net::recv(&self.socket, room, RecvFlags::empty()))?
        else {
            return Ok(Turn::Idle);
        };
        self.stored = false;
        *left = left.saturating_sub(bytes as u64);
        self.advance(bytes as u64);
        Ok(Turn::More)
    }

    /// Goes on by as many bytes; behind the frame's last one, to the next frame.
    fn advance(&mut self, bytes: u64) {
        let mut left = bytes;
        while left > 0 {
            let rest = self.spans[self.span].len - self.at;
            if left < rest {
                self.at += left;
                return;
            }
            left -= rest;
            self.at = 0;
            self.span += 1;
        }
        let Some(frame) = self.frame.filter(|_| self.span == self.spans.len()) else { return };
        self.unfinished = (!frame.last).then_some(frame.post);
        if frame.last {
            self.acks.extend(Ack { post: frame.post, stored: self.stored }.encode());
            self.stored = true;
        }
        self.stage = Stage::Head;
    }

    /// Sends what the socket takes.
    fn acknowledge(&mut self) -> Result<()> {
        while !self.acks.is_empty() {
            match rustix::net::send(&self.socket, &self.acks, SendFlags::NOSIGNAL) {
                Ok(bytes) => drop(self.acks.drain(..bytes)),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(gone(&errno.to_string())),
            }
        }
        Ok(())
    }

    /// Closes at once.
    pub(super) fn abort(self) {
        socket::abort(self.socket);
    }
}

/// What a call received; `None` when there is nothing yet.
fn received<T>(result: rustix::io::Result<(T, usize)>) -> Result<Option<usize>> {
    match result {
        Ok((_, 0)) => Err(gone("it was closed")),
        Ok((_, bytes)) => Ok(Some(bytes)),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(errno) => Err(gone(&errno.to_string())),
    }
}

fn gone(why: &str) -> Error {
    ErrorKind::PeerLost.error(format!("a data connection broke: {why}"))
}
