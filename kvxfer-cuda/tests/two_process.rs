//! Two real processes and one segment: the parent is the consumer, the child the producer.

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::writer::{BYTES, HALF, ID, Writer, check_lower_half, content, next_round, start};
use common::{DEADLINE, Peer, parent};
use kvxfer_core::SegmentId;
use kvxfer_cuda::copy::{Stores, copy_summed, sum_of};
use kvxfer_cuda::memory::{HostPool, Mapping, Regions};
use kvxfer_cuda::transport::{Shm, shm};

/// The body of the child process; an empty test otherwise.
#[test]
fn child() {
    for role in ["write", "scribble"] {
        let Some(mut wire) = parent(role) else { continue };
        let memory = HostPool::new(1, BYTES).unwrap();
        let mapping = memory.segment(ID).unwrap();
        fill(mapping, &content());
        let mut regions = Regions::new();
        // SAFETY: `memory` is dropped after the transport.
        unsafe { regions.register(mapping.as_mut_ptr(), BYTES) }.unwrap();
        let mut writer = Writer::new(Shm::new(Arc::new(regions)));
        writer.begin(&mut wire);
        if role == "scribble" {
            writer.scribble(&mut wire, |byte| fill(mapping, &vec![byte; BYTES as usize]));
        }
    }
}

fn fill(mapping: &Mapping, bytes: &[u8]) {
    let to = mapping.at(0, bytes.len() as u64).unwrap();
    // SAFETY: `at` checked the range.
    unsafe { to.copy_from(bytes.as_ptr(), bytes.len()) };
}

/// A child that is given segment 0 of the pool, and what it says the sum of the lower half is.
fn writer(role: &str, pool: &HostPool) -> (Peer, u64) {
    start("child", role, &shm::export(pool, ID).unwrap())
}

/// What the consumer sees.
fn seen(mapping: &Mapping, offset: u64, len: u64) -> Vec<u8> {
    let from = mapping.at(offset, len).unwrap();
    let mut bytes = vec![0; len as usize];
    // SAFETY: `at` checked the range.
    unsafe { copy_summed(bytes.as_mut_ptr(), from, bytes.len(), 0, 0, Stores::Cached) };
    bytes
}

#[test]
fn another_process_writes_blocks_and_tells_their_sum() {
    let pool = HostPool::new(2, BYTES).unwrap();
    let (peer, told) = writer("write", &pool);
    check_lower_half(&seen(pool.segment(ID).unwrap(), 0, HALF), told);
    assert!(seen(pool.segment(SegmentId(1)).unwrap(), 0, BYTES).iter().all(|&byte| byte == 0));
    peer.succeeds();
}

#[test]
fn a_writer_killed_while_it_writes_leaves_memory_that_can_be_read() {
    let pool = HostPool::new(1, BYTES).unwrap();
    let (mut peer, told) = writer("scribble", &pool);
    next_round(&mut peer);
    let mapping = pool.segment(ID).unwrap();
    assert!(seen(mapping, HALF, HALF).iter().all(|&byte| byte != 0), "nothing was scribbled");

    peer.kill();
    // SAFETY: all of the mapping.
    let sum = || unsafe { sum_of(mapping.as_mut_ptr(), BYTES as usize, 0, 0) };
    assert_eq!(sum(), sum(), "it is written to after the writer's death");
    check_lower_half(&seen(mapping, 0, HALF), told);
}

#[test]
fn fresh_memory_hides_what_a_living_writer_still_writes() {
    let mut pool = HostPool::new(1, BYTES).unwrap();
    let (mut peer, told) = writer("scribble", &pool);
    let first = next_round(&mut peer);

    let old = Arc::clone(pool.segment(ID).unwrap());
    assert_eq!(pool.replace(ID, &[(0, HALF)]).unwrap(), 1);
    let now = Arc::clone(pool.segment(ID).unwrap());
    let before = seen(&old, HALF, HALF);

    // It does keep writing, to where it always did.
    let start = Instant::now();
    let mut round = next_round(&mut peer);
    while seen(&old, HALF, HALF) == before {
        assert!(start.elapsed() < DEADLINE, "the writer stopped: nothing was tested");
        round = next_round(&mut peer);
    }
    assert!(round > first);
    assert!(seen(&now, HALF, HALF).iter().all(|&byte| byte == 0), "it reached the fresh memory");
    check_lower_half(&seen(&now, 0, HALF), told);

    // And the fresh memory can be given to the next writer meanwhile.
    let (heir, told) = writer("write", &pool);
    check_lower_half(&seen(&now, 0, HALF), told);
    heir.succeeds();
    peer.assert_alive();
}
