//! Modules, and kernels as host code of the same source.

use std::ffi::{CStr, c_void};
use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use crate::harness::{
    Outcome, Stream, bind, device, gate, live, on_standin, outcome, pinned, recorded, seeds, set,
    stream, write,
};

/// What the driver is given of a kernel: the stand-in looks at names, parameters and limits only.
const PTX: &CStr = c"
.version 8.0
.target sm_80
.address_size 64
.visible .entry kvx_copy_sum(
    .param .u64 kvx_copy_sum_param_0,
    .param .u64 kvx_copy_sum_param_1,
    .param .u64 kvx_copy_sum_param_2,
    .param .u64 kvx_copy_sum_param_3
)
.maxntid 1024, 1, 1
{
    ret;
}
.visible .entry no_such_kernel(.param .u64 a) { ret; }
";

/// What the product gives it.
const COMMITTED: &str = include_str!("../../../kernels/kv.ptx");

/// Bytes of an item of the kernel's, of its tiles, and sums of a slot (kernels/kv.cu).
const ITEM: usize = 40;
const TILE: usize = 512;
const LANES: usize = 8;

fn load(ptx: &CStr) -> Result<sys::CUmodule, CUresult> {
    let mut module = ptr::null_mut();
    match code!(cuModuleLoadData(&mut module, ptx.as_ptr().cast())) {
        CUresult::CUDA_SUCCESS => Ok(module),
        code => Err(code),
    }
}

fn kernel() -> sys::CUfunction {
    let mut function = ptr::null_mut();
    let module = load(PTX).expect("it loads");
    cu!(cuModuleGetFunction(&mut function, module, c"kvx_copy_sum".as_ptr()));
    function
}

fn launch(function: sys::CUfunction, block: u32, args: [u64; 4], stream: Stream) -> CUresult {
    let mut params = args.each_ref().map(|arg| ptr::from_ref(arg).cast_mut().cast::<c_void>());
    let params = params.as_mut_ptr();
    code!(cuLaunchKernel(function, 2, 1, 1, block, 1, 1, 0, stream, params, ptr::null_mut()))
}

