//! One data connection, at the sender.
//!
//! Its queue holds the posts that it has begun: in front those which are sent and not answered, then the one that is
//! being sent.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Instant;

use kvxfer_core::sum::words;
use kvxfer_core::{Error, ErrorKind, Incarnation, Result};

use super::frame::{Ack, Answer, Head, Opening, SPANS, Span, wrong};
use super::io::{Gather, sum};
use super::queue::{Queue, Queued};
use super::socket;
use crate::memory::Regions;
use crate::transport::watch::Interest;

/// Bytes of a turn: of a call, mostly. Small enough that they are still in the cache when the kernel copies what was
/// summed.
const TURN: u64 = 256 << 10;
/// Where a sum may be interrupted: at a multiple of a cache line.
const LINE: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// To be connected, and answered, until then.
    Opening {
        connected: bool,
        until: Instant,
    },
    Up,
}

/// What a stream waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Its next turn.
    More,
    /// The socket, to take more.
    Full,
    /// A post.
    Idle,
}

pub(super) struct Stream {
    socket: OwnedFd,
    /// To which of the peer's addresses it goes.
    pub(super) nth: usize,
    pub(super) address: SocketAddr,
    opening: Opening,
    pub(super) phase: Phase,
    pub(super) state: Turn,
    /// As the poller knows it.
    pub(super) interest: Interest,
    pub(super) queue: Queue,
    /// Bytes in the queue.
    pub(super) load: u64,
    /// Posts at the front of the queue that are sent.
    sent: usize,
    /// What goes out before the frame's pieces, and how much of it has.
    head: Vec<u8>,
    head_sent: usize,
    /// The next byte to be sent: of which piece, and where in it.
    piece: usize,
    at: u64,
    /// The pieces before this are of the frame; and of the post.
    frame_end: usize,
    post_end: usize,
    sum: Summed,
    inbox: [u8; 512],
    filled: usize,
}

/// How far the sum of the post that is being sent is. Never behind what was sent.
#[derive(Default)]
struct Summed {
    piece: usize,
    at: u64,
    index: u64,
    sum: u64,
}

impl Stream {
    /// Starts to connect.
    pub(super) fn start(
        nth: usize,
        address: SocketAddr,
        opening: Opening,
        until: Instant,
    ) -> Result<Self> {
        let socket = socket::connect(&address).map_err(|errno| unreachable(&address, errno))?;
        Ok(Self {
            socket,
            nth,
            address,
            opening,
            phase: Phase::Opening { connected: false, until },
            state: Turn::Full,
            interest: Interest { read: true, write: true },
            queue: Queue::default(),
            load: 0,
            sent: 0,
            head: opening.encode().to_vec(),
            head_sent: 0,
            piece: 0,
            at: 0,
            frame_end: 0,
            post_end: 0,
            sum: Summed::default(),
            inbox: [0; 512],
            filled: 0,
        })
    }

    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Whether it would begin a post now.
    pub(super) fn is_idle(&self) -> bool {
        self.state == Turn::Idle && self.phase == Phase::Up
    }

    /// What the socket is to be watched for now.
    pub(super) fn wants(&self) -> Interest {
        Interest { read: true, write: self.state == Turn::Full }
    }

    /// The socket takes bytes, or was refused.
    pub(super) fn writable(&mut self) -> Result<()> {
        if let Phase::Opening { connected, .. } = &mut self.phase
            && !*connected
        {
            socket::connected(&self.socket).map_err(|errno| unreachable(&self.address, errno))?;
            *connected = true;
        }
        self.state = Turn::More;
        Ok(())
    }

