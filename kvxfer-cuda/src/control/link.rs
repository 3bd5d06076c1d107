//! One connection: its bytes in, its bytes out, and the descriptors beside them.
//!
//! Descriptors and frames. The kernel says which bytes descriptors came with only to the extent that
//! a receive ends with the send that carried them. So a send that carries descriptors begins with its
//! frame's first byte and holds nothing of the next frame; whatever the receiver got before in the same
//! call, the *last* byte of the call belongs to that frame. The receiver gives the descriptors to the
//! first frame that is complete with that byte.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvxfer_core::wire::{self, Decoder, Frame};
use kvxfer_core::{Error, ErrorKind, Incarnation, LinkId, Result, Time};

use crate::fds::{MAX_FDS, recv_with_fds, send_with_fds};

use super::peer::Peer;

/// Bytes taken from one connection before others get their turn.
const READ_TURN: usize = 256 << 10;

/// A connection, from its first byte on.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: LinkId,
    pub(super) socket: OwnedFd,
    /// The process at the other end of a Unix socket; `None` over TCP.
    pub(super) unix: Option<Peer>,
    /// For logs: the address that was dialled, or that dials.
    pub(super) remote: String,
    /// The configured peer that was dialled, or `None` if the connection was accepted.
    pub(super) dialled: Option<usize>,
    /// Either side said that it ends for a reason which dialling again does not cure.
    pub(super) refused: bool,
    pub(super) stage: Stage,
    pub(super) inbox: Inbox,
    pub(super) outbox: Outbox,
    /// Whether the poller watches for room to write.
    pub(super) watches_write: bool,
    /// When the connection began, as the next poll saw the time; never too early.
    pub(super) born: Option<Time>,
    /// When bytes last came, as the poll after them saw the time; never too early.
    pub(super) heard: Time,
    /// Bytes came, or the connection began, since the time was last read.
    pub(super) fresh: bool,
    /// When bytes were last sent; never too late.
    pub(super) said: Time,
}

/// How far a connection has come.
#[derive(Debug)]
pub(super) enum Stage {
    /// A TCP connection is being made.
    Connecting,
    /// We wait for the other side's hello.
    Greeting,
    /// Both hellos have passed.
    Up {
        /// The version both speak.
        version: u16,
        /// Who the peer is; each of its frames says so.
        peer: Incarnation,
        /// Whether silence ends the link. Not between the halves of one engine: they are on one host, where
        /// the kernel ends a dead process's links, and a stopped one may go on reading what it was told of.
        leased: bool,
    },
}

/// A frame and what came beside it.
pub(super) type Arrival = (Frame, Vec<OwnedFd>);

/// What a read ended with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Read {
    /// Nothing more is there, or the connection's turn is over; whether anything was there.
    Open { heard: bool },
    /// The other side has closed.
    End,
}

impl Link {
    pub(super) fn new(
        id: LinkId,
        socket: OwnedFd,
        unix: Option<Peer>,
        remote: String,
        dialled: Option<usize>,
        versions: (u16, u16),
    ) -> Self {
        Self {
            id,
            socket,
            unix,
            remote,
            dialled,
            refused: false,
            stage: Stage::Greeting,
            inbox: Inbox::new(versions),
            outbox: Outbox::default(),
            watches_write: false,
            born: None,
            heard: Time::ZERO,
            fresh: false,
            said: Time::ZERO,
        }
    }

    /// The error with whom it concerns.
    pub(super) fn named(&self, error: &Error) -> Error {
        let who = match self.stage {
            Stage::Up { peer, .. } => format!("peer {peer} at {}", self.remote),
            _ => self.remote.clone(),
        };
        error.kind().error(format!("{who}: {error}"))
    }

    /// Reads what is there, up to a turn's worth. Frames that came before an error are in `out`.
    pub(super) fn read(&mut self, scratch: &mut [u8], out: &mut Vec<Arrival>) -> Result<Read> {
        let mut taken = 0;
        while taken < READ_TURN {
            let mut fds = Vec::new();
            match recv_with_fds(&self.socket, scratch, &mut fds) {
                Ok(0) => return Ok(Read::End),
                Ok(bytes) => {
                    taken += bytes;
                    let drained = bytes < scratch.len() && fds.is_empty();
                    self.inbox.push(&scratch[..bytes], fds, out)?;
                    if drained {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    return Err(ErrorKind::Protocol.error(error.to_string()));
                }
                Err(error) => return Err(ErrorKind::PeerLost.error(error.to_string())),
            }
        }
        Ok(Read::Open { heard: taken > 0 })
    }

    /// Writes what the socket takes. `Ok(true)` when nothing is left.
    pub(super) fn flush(&mut self) -> Result<bool> {
        self.outbox.flush(self.socket.as_fd()).map_err(|error| lost(&error))
    }
}

fn lost(error: &io::Error) -> Error {
    ErrorKind::PeerLost.error(error.to_string())
}

/// What has come in and is not a whole frame yet.
#[derive(Debug)]
pub(super) struct Inbox {
    decoder: Decoder,
    /// Our versions. The peer's hello and they say which version its messages have.
    versions: (u16, u16),
    /// Descriptors of the next frame to complete. At most [`MAX_FDS`].
    fds: Vec<OwnedFd>,
    /// Whether a single byte ever came.
    pub(super) touched: bool,
}

impl Inbox {
    fn new(versions: (u16, u16)) -> Self {
        Self { decoder: Decoder::new(), versions, fds: Vec::new(), touched: false }
    }

