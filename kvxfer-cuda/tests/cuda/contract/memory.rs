//! Physical memory, addresses, and what counts as used.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvxfer_cuda::driver::{Device, DevicePtr, HandleKind, Priority, RawDevice, cuda};

use super::MUCH;
use crate::harness::{Peer, child_device, device, drain, get, parent, pattern, put};

const LEN: usize = 1 << 20;

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "memory::mapped_memory_is_aligned",
        "Physical memory comes in multiples of the granularity, and is mapped at multiples of 256 bytes at least.",
    ),
    (
        "memory::mapping_again_shows_the_same_bytes",
        "What was written stays when memory is unmapped and mapped again.",
    ),
    (
        "memory::one_memory_at_two_addresses",
        "Memory may be mapped twice at a time; what is written through one address is read through the other, once \
         the work is done.",
    ),
    ("memory::access_has_to_be_set", "Mapped memory can't be used before `cuMemSetAccess`."),
    (
        "memory::no_more_than_there_is_is_mapped",
        "To map more bytes than the memory has is refused.",
    ),
    (
        "memory::too_much_is_refused_and_nothing_is_lost",
        "More than the device has is `OUT_OF_MEMORY`, and the device works on.",
    ),
    (
        "memory::what_is_allocated_is_not_free",
        "`cuMemGetInfo` counts physical memory as used as long as it exists, mapped or not, and free afterwards.",
    ),
    (
        "memory::a_descriptor_keeps_memory",
        "A descriptor of exported memory keeps it, also when its owner released it and nobody imported it.",
    ),
    (
        "memory::rdma_is_only_asked_for",
        "The driver tells of mapped memory whether a network card reaches it.",
    ),
    (
        "memory::a_peer_maps_memory",
        "A device that can reach another one maps its memory by `cuMemSetAccess` alone, without `cuCtxEnablePeerAccess`.",
    ),
];

#[test]
fn mapped_memory_is_aligned() {
    let device = device!();
    let granularity = device.granularity().unwrap();
    assert!(granularity.is_power_of_two());
    for bytes in [1, granularity - 1, granularity, granularity + 1] {
        let physical = device.allocate(bytes).unwrap();
        assert_eq!(physical.bytes(), bytes.next_multiple_of(granularity));
        let mapped = device.map(Arc::new(physical)).unwrap();
        assert!(mapped.ptr().addr().is_multiple_of(256));
    }
}

#[test]
fn mapping_again_shows_the_same_bytes() {
    let device = device!();
    let physical = Arc::new(device.allocate(LEN as u64).unwrap());
    let content = pattern(LEN, 1);
    let mapped = device.map(Arc::clone(&physical)).unwrap();
    put(&device, mapped.ptr(), &content);
    drop(mapped);
    let mapped = device.map(physical).unwrap();
    assert!(get(&device, mapped.ptr(), LEN) == content);
}

#[test]
fn one_memory_at_two_addresses() {
    let device = device!();
    let physical = Arc::new(device.allocate(LEN as u64).unwrap());
    let [one, two] = [(); 2].map(|()| device.map(Arc::clone(&physical)).unwrap());
    assert_ne!(one.ptr(), two.ptr());
    let content = pattern(LEN, 2);
    put(&device, one.ptr(), &content);
    assert!(get(&device, two.ptr(), LEN) == content);
}

/// Maps without setting access, and copies: in a process of its own, because it may end the context.
#[test]
fn child() {
    let Some(_) = parent("no access") else { return };
    let (device, driver) = (child_device(), cuda().unwrap());
    device.bind().unwrap();
    let bytes = device.granularity().unwrap();
    // SAFETY: the context is current; the ranges are those that were just made. The process ends after this.
    let ptr = unsafe {
        let memory = driver.memory_create(RawDevice(0), bytes, HandleKind::PosixFd, false).unwrap();
        let ptr = driver.address_reserve(bytes).unwrap();
        driver.map(ptr, bytes, memory).unwrap();
        ptr
    };
    assert!(fails(&device, ptr), "memory without access was written to");
    // SAFETY: as above.
    unsafe { driver.set_access(ptr, bytes, RawDevice(0)) }.ok();
}

/// Whether a fill there is refused, at once or later.
fn fails(device: &Device, ptr: DevicePtr) -> bool {
    let stream = device.stream(Priority::Default).unwrap();
    stream.fill(ptr, 1, 4096).and_then(|()| stream.synchronize()).is_err()
}

#[test]
fn access_has_to_be_set() {
    let _device = device!();
    Peer::start("contract::memory::child", "no access").succeeds();
}

#[test]
fn no_more_than_there_is_is_mapped() {
    let device = device!();
    let physical = device.allocate(1).unwrap();
    let fd = physical.export().unwrap();
    let more = device.import(fd.as_fd(), physical.bytes() * 2);
    let mapped = more.and_then(|more| device.map(Arc::new(more)));
    let error = mapped.unwrap_err();
    assert!(!error.is_sticky(), "{error}");
}

#[test]
fn too_much_is_refused_and_nothing_is_lost() {
    let device = device!(alone);
    let (free, total) = device.memory().unwrap();
    let error = device.allocate(total * 2).unwrap_err();
    assert!(error.is_out_of_memory() && !error.is_sticky(), "{error}");
    let error = device.buffer(total * 2).unwrap_err();
    assert!(error.is_out_of_memory() && !error.is_sticky(), "{error}");
    assert!(device.memory().unwrap().0 + (64 << 20) > free);
    let stream = device.stream(Priority::Default).unwrap();
    let buffer = device.buffer(4096).unwrap();
    stream.fill(buffer.ptr(), 1, 4096).unwrap();
    drain(&stream);
}

#[test]
fn what_is_allocated_is_not_free() {
    let device = device!(alone);
    let before = device.memory().unwrap().0;
    let physical = Arc::new(device.allocate(MUCH).unwrap());
    super::assert_free(&device, before - MUCH);
    let mapped = device.map(Arc::clone(&physical)).unwrap();
    drop(physical);
    super::assert_free(&device, before - MUCH);
    drop(mapped);
    super::assert_free(&device, before);
}

#[test]
fn a_descriptor_keeps_memory() {
    let device = device!(counted);
    let before = device.memory().unwrap().0;
    let physical = device.allocate(MUCH).unwrap();
    let fd = physical.export().unwrap();
    drop(physical);
    super::assert_free(&device, before - MUCH);
    drop(fd);
    super::assert_free(&device, before);
}

#[test]
fn rdma_is_only_asked_for() {
    let device = device!();
    let physical = device.allocate(1).unwrap();
    let asked = physical.rdma_capable();
    let mapped = device.map(Arc::new(physical)).unwrap();
    // What was not asked for may be there all the same; what was may be missing. But there is an answer.
    let verified = mapped.rdma_verified().unwrap();
    println!("asked {asked}, is {verified}");
}

#[test]
fn a_peer_maps_memory() {
    let devices = device!(two);
    let [own, peer] = &*devices;
    if super::unreachable(own, peer) {
        return;
    }
    let physical = Arc::new(peer.allocate(LEN as u64).unwrap());
    let (here, there) = (own.map(Arc::clone(&physical)).unwrap(), peer.map(physical).unwrap());
    let content = pattern(LEN, 3);
    put(own, here.ptr(), &content);
    assert!(get(peer, there.ptr(), LEN) == content);
    put(peer, there.ptr(), &pattern(LEN, 4));
    assert!(get(own, here.ptr(), LEN) == pattern(LEN, 4));
}