    /// Reads the answer and acknowledgements; tells each post that ended.
    pub(super) fn read(
        &mut self,
        owner: Incarnation,
        mut ended: impl FnMut(Queued, bool),
    ) -> Result<()> {
        loop {
            let room = &mut self.inbox[self.filled..];
            let wanted = room.len();
            match rustix::net::recv(&self.socket, room, rustix::net::RecvFlags::empty()) {
                Ok((0, _)) => return Err(self.closed("it was closed")),
                Ok((bytes, _)) => {
                    self.filled += bytes;
                    self.understand(owner, &mut ended)?;
                    if bytes < wanted {
                        return Ok(());
                    }
                }
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(self.closed(&errno.to_string())),
            }
        }
    }

    fn understand(
        &mut self,
        owner: Incarnation,
        ended: &mut impl FnMut(Queued, bool),
    ) -> Result<()> {
        let mut used = 0;
        if self.phase != Phase::Up {
            let Some(bytes) = self.inbox[..self.filled].first_chunk() else { return Ok(()) };
            let answer = Answer::decode(bytes)?;
            if answer != (Answer { stream: self.opening.stream, owner }) {
                return Err(wrong(format!("{} is the data port of another agent", self.address)));
            }
            used = Answer::BYTES;
            self.phase = Phase::Up;
        }
        for ack in self.inbox[used..self.filled].as_chunks::<{ Ack::BYTES }>().0 {
            let ack = Ack::decode(ack)?;
            used += Ack::BYTES;
            let post = match self.sent {
                0 => None,
                _ => self.queue.pop().filter(|post| post.id == ack.post),
            };
            let Some(post) = post else {
                return Err(wrong(format!("post {} was acknowledged, and not sent", ack.post)));
            };
            self.sent -= 1;
            self.load -= post.bytes;
            self.piece -= post.writes;
            self.frame_end -= post.writes;
            self.post_end -= post.writes;
            self.sum.piece -= post.writes;
            ended(post, ack.stored);
        }
        self.inbox.copy_within(used..self.filled, 0);
        self.filled -= used;
        Ok(())
    }

    /// Sends for a turn, taking more posts from those that wait.
    pub(super) fn send(
        &mut self,
        regions: &Regions,
        waiting: &mut Queue,
        budget: &mut u64,
    ) -> Result<Turn> {
        let mut left = TURN.min(*budget);
        while left > 0 {
            if self.frame_is_sent() && !self.next_frame(waiting) {
                return Ok(Turn::Idle);
            }
            let (offered, taken) = self.send_once(regions, left)?;
            left = left.saturating_sub(taken);
            *budget = budget.saturating_sub(taken);
            if taken < offered {
                return Ok(Turn::Full);
            }
        }
        Ok(Turn::More)
    }

    fn frame_is_sent(&self) -> bool {
        self.head_sent == self.head.len() && self.piece == self.frame_end
    }

    /// Goes on to what comes behind the frame that was sent. Whether there is anything.
    fn next_frame(&mut self, waiting: &mut Queue) -> bool {
        if self.phase != Phase::Up {
            return false;
        }
        if self.piece == self.post_end {
            if !self.queue.take_front(waiting) {
                return false;
            }
            self.post_end = self.queue.writes.len();
            self.load += self.queue.posts.back().map_or(0, |post| post.bytes);
            self.sum = Summed { piece: self.piece, ..Summed::default() };
        }
        let post = &self.queue.posts[self.sent];
        self.head.clear();
        self.head.resize(Head::BYTES, 0);
        let mut head = Head { post: post.id, grant: post.grant, bytes: 0, spans: 0, last: false };
        let mut open: Option<Span> = None;
        let mut end = self.piece;
        for piece in self.queue.writes.range(self.piece..self.post_end) {
            let &super::queue::Piece { segment, generation, dst: offset, len, .. } = piece;
            match &mut open {
                // Neighbours there, wherever they come from: one span.
                Some(span) if span.segment == segment && span.offset + span.len == offset => {
                    span.len += len;
                }
                _ if head.spans as usize == SPANS => break,
                _ => {
                    let span = open.replace(Span { segment, generation, offset, len });
                    span.iter().for_each(|span| self.head.extend(span.encode()));
                    head.spans += 1;
                }
            }
            head.bytes += len;
            end += 1;
        }
        open.iter().for_each(|span| self.head.extend(span.encode()));
        head.last = end == self.post_end;
        self.head[..Head::BYTES].copy_from_slice(&head.encode());
        self.head_sent = 0;
        self.frame_end = end;
        true
    }

