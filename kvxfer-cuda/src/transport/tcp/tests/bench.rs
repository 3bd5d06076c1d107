//! A sender, a target, and sockets that speak by hand.

use std::io::{ErrorKind, Read, Write as _};
use std::net::TcpStream;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Error, GrantId, Incarnation, PostId, Result, SegmentId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::super::blob::Blob;
use super::super::frame::{Answer, Head, Opening, Span, Token};
use super::super::{Tcp, TcpTarget};
use crate::memory::{HostPool, Regions};
use crate::transport::Target;
use crate::transport::target::Incoming;

pub(super) const WRITER: Incarnation = Incarnation([1; 16]);
pub(super) const OWNER: Incarnation = Incarnation([2; 16]);
pub(super) const BYTES: u64 = 1 << 20;
pub(super) const ZERO: SegmentId = SegmentId(0);
pub(super) const ONE: SegmentId = SegmentId(1);
pub(super) const GRANT: GrantId = GrantId(7);
/// No wait of a test is longer.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

pub(super) type Lost = Vec<(Incarnation, Error)>;

pub(super) fn any(_: &Incoming) -> Result<()> {
    Ok(())
}

/// A target with two segments, and the engine's memory of whoever writes to it.
pub(super) struct Bench {
    pub(super) target: TcpTarget,
    pub(super) pool: HostPool,
    pub(super) regions: Arc<Regions>,
    pub(super) lost: Lost,
}

impl Bench {
    pub(super) fn new(streams: u32) -> Self {
        let mut regions = Regions::new();
        regions.keep(content()).unwrap();
        Self {
            target: TcpTarget::bind(OWNER, "127.0.0.1", 0, streams).unwrap(),
            pool: HostPool::new(2, BYTES).unwrap(),
            regions: Arc::new(regions),
            lost: Vec::new(),
        }
    }

    /// A sender that has the first segment attached.
    pub(super) fn sender(&mut self) -> Tcp {
        let mut sender = Tcp::new(WRITER, Arc::clone(&self.regions)).unwrap();
        let handle = self.export(ZERO);
        sender.attach(OWNER, ZERO, handle).unwrap();
        sender
    }

    pub(super) fn export(&mut self, segment: SegmentId) -> SegmentHandle {
        self.target.export(WRITER, segment, self.pool.segment(segment).unwrap()).unwrap()
    }

    /// What a new writer is told.
    pub(super) fn blob(&mut self) -> Blob {
        Blob::decode(&self.export(ZERO)).unwrap()
    }

    pub(super) fn poll(&mut self) {
        self.target.poll(1 << 20, &any, &mut self.lost);
    }

    /// Polls both until nothing is pending.
    pub(super) fn settle(&mut self, sender: &mut Tcp) -> Vec<Completion> {
        let mut out = Vec::new();
        self.until(sender, |_, sender| {
            sender.poll(1 << 20, &mut out);
            sender.pending() == 0
        });
        out.sort_by_key(|end| end.id);
        out
    }

    /// Polls the target until something holds; sleeps when there is nothing to do.
    #[track_caller]
    pub(super) fn until(
        &mut self,
        sender: &mut Tcp,
        mut holds: impl FnMut(&mut Self, &mut Tcp) -> bool,
    ) {
        let start = Instant::now();
        while !holds(self, sender) {
            assert!(start.elapsed() < DEADLINE, "it never comes to that");
            self.poll();
            if self.target.rests() && sender.rests() {
                wait(&[self.target.event_fd(), sender.event_fd().unwrap()]);
            }
        }
    }

    /// Polls the target until a writer is lost; why.
    #[track_caller]
    pub(super) fn loses(&mut self) -> Error {
        while self.lost.is_empty() {
            self.poll();
            if self.lost.is_empty() && self.target.rests() {
                wait(&[self.target.event_fd()]);
            }
        }
        let (writer, why) = self.lost.pop().unwrap();
        assert_eq!((writer, self.lost.len()), (WRITER, 0));
        why
    }

    pub(super) fn seen(&self, segment: SegmentId) -> Vec<u8> {
        let from = self.pool.segment(segment).unwrap().as_mut_ptr();
        // SAFETY: all of the mapping; nobody else is there.
        (0..BYTES as usize).map(|at| unsafe { from.add(at).read_volatile() }).collect()
    }

