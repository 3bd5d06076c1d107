//! Copies, between addresses of the device and from and to pinned memory.

use kvxfer_cuda::driver::{Copy, Device, Priority, Stream};

use crate::harness::{Gate, device, drain, get, pattern, put};

fn stream(device: &Device) -> Stream {
    device.stream(Priority::Lowest).unwrap()
}

/// Lengths around those that hardware likes.
const LENGTHS: [u64; 15] =
    [1, 2, 3, 7, 8, 15, 16, 17, 255, 256, 257, 4095, 4096, 65_537, 1_000_003];

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "copies::every_size_and_alignment",
        "`cuMemcpyAsync` copies any number of bytes between any addresses, and no byte beyond them.",
    ),
    (
        "copies::a_batch_copies_every_size_and_alignment",
        "So does each copy of a batch (`cuMemcpyBatchAsync_v2`, or the first version).",
    ),
    ("copies::a_batch_takes_ten_thousand", "A batch may have 10,000 copies."),
    (
        "copies::a_batch_reads_in_stream_order",
        "A batch with stream access order reads what earlier work of its stream wrote, and nothing that later work \
         writes.",
    ),
    (
        "copies::a_batch_waits_for_the_event_before_it",
        "A batch starts after the event that its stream waits for.",
    ),
    (
        "copies::later_work_follows_the_whole_batch",
        "What follows a batch in its stream starts after all its copies.",
    ),
    (
        "copies::uploads_and_downloads_do_not_wait",
        "Copies from and to pinned memory return while the stream is held back, and move the bytes that are there \
         when it goes on.",
    ),
    (
        "copies::fills_are_exact",
        "`cuMemsetD8Async` sets the bytes that it is told to, and no other.",
    ),
    (
        "copies::a_copy_to_a_peers_memory_arrives",
        "A copy from a device's own memory to memory of another one that is mapped here arrives there.",
    ),
];

#[test]
fn every_size_and_alignment() {
    let device = device!();
    let stream = stream(&device);
    let (from, to) = (device.buffer(2 << 20).unwrap(), device.buffer(2 << 20).unwrap());
    let content = pattern(2 << 20, 1);
    put(&device, from.ptr(), &content);
    for (at, len) in LENGTHS.into_iter().enumerate() {
        let (src, dst) = (3 + at as u64 * 5, 1 + at as u64 * 7);
        stream.fill(to.ptr(), 0xee, to.bytes()).unwrap();
        stream.copy(to.ptr().offset(dst), from.ptr().offset(src), len).unwrap();
        drain(&stream);
        let mut expected = vec![0xee; 2 << 20];
        expected[dst as usize..][..len as usize]
            .copy_from_slice(&content[src as usize..][..len as usize]);
        assert!(get(&device, to.ptr(), 2 << 20) == expected, "{len} bytes from {src} to {dst}");
    }
}

#[test]
fn a_batch_copies_every_size_and_alignment() {
    let device = device!();
    let stream = stream(&device);
    let (from, to) = (device.buffer(4 << 20).unwrap(), device.buffer(4 << 20).unwrap());
    let content = pattern(4 << 20, 2);
    put(&device, from.ptr(), &content);
    stream.fill(to.ptr(), 0xee, to.bytes()).unwrap();
    let mut expected = vec![0xee; 4 << 20];
    let (mut copies, mut dst) = (Vec::new(), 1);
    for round in 0..3 {
        for (at, len) in LENGTHS.into_iter().enumerate() {
            let src = 11 * at as u64 + 4096 * round;
            copies.push(Copy { dst: to.ptr().offset(dst), src: from.ptr().offset(src), len });
            expected[dst as usize..][..len as usize]
                .copy_from_slice(&content[src as usize..][..len as usize]);
            dst += len + 1 + round;
            // None is allowed too.
            copies.push(Copy { dst: to.ptr().offset(dst), src: from.ptr(), len: 0 });
        }
    }
    stream.copy_batch(&copies).unwrap();
    drain(&stream);
    assert!(get(&device, to.ptr(), 4 << 20) == expected);
    stream.copy_batch(&[]).unwrap();
}

#[test]
fn a_batch_takes_ten_thousand() {
    let device = device!();
    let stream = stream(&device);
    let (from, to) = (device.buffer(10_000 * 64).unwrap(), device.buffer(10_000 * 64).unwrap());
    let content = pattern(10_000 * 64, 3);
    put(&device, from.ptr(), &content);
    // The other way round.
    let copies: Vec<Copy> = (0..10_000)
        .map(|at| Copy {
            dst: to.ptr().offset((9_999 - at) * 64),
            src: from.ptr().offset(at * 64),
            len: 64,
        })
        .collect();
    stream.copy_batch(&copies).unwrap();
    drain(&stream);
    let bytes = get(&device, to.ptr(), content.len());
    assert!(bytes.chunks(64).rev().eq(content.chunks(64)));
}

/// Copies of 4 KiB of all of a buffer to all of another one.
fn batch(to: &kvxfer_cuda::driver::Buffer, from: &kvxfer_cuda::driver::Buffer) -> Vec<Copy> {
    (0..from.bytes() / 4096)
        .map(|at| Copy {
            dst: to.ptr().offset(at * 4096),
            src: from.ptr().offset(at * 4096),
            len: 4096,
        })
        .collect()
}

