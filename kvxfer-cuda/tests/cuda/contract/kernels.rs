//! Kernels: the one that is committed, launched by hand.

use std::ffi::CStr;

use kvxfer_core::sum::{Sum, word_key};
use kvxfer_cuda::driver::{CudaError, Device, DevicePtr, Function, Module, Priority, Stream};

use crate::harness::{Gate, Peer, child_device, device, drain, get, parent, pattern, put};

pub(super) const CLAUSES: &[super::Clause] = &[
    (
        "kernels::the_committed_ptx_loads",
        "The committed PTX is compiled for the device at hand, and its kernel found by name; others are not.",
    ),
    (
        "kernels::what_is_no_code_is_refused",
        "`cuModuleLoadData` refuses what is no PTX, or newer than the driver, and the device works on.",
    ),
    (
        "kernels::a_kernel_copies_and_adds_its_sum",
        "The kernel stores each byte of an item and no other, and its sums, added atomically, are those of the host.",
    ),
    (
        "kernels::a_kernel_runs_in_stream_order",
        "A kernel reads what earlier work of its stream wrote, and nothing that later work writes.",
    ),
    (
        "kernels::parameters_are_taken_at_launch",
        "`cuLaunchKernel` copies the parameters before it returns.",
    ),
    (
        "kernels::a_launch_too_large_is_refused",
        "A block of more threads than the kernel was compiled for is refused.",
    ),
    (
        "kernels::a_bad_address_ends_the_context",
        "A kernel that writes to a bad address ends its process's context: waiting for it tells so, and so does each \
         later call. Other processes go on.",
    ),
];

const LANES: usize = 8;
const BLOCK: u32 = 512;
const SEED: u64 = 7;

fn module(device: &Device) -> Module {
    let ptx = concat!(include_str!("../../../kernels/kv.ptx"), "\0");
    device.module(CStr::from_bytes_with_nul(ptx.as_bytes()).unwrap()).unwrap()
}

fn function(device: &Device) -> Function {
    module(device).function(c"kvx_copy_sum").unwrap()
}

/// One item on the device, and room for its sums.
struct Item {
    memory: kvxfer_cuda::driver::Buffer,
    len: u64,
}

impl Item {
    fn new(device: &Device, src: DevicePtr, dst: DevicePtr, len: u64) -> Self {
        let memory = device.buffer(256).unwrap();
        let words = [src.addr(), dst.addr(), len, word_key(SEED, 0), 0];
        let mut bytes = words.map(u64::to_le_bytes).concat();
        bytes.resize(256, 0);
        put(device, memory.ptr(), &bytes);
        Self { memory, len }
    }

    fn args(&self) -> [u64; 4] {
        let at = self.memory.ptr().addr();
        [at, 1, self.len.div_ceil(512), at + 64]
    }

    fn launch(&self, stream: &Stream, function: &Function) -> Result<(), CudaError> {
        stream.launch(function, 2, BLOCK, &mut self.args())
    }

