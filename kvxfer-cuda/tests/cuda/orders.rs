//! What comes before what on a GPU, and that the tests of it can fail.
//!
//! A build with `--cfg kvxfer_planted` runs each of them again with the bug that it is there to find: then
//! it has to fail.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvxfer_core::transport::{Post, Transport, Write};
use kvxfer_core::{Incarnation, PostId, SegmentId};
use kvxfer_cuda::device::{Copier, CopierConfig, DevicePool, DeviceRegions};
use kvxfer_cuda::driver::{Buffer, Device, Priority};
use kvxfer_cuda::transport::{CudaIpc, cuda_ipc};

use crate::copier::{BATCH, KERNEL, Rig, event, span, sum};
use crate::harness::{DEADLINE, Gate, device, drain, finish, get, put};

const LEN: u64 = 1 << 16;
/// How long what must not happen is watched for. With the bug it happens at once.
const WATCH: Duration = Duration::from_millis(100);

#[track_caller]
fn assert_holds(device: &Device, memory: &Buffer, byte: u8) {
    let bytes = get(device, memory.ptr(), LEN as usize);
    let differs = bytes.iter().find(|&&stored| stored != byte);
    assert_eq!(differs, None, "{byte} everywhere");
}

/// The engine writes blocks and records an event, all while its stream is held back: the copies read what was
/// written, however early they were asked for.
fn copies_what_the_engine_wrote(config: CopierConfig) {
    let device = device!();
    let mut rig = Rig::new(&device, config);
    let engine = device.stream(Priority::Default).unwrap();
    let [source, target] = [(); 2].map(|()| device.buffer(LEN).unwrap());
    let computed = event(&device);
    put(&device, source.ptr(), &vec![1; LEN as usize]);
    let gate = Gate::before(&engine);
    engine.fill(source.ptr(), 2, LEN).unwrap();
    engine.record(&computed).unwrap();
    rig.copier.wait_for(&computed).unwrap();
    rig.copier.submit(0, &[span(source.ptr(), target.ptr(), LEN)]).unwrap();
    let early = rig.collect_for(1, WATCH);
    assert!(early.is_empty(), "copied before the engine's event: {early:?}");
    gate.open();
    let sums = rig.collect(1).remove(0).result;
    assert_holds(&device, &target, 2);
    assert_eq!(sums.unwrap(), sum(&[2; LEN as usize]));
}

#[test]
fn copies_wait_for_the_engine() {
    copies_what_the_engine_wrote(KERNEL);
}

#[test]
fn batches_read_in_the_streams_order() {
    copies_what_the_engine_wrote(BATCH);
}

#[test]
fn blocks_are_reused_after_they_were_read() {
    let device = device!();
    for config in [KERNEL, BATCH] {
        let mut rig = Rig::new(&device, config);
        let [engine, other] = [(); 2].map(|()| device.stream(Priority::Default).unwrap());
        let [source, target] = [(); 2].map(|()| device.buffer(LEN).unwrap());
        let (computed, reused) = (event(&device), device.event().unwrap());
        put(&device, source.ptr(), &vec![1; LEN as usize]);
        let gate = Gate::before(&other);
        other.record(&computed).unwrap();
        rig.copier.wait_for(&computed).unwrap();
        rig.copier.submit(0, &[span(source.ptr(), target.ptr(), LEN)]).unwrap();
        let early = rig.collect_for(1, Duration::ZERO);
        assert!(early.is_empty(), "{early:?}");

        engine.wait(rig.copier.launched()).unwrap();
        engine.fill(source.ptr(), 2, LEN).unwrap();
        engine.record(&reused).unwrap();
        let watched = std::time::Instant::now();
        while watched.elapsed() < WATCH && !reused.is_done().unwrap() {
            std::thread::yield_now();
        }
        gate.open();
        let sums = rig.collect(1).remove(0).result;
        finish(&reused);
        assert_holds(&device, &target, 1);
        assert_eq!(sums.unwrap(), sum(&[1; LEN as usize]));
        assert_holds(&device, &source, 2);
    }
}

#[test]
fn nothing_is_done_before_its_copies_are() {
    let device = device!();
    for config in [KERNEL, BATCH] {
        let mut rig = Rig::new(&device, config);
        let engine = device.stream(Priority::Default).unwrap();
        let [source, target] = [(); 2].map(|()| device.buffer(LEN).unwrap());
        let computed = event(&device);
        put(&device, source.ptr(), &vec![1; LEN as usize]);
        let gate = Gate::before(&engine);
        engine.record(&computed).unwrap();
        rig.copier.wait_for(&computed).unwrap();
        rig.copier.submit(0, &[span(source.ptr(), target.ptr(), LEN)]).unwrap();
        let early = rig.collect_for(1, WATCH);
        assert!(early.is_empty(), "nothing was copied yet: {early:?}");
        gate.open();
        assert_eq!(rig.collect(1).remove(0).result.unwrap(), sum(&[1; LEN as usize]));
        assert_holds(&device, &target, 1);
    }
}

