//! Contexts and threads.

use std::sync::Arc;

use kvxfer_cuda::driver::{Device, Priority, RawContext, cuda};

use crate::harness::{
    Peer, assert_nothing_lives, child_device, device, drain, get, parent, pattern, put,
};

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "context::the_primary_context_is_shared",
        "Who retains a device's primary context twice, as an engine and we do, has one context: memory, streams and \
         events of both are used together.",
    ),
    (
        "context::a_threads_own_context_stays",
        "`cuCtxGetCurrent` and `cuCtxSetCurrent` are each thread's own, so what an engine's thread had is restored.",
    ),
    ("context::any_thread_may_call", "What one thread made, another one may use and destroy."),
    (
        "context::the_context_outlives_its_opener",
        "A context that is retained once more stays when others release it.",
    ),
    ("context::everything_is_given_back", "What is dropped is gone, in any order."),
];

#[test]
fn child() {
    let Some(_) = parent("everything") else { return };
    {
        let device = child_device();
        let stream = device.stream(Priority::Lowest).unwrap();
        let event = device.event().unwrap();
        let physical = Arc::new(device.allocate(1 << 20).unwrap());
        let mapped = device.map(Arc::clone(&physical)).unwrap();
        let (buffer, pinned) = (device.buffer(4096).unwrap(), device.pinned(4096).unwrap());
        drop((device, physical));
        stream.upload(mapped.ptr(), &pinned, 0, 4096).unwrap();
        stream.copy(buffer.ptr(), mapped.ptr(), 4096).unwrap();
        stream.record(&event).unwrap();
        drop(pinned);
        event.wait().unwrap();
        drop(stream);
        drop(event);
        drop(buffer);
    }
    assert_nothing_lives();
}

#[test]
fn everything_is_given_back() {
    let _device = device!();
    Peer::start("contract::context::child", "everything").succeeds();
}

#[test]
fn the_primary_context_is_shared() {
    let device = device!();
    let engine = Device::open(cuda().unwrap(), 0).unwrap();
    let buffer = engine.buffer(4096).unwrap();
    let (theirs, ours) =
        (engine.stream(Priority::Default).unwrap(), device.stream(Priority::Default).unwrap());
    let event = engine.event().unwrap();
    theirs.fill(buffer.ptr(), 1, 4096).unwrap();
    theirs.record(&event).unwrap();
    ours.wait(&event).unwrap();
    ours.fill(buffer.ptr().offset(1), 2, 4095).unwrap();
    drain(&ours);
    assert_eq!(get(&engine, buffer.ptr(), 3), [1, 2, 2]);
}

#[test]
fn a_threads_own_context_stays() {
    let devices = device!(two);
    let [first, second] = &*devices;
    let driver = cuda().unwrap();
    // SAFETY: needs nothing.
    let current = || unsafe { driver.context_current() }.unwrap();
    let use_it = |device: &Device| {
        let buffer = device.buffer(4096).unwrap();
        put(device, buffer.ptr(), &pattern(4096, 1));
        assert!(get(device, buffer.ptr(), 4096) == pattern(4096, 1));
    };
    // A thread that has none.
    assert_eq!(current(), RawContext::NULL);
    use_it(first);
    assert_eq!(current(), RawContext::NULL);
    // An engine's, which has its own.
    first.bind().unwrap();
    let own = current();
    assert_ne!(own, RawContext::NULL);
    use_it(second);
    assert_eq!(current(), own);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(current(), RawContext::NULL);
            second.bind().unwrap();
            assert_ne!(current(), own);
        });
    });
    assert_eq!(current(), own);
}

#[test]
fn any_thread_may_call() {
    let device = device!();
    let (stream, event) = (device.stream(Priority::Default).unwrap(), device.event().unwrap());
    let buffer = device.buffer(1 << 20).unwrap();
    let ptr = buffer.ptr();
    let (stream, event) = std::thread::spawn(move || {
        stream.fill(ptr, 1, 1 << 20).unwrap();
        stream.record(&event).unwrap();
        (stream, event)
    })
    .join()
    .unwrap();
    crate::harness::finish(&event);
    assert!(get(&device, ptr, 1 << 20).iter().all(|&byte| byte == 1));
    std::thread::spawn(move || drop((stream, event, buffer))).join().unwrap();
}

#[test]
fn the_context_outlives_its_opener() {
    let device = device!();
    let buffer = Device::open(cuda().unwrap(), 0).unwrap().buffer(4096).unwrap();
    drop(Device::open(cuda().unwrap(), 0).unwrap());
    put(&device, buffer.ptr(), &pattern(4096, 2));
    assert!(get(&device, buffer.ptr(), 4096) == pattern(4096, 2));
}
