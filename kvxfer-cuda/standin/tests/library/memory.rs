//! Plain device memory, host memory, and what is said about addresses.

use std::ffi::{c_int, c_void};
use std::process::Stdio;
use std::ptr;

use crate::harness::*;

const SIGSEGV: i32 = 11;

fn alloc(bytes: usize) -> Result<u64, c_int> {
    let mut start = 0_u64;
    match cu!(cuMemAlloc_v2(&mut start, bytes)) {
        0 => Ok(start),
        code => Err(code),
    }
}

fn read(addr: u64) -> u8 {
    // SAFETY: the point of the test: this process dies, or the memory is the host's.
    unsafe { ptr::with_exposed_provenance::<u8>(addr as usize).read_volatile() }
}

#[test]
fn the_host_dies_of_a_device_address() {
    play("", |role, stage| {
        start_on(0);
        match role {
            "first" => {
                stage.spawn("plain", "", Stdio::null()).dies_of(SIGSEGV);
                stage.spawn("mapped", "", Stdio::null()).dies_of(SIGSEGV);
                stage.spawn("freed", "", Stdio::null()).dies_of(SIGSEGV);
                stage.spawn("pinned", "", Stdio::null()).passes();
            }
            "plain" => {
                read(alloc(1).unwrap());
            }
            "mapped" => {
                read(map(create(0, 2 * MIB).unwrap(), 2 * MIB, 0));
            }
            pinned => {
                let mut start = 0_u64;
                ok!(cuMemHostAlloc(&mut start, 5000_usize, 1_u32));
                assert_eq!(read(start + 4999), 0);
                ok!(cuMemFreeHost(start));
                if pinned == "freed" {
                    read(start);
                }
            }
        }
    });
}

#[test]
fn a_device_has_so_much_and_no_more() {
    play("memory=8MiB", |_, _| {
        start_on(0);
        assert_eq!(free_memory(), 8 * MIB);
        assert_eq!(alloc(0), Err(1));
        assert_eq!(alloc(8 * MIB + 1), Err(2));
        assert_eq!(alloc(usize::MAX), Err(2));
        let (one, handle) = (alloc(5 * MIB).unwrap(), create(0, 2 * MIB).unwrap());
        assert_eq!(free_memory(), MIB);
        assert_eq!((alloc(2 * MIB), create(0, 2 * MIB)), (Err(2), Err(2)));
        // The other device has its own.
        ok!(cuMemRelease(create(1, 8 * MIB).unwrap()));
        ok!(cuMemFree_v2(one));
        assert_eq!(free_memory(), 6 * MIB);
        ok!(cuMemFree_v2(alloc(6 * MIB).unwrap()));
        ok!(cuMemRelease(handle));
        assert_eq!(free_memory(), 8 * MIB);
        ok!(cuMemFree_v2(0_u64));
        nothing_is_left(&[0]);
    });
}

#[test]
fn only_what_was_allocated_is_freed() {
    play("", |_, _| {
        start_on(0);
        let start = alloc(4096).unwrap();
        assert_eq!(cu!(cuMemFree_v2(start + 1)), 1);
        ok!(cuMemFree_v2(start));
        assert_eq!(cu!(cuMemFree_v2(start)), 1);
        assert_ne!(alloc(4096).unwrap(), start, "no address comes twice");
        let mapped = map(create(0, 2 * MIB).unwrap(), 2 * MIB, 0);
        assert_eq!(cu!(cuMemFree_v2(mapped)), 1);
        assert_eq!(cu!(cuMemFreeHost(mapped)), 1);
        assert_eq!(report(), [2, 2, 1, 0, 0, 0, 0, 1, 1]);
    });
}

#[test]
fn host_memory_is_counted_and_known() {
    play("", |_, _| {
        start_on(0);
        let mut pinned = 0_u64;
        ok!(cuMemAllocHost_v2(&mut pinned, 100_usize));
        let own = [0_u8; 100];
        let own_at = own.as_ptr().expose_provenance() as u64;
        ok!(cuMemHostRegister_v2(own_at, 100_usize, 0_u32));
        assert_eq!(cu!(cuMemHostRegister_v2(own_at + 99, 1_usize, 0_u32)), 712);
        assert_eq!(report()[5], 2);
        for at in [pinned, own_at + 99] {
            let (mut device, mut kind) = (0_u64, 0_u32);
            ok!(cuMemHostGetDevicePointer_v2(&mut device, at, 0_u32));
            ok!(cuPointerGetAttribute((&raw mut kind).cast::<c_void>(), 2_i32, at));
            assert_eq!((device, kind), (at, 1));
        }
        assert_eq!(cu!(cuMemHostUnregister(pinned)), 713);
        assert_eq!(cu!(cuMemFreeHost(own_at)), 1);
        ok!(cuMemHostUnregister(own_at));
        ok!(cuMemFreeHost(pinned));
        assert_eq!(cu!(cuMemFreeHost(pinned)), 1);
        nothing_is_left(&[0]);
    });
}

#[test]
fn addresses_are_explained() {
    play("", |role, stage| {
        start_on(1);
        let number = |which: c_int, addr: u64| {
            let mut value = 0_u64;
            let code = cu!(cuPointerGetAttribute((&raw mut value).cast::<c_void>(), which, addr));
            (code, value)
        };
        let mapped = map(create(1, 2 * MIB).unwrap(), 2 * MIB, 1);
        if role != "first" {
            // Asked for, and not had.
            return assert_eq!(number(15, mapped), (0, 0));
        }
        stage.spawn("without", "rdma=0", Stdio::null()).passes();

        let plain = alloc(1000).unwrap();
        let mut context = 0_usize;
        ok!(cuCtxGetCurrent(&mut context));
        // Context, type, device, legacy IPC, first address, size, kinds of handles, RDMA.
        let whiches = [1, 2, 9, 10, 11, 12, 14, 15];
        let seen = whiches.map(|which| number(which, plain + 999));
        assert_eq!(seen, [context as u64, 2, 1, 1, plain, 1000, 0, 0].map(|value| (0, value)));
        let seen = whiches.map(|which| number(which, mapped + 1));
        assert_eq!(seen, [0, 2, 1, 0, mapped, 2 << 20, 1, 1].map(|value| (0, value)));
        assert_ne!(number(7, plain), number(7, mapped));
        assert_eq!(number(2, plain + 1000).0, 1);
        assert_eq!(number(99, plain).0, 1);

        let (mut kind, mut device) = (9_u32, 9_i32);
        let outs = [(&raw mut kind).cast::<c_void>(), (&raw mut device).cast()];
        let both = |addr: u64| {
            cu!(cuPointerGetAttributes(2_u32, [2_i32, 9].as_ptr(), outs.as_ptr(), addr))
        };
        assert_eq!(both(plain), 0);
        assert_eq!((kind, device), (2, 1));
        assert_eq!(both(1), 0);
        assert_eq!((kind, device), (0, 0));

        let (mut start, mut bytes) = (0_u64, 0_usize);
        ok!(cuMemGetAddressRange_v2(&mut start, &mut bytes, plain + 5));
        assert_eq!((start, bytes), (plain, 1000));
        assert_eq!(cu!(cuMemGetAddressRange_v2(&mut start, &mut bytes, plain - 1)), 500);
    });
}
