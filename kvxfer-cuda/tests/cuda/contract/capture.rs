//! Graph capture, which the engine may be in when it calls us.

use kvxfer_cuda::driver::{CudaError, EngineStream, Priority};

use crate::harness::{Gate, device, drain};

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "capture::what_would_break_a_capture_is_refused_before",
        "`cuStreamIsCapturing` tells of a capture and leaves it valid, so that no event is recorded into it, and none \
         from outside is waited for.",
    ),
    (
        "capture::a_thread_of_ours_disturbs_no_capture",
        "After `cuThreadExchangeStreamCaptureMode(RELAXED)` a thread may allocate, wait and copy while another thread's \
         stream is captured in global mode, and the capture stays valid.",
    ),
    (
        "capture::captured_work_does_not_run",
        "Work that is queued into a stream under capture doesn't run.",
    ),
];

#[test]
fn what_would_break_a_capture_is_refused_before() {
    // Alone: a capture in global mode forbids things to other threads.
    let device = device!(alone);
    let stream = device.stream(Priority::Default).unwrap();
    let (outside, inside) = (device.event().unwrap(), device.event().unwrap());
    let other = device.stream(Priority::Default).unwrap();
    let gate = Gate::before(&other);
    other.record(&outside).unwrap();
    let buffer = device.buffer(4096).unwrap();
    // SAFETY: the stream outlives it.
    let engine = unsafe { EngineStream::from_raw(&device, stream.handle()) };
    engine.record(&inside).unwrap();
    let capture = stream.capture(|| {
        stream.fill(buffer.ptr(), 1, 4096).unwrap();
        assert_eq!(engine.record(&inside), Err(CudaError::Capturing));
        assert_eq!(engine.wait(&outside), Err(CudaError::Capturing));
        stream.fill(buffer.ptr(), 2, 4096).unwrap();
    });
    assert_eq!(capture, Ok(()), "the capture was invalidated");
    gate.open();
    // Afterwards it works again.
    engine.record(&inside).unwrap();
    engine.wait(&outside).unwrap();
    drain(&stream);
}

#[test]
fn a_thread_of_ours_disturbs_no_capture() {
    let device = device!(alone);
    let stream = device.stream(Priority::Default).unwrap();
    let buffer = device.buffer(4096).unwrap();
    let capture = stream.capture(|| {
        stream.fill(buffer.ptr(), 1, 4096).unwrap();
        std::thread::scope(|scope| {
            let ours = scope.spawn(|| {
                device.bind().unwrap();
                let side = device.stream(Priority::Lowest).unwrap();
                let buffer = device.buffer(1 << 20).unwrap();
                let mapped = device.map(std::sync::Arc::new(device.allocate(1).unwrap())).unwrap();
                side.copy(mapped.ptr(), buffer.ptr(), 4096).unwrap();
                let event = device.event().unwrap();
                side.record(&event).unwrap();
                event.wait().unwrap();
                device.pinned(4096).unwrap();
            });
            ours.join().unwrap();
        });
    });
    assert_eq!(capture, Ok(()), "the capture was invalidated");
}

#[test]
fn captured_work_does_not_run() {
    let device = device!(alone);
    let stream = device.stream(Priority::Default).unwrap();
    let buffer = device.buffer(4096).unwrap();
    stream.fill(buffer.ptr(), 1, 4096).unwrap();
    drain(&stream);
    stream.capture(|| stream.fill(buffer.ptr(), 2, 4096).unwrap()).unwrap();
    drain(&stream);
    assert!(crate::harness::get(&device, buffer.ptr(), 4096).iter().all(|&byte| byte == 1));
}
