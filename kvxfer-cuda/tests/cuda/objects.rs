//! What the objects over the driver promise by themselves.

use kvxfer_cuda::driver::{CudaError, Function, Priority};

use crate::harness::{Gate, Peer, child_device, device, drain, get, live, parent, pattern};

fn outside<T: std::fmt::Debug>(result: Result<T, CudaError>) {
    let error = result.unwrap_err();
    assert!(matches!(error, CudaError::OutOfBounds { .. }), "{error}");
}

#[test]
fn ranges_of_pinned_memory_are_checked() {
    let device = device!();
    let (stream, pinned) = (device.stream(Priority::Default).unwrap(), device.pinned(100).unwrap());
    let buffer = device.buffer(4096).unwrap();
    for (offset, len) in [(0, 101), (100, 1), (101, 0), (u64::MAX, 1), (1, u64::MAX)] {
        outside(stream.upload(buffer.ptr(), &pinned, offset, len));
        outside(stream.download(&pinned, offset, buffer.ptr(), len));
    }
    outside(pinned.write(96, &[0; 8]));
    outside(pinned.read(93, &mut [0; 8]));
    for offset in [1, 2, 97, 100, u64::MAX] {
        outside(stream.hold(&pinned, offset, 0));
    }
    stream.upload(buffer.ptr(), &pinned, 100, 0).unwrap();
    stream.hold(&pinned, 96, 0).unwrap();
    drain(&stream);
}

#[test]
fn pinned_memory_is_zeroed_and_keeps_bytes_anywhere() {
    let device = device!();
    let pinned = device.pinned(1000).unwrap();
    let mut all = vec![1; 1000];
    pinned.read(0, &mut all).unwrap();
    assert!(all.iter().all(|&byte| byte == 0));
    for (offset, len) in [(0, 8), (8, 64), (3, 8), (16, 5), (999, 1), (0, 1000), (1, 999)] {
        let bytes = pattern(len, offset);
        pinned.write(offset, &bytes).unwrap();
        let mut read = vec![0; len];
        pinned.read(offset, &mut read).unwrap();
        assert_eq!(read, bytes, "{len} from {offset}");
    }
}

#[test]
fn nothing_to_do_is_done() {
    let device = device!();
    let stream = device.stream(Priority::Default).unwrap();
    let (buffer, pinned) = (device.buffer(0).unwrap(), device.pinned(0).unwrap());
    let nowhere = buffer.ptr().offset(1 << 46);
    stream.copy(nowhere, nowhere, 0).unwrap();
    stream.fill(nowhere, 1, 0).unwrap();
    stream.upload(nowhere, &pinned, 0, 0).unwrap();
    stream.download(&pinned, 0, nowhere, 0).unwrap();
    stream.copy_batch(&[]).unwrap();
    drain(&stream);
}

#[test]
fn a_kernel_has_not_too_many_parameters() {
    let device = device!();
    let ptx = std::ffi::CString::new(include_str!("../../kernels/kv.ptx")).unwrap();
    let function = device.module(&ptx).unwrap().function(c"kvx_copy_sum").unwrap();
    let stream = device.stream(Priority::Default).unwrap();
    let many = stream.launch(&function, 1, 32, &mut [0; Function::MOST_PARAMETERS + 1]);
    assert!(matches!(many, Err(CudaError::Unsupported { .. })), "{many:?}");
}

/// In the order of the stand-in's report.
const PINNED: usize = 5;
const MODULES: usize = 6;

/// What a stream uses stays until it is dropped, and longer when it is dropped with work in it.
#[test]
fn child() {
    let Some(_) = parent("streams keep") else { return };
    let counts = || live().map(|counts| (counts[PINNED], counts[MODULES]));
    let expect = |pinned, modules| {
        if let Some(counts) = counts() {
            assert_eq!(counts, (pinned, modules));
        }
    };
    let device = child_device();
    let (stream, buffer) =
        (device.stream(Priority::Default).unwrap(), device.buffer(4096).unwrap());
    let gate = Gate::before(&stream);
    let (from, to) = (device.pinned(4096).unwrap(), device.pinned(4096).unwrap());
    let content = pattern(4096, 1);
    from.write(0, &content).unwrap();
    let ptx = std::ffi::CString::new(include_str!("../../kernels/kv.ptx")).unwrap();
    let module = device.module(&ptx).unwrap();
    let function = module.function(c"kvx_copy_sum").unwrap();
    drop(module);
    expect(3, 1);
    for at in 0..8 {
        stream.upload(buffer.ptr().offset(at * 512), &from, at * 512, 512).unwrap();
        stream.download(&to, at * 512, buffer.ptr().offset(at * 512), 512).unwrap();
    }
    // No items.
    stream.launch(&function, 1, 32, &mut [buffer.ptr().addr(), 0, 0, buffer.ptr().addr()]).unwrap();
    drop((from, function));
    expect(3, 1);
    gate.open();
    drain(&stream);
    let mut bytes = vec![0; 4096];
    to.read(0, &mut bytes).unwrap();
    assert!(bytes == content && get(&device, buffer.ptr(), 4096) == content);
    expect(3, 1);
    drop((gate, stream));
    expect(1, 0);

    let stream = device.stream(Priority::Default).unwrap();
    let event = device.event().unwrap();
    let gate = Gate::before(&stream);
    stream.download(&to, 0, buffer.ptr(), 4096).unwrap();
    stream.record(&event).unwrap();
    drop((stream, to));
    expect(2, 0);
    gate.open();
    event.wait().unwrap();
    drop(gate);
    // Nobody knows when the work ended.
    expect(2, 0);
}

#[test]
fn streams_keep_what_their_work_uses() {
    let _device = device!();
    Peer::start("objects::child", "streams keep").succeeds();
}
