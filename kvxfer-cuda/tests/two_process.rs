//! Two real processes and one segment: the parent is the consumer, the child the producer.
//!
//! The child is this binary, run again for the one test [`child`]; its standard input is a Unix
//! socket. Nothing sleeps; each wait has a deadline, and each child is reaped.

use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Incarnation, PostId, SegmentId};
use kvxfer_cuda::copy::{Stores, copy_summed, sum_of};
use kvxfer_cuda::fds::{recv_with_fds, send_with_fds};
use kvxfer_cuda::memory::{HostPool, Mapping, Regions};
use kvxfer_cuda::transport::{Shm, shm};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

const ROLE: &str = "KVXFER_TEST_CHILD";
const DEADLINE: Duration = Duration::from_secs(60);
const BYTES: u64 = 1 << 20;
const HALF: u64 = BYTES / 2;
const BLOCK: u64 = 4096;
const SEED: u64 = 42;
const PEER: Incarnation = Incarnation([1; 16]);
const ID: SegmentId = SegmentId(0);

/// What the producer's memory holds.
fn content() -> Vec<u8> {
    (0..BYTES).map(|i| (i * i / 7 + i / 256 + 1) as u8).collect()
}

/// Every block of the lower half, at the mirrored place.
fn mirrored() -> Vec<Write> {
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

// The child.

/// The body of the child process; an empty test otherwise.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let mut producer = Producer::attached(&socket);
    // The lower half once, for good.
    let sum = producer.write(&mirrored());
    socket.write_all(&sum.to_le_bytes()).unwrap();
    if role == "scribble" {
        producer.scribble(&mut socket);
    }
}

struct Producer {
    transport: Shm,
    posts: u64,
    // The last to be dropped: the transport reads it.
    memory: HostPool,
}

impl Producer {
    /// Receives the segment and attaches it.
    fn attached(socket: &UnixStream) -> Self {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let (mut blob, mut fds) = ([0; 64], Vec::new());
        let len = recv_with_fds(socket, &mut blob, &mut fds).unwrap();

        let memory = HostPool::new(1, BYTES).unwrap();
        let mapping = memory.segment(ID).unwrap();
        fill(mapping, &content());
        let mut regions = Regions::new();
        // SAFETY: `memory` is dropped after the transport.
        unsafe { regions.register(mapping.as_mut_ptr(), BYTES) }.unwrap();
        let mut transport = Shm::new(Arc::new(regions));
        let handle = SegmentHandle { blob: blob[..len].to_vec(), bytes: BYTES, fds };
        transport.attach(PEER, ID, handle).unwrap();
        Self { transport, posts: 0, memory }
    }

    fn write(&mut self, writes: &[Write]) -> u64 {
        self.posts += 1;
        let post = Post { id: PostId(self.posts), peer: PEER, grant: None, seed: SEED, writes };
        self.transport.post(post).unwrap();
        let mut out = Vec::new();
        while out.is_empty() {
            self.transport.poll(10_000, &mut out);
        }
        out[0].result.clone().unwrap()
    }

    /// Writes to the upper half, other bytes each time, until the parent is gone. Answers each byte
    /// from the parent after one more complete round.
    fn scribble(&mut self, socket: &mut UnixStream) {
        socket.set_nonblocking(true).unwrap();
        let start = Instant::now();
        let upper = [Write { region: RegionId(0), src: HALF, segment: ID, dst: HALF, len: HALF }];
        for round in 1_u64.. {
            assert!(start.elapsed() < DEADLINE, "nobody stops this writer");
            let asked = match socket.read(&mut [0]) {
                Ok(0) => return,
                Ok(_) => true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                Err(error) => panic!("{error}"),
            };
            fill(self.memory.segment(ID).unwrap(), &vec![round as u8 | 1; BYTES as usize]);
            self.write(&upper);
            if asked {
                socket.write_all(&round.to_le_bytes()).unwrap();
            }
        }
    }
}

fn fill(mapping: &Mapping, bytes: &[u8]) {
    let to = mapping.at(0, bytes.len() as u64).unwrap();
    // SAFETY: `at` checked the range.
    unsafe { to.copy_from(bytes.as_ptr(), bytes.len()) };
}

// The parent.

/// A child process, killed and reaped at the latest when it is dropped.
struct Peer {
    process: std::process::Child,
    socket: UnixStream,
}

