//! The copier: what it copies and sums, what it refuses, and how it ends.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvxfer_core::sum::{Sum, word_key};
use kvxfer_core::{Error, ErrorKind};
use kvxfer_cuda::device::{Copier, CopierConfig, Done, Span, Summed};
use kvxfer_cuda::driver::{Buffer, Device, DevicePtr, Event, Priority};

use crate::allocations;
use crate::harness::{
    DEADLINE, Gate, Peer, assert_nothing_lives, child_device, device, drain, get, live, on_standin,
    parent, pattern, put,
};

/// A copier, and what it says.
pub struct Rig {
    pub copier: Copier,
    wakes: Receiver<()>,
    done: Vec<Done>,
}

impl Rig {
    pub fn new(device: &Device, config: CopierConfig) -> Self {
        Self::try_new(device, config).unwrap()
    }

    fn try_new(device: &Device, config: CopierConfig) -> Result<Self, Error> {
        let (wake, wakes) = channel();
        let copier = Copier::new(device, config, move || {
            let _ = wake.send(());
        })?;
        Ok(Self { copier, wakes, done: Vec::with_capacity(1 << 12) })
    }

    /// The ends of so many tasks, or of as many as there are in that time.
    pub fn collect_for(&mut self, tasks: usize, limit: Duration) -> Vec<Done> {
        let deadline = Instant::now() + limit;
        loop {
            self.copier.poll(&mut self.done);
            let left = deadline.saturating_duration_since(Instant::now());
            if self.done.len() >= tasks || self.wakes.recv_timeout(left).is_err() {
                return std::mem::take(&mut self.done);
            }
        }
    }

    /// The ends of so many tasks.
    #[track_caller]
    pub fn collect(&mut self, tasks: usize) -> Vec<Done> {
        let done = self.collect_for(tasks, DEADLINE);
        assert_eq!(done.len(), tasks, "tasks that ended");
        done
    }

    /// Copies, and waits for the sum.
    #[track_caller]
    pub fn run(&mut self, spans: &[Span]) -> Result<u64, Error> {
        self.copier.submit(0, spans).unwrap();
        self.collect(1).remove(0).result
    }
}

pub fn event(device: &Device) -> Arc<Event> {
    Arc::new(device.event().unwrap())
}

/// Copies by the kernel alone.
pub const KERNEL: CopierConfig = CopierConfig {
    kernel_below: Some(u64::MAX),
    sms: 4,
    outstanding: 64 << 20,
    summed: Summed::Source,
};
/// Copies by batches alone.
pub const BATCH: CopierConfig = CopierConfig { kernel_below: Some(0), ..KERNEL };

/// One copy, with the checksum of seed 0 from word 0 on.
pub fn span(src: DevicePtr, dst: DevicePtr, len: u64) -> Span {
    Span { src, dst: Some(dst), len, key: word_key(0, 0) }
}

/// The checksum of seed 0.
pub fn sum(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new(0);
    sum.update(bytes);
    sum.finish()
}

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
fn check_all(device: &Device, config: CopierConfig) {
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
        return crate::harness::skip("needs the stand-in");
    }
    for setting in [
        "driver=13000",
        "driver=12060",
        "driver=12080;missing=cuMemcpyBatchAsync",
        "driver=13000;missing=cuMemcpyBatchAsync_v2",
    ] {
        let setting = standin(setting);
        let env = [("KVXFER_STANDIN", &*setting)];
        Peer::start_with("copier::without_either_batch_call", "batches", &env).succeeds();
    }
}

