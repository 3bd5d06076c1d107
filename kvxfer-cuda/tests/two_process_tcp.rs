//! Two real processes and a socket: the parent is the consumer and receives, the child is the producer.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::writer::{BYTES, HALF, ID, PEER, Writer, check_lower_half, content, mirrored};
use common::{DEADLINE, Peer, parent};
use kvxfer_core::transport::{RegionId, SegmentHandle, Write};
use kvxfer_core::{Error, ErrorKind, Incarnation};
use kvxfer_cuda::copy::{Stores, copy_summed};
use kvxfer_cuda::memory::{HostPool, Regions};
use kvxfer_cuda::transport::{Target, Tcp, TcpTarget};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

const WRITER: Incarnation = Incarnation([2; 16]);

/// The body of the child process; an empty test otherwise.
#[test]
fn child() {
    let Some(mut wire) = parent("writer") else { return };
    let mut regions = Regions::new();
    regions.keep(content()).unwrap();
    let mut writer = Writer::new(Tcp::new(WRITER, Arc::new(regions)).unwrap());
    let blob = (0..u64::from_le_bytes(wire.receive())).map(|_| wire.receive::<1>()[0]).collect();
    writer.attach(SegmentHandle { blob, bytes: BYTES, fds: Vec::new() });
    let sum = writer.write(&mirrored()).unwrap();
    wire.send(&sum.to_le_bytes());
    // The upper half again and again, until it is killed.
    let upper = [Write { region: RegionId(0), src: 0, segment: ID, dst: HALF, len: HALF }];
    let start = Instant::now();
    while start.elapsed() < DEADLINE {
        writer.write(&upper).unwrap();
    }
}

/// The parent's side.
struct Consumer {
    target: TcpTarget,
    pool: HostPool,
    lost: Vec<(Incarnation, Error)>,
}

impl Consumer {
    fn receive(&mut self) {
        if self.target.rests() {
            let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
            let mut fds = [PollFd::from_borrowed_fd(self.target.event_fd(), PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&deadline)), Ok(1), "nothing comes");
        }
        self.target.poll(100_000, &|_| Ok(()), &mut self.lost);
    }

    fn seen(&self) -> Vec<u8> {
        let from = self.pool.segment(ID).unwrap().as_mut_ptr();
        let mut bytes = vec![0; BYTES as usize];
        // SAFETY: all of the mapping.
        unsafe { copy_summed(bytes.as_mut_ptr(), from, bytes.len(), 0, 0, Stores::Cached) };
        bytes
    }
}

#[test]
fn a_writer_killed_while_it_writes_is_lost_once_and_stores_nothing_more() {
    let mut consumer = Consumer {
        target: TcpTarget::bind(PEER, "127.0.0.1", 0, 2).unwrap(),
        pool: HostPool::new(1, BYTES).unwrap(),
        lost: Vec::new(),
    };
    let memory = consumer.pool.segment(ID).unwrap();
    let blob = consumer.target.export(WRITER, ID, memory).unwrap().blob;
    let mut child = Peer::start("child", "writer");
    child.wire.send(&(blob.len() as u64).to_le_bytes());
    child.wire.send(&blob);
    // Everything before the upper half is there when that begins.
    while consumer.seen()[HALF as usize] == 0 {
        consumer.receive();
    }
    check_lower_half(&consumer.seen(), u64::from_le_bytes(child.wire.receive()));

    child.kill();
    while consumer.lost.is_empty() {
        consumer.receive();
    }
    assert_eq!(consumer.lost.len(), 1);
    assert_eq!((consumer.lost[0].0, consumer.lost[0].1.kind()), (WRITER, ErrorKind::PeerLost));
    let (before, connections) = (consumer.seen(), format!("{:?}", consumer.target));
    assert!(connections.contains("connections: 0"), "{connections}");
    for _ in 0..10 {
        consumer.target.poll(1 << 20, &|_| Ok(()), &mut consumer.lost);
    }
    assert!(consumer.seen() == before && consumer.lost.len() == 1);
}
