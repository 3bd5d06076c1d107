//! Two real processes and one segment of GPU memory, killed in the middle of copies.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::sum::Sum;
use kvxfer_core::transport::{Completion, Post, RegionId, SegmentHandle, Transport, Write};
use kvxfer_core::{Incarnation, PostId, Result, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, DevicePtr, Priority, Stream};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc};

use crate::harness::{
    DEADLINE, Peer, Wire, child_device, device, drain, get, parent, pattern, put,
};

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

fn config() -> CopierConfig {
    CopierConfig { kernel_below: Some(16 << 10), ..CopierConfig::default() }
}

/// What the producer's memory holds.
fn content() -> Vec<u8> {
    pattern(BYTES as usize, 1)
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

/// The bytes of a handle's blob. It is as long as this version's are.
const BLOB: usize = 49;

fn send(wire: &mut Wire, handle: &SegmentHandle) {
    wire.send_fd(&handle.blob, handle.fds[0].as_fd());
}

fn receive(wire: &mut Wire) -> SegmentHandle {
    let (blob, fd) = wire.receive_fd::<BLOB>();
    SegmentHandle { blob: blob.to_vec(), bytes: BYTES, fds: vec![fd] }
}

fn fill(device: &Device, ptr: DevicePtr, byte: u8, len: u64) {
    let stream = device.stream(Priority::Default).unwrap();
    stream.fill(ptr, byte, len).unwrap();
    drain(&stream);
}

// The child.

/// The bodies of the children; an empty test otherwise.
#[test]
fn child() {
    if let Some(mut wire) = parent("write") {
        Producer::started(&mut wire);
    }
    if let Some(mut wire) = parent("scribble") {
        Producer::started(&mut wire).scribble(&mut wire);
    }
    if let Some(mut wire) = parent("export") {
        let mut pool = DevicePool::new(&child_device(), 1, BYTES).unwrap();
        send(&mut wire, &cuda_ipc::export(&mut pool, ID, PEER).unwrap());
        while wire.order().is_some() {}
    }
}

struct Producer {
    transport: CudaIpc,
    posts: u64,
    ended: Vec<Completion>,
    stream: Stream,
    // The last to be dropped: the transport reads it.
    memory: Buffer,
}

impl Producer {
    fn new(device: &Device) -> Self {
        let memory = device.buffer(BYTES).unwrap();
        put(device, memory.ptr(), &content());
        let mut regions = DeviceRegions::new();
        // SAFETY: `memory` is dropped after the transport.
        unsafe { regions.register(memory.ptr(), BYTES) }.unwrap();
        let copier = Copier::new(device, config(), || ()).unwrap();
        let transport = CudaIpc::new(device.clone(), Arc::new(regions), copier);
        let stream = device.stream(Priority::Default).unwrap();
        Self { transport, posts: 0, ended: Vec::new(), stream, memory }
    }

    /// Attaches what the parent sends, and writes the lower half, once and for good.
    fn started(wire: &mut Wire) -> Self {
        let mut producer = Self::new(&child_device());
        producer.attach(receive(wire));
        let sum = producer.write(&mirrored()).unwrap();
        wire.send(&sum.to_le_bytes());
        producer
    }

    fn attach(&mut self, handle: SegmentHandle) {
        self.transport.attach(PEER, ID, handle).unwrap();
    }

    fn post(&mut self, writes: &[Write]) -> Result<()> {
        self.posts += 1;
        self.transport.post(Post {
            id: PostId(self.posts),
            peer: PEER,
            grant: None,
            seed: SEED,
            writes,
        })
    }

    fn end(&mut self) -> Completion {
        let start = Instant::now();
        while self.ended.is_empty() {
            assert!(start.elapsed() < DEADLINE, "a post does not end");
            self.transport.poll(0, &mut self.ended);
            std::thread::yield_now();
        }
        self.ended.remove(0)
    }

    fn write(&mut self, writes: &[Write]) -> Result<u64> {
        self.post(writes)?;
        self.end().result
    }

    /// Writes to the upper half, other bytes each time, until the parent is gone. Answers each byte
    /// from the parent after one more complete round.
    fn scribble(&mut self, wire: &mut Wire) {
        wire.nonblocking();
        let start = Instant::now();
        let upper = [Write { region: RegionId(0), src: HALF, segment: ID, dst: HALF, len: HALF }];
        for round in 1_u64.. {
            assert!(start.elapsed() < DEADLINE, "nobody stops this writer");
            let Some(asked) = wire.asked() else { return };
            self.stream.fill(self.memory.ptr(), round as u8 | 1, BYTES).unwrap();
            drain(&self.stream);
            self.write(&upper).unwrap();
            if asked {
                wire.send(&round.to_le_bytes());
            }
        }
    }
}

// The parent.

/// Starts a writer that is given segment 0 of the pool, and waits for its sum of the lower half.
fn writer(role: &str, pool: &mut DevicePool) -> (Peer, u64) {
    let mut peer = Peer::start("two_process::child", role);
    send(&mut peer.wire, &cuda_ipc::export(pool, ID, PEER).unwrap());
    let told = u64::from_le_bytes(peer.wire.receive());
    (peer, told)
}

/// Waits for one more complete round of a scribbler.
fn next_round(peer: &mut Peer) -> u64 {
    peer.wire.send(&[1]);
    u64::from_le_bytes(peer.wire.receive())
}

fn at(pool: &DevicePool, offset: u64) -> DevicePtr {
    pool.at(ID, offset, HALF).unwrap()
}

/// Checks what a child wrote to the lower half, and what it says the sum is.
#[track_caller]
fn check_lower_half(device: &Device, lower: DevicePtr, told: u64) {
    let (content, seen) = (content(), get(device, lower, HALF as usize));
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
    let device = device!();
    let mut pool = DevicePool::new(&device, 2, BYTES).unwrap();
    let other = pool.at(SegmentId(1), 0, BYTES).unwrap();
    fill(&device, other, POISON, BYTES);
    let (peer, told) = writer("write", &mut pool);
    check_lower_half(&device, at(&pool, 0), told);
    assert!(get(&device, other, BYTES as usize).iter().all(|&byte| byte == POISON));
    peer.succeeds();
}

/// What `cuda_ipc` needs before a writer's death may count as a fence.
#[test]
fn no_write_comes_after_the_writers_death() {
    let device = device!();
    let mut pool = DevicePool::new(&device, 1, BYTES).unwrap();
    for kill in 0..kills() {
        fill(&device, at(&pool, HALF), 0, HALF);
        let (mut peer, told) = writer("scribble", &mut pool);
        next_round(&mut peer);
        let upper = get(&device, at(&pool, HALF), HALF as usize);
        assert!(upper.iter().all(|&byte| byte != 0), "nothing was scribbled");

        peer.kill();
        check_lower_half(&device, at(&pool, 0), told);
        fill(&device, at(&pool, HALF), POISON, HALF);
        // Long enough for copies that were queued: each read is of the whole half.
        for _ in 0..5 {
            let upper = get(&device, at(&pool, HALF), HALF as usize);
            assert!(upper.iter().all(|&byte| byte == POISON), "kill {kill}: a late write");
        }
    }
}

#[test]
fn fresh_memory_hides_what_a_living_writer_still_writes() {
    let device = device!();
    let mut copier = Copier::new(&device, config(), || ()).unwrap();
    let mut pool = DevicePool::new(&device, 1, BYTES).unwrap();
    let (mut peer, told) = writer("scribble", &mut pool);
    let first = next_round(&mut peer);

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
    fill(&device, at(&pool, HALF), POISON, HALF);
    let before = get(&device, old.ptr().offset(HALF), HALF as usize);

    // It does keep writing, to where it always did.
    let start = Instant::now();
    let mut round = next_round(&mut peer);
    while get(&device, old.ptr().offset(HALF), HALF as usize) == before {
        assert!(start.elapsed() < DEADLINE, "the writer stopped: nothing was tested");
        round = next_round(&mut peer);
    }
    assert!(round > first);
    let upper = get(&device, at(&pool, HALF), HALF as usize);
    assert!(upper.iter().all(|&byte| byte == POISON), "it reached the fresh memory");
    check_lower_half(&device, at(&pool, 0), told);

    // And the fresh memory can be given to the next writer meanwhile.
    let (heir, told) = writer("write", &mut pool);
    check_lower_half(&device, at(&pool, 0), told);
    heir.succeeds();
    next_round(&mut peer);

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
    let device = device!();
    for _ in 0..kills() {
        let mut peer = Peer::start("two_process::child", "export");
        let mut producer = Producer::new(&device);
        producer.attach(receive(&mut peer.wire));
        let sum = producer.write(&mirrored()).unwrap();
        for _ in 0..8 {
            producer.post(&mirrored()).unwrap();
        }
        peer.kill();
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
