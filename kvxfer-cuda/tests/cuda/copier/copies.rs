//! What arrives, and its checksum.

use kvxfer_core::sum::{Sum, word_key};
use kvxfer_cuda::device::{CopierConfig, Span, Summed};
use kvxfer_cuda::driver::{Buffer, Device};

use super::{BATCH, KERNEL, Rig, standin, sum};
use crate::harness::{Peer, child_device, device, get, on_standin, parent, pattern, put, skip};

const SEED: u64 = 0xfeed;
const POISON: u8 = 0xa5;
/// Bytes between two destinations.
const GUARD: u64 = 64;

/// A task with these copies, (length, source's and destination's offset from a multiple of 16), into memory of
/// their own between guards: checks all of that memory, and the sum.
#[track_caller]
fn check(
    device: &Device,
    rig: &mut Rig,
    source: &Buffer,
    bytes: &[u8],
    copies: &[(u64, u64, u64)],
) {
    let room: u64 = copies.iter().map(|(len, ..)| len.next_multiple_of(16) + 16 + GUARD).sum();
    let target = device.buffer(room + GUARD).unwrap();
    let mut expected = vec![POISON; target.bytes() as usize];
    put(device, target.ptr(), &expected);
    let (mut sum, mut spans, mut at) = (Sum::new(SEED), Vec::new(), GUARD);
    for &(len, src, dst) in copies {
        let to = at + dst;
        spans.push(Span {
            src: source.ptr().offset(src),
            dst: Some(target.ptr().offset(to)),
            len,
            key: word_key(SEED, sum.index()),
        });
        let from = &bytes[src as usize..(src + len) as usize];
        sum.update(from);
        expected[to as usize..(to + len) as usize].copy_from_slice(from);
        at += len.next_multiple_of(16) + 16 + GUARD;
    }
    assert_eq!(rig.run(&spans).unwrap(), sum.finish(), "the sum of {copies:?}");
    let stored = get(device, target.ptr(), expected.len());
    let differs = stored.iter().zip(&expected).position(|(stored, expected)| stored != expected);
    assert_eq!(differs, None, "the bytes of {copies:?}");
}

/// All alignments, of each length; all lengths in one task.
pub(super) fn check_all(device: &Device, config: CopierConfig) {
    const LENGTHS: [u64; 20] =
        [1, 2, 7, 8, 9, 15, 16, 17, 24, 63, 255, 256, 257, 511, 512, 513, 2048, 4095, 4097, 65_544];
    let mut rig = Rig::new(device, config);
    let bytes = pattern((1 << 20) + 64, 1);
    let source = device.buffer(bytes.len() as u64).unwrap();
    put(device, source.ptr(), &bytes);
    let pairs = || (0..16).flat_map(|src| (0..16).map(move |dst| (src, dst)));
    for len in LENGTHS.into_iter().filter(|len| *len < 4096) {
        let copies: Vec<_> = pairs().map(|(src, dst)| (len, src, dst)).collect();
        check(device, &mut rig, &source, &bytes, &copies);
    }
    for len in [4097, 65_544, 1 << 20] {
        let copies: Vec<_> = (0..16).map(|shift| (len, shift, shift * 5 % 16)).collect();
        check(device, &mut rig, &source, &bytes, &copies);
    }
    let mixed: Vec<_> = LENGTHS.iter().zip(pairs()).map(|(&len, (a, b))| (len, b, a)).collect();
    check(device, &mut rig, &source, &bytes, &mixed);
    // Summed only.
    let only = Span { src: source.ptr(), dst: None, len: 70_001, key: word_key(0, 0) };
    assert_eq!(rig.run(&[only]).unwrap(), sum(&bytes[..70_001]));
}

#[test]
fn the_kernel_copies_and_sums() {
    let device = device!();
    check_all(&device, KERNEL);
}

#[test]
fn batches_copy_and_the_kernel_sums() {
    let device = device!();
    check_all(&device, BATCH);
    check_all(&device, CopierConfig { summed: Summed::Destination, ..BATCH });
}

#[test]
fn both_together() {
    let device = device!();
    for summed in [Summed::Source, Summed::Destination] {
        check_all(&device, CopierConfig { kernel_below: Some(1000), summed, ..KERNEL });
    }
}

/// Drivers differ in how a batch is given to them.
#[test]
fn without_either_batch_call() {
    if parent("batches").is_some() {
        let device = child_device();
        return check_all(&device, CopierConfig { kernel_below: Some(1000), ..KERNEL });
    }
    let _device = device!();
    if !on_standin() {
        return skip("needs the stand-in");
    }
    for setting in [
        "driver=13000",
        "driver=12060",
        "driver=12080;missing=cuMemcpyBatchAsync",
        "driver=13000;missing=cuMemcpyBatchAsync_v2",
    ] {
        let setting = standin(setting);
        let env = [("KVXFER_STANDIN", &*setting)];
        Peer::start_with("copier::copies::without_either_batch_call", "batches", &env).succeeds();
    }
}

#[test]
fn a_task_is_cut_into_launches() {
    let device = device!();
    // 64 KiB a launch.
    let config = CopierConfig { outstanding: 1, kernel_below: Some(8192), ..KERNEL };
    let mut rig = Rig::new(&device, config);
    let bytes = pattern(1 << 20, 2);
    let source = device.buffer(1 << 20).unwrap();
    put(&device, source.ptr(), &bytes);
    check(
        &device,
        &mut rig,
        &source,
        &bytes,
        &[((1 << 20) - 3, 3, 3), (5, 0, 0), (300_000, 7, 11)],
    );
    // More spans than a table has.
    let copies: Vec<_> = (0..5000).map(|i| (1 + i % 40, i % 16, i % 13)).collect();
    check(&device, &mut rig, &source, &bytes, &copies);
}

#[test]
fn the_cut_over_is_measured() {
    let device = device!();
    let mut rig = Rig::new(&device, CopierConfig { kernel_below: None, ..KERNEL });
    let below = rig.copier.kernel_below();
    assert!((4 << 10..=4 << 20).contains(&below), "{below}");
    let bytes = pattern(1 << 16, 7);
    let source = device.buffer(1 << 16).unwrap();
    put(&device, source.ptr(), &bytes);
    check(&device, &mut rig, &source, &bytes, &[(1 << 16, 0, 0), (100, 1, 2)]);
}
