//! Two real processes and one segment of GPU memory, killed in the middle of copies.

use std::sync::Arc;
use std::time::Instant;

use kvxfer_core::SegmentId;
use kvxfer_core::transport::Transport;
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, DevicePtr, Priority, Sharing};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc};

use crate::common::writer::{
    BYTES, HALF, ID, PEER, Writer, check_lower_half, content, mirrored, next_round, receive, send,
    start,
};
use crate::harness::{DEADLINE, Peer, child_device, device, drain, get, parent, put, shares};

const POISON: u8 = 0xEE;

/// How often a process is killed: `KVXFER_KILLS`, else a few times.
fn kills() -> u32 {
    std::env::var("KVXFER_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(3)
}

fn config() -> CopierConfig {
    CopierConfig { kernel_below: Some(16 << 10), ..CopierConfig::default() }
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
    for role in ["write", "scribble"] {
        let Some(mut wire) = parent(role) else { continue };
        let device = child_device();
        let mut producer = Producer::new(&device);
        producer.writer.begin(&mut wire);
        if role == "scribble" {
            let memory = producer.memory.ptr();
            producer.writer.scribble(&mut wire, |byte| fill(&device, memory, byte, BYTES));
        }
    }
    if let Some(mut wire) = parent("export") {
        let mut pool = DevicePool::new(&child_device(), 1, BYTES).unwrap();
        send(&mut wire, &cuda_ipc::export(&mut pool, ID, PEER).unwrap());
        while wire.order().is_some() {}
    }
}

struct Producer {
    writer: Writer<CudaIpc>,
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
        Self { writer: Writer::new(transport), memory }
    }
}

// The parent.

/// A writer that is given segment 0 of the pool, and what it says the sum of the lower half is.
fn writer(role: &str, pool: &mut DevicePool) -> (Peer, u64) {
    start("two_process::child", role, &cuda_ipc::export(pool, ID, PEER).unwrap())
}

fn at(pool: &DevicePool, offset: u64) -> DevicePtr {
    pool.at(ID, offset, HALF).unwrap()
}

#[track_caller]
fn check_lower(device: &Device, pool: &DevicePool, told: u64) {
    check_lower_half(&get(device, at(pool, 0), HALF as usize), told);
}

#[test]
fn another_process_writes_blocks_and_tells_their_sum() {
    let device = device!();
    shares(&device).for_each(|sharing| another_process_writes(&device, sharing));
}

fn another_process_writes(device: &Device, sharing: Sharing) {
    let mut pool = DevicePool::new_as(device, sharing, 2, BYTES).unwrap();
    let other = pool.at(SegmentId(1), 0, BYTES).unwrap();
    fill(device, other, POISON, BYTES);
    let (peer, told) = writer("write", &mut pool);
    check_lower(device, &pool, told);
    assert!(get(device, other, BYTES as usize).iter().all(|&byte| byte == POISON));
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
        check_lower(&device, &pool, told);
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
    let device = device!(counted);
    shares(&device).for_each(|sharing| fresh_memory_hides(&device, sharing));
}

fn fresh_memory_hides(device: &Device, sharing: Sharing) {
    let mut copier = Copier::new(device, config(), || ()).unwrap();
    let mut pool = DevicePool::new_as(device, sharing, 1, BYTES).unwrap();
    let free = device.memory().unwrap().0;
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
    fill(device, at(&pool, HALF), POISON, HALF);
    let before = get(device, old.ptr().offset(HALF), HALF as usize);

    // It does keep writing, to where it always did.
    let start = Instant::now();
    let mut round = next_round(&mut peer);
    while get(device, old.ptr().offset(HALF), HALF as usize) == before {
        assert!(start.elapsed() < DEADLINE, "the writer stopped: nothing was tested");
        round = next_round(&mut peer);
    }
    assert!(round > first);
    let upper = get(device, at(&pool, HALF), HALF as usize);
    assert!(upper.iter().all(|&byte| byte == POISON), "it reached the fresh memory");
    check_lower(device, &pool, told);

    // And the fresh memory can be given to the next writer meanwhile.
    let (heir, told) = writer("write", &mut pool);
    check_lower(device, &pool, told);
    heir.succeeds();
    next_round(&mut peer);

    // The old memory is free when its writer is gone and we know it, and not before.
    drop(old);
    assert!(pool.waits_for(PEER));
    peer.ends();
    if sharing == Sharing::Legacy {
        assert!(device.memory().unwrap().0 < free, "freed as long as it may be open");
    }
    pool.let_go(PEER);
    assert_eq!((pool.retired_bytes(), pool.waits_for(PEER)), (0, false));
    let start = Instant::now();
    while device.memory().unwrap().0 < free {
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
        let writer = &mut producer.writer;
        writer.attach(receive(&mut peer.wire));
        let sum = writer.write(&mirrored()).unwrap();
        for _ in 0..8 {
            writer.post(&mirrored()).unwrap();
        }
        peer.kill();
        // The import keeps the memory: what is under way ends well, and so does what comes now.
        for _ in 0..8 {
            assert_eq!(writer.end().result.unwrap(), sum);
        }
        assert_eq!(writer.write(&mirrored()).unwrap(), sum);
        writer.transport.detach(PEER, None);
        assert_eq!(writer.transport.pending(), 0);
        let gone = writer.post(&mirrored()).unwrap_err();
        assert!(!gone.retryable());
    }
}
