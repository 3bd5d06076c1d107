//! Streams and events.

use kvxfer_cuda::driver::Priority;

use crate::harness::{Gate, device, drain, finish, get};

#[test]
fn a_stream_runs_its_work_in_order() {
    let device = device!();
    let stream = device.stream(Priority::Default).unwrap();
    let buffer = device.buffer(1 << 20).unwrap();
    for byte in 0..64 {
        stream.fill(buffer.ptr(), byte, buffer.bytes()).unwrap();
    }
    drain(&stream);
    assert!(get(&device, buffer.ptr(), 1 << 20).iter().all(|&byte| byte == 63));
}

#[test]
fn a_stream_waits_for_an_event_of_another() {
    let device = device!();
    let [first, second] = [(); 2].map(|()| device.stream(Priority::Default).unwrap());
    let (buffer, event) = (device.buffer(4096).unwrap(), device.event().unwrap());
    let gate = Gate::before(&first);
    first.fill(buffer.ptr(), 1, 4096).unwrap();
    first.record(&event).unwrap();
    second.wait(&event).unwrap();
    second.fill(buffer.ptr(), 2, 4096).unwrap();
    let done = device.event().unwrap();
    second.record(&done).unwrap();
    assert!(!event.is_done().unwrap());
    assert!(!done.is_done().unwrap());
    gate.open();
    finish(&done);
    assert!(get(&device, buffer.ptr(), 4096).iter().all(|&byte| byte == 2));
}
