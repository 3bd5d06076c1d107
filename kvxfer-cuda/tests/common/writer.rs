//! A process that writes to another one's segment, by whichever transport: the lower half of its memory once, and then
//! the upper half for as long as it lives.

use std::os::fd::AsFd;
use std::time::Instant;

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Incarnation, PostId, Result, SegmentId};

use super::{DEADLINE, Peer, Wire};

/// Of the writer's memory and of each segment.
pub const BYTES: u64 = 4 << 20;
pub const HALF: u64 = BYTES / 2;
pub const PEER: Incarnation = Incarnation([1; 16]);
pub const ID: SegmentId = SegmentId(0);
const BLOCK: u64 = 4096;
const SEED: u64 = 42;

/// What the writer's memory holds at first.
pub fn content() -> Vec<u8> {
    (0..BYTES).map(|i| (i * i / 7 + i / 256 + 1) as u8).collect()
}

/// Every block of the lower half, at the mirrored place.
pub fn mirrored() -> Vec<Write> {
    (0..HALF / BLOCK)
        .map(|i| Write {
            region: RegionId(0),
            src: i * BLOCK,
            segment: ID,
            dst: HALF - (i + 1) * BLOCK,
            len: BLOCK,
        })
        .collect()
}

pub fn send(wire: &mut Wire, handle: &SegmentHandle) {
    wire.send(&[handle.fds.len() as u8, handle.blob.len() as u8]);
    match &handle.fds[..] {
        [] => wire.send(&handle.blob),
        [fd, ..] => wire.send_fd(&handle.blob, fd.as_fd()),
    }
}

pub fn receive(wire: &mut Wire) -> SegmentHandle {
    let [fds, len] = wire.receive();
    let (mut blob, mut descriptors) = (vec![0; len.into()], vec![]);
    match fds {
        0 => wire.receive_into(&mut blob),
        _ => descriptors.push(wire.receive_fd_into(&mut blob)),
    }
    SegmentHandle { blob, bytes: BYTES, fds: descriptors }
}

// The child.

pub struct Writer<T> {
    pub transport: T,
    posts: u64,
    ended: Vec<Completion>,
}

impl<T: Transport> Writer<T> {
    /// `transport` reads [`content`] as its region 0.
    pub fn new(transport: T) -> Self {
        Self { transport, posts: 0, ended: Vec::new() }
    }

    pub fn attach(&mut self, handle: SegmentHandle) {
        self.transport.attach(PEER, ID, handle).unwrap();
    }

    /// Attaches what the parent sends, and writes the lower half, once and for good.
    pub fn begin(&mut self, wire: &mut Wire) {
        self.attach(receive(wire));
        let sum = self.write(&mirrored()).unwrap();
        wire.send(&sum.to_le_bytes());
    }

    pub fn post(&mut self, writes: &[Write]) -> Result<()> {
        self.posts += 1;
        let id = PostId(self.posts);
        self.transport.post(Post { id, peer: PEER, grant: None, seed: SEED, writes })
    }

    pub fn end(&mut self) -> Completion {
        let start = Instant::now();
        while self.ended.is_empty() {
            assert!(start.elapsed() < DEADLINE, "a post does not end");
            self.transport.poll(10_000, &mut self.ended);
            std::thread::yield_now();
        }
        self.ended.remove(0)
    }

    pub fn write(&mut self, writes: &[Write]) -> Result<u64> {
        self.post(writes)?;
        self.end().result
    }

    /// Writes to the upper half, other bytes each time, until the parent is gone. `fill` fills the memory with a
    /// byte. Answers each byte from the parent after one more complete round.
    pub fn scribble(&mut self, wire: &mut Wire, fill: impl Fn(u8)) {
        wire.nonblocking();
        let start = Instant::now();
        let upper = [Write { region: RegionId(0), src: HALF, segment: ID, dst: HALF, len: HALF }];
        for round in 1_u64.. {
            assert!(start.elapsed() < DEADLINE, "nobody stops this writer");
            let Some(asked) = wire.asked() else { return };
            fill(round as u8 | 1);
            self.write(&upper).unwrap();
            if asked {
                wire.send(&round.to_le_bytes());
            }
        }
    }
}

// The parent.

/// Starts a writer that is given that segment, and waits for its sum of the lower half.
pub fn start(test: &str, role: &str, handle: &SegmentHandle) -> (Peer, u64) {
    let mut peer = Peer::start(test, role);
    send(&mut peer.wire, handle);
    let told = u64::from_le_bytes(peer.wire.receive());
    (peer, told)
}

/// Waits for one more complete round of a scribbler.
pub fn next_round(peer: &mut Peer) -> u64 {
    peer.wire.send(&[1]);
    u64::from_le_bytes(peer.wire.receive())
}

/// Checks what a writer wrote to the lower half, and what it says the sum is.
#[track_caller]
pub fn check_lower_half(seen: &[u8], told: u64) {
    let content = content();
    let mut sum = Sum::new(SEED);
    for write in mirrored() {
        let expected = &content[write.src as usize..][..BLOCK as usize];
        assert!(&seen[write.dst as usize..][..BLOCK as usize] == expected, "at {}", write.dst);
        sum.update(expected);
    }
    assert_eq!(told, sum.finish());
}