#[test]
fn a_batch_reads_in_stream_order() {
    let device = device!();
    let stream = stream(&device);
    let (from, to) = (device.buffer(1 << 20).unwrap(), device.buffer(1 << 20).unwrap());
    put(&device, from.ptr(), &[1; 1 << 20]);
    let gate = Gate::before(&stream);
    stream.fill(from.ptr(), 2, from.bytes()).unwrap();
    stream.copy_batch(&batch(&to, &from)).unwrap();
    stream.fill(from.ptr(), 3, from.bytes()).unwrap();
    gate.open();
    drain(&stream);
    assert!(get(&device, to.ptr(), 1 << 20).iter().all(|&byte| byte == 2));
}

#[test]
fn a_batch_waits_for_the_event_before_it() {
    let device = device!();
    let (engine, side) = (stream(&device), stream(&device));
    let (from, to) = (device.buffer(1 << 20).unwrap(), device.buffer(1 << 20).unwrap());
    put(&device, from.ptr(), &[1; 1 << 20]);
    let event = device.event().unwrap();
    let gate = Gate::before(&engine);
    engine.fill(from.ptr(), 2, from.bytes()).unwrap();
    engine.record(&event).unwrap();
    side.wait(&event).unwrap();
    side.copy_batch(&batch(&to, &from)).unwrap();
    assert!(!side.is_idle().unwrap());
    gate.open();
    drain(&side);
    assert!(get(&device, to.ptr(), 1 << 20).iter().all(|&byte| byte == 2));
}

#[test]
fn later_work_follows_the_whole_batch() {
    let device = device!();
    let (side, engine) = (stream(&device), stream(&device));
    let (from, to) = (device.buffer(1 << 20).unwrap(), device.buffer(1 << 20).unwrap());
    put(&device, from.ptr(), &[1; 1 << 20]);
    let read = device.event().unwrap();
    for _ in 0..20 {
        side.copy_batch(&batch(&to, &from)).unwrap();
        side.record(&read).unwrap();
        // The blocks are used again as soon as they are read.
        engine.wait(&read).unwrap();
        engine.fill(from.ptr(), 9, from.bytes()).unwrap();
        drain(&engine);
        assert!(get(&device, to.ptr(), 1 << 20).iter().all(|&byte| byte == 1));
        put(&device, from.ptr(), &[1; 1 << 20]);
        put(&device, to.ptr(), &[0; 1 << 20]);
    }
}

#[test]
fn uploads_and_downloads_do_not_wait() {
    let device = device!();
    let stream = stream(&device);
    let buffer = device.buffer(4096).unwrap();
    let (from, to) = (device.pinned(4096).unwrap(), device.pinned(4096).unwrap());
    let gate = Gate::before(&stream);
    stream.upload(buffer.ptr().offset(1), &from, 3, 4001).unwrap();
    stream.download(&to, 5, buffer.ptr().offset(1), 4001).unwrap();
    let content = pattern(4096, 4);
    from.write(0, &content).unwrap();
    gate.open();
    drain(&stream);
    let mut bytes = vec![0; 4096];
    to.read(0, &mut bytes).unwrap();
    assert!(bytes[5..4006] == content[3..4004]);
    assert!(bytes[..5].iter().chain(&bytes[4006..]).all(|&byte| byte == 0));
}

#[test]
fn fills_are_exact() {
    let device = device!();
    let stream = stream(&device);
    let buffer = device.buffer(1 << 17).unwrap();
    for (at, len) in LENGTHS.into_iter().filter(|&len| len < 1 << 16).enumerate() {
        stream.fill(buffer.ptr(), 0, buffer.bytes()).unwrap();
        stream.fill(buffer.ptr().offset(at as u64), 7, len).unwrap();
        drain(&stream);
        let bytes = get(&device, buffer.ptr(), 1 << 17);
        let set = at..at + len as usize;
        assert!(
            bytes.iter().enumerate().all(|(i, &byte)| (byte == 7) == set.contains(&i)),
            "{len}"
        );
    }
}

#[test]
fn a_copy_to_a_peers_memory_arrives() {
    let devices = device!(two);
    let [own, peer] = &*devices;
    if super::unreachable(own, peer) {
        return;
    }
    let theirs = std::sync::Arc::new(peer.allocate(2 << 20).unwrap());
    let (here, there) = (own.map(theirs.clone()).unwrap(), peer.map(theirs).unwrap());
    let source = own.buffer(1 << 20).unwrap();
    let content = pattern(1 << 20, 5);
    put(own, source.ptr(), &content);
    let stream = stream(own);
    let copies = batch(&source, &source);
    let copies: Vec<Copy> = copies
        .iter()
        .enumerate()
        .map(|(at, copy)| Copy { dst: here.ptr().offset(at as u64 * 4096), ..*copy })
        .collect();
    stream.copy_batch(&copies).unwrap();
    drain(&stream);
    assert!(get(peer, there.ptr(), 1 << 20) == content);
}
