//! A pool's memory, shared in each way: who is refused, and when what was shared is free again.

use std::sync::Arc;

use kvxfer_core::transport::Transport;
use kvxfer_core::{ErrorKind, Incarnation, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Device, Sharing};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc};

use crate::harness::{
    Peer, assert_nothing_lives, child_device, device, live, on_standin, parent, shares, skip,
};

/// More than a driver takes for itself meanwhile.
const BYTES: u64 = 64 << 20;
const ID: SegmentId = SegmentId(0);
const WRITER: Incarnation = Incarnation([1; 16]);
const HEIR: Incarnation = Incarnation([2; 16]);

fn pool(device: &Device, sharing: Sharing) -> DevicePool {
    DevicePool::new_as(device, sharing, 1, BYTES).unwrap()
}

/// Puts fresh memory behind the segment. Nothing is under way, so the old memory need not wait.
fn replace(pool: &mut DevicePool) {
    let fresh = pool.fresh(ID, &[]).unwrap();
    drop(pool.swap(fresh).unwrap());
}

#[test]
fn only_plain_memory_waits_for_its_writer() {
    let device = device!(counted);
    for sharing in shares(&device) {
        let plain = u64::from(sharing == Sharing::Legacy);
        let before = device.memory().unwrap().0;
        let mut pool = pool(&device, sharing);
        let used = || (before - device.memory().unwrap().0) / BYTES;
        // Nobody was given it.
        replace(&mut pool);
        assert_eq!((used(), pool.retired_bytes()), (1, 0), "{sharing}");
        cuda_ipc::export(&mut pool, ID, WRITER).unwrap();
        replace(&mut pool);
        assert_eq!((used(), pool.retired_bytes()), (1 + plain, BYTES), "{sharing}");
        // Another one's letting go is nothing to it.
        cuda_ipc::export(&mut pool, ID, HEIR).unwrap();
        pool.let_go(HEIR);
        assert_eq!((used(), pool.retired_bytes()), (1 + plain, BYTES), "{sharing}");
        assert_eq!([WRITER, HEIR].map(|peer| pool.waits_for(peer)), [true, false]);
        pool.let_go(WRITER);
        assert_eq!((used(), pool.retired_bytes()), (1, 0), "{sharing}");
        assert!(!pool.waits_for(WRITER));
    }
}

#[test]
fn a_writer_that_died_before_has_nothing_to_let_go_of() {
    let device = device!(counted);
    for sharing in shares(&device) {
        let before = device.memory().unwrap().0;
        let mut pool = pool(&device, sharing);
        cuda_ipc::export(&mut pool, ID, WRITER).unwrap();
        pool.let_go(WRITER);
        replace(&mut pool);
        assert_eq!((before - device.memory().unwrap().0) / BYTES, 1, "{sharing}");
        assert_eq!(pool.retired_bytes(), 0);
        assert!(!pool.waits_for(WRITER));
    }
}

#[test]
fn a_segment_that_was_handed_on_waits_for_its_last_writer_only() {
    let device = device!();
    for sharing in shares(&device) {
        let mut pool = pool(&device, sharing);
        cuda_ipc::export(&mut pool, ID, WRITER).unwrap();
        cuda_ipc::export(&mut pool, ID, HEIR).unwrap();
        replace(&mut pool);
        assert_eq!(pool.retired_bytes(), BYTES);
        assert_eq!([WRITER, HEIR].map(|peer| pool.waits_for(peer)), [false, true]);
        pool.let_go(HEIR);
    }
}

/// In a process of its own: what it gives up for good ends with it.
#[test]
fn a_pool_frees_no_plain_memory_that_may_be_open() {
    if parent("pool-dropped").is_some() {
        let device = child_device();
        let alive = || live().map_or(0, |counts| counts[0]);
        for sharing in shares(&device) {
            let mut shared = pool(&device, sharing);
            cuda_ipc::export(&mut shared, ID, WRITER).unwrap();
            shared.let_go(WRITER);
            drop(shared);
            assert_eq!(alive(), 0, "{sharing}: nobody has it");
        }
        let mut retired = pool(&device, Sharing::Legacy);
        cuda_ipc::export(&mut retired, ID, WRITER).unwrap();
        replace(&mut retired);
        drop(retired);
        assert_eq!(alive(), 1, "the old memory stays, the new one doesn't");
        let mut shared = pool(&device, Sharing::Legacy);
        cuda_ipc::export(&mut shared, ID, WRITER).unwrap();
        drop(shared);
        return assert_eq!(alive(), 2);
    }
    let device = device!();
    if !on_standin() || !shares(&device).any(|sharing| sharing == Sharing::Legacy) {
        return skip("only the stand-in counts what a process has");
    }
    let test = "sharing::a_pool_frees_no_plain_memory_that_may_be_open";
    Peer::start(test, "pool-dropped").succeeds();
}

#[test]
fn plain_memory_is_not_opened_in_the_process_that_has_it() {
    let device = device!();
    if !shares(&device).any(|sharing| sharing == Sharing::Legacy) {
        return;
    }
    let mut pool = pool(&device, Sharing::Legacy);
    let copier = Copier::new(&device, CopierConfig::default(), || ()).unwrap();
    let mut writer = CudaIpc::new(device.clone(), Arc::new(DeviceRegions::new()), copier);
    let handle = cuda_ipc::export(&mut pool, ID, WRITER).unwrap();
    let error = writer.attach(WRITER, ID, handle).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoPath);
    assert!(error.to_string().contains("processes of their own"), "{error}");
    pool.let_go(WRITER);
}

/// What a device can't do, by the stand-in's configuration, is refused at the start, with what to set instead.
#[test]
fn what_a_device_cannot_share_is_refused() {
    const REFUSED: [(&str, Sharing, &str); 4] = [
        ("fabric=0", Sharing::Fabric, "set sharing to posix_fd; fabric needs"),
        ("mig=0", Sharing::Legacy, "set sharing to posix_fd; legacy needs"),
        ("mps=1", Sharing::Legacy, "set sharing to posix_fd; legacy needs"),
        ("fail=cuMemCreate:0:801;fabric=1", Sharing::Fabric, "start nvidia-imex"),
    ];
    for (at, (standin, sharing, fix)) in REFUSED.into_iter().enumerate() {
        let role = format!("pool-refused-{at}");
        if parent(&role).is_some() {
            let error = DevicePool::new_as(&child_device(), sharing, 1, BYTES).unwrap_err();
            assert!(error.to_string().contains(fix), "{error}");
            assert!(matches!(error.kind(), ErrorKind::Config | ErrorKind::Device));
            return assert_nothing_lives();
        }
        let _lease = device!();
        if !on_standin() {
            return skip("only the stand-in can be told to");
        }
        let test = "sharing::what_a_device_cannot_share_is_refused";
        Peer::start_with(test, &role, &[("KVXFER_STANDIN", standin)]).succeeds();
    }
}
