//! Devices, contexts, and what joins devices.

use std::ffi::{CStr, c_char, c_int};

use crate::harness::*;

fn count() -> c_int {
    let mut count = -1;
    ok!(cuDeviceGetCount(&mut count));
    count
}

fn name(device: c_int) -> String {
    let mut name = [0 as c_char; 64];
    ok!(cuDeviceGetName(name.as_mut_ptr(), 64_i32, device));
    // SAFETY: the driver ends it.
    unsafe { CStr::from_ptr(name.as_ptr()) }.to_str().unwrap().to_owned()
}

pub(crate) fn uuid(device: c_int) -> [u8; 16] {
    let mut uuid = [0; 16];
    ok!(cuDeviceGetUuid_v2(&mut uuid, device));
    uuid
}

fn attribute(attribute: c_int, device: c_int) -> c_int {
    let mut value = -1;
    ok!(cuDeviceGetAttribute(&mut value, attribute, device));
    value
}

/// Whether there is access, and whether atomics are native.
fn link(one: c_int, other: c_int) -> (c_int, c_int) {
    let (mut can, mut access, mut atomics) = (-1, -1, -1);
    ok!(cuDeviceCanAccessPeer(&mut can, one, other));
    ok!(cuDeviceGetP2PAttribute(&mut access, 2_i32, one, other));
    ok!(cuDeviceGetP2PAttribute(&mut atomics, 3_i32, one, other));
    assert_eq!(can, access);
    (can, atomics)
}

#[test]
fn devices_are_the_same_for_each_process_that_sees_them() {
    let config = "devices=3;driver=12040;memory=3MiB;mps=1";
    play(config, |role, stage| {
        start();
        if role == "first" {
            assert_eq!(count(), 3);
            let (mut version, mut bytes) = (0, 0_usize);
            ok!(cuDriverGetVersion(&mut version));
            ok!(cuDeviceTotalMem_v2(&mut bytes, 2_i32));
            assert_eq!((version, bytes), (12040, 3 * MIB));
            assert_eq!([attribute(16, 0), attribute(75, 0), attribute(103, 0)], [16, 9, 1]);
            assert_eq!([attribute(133, 0), attribute(128, 0)], [1, 0]);
            assert_eq!(cu!(cuDeviceGet(&mut version, 3_i32)), 101);
            assert_eq!(cu!(cuDeviceGetAttribute(&mut version, 0_i32, 0_i32)), 1);
            stage.spawn_with("second", config, std::process::Stdio::null(), Some("2,1")).passes();
            let hidden = "devices=3;hidden=1";
            stage.spawn("third", hidden, std::process::Stdio::null()).passes();
        } else {
            assert_eq!(count(), 2);
            let places = if role == "second" { [2, 1] } else { [0, 2] };
            assert_eq!([uuid(0)[15], uuid(1)[15]], places);
            assert_ne!(uuid(0), uuid(1));
            assert_eq!(cu!(cuDeviceGet(&mut 0, 2_i32)), 101);
        }
    });
}

#[test]
fn without_devices_there_is_nothing_to_start() {
    play("devices=1;hidden=0", |_, _| {
        assert_eq!(cu!(cuDeviceGetCount(&mut 0)), 3);
        assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 3);
        assert_eq!(cu!(cuMemAddressReserve(&mut 0_u64, 2 * MIB, 0_usize, 0_u64, 0_u64)), 3);
        assert_eq!(cu!(cuInit(0_u32)), 100);
        assert_eq!(report(), [0; 9]);
    });
}

#[test]
fn a_configuration_that_is_not_understood_stops_everything() {
    play("divices=2", |_, _| {
        assert_eq!(cu!(cuInit(0_u32)), 999);
        assert_eq!(cu!(cuDriverGetVersion(&mut 0)), 999);
    });
}

#[test]
fn links_are_what_the_configuration_says() {
    let config = "devices=4;nvlink=0-1;p2p=1-2";
    play(config, |_, _| {
        start_on(0);
        assert_eq!((link(0, 1), link(1, 0)), ((1, 1), (1, 1)));
        assert_eq!((link(2, 1), link(0, 2), link(3, 0)), ((1, 0), (0, 0), (0, 0)));
        assert_eq!(cu!(cuDeviceGetP2PAttribute(&mut 0, 2_i32, 1_i32, 1_i32)), 101);

        let mut contexts = [0_usize; 3];
        for (device, context) in contexts.iter_mut().enumerate() {
            ok!(cuDevicePrimaryCtxRetain(&mut *context, device as c_int));
        }
        assert_eq!(cu!(cuCtxEnablePeerAccess(contexts[2], 0_u32)), 217);
        assert_eq!(cu!(cuCtxEnablePeerAccess(contexts[0], 0_u32)), 101);
        assert_eq!(cu!(cuCtxDisablePeerAccess(contexts[1])), 705);
        ok!(cuCtxEnablePeerAccess(contexts[1], 0_u32));
        assert_eq!(cu!(cuCtxEnablePeerAccess(contexts[1], 0_u32)), 704);
        ok!(cuCtxDisablePeerAccess(contexts[1]));
        nothing_is_left(&[0, 0, 1, 2]);
    });
}

#[test]
fn parts_of_a_device_reach_nobody() {
    play("devices=2;mig=1", |_, _| {
        start_on(1);
        assert!(!name(0).contains("MIG") && name(1).contains("MIG"));
        assert_eq!((link(0, 1), link(1, 0)), ((0, 0), (0, 0)));
        let mut start = 0_u64;
        ok!(cuMemAlloc_v2(&mut start, 100_usize));
        assert_eq!(cu!(cuIpcGetMemHandle(&mut [0_u8; 64], start)), 801);
        ok!(cuMemFree_v2(start));

        let handle = create(1, 2 * MIB).unwrap();
        let start = map(handle, 2 * MIB, 1);
        assert_eq!(set_access(start, 2 * MIB, 0, 3), 101);
        unmap(start, 2 * MIB);
        ok!(cuMemRelease(handle));
        nothing_is_left(&[1]);
    });
}

#[test]
fn contexts_are_each_thread_s_own_and_counted() {
    play("devices=2", |_, _| {
        start();
        let current = || {
            let mut context = 1_usize;
            ok!(cuCtxGetCurrent(&mut context));
            context
        };
        assert_eq!(current(), 0);
        assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 201);
        let (mut one, mut other, mut device) = (0_usize, 0_usize, -1);
        ok!(cuDevicePrimaryCtxRetain(&mut one, 0_i32));
        ok!(cuDevicePrimaryCtxRetain(&mut other, 1_i32));
        ok!(cuCtxSetCurrent(one));
        ok!(cuCtxPushCurrent_v2(other));
        ok!(cuCtxGetDevice(&mut device));
        assert_eq!((current(), device), (other, 1));
        std::thread::spawn(move || assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 201))
            .join()
            .unwrap();
        ok!(cuCtxPopCurrent_v2(&mut other));
        assert_eq!(current(), one);
        assert_eq!(cu!(cuCtxSetCurrent(7_usize)), 201);

        ok!(cuDevicePrimaryCtxRetain(&mut one, 0_i32));
        ok!(cuDevicePrimaryCtxRelease_v2(0_i32));
        free_memory();
        ok!(cuDevicePrimaryCtxRelease_v2(0_i32));
        assert_eq!(cu!(cuMemAlloc_v2(&mut 0_u64, 1_usize)), 709);
        assert_eq!(cu!(cuDevicePrimaryCtxRelease_v2(0_i32)), 201);
        nothing_is_left(&[1]);
    });
}
