//! Streams and events.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use kvxfer_cuda::driver::{Device, DevicePtr, EngineStream, Priority, Stream, cuda};

use crate::harness::{DEADLINE, Gate, device, drain, finish, get};

const LEN: u64 = 1 << 16;

fn streams<const N: usize>(device: &Device) -> [Stream; N] {
    [(); N].map(|()| device.stream(Priority::Default).unwrap())
}

#[track_caller]
fn assert_filled(device: &Device, ptr: DevicePtr, byte: u8) {
    let bytes = get(device, ptr, LEN as usize);
    assert!(bytes.iter().all(|&b| b == byte), "not all are {byte}: {:?}...", &bytes[..16]);
}

pub(super) const CLAUSES: &[super::Clause] = &[
    ("streams::work_runs_in_order", "What is queued in one stream runs in that order."),
    ("streams::streams_are_independent", "A stream that is held back holds no other one back."),
    (
        "streams::a_stream_waits_for_an_event_of_another",
        "What is queued behind `cuStreamWaitEvent` starts after the work that the event was recorded behind.",
    ),
    (
        "streams::a_wait_is_for_the_latest_record",
        "`cuStreamWaitEvent` waits for the last `cuEventRecord` before it.",
    ),
    (
        "streams::recording_again_moves_no_wait",
        "Recording an event again changes nothing for a stream that waits for it already.",
    ),
    (
        "streams::an_event_that_was_never_recorded_is_done",
        "An event that was never recorded is done; neither a stream nor the host waits for it.",
    ),
    (
        "streams::a_host_wait_sleeps_until_the_work_is_done",
        "`cuEventSynchronize` returns after the work that the event was recorded behind, and not before.",
    ),
    (
        "streams::a_query_tells_without_waiting",
        "`cuStreamQuery` and `cuEventQuery` return at once, whether the work is done or not.",
    ),
    (
        "streams::a_dropped_stream_ends_its_work",
        "`cuStreamDestroy` returns at once, and the work in the stream runs to its end.",
    ),
    (
        "streams::a_dropped_event_still_orders",
        "An event may be destroyed while a stream waits for it: the stream waits on.",
    ),
    (
        "streams::the_lowest_priority_is_not_above_the_default",
        "There is a lowest priority, not above the default one, and streams of it run.",
    ),
    (
        "streams::the_default_stream_and_ours_are_apart",
        "A non-blocking stream and the legacy default stream don't wait for each other; events order them.",
    ),
    (
        "streams::a_stream_goes_on_when_the_host_says_so",
        "`cuStreamWaitValue32` holds a stream until the host has written the word in pinned memory, which has one \
         address on both sides.",
    ),
];

#[test]
fn work_runs_in_order() {
    let device = device!();
    let [stream] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    for byte in 0..64 {
        stream.fill(buffer.ptr(), byte, LEN).unwrap();
    }
    drain(&stream);
    assert_filled(&device, buffer.ptr(), 63);
}

#[test]
fn streams_are_independent() {
    let device = device!();
    let [held, free] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let gate = Gate::before(&held);
    held.fill(buffer.ptr(), 1, LEN).unwrap();
    free.fill(buffer.ptr(), 2, LEN).unwrap();
    drain(&free);
    assert_filled(&device, buffer.ptr(), 2);
    assert!(!held.is_idle().unwrap());
    gate.open();
    drain(&held);
    assert_filled(&device, buffer.ptr(), 1);
}

#[test]
fn a_stream_waits_for_an_event_of_another() {
    let device = device!();
    let [first, second] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let [event, done] = [(); 2].map(|()| device.event().unwrap());
    let gate = Gate::before(&first);
    first.fill(buffer.ptr(), 1, LEN).unwrap();
    first.record(&event).unwrap();
    second.wait(&event).unwrap();
    second.fill(buffer.ptr(), 2, LEN).unwrap();
    second.record(&done).unwrap();
    assert!(!event.is_done().unwrap());
    assert!(!done.is_done().unwrap());
    gate.open();
    finish(&done);
    assert!(event.is_done().unwrap());
    assert_filled(&device, buffer.ptr(), 2);
}

#[test]
fn a_wait_is_for_the_latest_record() {
    let device = device!();
    let [first, second, third] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let event = device.event().unwrap();
    first.record(&event).unwrap();
    finish(&event);
    let gate = Gate::before(&second);
    second.fill(buffer.ptr(), 1, LEN).unwrap();
    second.record(&event).unwrap();
    third.wait(&event).unwrap();
    third.fill(buffer.ptr(), 2, LEN).unwrap();
    assert!(!event.is_done().unwrap());
    assert!(!third.is_idle().unwrap());
    gate.open();
    drain(&third);
    assert_filled(&device, buffer.ptr(), 2);
}

