//! Two real processes and one segment of GPU memory, killed in the middle of copies.
//!
//! The child is this binary, run again for the one test [`child`]; its standard input is a Unix
//! socket. Each wait has a deadline, and each child is reaped.

use std::io::{self, Read, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Incarnation, PostId, Result, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, DevicePtr, Pinned, Priority, Stream};
use kvxfer_cuda::fds::{recv_with_fds, send_with_fds};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::harness::device;

const ROLE: &str = "KVXFER_TEST_CHILD";
const DEADLINE: Duration = Duration::from_secs(60);
const BYTES: u64 = 4 << 20;
const HALF: u64 = BYTES / 2;
const BLOCK: u64 = 4096;
const SEED: u64 = 42;
const PEER: Incarnation = Incarnation([1; 16]);
const ID: SegmentId = SegmentId(0);
const POISON: u8 = 0xEE;

/// How often a process is killed: `KVXFER_KILLS`, else a few times.
fn kills() -> u32 {
    std::env::var("KVXFER_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3)
}

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

/// A stream and staging memory: the host's way to bytes on the device.
struct View {
    stream: Stream,
    staging: Arc<Pinned>,
}

impl View {
    fn new(device: &Device) -> Self {
        Self {
            stream: device.stream(Priority::Default).unwrap(),
            staging: device.pinned(BYTES).unwrap(),
        }
    }

    fn write(&self, to: DevicePtr, bytes: &[u8]) {
        self.staging.write(0, bytes).unwrap();
        self.stream.upload(to, &self.staging, 0, bytes.len() as u64).unwrap();
        self.stream.synchronize().unwrap();
    }

    fn read(&self, from: DevicePtr, len: u64) -> Vec<u8> {
        self.stream.download(&self.staging, 0, from, len).unwrap();
        self.stream.synchronize().unwrap();
        let mut bytes = vec![0; len as usize];
        self.staging.read(0, &mut bytes).unwrap();
        bytes
    }

    fn fill(&self, to: DevicePtr, byte: u8, len: u64) {
        self.stream.fill(to, byte, len).unwrap();
        self.stream.synchronize().unwrap();
    }
}

/// A socket's message: a handle.
fn send(socket: &UnixStream, handle: &SegmentHandle) {
    let sent = send_with_fds(socket, &handle.blob, &[handle.fds[0].as_fd()]).unwrap();
    assert_eq!(sent, handle.blob.len());
}

fn receive(socket: &UnixStream) -> SegmentHandle {
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let (mut blob, mut fds) = ([0; 256], Vec::new());
    let len = recv_with_fds(socket, &mut blob, &mut fds).unwrap();
    SegmentHandle { blob: blob[..len].to_vec(), bytes: BYTES, fds }
}

// The child.

/// The body of the child process; an empty test otherwise.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned().unwrap());
    let device = device().expect("the parent has one");
    if role == "export" {
        return export_and_wait(&device, &mut socket);
    }
    let mut producer = Producer::new(&device);
    producer.attach(receive(&socket));
    // The lower half once, for good.
    let sum = producer.write(&mirrored()).unwrap();
    socket.write_all(&sum.to_le_bytes()).unwrap();
    if role == "scribble" {
        producer.scribble(&mut socket);
    }
}

/// Gives a segment away and lives until the parent closes the socket.
fn export_and_wait(device: &Device, socket: &mut UnixStream) {
    let mut pool = DevicePool::new(device, 1, BYTES).unwrap();
    send(socket, &cuda_ipc::export(&mut pool, ID, PEER).unwrap());
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let _ = socket.read(&mut [0]);
}

struct Producer {
    transport: CudaIpc,
    posts: u64,
    view: View,
    // The last to be dropped: the transport reads it.
    memory: Buffer,
}