    /// One call; how many bytes were offered to the socket, and taken.
    fn send_once(&mut self, regions: &Regions, most: u64) -> Result<(u64, u64)> {
        let mut out = Gather::new();
        out.bytes(&self.head[self.head_sent..]);
        let (mut piece, mut at) = (self.piece, self.at);
        let most = out.len() + most;
        while piece < self.frame_end && out.len() < most && !out.is_full() {
            let from = self.queue.writes[piece];
            let len = (from.len - at).min(most - out.len());
            out.region(regions, from.region, from.src + at, len)?;
            at += len;
            let seed = self.queue.posts[self.sent].seed;
            self.sum.up_to(regions, piece, &from, at, seed)?;
            if at == from.len {
                (piece, at) = (piece + 1, 0);
            }
        }
        let offered = out.len();
        match out.send(&self.socket) {
            Ok(taken) => {
                self.advance(taken);
                Ok((offered, taken))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((offered, 0)),
            Err(error) => Err(self.closed(&error.to_string())),
        }
    }

    fn advance(&mut self, taken: u64) {
        let of_head = taken.min((self.head.len() - self.head_sent) as u64);
        self.head_sent += of_head as usize;
        let mut left = taken - of_head;
        while left > 0 {
            let rest = self.queue.writes[self.piece].len - self.at;
            if left < rest {
                self.at += left;
                return;
            }
            left -= rest;
            self.at = 0;
            self.piece += 1;
        }
        if self.frame_is_sent() && self.phase == Phase::Up && self.piece == self.post_end {
            self.queue.posts[self.sent].sum = self.sum.sum;
            self.sent += 1;
        }
    }

    /// The error that says why the connection is over.
    fn closed(&self, why: &str) -> Error {
        let address = self.address;
        match self.phase {
            Phase::Up => ErrorKind::PeerLost.error(format!("the data connection to {address} broke: {why}")),
            Phase::Opening { connected: true, .. } => ErrorKind::PeerLost
                .error(format!("the data connection to {address} was refused: {why}"))
                .fix("its token was used or is over, or something between the hosts answers in the peer's place"),
            Phase::Opening { connected: false, .. } => unreachable(&address, why),
        }
    }

    /// Closes at once; the posts that were begun.
    pub(super) fn abort(self) -> Queue {
        socket::abort(self.socket);
        self.queue
    }
}

impl Summed {
    /// Sums a piece up to there, if that is not done, and as far beyond as words and lines go.
    fn up_to(
        &mut self,
        regions: &Regions,
        piece: usize,
        from: &super::queue::Piece,
        to: u64,
        seed: u64,
    ) -> Result<()> {
        if (self.piece, self.at) >= (piece, to) {
            return Ok(());
        }
        let to = to.next_multiple_of(LINE).min(from.len);
        let len = to - self.at;
        let part = sum(regions, from.region, from.src + self.at, len, seed, self.index)?;
        self.sum = self.sum.wrapping_add(part);
        self.index = self.index.wrapping_add(words(len));
        (self.piece, self.at) = if to == from.len { (piece + 1, 0) } else { (piece, to) };
        Ok(())
    }
}

/// There is no way to that address.
pub(super) fn unreachable(address: &SocketAddr, why: impl std::fmt::Display) -> Error {
    ErrorKind::NoPath.error(format!("no data connection to {address}: {why}")).fix(
        "open that port between the hosts: a firewall, a security group or a NetworkPolicy may drop it; or have \
         the peer listen on an address that is routed from here",
    )
}