/// What the stand-in of a child is told: this process's settings, and more.
fn standin(more: &str) -> String {
    let own = std::env::var("KVXFER_STANDIN").unwrap_or_default();
    format!("{own};{more}")
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
fn each_task_ends_once_in_order() {
    let device = device!();
    let mut rig = Rig::new(&device, CopierConfig { kernel_below: Some(512), ..KERNEL });
    let bytes = pattern(1 << 16, 3);
    let [source, target] = [(); 2].map(|()| device.buffer(1 << 16).unwrap());
    put(&device, source.ptr(), &bytes);
    let mut expected = Vec::new();
    // Every eighth is of nothing.
    for task in 0..1500_u64 {
        let len = task % 8 * 100;
        let at = task % 64 * 1024;
        let copy = span(source.ptr().offset(at), target.ptr().offset(at), len);
        rig.copier.submit(task, &[copy]).unwrap();
        expected.push((task, sum(&bytes[at as usize..(at + len) as usize])));
        if task % 100 == 0 {
            rig.copier.poll(&mut rig.done);
        }
    }
    let done = rig.collect(expected.len());
    let done: Vec<_> = done.into_iter().map(|done| (done.task, done.result.unwrap())).collect();
    assert_eq!(done, expected);
    assert_eq!(rig.copier.pending(), 0);
    assert!(rig.collect_for(1, Duration::from_millis(20)).is_empty());
}

#[test]
fn a_full_queue_takes_more_later() {
    let device = device!();
    let mut rig = Rig::new(&device, KERNEL);
    let engine = device.stream(Priority::Default).unwrap();
    let [source, target] = [(); 2].map(|()| device.buffer(64).unwrap());
    let computed = event(&device);
    let gate = Gate::before(&engine);
    engine.record(&computed).unwrap();
    rig.copier.wait_for(&computed).unwrap();
    let copy = [span(source.ptr(), target.ptr(), 64)];
    let mut taken = 0;
    let refused = loop {
        match rig.copier.submit(taken, &copy) {
            Ok(()) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 1 << 20, "nothing bounds the queue");
        rig.copier.poll(&mut rig.done);
    };
    assert!(refused.retryable() && refused.kind() == ErrorKind::PoolFull, "{refused}");
    assert!(rig.done.is_empty());
    assert_eq!(rig.copier.pending() as u64, taken);
    gate.open();
    let done = rig.collect(taken as usize);
    assert!(done.iter().map(|done| done.task).eq(0..taken));
    assert!(rig.run(&copy).is_ok());
}

#[test]
fn later_layers_do_not_hold_earlier_ones() {
    const LAYERS: u32 = 12;
    let device = device!();
    let mut rig = Rig::new(&device, KERNEL);
    let engine = device.stream(Priority::Default).unwrap();
    let [source, target] = [(); 2].map(|()| device.buffer(u64::from(LAYERS) * 4096).unwrap());
    let layers = device.pinned(4).unwrap();
    // All of the engine's work is there before any of it runs, as engines do it.
    for layer in 0..LAYERS {
        let at = u64::from(layer) * 4096;
        let computed = event(&device);
        engine.hold(&layers, 0, layer + 1).unwrap();
        engine.fill(source.ptr().offset(at), layer as u8 + 1, 4096).unwrap();
        engine.record(&computed).unwrap();
        rig.copier.wait_for(&computed).unwrap();
        let copy = span(source.ptr().offset(at), target.ptr().offset(at), 4096);
        rig.copier.submit(layer.into(), &[copy]).unwrap();
        rig.copier.poll(&mut rig.done);
    }
    for layer in 0..LAYERS {
        layers.write(0, &(layer + 1).to_ne_bytes()).unwrap();
        let done = rig.collect(1);
        assert_eq!(done[0].task, u64::from(layer));
        assert_eq!(*done[0].result.as_ref().unwrap(), sum(&[layer as u8 + 1; 4096]));
    }
}

#[test]
fn a_drain_gives_up_what_was_not_started() {
    let device = device!();
    let mut rig = Rig::new(&device, KERNEL);
    let engine = device.stream(Priority::Default).unwrap();
    let [source, target] = [(); 2].map(|()| device.buffer(64).unwrap());
    let [first, second] = [(); 2].map(|()| event(&device));
    let copy = [span(source.ptr(), target.ptr(), 64)];
    let gate = Gate::before(&engine);
    engine.record(&first).unwrap();
    rig.copier.wait_for(&first).unwrap();
    rig.copier.submit(1, &copy).unwrap();
    rig.copier.poll(&mut rig.done);
    rig.copier.wait_for(&second).unwrap();
    rig.copier.submit(2, &copy).unwrap();

    let error = rig.copier.drain(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    rig.copier.poll(&mut rig.done);
    assert!(rig.done.is_empty(), "what is under way does not end by waiting less");
    gate.open();
    rig.copier.drain(DEADLINE).unwrap();
    rig.copier.poll(&mut rig.done);
    let ends: Vec<_> = rig.done.drain(..).map(|done| done.result.map_err(|e| e.kind())).collect();
    assert_eq!(ends, [Ok(sum(&[0; 64])), Err(ErrorKind::Closed)]);
    assert!(rig.run(&copy).is_ok(), "it goes on");
}

#[test]
fn a_drop_waits_for_what_is_under_way() {
    let device = device!();
    let mut rig = Rig::new(&device, BATCH);
    let engine = device.stream(Priority::Default).unwrap();
    let bytes = pattern(1 << 16, 5);
    let [source, target] = [(); 2].map(|()| device.buffer(1 << 16).unwrap());
    put(&device, source.ptr(), &bytes);
    let computed = event(&device);
    let gate = Gate::before(&engine);
    engine.record(&computed).unwrap();
    rig.copier.wait_for(&computed).unwrap();
    rig.copier.submit(0, &[span(source.ptr(), target.ptr(), 1 << 16)]).unwrap();
    rig.copier.poll(&mut rig.done);
    let (ended, end) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            drop(rig);
            ended.send(()).unwrap();
        });
        assert!(end.recv_timeout(Duration::from_millis(100)).is_err(), "the drop did not wait");
        gate.open();
        end.recv_timeout(DEADLINE).unwrap();
    });
    assert!(get(&device, target.ptr(), 1 << 16) == bytes);
}