impl Producer {
    fn new(device: &Device) -> Self {
        let view = View::new(device);
        let memory = device.buffer(BYTES).unwrap();
        view.write(memory.ptr(), &content());
        let mut regions = DeviceRegions::new();
        // SAFETY: `memory` is dropped after the transport.
        unsafe { regions.register(memory.ptr(), BYTES) }.unwrap();
        let copier = Copier::new(device, CopierConfig::default(), || ()).unwrap();
        let transport = CudaIpc::new(device.clone(), Arc::new(regions), copier);
        Self { transport, posts: 0, view, memory }
    }

    fn attach(&mut self, handle: SegmentHandle) {
        self.transport.attach(PEER, ID, handle).unwrap();
    }

    fn post(&mut self, writes: &[Write]) -> Result<()> {
        self.posts += 1;
        self.transport.post(Post { id: PostId(self.posts), peer: PEER, seed: SEED, writes })
    }

    fn end(&mut self) -> Completion {
        let (mut out, start) = (Vec::new(), Instant::now());
        loop {
            assert!(start.elapsed() < DEADLINE, "a post does not end");
            self.transport.poll(0, &mut out);
            if let Some(end) = out.pop() {
                return end;
            }
            std::thread::yield_now();
        }
    }

    fn write(&mut self, writes: &[Write]) -> Result<u64> {
        self.post(writes)?;
        self.end().result
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
            self.view.fill(self.memory.ptr(), round as u8 | 1, BYTES);
            self.write(&upper).unwrap();
            if asked {
                socket.write_all(&round.to_le_bytes()).unwrap();
            }
        }
    }
}

// The parent.

/// A child process, killed and reaped at the latest when it is dropped.
struct Peer {
    process: std::process::Child,
    socket: UnixStream,
}