impl Peer {
    /// Starts a child that is given segment 0 of the pool.
    fn start(role: &str, pool: &HostPool) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(ROLE, role)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let handle = shm::export(pool, ID).unwrap();
        let sent = send_with_fds(&socket, &handle.blob, &[handle.fds[0].as_fd()]).unwrap();
        assert_eq!(sent, handle.blob.len());
        Self { process, socket }
    }

    fn number(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.socket.read_exact(&mut bytes).expect("the child answers in time");
        u64::from_le_bytes(bytes)
    }

    /// Waits for one more complete round of a scribbler.
    fn round(&mut self) -> u64 {
        self.socket.write_all(&[1]).unwrap();
        self.number()
    }

    /// Waits for the child's end.
    fn reap(&mut self) -> std::process::ExitStatus {
        let pid = Pid::from_child(&self.process);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&deadline)), Ok(1), "the child does not end");
        self.process.wait().unwrap()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Without effect on a child that was reaped.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the consumer sees.
fn seen(mapping: &Mapping, offset: u64, len: u64) -> Vec<u8> {
    let from = mapping.at(offset, len).unwrap();
    let mut bytes = vec![0; len as usize];
    // SAFETY: `at` checked the range.
    unsafe { copy_summed(bytes.as_mut_ptr(), from, bytes.len(), 0, 0, Stores::Cached) };
    bytes
}

/// Checks what a child wrote to the lower half, and what it says the sum is.
#[track_caller]
fn check_lower_half(mapping: &Mapping, told: u64) {
    let content = content();
    let mut sum = Sum::new(SEED);
    for write in mirrored() {
        let expected = &content[write.src as usize..][..BLOCK as usize];
        assert!(seen(mapping, write.dst, BLOCK) == expected, "the block at {}", write.dst);
        sum.update(expected);
    }
    assert_eq!(told, sum.finish());
}

#[test]
fn another_process_writes_blocks_and_tells_their_sum() {
    let pool = HostPool::new(2, BYTES).unwrap();
    let mut peer = Peer::start("write", &pool);
    let told = peer.number();
    check_lower_half(pool.segment(ID).unwrap(), told);
    assert!(seen(pool.segment(SegmentId(1)).unwrap(), 0, BYTES).iter().all(|&byte| byte == 0));
    assert!(peer.reap().success());
}

#[test]
fn a_writer_killed_while_it_writes_leaves_memory_that_can_be_read() {
    let pool = HostPool::new(1, BYTES).unwrap();
    let mut peer = Peer::start("scribble", &pool);
    let told = peer.number();
    peer.round();
    let mapping = pool.segment(ID).unwrap();
    assert!(seen(mapping, HALF, HALF).iter().all(|&byte| byte != 0), "nothing was scribbled");

    peer.process.kill().unwrap();
    assert!(!peer.reap().success());
    // SAFETY: all of the mapping.
    let sum = || unsafe { sum_of(mapping.as_mut_ptr(), BYTES as usize, 0, 0) };
    assert_eq!(sum(), sum(), "it is written to after the writer's death");
    check_lower_half(mapping, told);
}

#[test]
fn fresh_memory_hides_what_a_living_writer_still_writes() {
    let mut pool = HostPool::new(1, BYTES).unwrap();
    let mut peer = Peer::start("scribble", &pool);
    let told = peer.number();
    let first = peer.round();

    let old = Arc::clone(pool.segment(ID).unwrap());
    assert_eq!(pool.replace(ID, &[(0, HALF)]).unwrap(), 1);
    let now = Arc::clone(pool.segment(ID).unwrap());
    let before = seen(&old, HALF, HALF);

    // It does keep writing, to where it always did.
    let start = Instant::now();
    let mut round = peer.round();
    while seen(&old, HALF, HALF) == before {
        assert!(start.elapsed() < DEADLINE, "the writer stopped: nothing was tested");
        round = peer.round();
    }
    assert!(round > first);
    assert!(seen(&now, HALF, HALF).iter().all(|&byte| byte == 0), "it reached the fresh memory");
    check_lower_half(&now, told);

    // And the fresh memory can be given to the next writer meanwhile.
    let mut heir = Peer::start("write", &pool);
    let told = heir.number();
    check_lower_half(&now, told);
    assert!(heir.reap().success());
    assert!(peer.process.try_wait().unwrap().is_none(), "the old writer is alive");
}