    fn sum(&self, device: &Device) -> u64 {
        get(device, self.memory.ptr().offset(64), LANES * 8)
            .chunks(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .fold(0, u64::wrapping_add)
    }
}

fn sum_of(bytes: &[u8]) -> u64 {
    let mut sum = Sum::new(SEED);
    sum.update(bytes);
    sum.finish()
}

#[test]
fn the_committed_ptx_loads() {
    let device = device!();
    let module = module(&device);
    module.function(c"kvx_copy_sum").unwrap();
    let error = module.function(c"kvx_nothing").unwrap_err();
    assert_eq!(error.code(), Some(500), "{error}");
}

#[test]
fn what_is_no_code_is_refused() {
    let device = device!();
    for text in [c"", c"no code at all", c".version 99.9\n.target sm_80\n.address_size 64\n"] {
        let error = device.module(text).unwrap_err();
        assert!(!error.is_sticky(), "{error}");
    }
    let buffer = device.buffer(4096).unwrap();
    let stream = device.stream(Priority::Default).unwrap();
    stream.fill(buffer.ptr(), 1, 4096).unwrap();
    drain(&stream);
    assert_eq!(get(&device, buffer.ptr(), 2), [1, 1]);
}

#[test]
fn a_kernel_copies_and_adds_its_sum() {
    let device = device!();
    let (stream, function) = (device.stream(Priority::Lowest).unwrap(), function(&device));
    let (from, to) = (device.buffer(1 << 17).unwrap(), device.buffer(1 << 17).unwrap());
    let content = pattern(1 << 17, 1);
    put(&device, from.ptr(), &content);
    for (src, dst, len) in
        [(0, 0, 1), (1, 3, 7), (0, 16, 4096), (5, 8, 1000), (16, 1, 65_537), (0, 0, 1 << 17)]
    {
        stream.fill(to.ptr(), 0xee, to.bytes()).unwrap();
        let item = Item::new(&device, from.ptr().offset(src), to.ptr().offset(dst), len as u64);
        item.launch(&stream, &function).unwrap();
        drain(&stream);
        let mut expected = vec![0xee; 1 << 17];
        expected[dst as usize..][..len].copy_from_slice(&content[src as usize..][..len]);
        assert!(get(&device, to.ptr(), 1 << 17) == expected, "{len} bytes from {src} to {dst}");
        assert_eq!(
            item.sum(&device),
            sum_of(&content[src as usize..][..len]),
            "{len} bytes from {src}"
        );
    }
}

#[test]
fn a_kernel_runs_in_stream_order() {
    let device = device!();
    let (stream, function) = (device.stream(Priority::Lowest).unwrap(), function(&device));
    let (from, to) = (device.buffer(1 << 16).unwrap(), device.buffer(1 << 16).unwrap());
    let item = Item::new(&device, from.ptr(), to.ptr(), 1 << 16);
    let gate = Gate::before(&stream);
    stream.fill(from.ptr(), 2, 1 << 16).unwrap();
    item.launch(&stream, &function).unwrap();
    stream.fill(from.ptr(), 3, 1 << 16).unwrap();
    gate.open();
    drain(&stream);
    assert!(get(&device, to.ptr(), 1 << 16).iter().all(|&byte| byte == 2));
    assert_eq!(item.sum(&device), sum_of(&[2; 1 << 16]));
}

#[test]
fn parameters_are_taken_at_launch() {
    let device = device!();
    let (stream, function) = (device.stream(Priority::Lowest).unwrap(), function(&device));
    let (from, to) = (device.buffer(4096).unwrap(), device.buffer(4096).unwrap());
    put(&device, from.ptr(), &pattern(4096, 2));
    let item = Item::new(&device, from.ptr(), to.ptr(), 4096);
    let gate = Gate::before(&stream);
    let mut args = item.args();
    stream.launch(&function, 1, BLOCK, &mut args).unwrap();
    args.fill(8);
    std::hint::black_box(args);
    gate.open();
    drain(&stream);
    assert!(get(&device, to.ptr(), 4096) == pattern(4096, 2));
}

#[test]
fn a_launch_too_large_is_refused() {
    let device = device!();
    let (stream, function) = (device.stream(Priority::Lowest).unwrap(), function(&device));
    let buffer = device.buffer(4096).unwrap();
    let item = Item::new(&device, buffer.ptr(), buffer.ptr().offset(2048), 16);
    let error = stream.launch(&function, 1, 4096, &mut item.args()).unwrap_err();
    assert!(!error.is_sticky(), "{error}");
    item.launch(&stream, &function).unwrap();
    drain(&stream);
}

#[test]
fn child() {
    let Some(mut parent) = parent("bad address") else { return };
    let device = child_device();
    let (stream, function) = (device.stream(Priority::Default).unwrap(), function(&device));
    let (event, buffer) = (device.event().unwrap(), device.buffer(4096).unwrap());
    let nowhere = buffer.ptr().offset(1 << 46);
    let item = Item::new(&device, buffer.ptr(), nowhere, 4096);
    // The error may come at once, or when somebody waits.
    let ended = item
        .launch(&stream, &function)
        .and_then(|()| stream.record(&event))
        .and_then(|()| event.wait());
    let error = ended.unwrap_err();
    assert!(error.is_sticky(), "{error}");
    for later in [stream.synchronize(), device.buffer(1).map(drop), event.is_done().map(drop)] {
        let later = later.unwrap_err();
        assert!(later.is_sticky(), "{later}");
    }
    parent.send(&[1]);
}

#[test]
fn a_bad_address_ends_the_context() {
    let device = device!();
    let (stream, buffer) =
        (device.stream(Priority::Default).unwrap(), device.buffer(4096).unwrap());
    let gate = Gate::before(&stream);
    stream.fill(buffer.ptr(), 3, 4096).unwrap();
    let mut peer = Peer::start("contract::kernels::child", "bad address");
    assert_eq!(peer.wire.receive(), [1]);
    peer.succeeds();
    gate.open();
    drain(&stream);
    assert!(get(&device, buffer.ptr(), 4096).iter().all(|&byte| byte == 3));
}