/// Work that does not end keeps its tables, streams and events, however often it is given up on.
#[test]
fn what_does_not_end_is_never_freed() {
    if parent("leak").is_none() {
        let _device = device!();
        return Peer::start("copier::what_does_not_end_is_never_freed", "leak").succeeds();
    }
    let device = child_device();
    let engine = device.stream(Priority::Default).unwrap();
    let bytes = pattern(1 << 16, 6);
    let [source, target] = [(); 2].map(|()| device.buffer(1 << 16).unwrap());
    put(&device, source.ptr(), &bytes);
    let computed = event(&device);
    let mut rig = Rig::new(&device, CopierConfig { kernel_below: Some(100), ..KERNEL });
    let gate = Gate::before(&engine);
    engine.record(&computed).unwrap();
    rig.copier.wait_for(&computed).unwrap();
    let spans = [(0, 64), (64, (1 << 16) - 64)]
        .map(|(at, len)| span(source.ptr().offset(at), target.ptr().offset(at), len));
    rig.copier.submit(0, &spans).unwrap();
    rig.copier.poll(&mut rig.done);
    rig.copier.drain(Duration::ZERO).unwrap_err();
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() < Duration::from_secs(5), "it had been waited for already");
    gate.open();
    // It runs to its end, in memory that is still there: else the context would be lost.
    let start = Instant::now();
    while get(&device, target.ptr(), 1 << 16) != bytes {
        assert!(start.elapsed() < DEADLINE, "the copies never came");
    }
    drain(&engine);
    drop((engine, computed, source, target, gate, device));
    assert!(live().is_none_or(|counts| counts.iter().any(|&count| count > 0)));
}

#[test]
fn nothing_is_left() {
    if parent("zero").is_none() {
        let _device = device!();
        return Peer::start("copier::nothing_is_left", "zero").succeeds();
    }
    let device = child_device();
    check_all(&device, CopierConfig { kernel_below: Some(1000), ..KERNEL });
    // Submitted, and never asked for.
    let buffer = device.buffer(128).unwrap();
    let mut rig = Rig::new(&device, KERNEL);
    for task in 0..100 {
        rig.copier.submit(task, &[span(buffer.ptr(), buffer.ptr().offset(64), 64)]).unwrap();
    }
    rig.copier.poll(&mut rig.done);
    drop(rig);
    drop((buffer, device));
    assert_nothing_lives();
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

#[test]
fn spans_cost_no_allocation() {
    let device = device!();
    let mut rig = Rig::new(&device, CopierConfig { kernel_below: Some(512), ..KERNEL });
    let [source, target] = [(); 2].map(|()| device.buffer(2 << 20).unwrap());
    let spans: Vec<_> = (0..2048)
        .map(|i| (i * 1024, if i % 2 == 0 { 256 } else { 1024 }))
        .map(|(at, len)| span(source.ptr().offset(at), target.ptr().offset(at), len))
        .collect();
    let computed = event(&device);
    let mut done = Vec::with_capacity(64);
    let mut round = || {
        for task in 0..8 {
            rig.copier.wait_for(&computed).unwrap();
            rig.copier.submit(task, &spans).unwrap();
            rig.copier.poll(&mut done);
        }
        while done.len() < 8 {
            rig.wakes.recv_timeout(DEADLINE).unwrap();
            rig.copier.poll(&mut done);
        }
        assert!(done.drain(..).all(|done| done.result.is_ok()));
    };
    round();
    let before = allocations::of_this_thread();
    round();
    let allocated = allocations::of_this_thread() - before;
    // A channel allocates now and then; 16,384 spans don't.
    assert!(allocated < 64, "{allocated} allocations");
}
