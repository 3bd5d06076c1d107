//! How tasks end, and the copier itself.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use kvxfer_core::ErrorKind;
use kvxfer_cuda::device::CopierConfig;
use kvxfer_cuda::driver::Priority;

use super::copies::check_all;
use super::{BATCH, KERNEL, Rig, event, span, standin, sum};
use crate::allocations;
use crate::harness::{
    DEADLINE, Gate, Peer, assert_nothing_lives, child_device, device, drain, finish, get, live,
    on_standin, parent, pattern, put, skip,
};

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
        return Peer::start("copier::ends::what_does_not_end_is_never_freed", "leak").succeeds();
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
    let launched = Arc::clone(rig.copier.launched());
    rig.copier.drain(Duration::ZERO).unwrap_err();
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() < Duration::from_secs(5), "it had been waited for already");
    gate.open();
    // It runs to its end, in memory that is still there: else the context would be lost.
    finish(&launched);
    assert!(get(&device, target.ptr(), 1 << 16) == bytes);
    drain(&engine);
    drop((launched, engine, computed, source, target, gate, device));
    assert!(live().is_none_or(|counts| counts.iter().any(|&count| count > 0)));
}

/// A copier that can't measure copies, because one does not end, is none.
#[test]
fn a_start_that_does_not_end_keeps_what_its_copies_may_use() {
    if parent("start").is_none() {
        let _device = device!();
        if !on_standin() {
            return skip("only the stand-in is stuck when it is told to be");
        }
        let test = "copier::ends::a_start_that_does_not_end_keeps_what_its_copies_may_use";
        let config = standin("late=cuMemcpyHtoDAsync:2:0");
        return Peer::start_with(test, "start", &[("KVXFER_STANDIN", &config)]).succeeds();
    }
    let device = child_device();
    let patience = Duration::from_millis(50);
    let config = CopierConfig { kernel_below: None, patience, ..KERNEL };
    let error = Rig::try_new(&device, config).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    drop(device);
    assert!(live().is_some_and(|counts| counts.iter().any(|&count| count > 0)));
}

#[test]
fn nothing_is_left() {
    if parent("zero").is_none() {
        let _device = device!();
        return Peer::start("copier::ends::nothing_is_left", "zero").succeeds();
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
fn copies_go_on_while_an_engine_captures_a_graph() {
    // Alone: a capture in global mode forbids things to other threads.
    let device = device!(alone);
    let engine = device.stream(Priority::Default).unwrap();
    let memory = device.buffer(128).unwrap();
    let copy = [span(memory.ptr(), memory.ptr().offset(64), 64)];
    let capture = engine.capture(|| {
        std::thread::scope(|scope| {
            let owner = scope.spawn(|| {
                device.bind().unwrap();
                let mut rig = Rig::new(&device, KERNEL);
                rig.run(&copy).unwrap()
            });
            assert_eq!(owner.join().unwrap(), sum(&[0; 64]));
        });
    });
    assert_eq!(capture, Ok(()), "the capture was invalidated");
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