/// The kernel's table for one run.
fn item(src: u64, dst: u64, len: usize) -> Vec<u8> {
    let numbers = [src, dst, len as u64, 12345, 0];
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// Fills a block on one stream and copies it on another one with the kernel.
fn copy(ordered: bool) -> Outcome {
    const BLOCK: usize = 40 << 10;
    bind(0);
    let (engine, side, function) = (stream(), stream(), kernel());
    let (kv, pool, items, sums) = (device(BLOCK), device(BLOCK), device(ITEM), device(8 * LANES));
    let (table, result) = (pinned(4096), pinned(BLOCK));
    write(table, &item(kv, pool, BLOCK));
    cu!(cuMemsetD8Async(kv, 8, BLOCK, engine));
    if ordered {
        cu!(cuStreamWaitEvent(side, recorded(engine), 0));
    }
    cu!(cuMemcpyHtoDAsync_v2(items, table.cast(), ITEM, side));
    cu!(cuMemsetD8Async(sums, 0, 8 * LANES, side));
    let args = [items, 1, BLOCK.div_ceil(TILE) as u64, sums];
    assert_eq!(launch(function, 128, args, side), CUresult::CUDA_SUCCESS);
    cu!(cuMemcpyDtoHAsync_v2(result.cast(), pool, BLOCK, side));
    outcome(&[side, engine], result, &[8; BLOCK])
}

#[test]
fn a_kernel_runs_in_its_streams_order() {
    on_standin(&seeds(""), || assert_eq!(copy(true), Outcome::Right));
}

#[test]
fn a_kernel_that_waits_for_no_event_is_caught() {
    on_standin(&["races=0".into()], || assert_eq!(copy(false), Outcome::Wrong));
}

#[test]
fn a_kernel_that_waits_for_no_event_races() {
    on_standin(&seeds(""), || assert_eq!(copy(false), Outcome::Broken));
}

#[test]
fn kernels_look_at_memory_when_they_run() {
    on_standin(&seeds(""), || {
        bind(0);
        let (stream, function, door) = (stream(), kernel(), pinned(4096));
        let (kv, sums, items) = (device(64), device(8 * LANES), device(ITEM));
        let table = item(kv, 0, 64);
        gate(stream, door);
        cu!(cuMemcpyHtoDAsync_v2(items, table.as_ptr().cast(), ITEM, stream));
        assert_eq!(launch(function, 32, [items, 1, 1, sums], stream), CUresult::CUDA_SUCCESS);
        cu!(cuMemFree_v2(kv));
        set(door, 1);
        assert_eq!(outcome(&[stream], door, &[1]), Outcome::Broken);
    });
}

#[test]
fn modules_and_launches_are_checked() {
    on_standin(&["driver=12000".into()], || {
        bind(0);
        let newer = c".version 8.1\n.target sm_80\n.visible .entry f() { ret; }";
        assert_eq!(load(newer), Err(CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION));
        for bad in [
            c"",
            c"what?",
            c".version 8.0\n.target sm_80",
            c".version 8.0\n.target t\n.entry f(.param .u32 a) {}",
        ] {
            assert_eq!(load(bad), Err(CUresult::CUDA_ERROR_INVALID_PTX));
        }
        assert_eq!(load(c"\x7fELF\xff\xfe"), Err(CUresult::CUDA_ERROR_INVALID_IMAGE));

        let module = load(PTX).expect("it loads");
        let mut function = ptr::null_mut();
        for name in [c"nothing", c"no_such_kernel"] {
            let found = code!(cuModuleGetFunction(&mut function, module, name.as_ptr()));
            assert_eq!(found, CUresult::CUDA_ERROR_NOT_FOUND);
        }
        cu!(cuModuleGetFunction(&mut function, module, c"kvx_copy_sum".as_ptr()));
        let invalid = CUresult::CUDA_ERROR_INVALID_VALUE;
        assert_eq!(launch(function, 0, [0; 4], stream()), invalid);
        assert_eq!(launch(function, 2048, [0; 4], stream()), invalid);
        bind(1);
        let handle = CUresult::CUDA_ERROR_INVALID_HANDLE;
        assert_eq!(launch(function, 32, [0; 4], stream()), handle);
        bind(0);
        assert_eq!(live("modules"), 1);
        cu!(cuModuleUnload(module));
        assert_eq!(live("modules"), 0);
        assert_eq!(launch(function, 32, [0; 4], stream()), handle);
    });
}

#[test]
fn the_committed_device_code_is_understood() {
    on_standin(&["driver=12000".into()], || {
        bind(0);
        let text = std::ffi::CString::new(COMMITTED).expect("text");
        let module = load(&text).expect("it loads");
        let mut function = ptr::null_mut();
        cu!(cuModuleGetFunction(&mut function, module, c"kvx_copy_sum".as_ptr()));
        // As many threads as it says, and no more.
        let too_many = CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
        assert_eq!(launch(function, 1024, [0; 4], stream()), too_many);
        assert_eq!(launch(function, 512, [0; 4], stream()), CUresult::CUDA_SUCCESS);
    });
}

#[test]
fn a_kernel_with_a_bad_address_breaks_the_device() {
    on_standin(&seeds(""), || {
        bind(0);
        let (stream, function) = (stream(), kernel());
        assert_eq!(launch(function, 32, [4096, 1, 1, 4096], stream), CUresult::CUDA_SUCCESS);
        let broken = CUresult::CUDA_ERROR_ILLEGAL_ADDRESS;
        assert_eq!(code!(cuStreamSynchronize(stream)), broken);
        assert_eq!(code!(cuStreamSynchronize(stream)), broken);
    });
}