    /// Takes the bytes of one receive and the descriptors that came with them.
    fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>, out: &mut Vec<Arrival>) -> Result<()> {
        self.touched = true;
        let Some((last, rest)) = bytes.split_last().filter(|_| !fds.is_empty()) else {
            return self.decode(bytes, out);
        };
        self.decode(rest, out)?;
        if !self.fds.is_empty() {
            return Err(ErrorKind::Protocol.error("descriptors came twice with one message"));
        }
        self.fds = fds;
        self.decode(std::slice::from_ref(last), out)
    }

    fn decode(&mut self, mut bytes: &[u8], out: &mut Vec<Arrival>) -> Result<()> {
        while !bytes.is_empty() {
            let taken = self.decoder.push(bytes);
            bytes = &bytes[taken..];
            while let Some(frame) = self.decoder.next()? {
                if let Frame::Hello(hello) = &frame
                    && let Ok(version) = wire::negotiate(self.versions, hello.versions)
                {
                    self.decoder.accept(version);
                }
                out.push((frame, std::mem::take(&mut self.fds)));
            }
            // After a hello without a common version: the link ends, and nothing more is read.
            if taken == 0 {
                break;
            }
        }
        Ok(())
    }
}

/// What waits to be written. Positions count the connection's bytes from 0.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    /// How many of `bytes` have been written.
    head: usize,
    /// The position of `bytes[0]`.
    base: u64,
    /// Frames with descriptors that have not begun to go out, in order.
    marks: VecDeque<Mark>,
}

#[derive(Debug)]
struct Mark {
    start: u64,
    end: u64,
    fds: Vec<OwnedFd>,
}

impl Outbox {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.head
    }

    /// Appends what `encode` writes, one frame, with copies of `fds`.
    ///
    /// # Errors
    /// The frame cannot be encoded, or the descriptors cannot be copied. Nothing was appended then.
    pub(super) fn push(
        &mut self,
        fds: &[BorrowedFd<'_>],
        encode: impl FnOnce(&mut Vec<u8>) -> Result<()>,
    ) -> Result<()> {
        if fds.len() > MAX_FDS {
            let about = format!("{} descriptors for one message, {MAX_FDS} can travel", fds.len());
            return Err(ErrorKind::OutOfBounds.error(about));
        }
        let copies = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<Vec<_>>>();
        let fds = copies.map_err(|error| {
            ErrorKind::Io
                .error(format!("cannot copy a descriptor: {error}"))
                .fix("raise the limit on open files (ulimit -n)")
        })?;
        let start = self.bytes.len();
        if let Err(error) = encode(&mut self.bytes) {
            self.bytes.truncate(start);
            return Err(error);
        }
        if !fds.is_empty() {
            let (start, end) = (self.base + start as u64, self.base + self.bytes.len() as u64);
            self.marks.push_back(Mark { start, end, fds });
        }
        Ok(())
    }

    fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.head < self.bytes.len() {
            let position = self.base + self.head as u64;
            let at = |position: u64| usize::try_from(position - self.base).expect("in memory");
            // A frame with descriptors gets a send of its own, up to its end; others share one.
            let (stop, fds) = match self.marks.front() {
                Some(mark) if mark.start == position => (at(mark.end), mark.fds.as_slice()),
                Some(mark) => (at(mark.start), &[][..]),
                None => (self.bytes.len(), &[][..]),
            };
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match send_with_fds(socket, &self.bytes[self.head..stop], &borrowed) {
                Ok(sent) => {
                    if !borrowed.is_empty() {
                        self.marks.pop_front();
                    }
                    self.head += sent;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.compact();
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.compact();
        Ok(true)
    }

    /// Forgets what was written, when that moves at most as many bytes as it frees.
    fn compact(&mut self) {
        if self.head >= self.bytes.len() - self.head {
            self.bytes.drain(..self.head);
            self.base += self.head as u64;
            self.head = 0;
        }
    }
}