    /// A byte of the first segment.
    pub(super) fn byte(&self, at: u64) -> u8 {
        let byte = self.pool.segment(ZERO).unwrap().at(at, 1).unwrap();
        // SAFETY: `at` checked it; nobody else is there.
        unsafe { byte.read_volatile() }
    }

    #[track_caller]
    pub(super) fn is_untouched(&self) {
        assert!([ZERO, ONE].iter().all(|&id| self.seen(id).iter().all(|&byte| byte == 0)));
    }

    /// Connects by hand and says something.
    pub(super) fn stranger(&self, says: &[u8]) -> Stranger {
        let socket = TcpStream::connect(self.target.address()).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        let mut stranger = Stranger { socket };
        stranger.say(says);
        stranger
    }

    /// A connection of the writer's that speaks by hand.
    #[track_caller]
    pub(super) fn writer(&mut self) -> Stranger {
        let blob = self.blob();
        self.opened(0, blob.tokens[0])
    }

    #[track_caller]
    pub(super) fn opened(&mut self, stream: u32, token: Token) -> Stranger {
        let mut socket = self.stranger(&Opening { stream, token, writer: WRITER }.encode());
        let answer = socket.hear(self).expect("it is let in");
        assert_eq!(Answer::decode(&answer).unwrap(), Answer { stream, owner: OWNER });
        socket
    }
}

/// The other end of a connection to the target.
pub(super) struct Stranger {
    pub(super) socket: TcpStream,
}

impl Stranger {
    pub(super) fn say(&mut self, bytes: &[u8]) {
        // What the target closed meanwhile takes no more.
        let _ = self.socket.write_all(bytes);
    }

    /// The next bytes, or `None` when it was closed; the target is polled meanwhile.
    pub(super) fn hear<const N: usize>(&mut self, bench: &mut Bench) -> Option<[u8; N]> {
        let (mut bytes, mut filled) = ([0; N], 0);
        loop {
            bench.poll();
            match self.socket.read(&mut bytes[filled..]) {
                Ok(0) => return None,
                Ok(more) => filled += more,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(&[bench.target.event_fd(), std::os::fd::AsFd::as_fd(&self.socket)]);
                }
                Err(_) => return None,
            }
            if filled == N {
                return Some(bytes);
            }
        }
    }

    #[track_caller]
    pub(super) fn is_closed(&mut self, bench: &mut Bench) {
        assert_eq!(self.hear::<1>(bench), None);
    }
}

/// Sleeps until one of them is readable.
#[track_caller]
pub(super) fn wait(fds: &[BorrowedFd<'_>]) {
    let mut fds: Vec<_> =
        fds.iter().map(|&fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&deadline)).unwrap() > 0, "nothing happens");
}

/// The engine's memory.
pub(super) fn content() -> Vec<u8> {
    (0..BYTES).map(|at| (at * at / 7 + at / 256) as u8 | 1).collect()
}

pub(super) fn write(src: u64, segment: SegmentId, dst: u64, len: u64) -> Write {
    Write { region: RegionId(0), src, segment, dst, len }
}

pub(super) fn post(sender: &mut Tcp, id: u64, writes: &[Write]) -> Result<()> {
    let (id, grant, seed) = (PostId(id), Some(GRANT), 5);
    sender.post(Post { id, peer: OWNER, grant, seed, writes })
}

pub(super) fn span(offset: u64, len: u64) -> Span {
    Span { segment: ZERO, generation: 1, offset, len }
}

/// A frame with its bytes: 1, 2, 3, …
pub(super) fn frame(post: u64, spans: &[Span]) -> Vec<u8> {
    let bytes = spans.iter().map(|span| span.len).sum();
    let (post, spans_) = (PostId(post), spans.len() as u32);
    let head = Head { post, grant: Some(GRANT), bytes, spans: spans_, last: true };
    let mut frame = head.encode().to_vec();
    frame.extend(spans.iter().flat_map(Span::encode));
    frame.extend((1..=bytes).map(|byte| byte as u8));
    frame
}