impl Peer {
    fn start(role: &str) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "two_process::child", "--nocapture"])
            .env(ROLE, role)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, socket }
    }

    /// Starts a writer that is given segment 0 of the pool.
    fn writer(role: &str, pool: &mut DevicePool) -> Self {
        let peer = Self::start(role);
        send(&peer.socket, &cuda_ipc::export(pool, ID, PEER).unwrap());
        peer
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

    /// Waits for the child's end, as an agent does: by its pidfd.
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

fn at(pool: &DevicePool, offset: u64) -> DevicePtr {
    pool.at(ID, offset, HALF).unwrap()
}

/// Checks what a child wrote to the lower half, and what it says the sum is.
#[track_caller]
fn check_lower_half(view: &View, lower: DevicePtr, told: u64) {
    let (content, seen) = (content(), view.read(lower, HALF));
    let mut sum = Sum::new(SEED);
    for write in mirrored() {
        let expected = &content[write.src as usize..][..BLOCK as usize];
        assert!(&seen[write.dst as usize..][..BLOCK as usize] == expected, "at {}", write.dst);
        sum.update(expected);
    }
    assert_eq!(told, sum.finish());
}

#[test]
fn another_process_writes_blocks_and_tells_their_sum() {
    let Some(device) = device() else { return };
    let view = View::new(&device);
    let mut pool = DevicePool::new(&device, 2, BYTES).unwrap();
    let other = pool.at(SegmentId(1), 0, BYTES).unwrap();
    view.fill(other, POISON, BYTES);
    let mut peer = Peer::writer("write", &mut pool);
    let told = peer.number();
    check_lower_half(&view, at(&pool, 0), told);
    assert!(view.read(other, BYTES).iter().all(|&byte| byte == POISON));
    assert!(peer.reap().success());
}

/// What `cuda_ipc` needs before a writer's death may count as a fence.
#[test]
fn no_write_comes_after_the_writers_death() {
    let Some(device) = device() else { return };
    let view = View::new(&device);
    let mut pool = DevicePool::new(&device, 1, BYTES).unwrap();
    for kill in 0..kills() {
        view.fill(at(&pool, HALF), 0, HALF);
        let mut peer = Peer::writer("scribble", &mut pool);
        let told = peer.number();
        peer.round();
        let upper = view.read(at(&pool, HALF), HALF);
        assert!(upper.iter().all(|&byte| byte != 0), "nothing was scribbled");

        peer.process.kill().unwrap();
        assert!(!peer.reap().success());
        check_lower_half(&view, at(&pool, 0), told);
        view.fill(at(&pool, HALF), POISON, HALF);
        // Long enough for copies that were queued: each read is of the whole half.
        for _ in 0..5 {
            let upper = view.read(at(&pool, HALF), HALF);
            assert!(upper.iter().all(|&byte| byte == POISON), "kill {kill}: a late write");
        }
    }
}

#[test]
fn fresh_memory_hides_what_a_living_writer_still_writes() {
    let Some(device) = device() else { return };
    let view = View::new(&device);
    let mut copier = Copier::new(&device, CopierConfig::default(), || ()).unwrap();
    let mut pool = DevicePool::new(&device, 1, BYTES).unwrap();
    let mut peer = Peer::writer("scribble", &mut pool);
    let told = peer.number();
    let first = peer.round();

    let fresh = pool.fresh(ID, &[(0, HALF)]).unwrap();
    copier.submit(0, &fresh.spans).unwrap();
    let (mut done, start) = (Vec::new(), Instant::now());
    while done.is_empty() {
        assert!(start.elapsed() < DEADLINE);
        copier.poll(&mut done);
        std::thread::yield_now();
    }
    done[0].result.as_ref().unwrap();
    let old = pool.swap(fresh).unwrap();
    assert_eq!((pool.generation(ID).unwrap(), pool.retired_bytes()), (1, old.bytes()));
    view.fill(at(&pool, HALF), POISON, HALF);
    let before = view.read(old.ptr().offset(HALF), HALF);

    // It does keep writing, to where it always did.
    let start = Instant::now();
    let mut round = peer.round();
    while view.read(old.ptr().offset(HALF), HALF) == before {
        assert!(start.elapsed() < DEADLINE, "the writer stopped: nothing was tested");
        round = peer.round();
    }
    assert!(round > first);
    let upper = view.read(at(&pool, HALF), HALF);
    assert!(upper.iter().all(|&byte| byte == POISON), "it reached the fresh memory");
    check_lower_half(&view, at(&pool, 0), told);

    // And the fresh memory can be given to the next writer meanwhile.
    let mut heir = Peer::writer("write", &mut pool);
    let told = heir.number();
    check_lower_half(&view, at(&pool, 0), told);
    assert!(heir.reap().success());
    assert!(peer.process.try_wait().unwrap().is_none(), "the old writer is alive");

    // The old memory is free when its writer is gone, and not before.
    drop(old);
    let held = device.memory().unwrap().0;
    drop(peer);
    pool.let_go(PEER);
    assert_eq!(pool.retired_bytes(), 0);
    let start = Instant::now();
    while device.memory().unwrap().0 <= held {
        assert!(start.elapsed() < DEADLINE, "the old memory stays taken");
        std::thread::yield_now();
    }
}

#[test]
fn an_exporter_killed_under_writes_takes_nothing_of_the_writers_along() {
    let Some(device) = device() else { return };
    for _ in 0..kills() {
        let mut peer = Peer::start("export");
        let mut producer = Producer::new(&device);
        producer.attach(receive(&peer.socket));
        let sum = producer.write(&mirrored()).unwrap();
        for _ in 0..8 {
            producer.post(&mirrored()).unwrap();
        }
        peer.process.kill().unwrap();
        peer.reap();
        // The import keeps the memory: what is under way ends well, and so does what comes now.
        for _ in 0..8 {
            assert_eq!(producer.end().result.unwrap(), sum);
        }
        assert_eq!(producer.write(&mirrored()).unwrap(), sum);
        producer.transport.detach(PEER, None);
        assert_eq!(producer.transport.pending(), 0);
        let gone = producer.post(&mirrored()).unwrap_err();
        assert!(!gone.retryable());
    }
}