#[test]
fn recording_again_moves_no_wait() {
    let device = device!();
    let [first, second] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let event = device.event().unwrap();
    let gate = Gate::before(&first);
    first.fill(buffer.ptr(), 1, LEN).unwrap();
    first.record(&event).unwrap();
    second.wait(&event).unwrap();
    second.fill(buffer.ptr(), 2, LEN).unwrap();
    // Again, behind something that is not done for long.
    let later = Gate::before(&first);
    first.record(&event).unwrap();
    assert!(!second.is_idle().unwrap());
    gate.open();
    drain(&second);
    assert_filled(&device, buffer.ptr(), 2);
    assert!(!event.is_done().unwrap());
    later.open();
    finish(&event);
}

#[test]
fn an_event_that_was_never_recorded_is_done() {
    let device = device!();
    let [stream] = streams(&device);
    let event = device.event().unwrap();
    assert!(event.is_done().unwrap());
    event.wait().unwrap();
    stream.wait(&event).unwrap();
    drain(&stream);
}

#[test]
fn a_host_wait_sleeps_until_the_work_is_done() {
    let device = device!();
    let [stream] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let event = device.event().unwrap();
    let gate = Gate::before(&stream);
    stream.fill(buffer.ptr(), 1, LEN).unwrap();
    stream.record(&event).unwrap();
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let (event, device) = (&event, &*device);
        scope.spawn(move || {
            device.bind().unwrap();
            sender.send(event.wait()).unwrap();
        });
        let early = receiver.recv_timeout(Duration::from_millis(50));
        assert_eq!(early, Err(RecvTimeoutError::Timeout));
        gate.open();
        receiver.recv_timeout(DEADLINE).expect("the wait ends").unwrap();
    });
    assert!(event.is_done().unwrap());
    assert_filled(&device, buffer.ptr(), 1);
}

#[test]
fn a_query_tells_without_waiting() {
    let device = device!();
    let [stream] = streams(&device);
    let event = device.event().unwrap();
    assert!(stream.is_idle().unwrap());
    let gate = Gate::before(&stream);
    stream.record(&event).unwrap();
    // Would they wait, the gate would never open.
    assert!(!stream.is_idle().unwrap());
    assert!(!event.is_done().unwrap());
    gate.open();
    finish(&event);
    stream.synchronize().unwrap();
    assert!(stream.is_idle().unwrap());
}

#[test]
fn a_dropped_stream_ends_its_work() {
    let device = device!();
    let [stream] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let event = device.event().unwrap();
    let gate = Gate::before(&stream);
    stream.fill(buffer.ptr(), 5, LEN).unwrap();
    stream.record(&event).unwrap();
    drop(stream);
    assert!(!event.is_done().unwrap());
    gate.open();
    finish(&event);
    assert_filled(&device, buffer.ptr(), 5);
}

#[test]
fn a_dropped_event_still_orders() {
    let device = device!();
    let [first, second] = streams(&device);
    let buffer = device.buffer(LEN).unwrap();
    let event = device.event().unwrap();
    let gate = Gate::before(&first);
    first.fill(buffer.ptr(), 1, LEN).unwrap();
    first.record(&event).unwrap();
    second.wait(&event).unwrap();
    second.fill(buffer.ptr(), 2, LEN).unwrap();
    drop(event);
    assert!(!second.is_idle().unwrap());
    gate.open();
    drain(&second);
    assert_filled(&device, buffer.ptr(), 2);
}

#[test]
fn the_lowest_priority_is_not_above_the_default() {
    let device = device!();
    device.bind().unwrap();
    // SAFETY: the context is current.
    let lowest = unsafe { cuda().unwrap().lowest_priority() }.unwrap();
    // Numerically lower is higher, and the default is 0.
    assert!(lowest >= 0, "{lowest}");
    let stream = device.stream(Priority::Lowest).unwrap();
    let buffer = device.buffer(LEN).unwrap();
    stream.fill(buffer.ptr(), 9, LEN).unwrap();
    drain(&stream);
    assert_filled(&device, buffer.ptr(), 9);
}

#[test]
fn the_default_stream_and_ours_are_apart() {
    // Alone: other tests' engines use the default stream too.
    let device = device!(alone);
    let [ours] = streams(&device);
    // SAFETY: every context has it.
    let default = unsafe { EngineStream::from_raw(&device, 0) };
    let [event, held] = [(); 2].map(|()| device.event().unwrap());
    let gate = Gate::before(&ours);
    ours.record(&held).unwrap();
    default.record(&event).unwrap();
    finish(&event);
    // Now it does wait, for an event.
    default.wait(&held).unwrap();
    default.record(&event).unwrap();
    assert!(!event.is_done().unwrap());
    // And other streams of ours don't wait for it.
    let [free] = streams(&device);
    drain(&free);
    gate.open();
    finish(&event);
}

#[test]
fn a_stream_goes_on_when_the_host_says_so() {
    let device = device!();
    let [stream] = streams(&device);
    let word = device.pinned(16).unwrap();
    stream.hold(&word, 8, 3).unwrap();
    for value in [1_u32, 2] {
        word.write(8, &value.to_ne_bytes()).unwrap();
        assert!(!stream.is_idle().unwrap());
    }
    word.write(8, &3_u32.to_ne_bytes()).unwrap();
    drain(&stream);
    // Nor is it a step to reach, but a value to have.
    stream.hold(&word, 8, 2).unwrap();
    drain(&stream);
}