/// The agent says that a segment is let go when the transport holds nothing of it; then its owner gives it to
/// another writer.
#[test]
fn a_segment_changes_hands_when_nothing_writes_to_it() {
    const PEER: Incarnation = Incarnation([7; 16]);
    const ID: SegmentId = SegmentId(0);
    let device = device!();
    for config in [KERNEL, BATCH] {
        let source = device.buffer(LEN).unwrap();
        put(&device, source.ptr(), &vec![1; LEN as usize]);
        let mut pool = DevicePool::new(&device, 1, LEN).unwrap();
        let target = pool.at(ID, 0, LEN).unwrap();
        let mut regions = DeviceRegions::new();
        // SAFETY: the memory outlives the transport, which is dropped before it.
        let region = unsafe { regions.register(source.ptr(), LEN) }.unwrap();
        let copier = Copier::new(&device, config, || ()).unwrap();
        let mut writer = CudaIpc::new(device.clone(), Arc::new(regions), copier);
        writer.attach(PEER, ID, cuda_ipc::export(&mut pool, ID, PEER).unwrap()).unwrap();

        let engine = device.stream(Priority::Default).unwrap();
        let computed = event(&device);
        let gate = Gate::before(&engine);
        engine.record(&computed).unwrap();
        writer.copier().wait_for(&computed).unwrap();
        let write = Write { region, src: 0, segment: ID, dst: 0, len: LEN };
        writer
            .post(Post { id: PostId(1), peer: PEER, grant: None, seed: 0, writes: &[write] })
            .unwrap();
        let mut ended = Vec::new();
        writer.poll(0, &mut ended);
        writer.detach(PEER, Some(ID));

        let heir = || {
            engine.fill(target, 2, LEN).unwrap();
            drain(&engine);
        };
        let held = writer.holds(PEER, Some(ID));
        gate.open();
        if !held {
            heir();
        }
        let start = Instant::now();
        while writer.pending() > 0 {
            assert!(start.elapsed() < DEADLINE, "the post does not end");
            writer.poll(0, &mut ended);
            std::thread::yield_now();
        }
        assert!(!writer.holds(PEER, Some(ID)));
        if held {
            heir();
        }
        let stored = get(&device, target, LEN as usize);
        assert!(stored.iter().all(|&byte| byte == 2), "the heir's bytes were written over");
    }
}

/// The bugs of `planted.rs`, and what finds each: the name of a test of this binary.
#[cfg(kvxfer_planted)]
const BUGS: &[(&str, &str)] = &[
    ("EngineEventIgnored", "orders::copies_wait_for_the_engine"),
    ("BatchOutOfOrder", "orders::batches_read_in_the_streams_order"),
    ("ReadEventMissing", "orders::blocks_are_reused_after_they_were_read"),
    ("DoneBeforeCompletion", "orders::nothing_is_done_before_its_copies_are"),
    ("PageFreedEarly", "pair::a_load_begins_behind_the_engines_stream_and_is_told_at_its_end"),
    ("SegmentHandedOnEarly", "orders::a_segment_changes_hands_when_nothing_writes_to_it"),
];

/// Each bug is found by its test, which passes without it. `KVXFER_PLANTED_REPORT` names a file for the result.
#[cfg(kvxfer_planted)]
#[test]
fn planted() {
    use crate::harness::{Peer, on_standin, skip};

    let _device = device!();
    if !on_standin() {
        return skip("a device may do by chance what it was not told to");
    }
    let succeeds = |test, bug| {
        let env = [("KVXFER_PLANTED", bug), ("RUST_BACKTRACE", "0")];
        Peer::start_with(test, "planted", &env).reap().success()
    };
    let mut lines = Vec::new();
    for &(bug, test) in BUGS {
        assert!(succeeds(test, ""), "{test} fails without a bug");
        assert!(!succeeds(test, bug), "{test} does not find {bug}");
        println!("{bug}: found by {test}");
        lines.push(format!("\"{bug}\": \"{test}\""));
    }
    if let Ok(path) = std::env::var("KVXFER_PLANTED_REPORT") {
        std::fs::write(path, format!("{{{}}}", lines.join(", "))).unwrap();
    }
}
