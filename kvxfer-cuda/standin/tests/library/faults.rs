//! Errors on order, missing entry points, and what is said about codes.

use std::ffi::{CStr, c_char, c_int};
use std::process::Stdio;
use std::ptr;

use cudarc::driver::sys::culib;

use crate::harness::*;

/// Whether `dlsym` finds it.
fn is_there(name: &str) -> bool {
    // SAFETY: it is not called.
    unsafe { culib().get::<unsafe extern "C" fn()>(name.as_bytes()) }.is_ok()
}

/// What `cuGetProcAddress` answers, and its status.
fn look_up(name: &CStr, version: c_int) -> (c_int, usize, c_int) {
    let (mut found, mut status) = (1_usize, -1);
    let code = cu!(cuGetProcAddress_v2(name.as_ptr(), &mut found, version, 0_u64, &mut status));
    (code, found, status)
}

#[test]
fn the_call_that_was_named_fails_and_no_other() {
    let config = "fail=cuMemCreate:2:2,cuMemAlloc:0:999,cuInit:1:304";
    play(config, |_, _| {
        assert_eq!(cu!(cuInit(0_u32)), 304);
        start_on(0);
        let one = create(0, 2 * MIB).unwrap();
        assert_eq!(create(0, 2 * MIB), Err(2));
        let two = create(0, 2 * MIB).unwrap();
        for _ in 0..3 {
            assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 999);
        }
        ok!(cuMemRelease(one));
        ok!(cuMemRelease(two));
        nothing_is_left(&[0]);
    });
}

#[test]
fn a_sticky_error_breaks_one_device_and_leaves_nothing_behind() {
    let config = "sticky=cuMemGetInfo:2:700";
    play(config, |_, _| {
        start_on(0);
        let (mut plain, mut pinned) = (0_u64, 0_u64);
        ok!(cuMemAlloc_v2(&mut plain, 1_usize));
        ok!(cuMemHostAlloc(&mut pinned, 1_usize, 0_u32));
        let (handle, other) = (create(0, 2 * MIB).unwrap(), create(1, 2 * MIB).unwrap());
        let (start, elsewhere) = (map(handle, 2 * MIB, 0), map(other, 2 * MIB, 1));
        free_memory();
        assert_eq!(cu!(cuMemGetInfo_v2(&mut 0_usize, &mut 0_usize)), 700);
        assert_eq!(cu!(cuMemGetInfo_v2(&mut 0_usize, &mut 0_usize)), 700);
        assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 700);
        assert_eq!(create(0, 2 * MIB), Err(700));
        assert_eq!(set_access(start, 2 * MIB, 0, 3), 700);
        assert_eq!(cu!(cuDevicePrimaryCtxRetain(&mut 0_usize, 0_i32)), 700);

        // Giving back works, and says that the device is broken where it is asked on it.
        assert_eq!((cu!(cuMemFree_v2(plain)), cu!(cuMemFreeHost(pinned))), (700, 700));
        unmap(start, 2 * MIB);
        ok!(cuMemRelease(handle));

        retain(1);
        free_memory();
        assert_eq!(set_access(elsewhere, 2 * MIB, 1, 1), 0);
        unmap(elsewhere, 2 * MIB);
        ok!(cuMemRelease(other));
        nothing_is_left(&[0, 1]);
    });
}

#[test]
fn missing_entry_points_are_not_found() {
    let config = "missing=cuMemMap,cuMemAlloc_v2";
    play(config, |role, stage| {
        let names = ["cuMemMap", "cuMemAlloc_v2", "cuMemUnmap", "cuMemcpyBatchAsync_v2"];
        let there = names.map(is_there);
        if role == "first" {
            assert_eq!(there[..3], [false, false, true]);
            assert_eq!(look_up(c"cuMemMap", 12080), (500, 0, 1));
            assert_eq!(look_up(c"cuMemAlloc", 12080), (500, 0, 1));
            stage.spawn("all", "", Stdio::null()).passes();
        } else {
            assert_eq!(there[..3], [true, true, true]);
            let (code, found, status) = look_up(c"cuMemAlloc", 12080);
            assert_eq!((code, status), (0, 0));
            // SAFETY: it is not called.
            let symbol =
                unsafe { culib().get::<unsafe extern "C" fn()>(b"cuMemAlloc_v2").unwrap() };
            assert_eq!(found, *symbol as usize);
            assert_eq!(look_up(c"cuMemAlloc_v2", 12080).0, 500);
            assert_eq!(look_up(c"nothing", 12080).0, 500);
        }
    });
}

#[test]
fn codes_have_names() {
    play("", |_, _| {
        for (code, expected) in [(0, "CUDA_SUCCESS"), (700, "CUDA_ERROR_ILLEGAL_ADDRESS")] {
            let mut name: *const c_char = ptr::null();
            ok!(cuGetErrorName(code, &mut name));
            // SAFETY: the driver's text.
            assert_eq!(unsafe { CStr::from_ptr(name) }.to_str().unwrap(), expected);
            ok!(cuGetErrorString(code, &mut name));
        }
        let mut name: *const c_char = c"".as_ptr();
        assert_eq!(cu!(cuGetErrorName(12345, &mut name)), 1);
        assert!(name.is_null());
    });
}

#[test]
fn null_is_refused() {
    play("", |_, _| {
        start_on(0);
        let null = ptr::null_mut::<u64>();
        assert_eq!(cu!(cuDeviceGetCount(null)), 1);
        assert_eq!(cu!(cuMemAlloc_v2(null, 1_usize)), 1);
        assert_eq!(cu!(cuMemHostAlloc(null, 1_usize, 0_u32)), 1);
        assert_eq!(cu!(cuMemCreate(null, 2 * MIB, &properties(0), 0_u64)), 1);
        assert_eq!(cu!(cuMemCreate(&mut 0_u64, 2 * MIB, null, 0_u64)), 1);
        assert_eq!(cu!(cuMemAddressReserve(null, 2 * MIB, 0_usize, 0_u64, 0_u64)), 1);
        assert_eq!(cu!(cuMemImportFromShareableHandle(null, 0_usize, POSIX)), 1);
        nothing_is_left(&[0]);
    });
}
