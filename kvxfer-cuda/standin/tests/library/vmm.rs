//! The rules of addresses and physical memory, in one process.

use std::os::fd::AsRawFd;

use crate::harness::*;

const PIECE: usize = 2 * MIB;

fn reserve(bytes: usize) -> u64 {
    let mut start = 0_u64;
    ok!(cuMemAddressReserve(&mut start, bytes, 0_usize, 0_u64, 0_u64));
    start
}

#[test]
fn memory_lives_until_its_last_handle_and_mapping_is_gone() {
    play("memory=4MiB", |_, _| {
        start_on(0);
        let handle = create(0, PIECE).unwrap();
        let start = map(handle, PIECE, 0);
        ok!(cuMemRelease(handle));
        assert_eq!(cu!(cuMemRelease(handle)), 1);
        assert_eq!(free_memory(), PIECE);

        let mut again = 0_u64;
        ok!(cuMemRetainAllocationHandle(&mut again, start as usize + 5));
        unmap(start, PIECE);
        assert_eq!(free_memory(), PIECE);
        let fd = export(again);
        ok!(cuMemRelease(again));
        let last = import(fd.as_raw_fd()).unwrap();
        drop(fd);
        let start = map(last, PIECE, 0);
        ok!(cuMemRelease(last));
        unmap(start, PIECE);
        assert_eq!(free_memory(), 2 * PIECE);
        nothing_is_left(&[0]);
    });
}

#[test]
fn sizes_and_places_are_whole_pieces() {
    play("", |_, _| {
        start_on(0);
        let (mut bytes, wanted) = (0_usize, properties(0));
        ok!(cuMemGetAllocationGranularity(&mut bytes, &wanted, 0_i32));
        assert_eq!(bytes, PIECE);
        assert_eq!(
            (create(0, PIECE - 1), create(0, 0), create(2, PIECE)),
            (Err(1), Err(1), Err(101))
        );
        for bytes in [0, PIECE + 1] {
            assert_eq!(cu!(cuMemAddressReserve(&mut 0_u64, bytes, 0_usize, 0_u64, 0_u64)), 1);
        }
        let (start, handle) = (reserve(3 * PIECE), create(0, 2 * PIECE).unwrap());
        assert_eq!(start as usize % PIECE, 0);
        let map =
            |at: u64, bytes: usize, handle: u64| cu!(cuMemMap(at, bytes, 0_usize, handle, 0_u64));
        let piece = PIECE as u64;
        assert_eq!(map(start + 1, PIECE, handle), 1);
        assert_eq!(map(start, PIECE + 1, handle), 1);
        assert_eq!(map(start, 3 * PIECE, handle), 1);
        assert_eq!(map(start + 2 * piece, 2 * PIECE, handle), 1);
        assert_eq!(map(start - piece, PIECE, handle), 1);
        assert_eq!(map(start, PIECE, handle + 1), 1);
        assert_eq!(map(start, 2 * PIECE, handle), 0);
        assert_eq!(map(start + piece, PIECE, handle), 1);
        assert_eq!(map(start + 2 * piece, PIECE, handle), 0);

        // Rights and unmapping are for whole mappings.
        assert_eq!(set_access(start, PIECE, 0, 3), 1);
        assert_eq!(set_access(start, 3 * PIECE, 0, 2), 1);
        assert_eq!(set_access(start, 3 * PIECE, 0, 3), 0);
        assert_eq!(cu!(cuMemUnmap(start, PIECE)), 1);
        assert_eq!(cu!(cuMemUnmap(start + piece, 2 * PIECE)), 1);
        assert_eq!(cu!(cuMemAddressFree(start, 3 * PIECE)), 1);
        ok!(cuMemUnmap(start, 3 * PIECE));
        assert_eq!(cu!(cuMemUnmap(start, 3 * PIECE)), 1);
        assert_eq!(cu!(cuMemAddressFree(start, 2 * PIECE)), 1);
        ok!(cuMemAddressFree(start, 3 * PIECE));
        ok!(cuMemRelease(handle));
        nothing_is_left(&[0]);
    });
}

#[test]
fn rights_need_a_link_and_are_told() {
    let config = "devices=3;nvlink=0-1";
    play(config, |_, _| {
        start_on(0);
        let handle = create(0, PIECE).unwrap();
        let start = map(handle, PIECE, 0);
        assert_eq!(set_access(start, PIECE, 2, 3), 101);
        assert_eq!(set_access(start, PIECE, 3, 3), 101);
        assert_eq!(set_access(start, PIECE, 1, 1), 0);
        let rights = |device| {
            let mut rights = 9_u64;
            ok!(cuMemGetAccess(&mut rights, &on(device), start));
            rights
        };
        assert_eq!([0, 1, 2].map(rights), [3, 1, 0]);
        assert_eq!(set_access(start, PIECE, 1, 0), 0);
        assert_eq!(rights(1), 0);

        let mut seen = properties(2);
        ok!(cuMemGetAllocationPropertiesFromHandle(&mut seen, handle));
        assert_eq!((seen.location.id, seen.handles, seen.flags[1]), (0, POSIX, 1));
        unmap(start, PIECE);
        ok!(cuMemRelease(handle));
        nothing_is_left(&[0]);
    });
}

#[test]
fn what_may_not_be_exported_is_not() {
    play("", |_, _| {
        start_on(0);
        let mut private = properties(0);
        private.handles = 0;
        let (mut handle, mut fd) = (0_u64, -1);
        ok!(cuMemCreate(&mut handle, PIECE, &private, 0_u64));
        let mut export_of = |handle: u64, kind: i32| {
            cu!(cuMemExportToShareableHandle(&mut fd, handle, kind, 0_u64))
        };
        assert_eq!(export_of(handle, POSIX), 1);
        let shared = create(0, PIECE).unwrap();
        assert_eq!(export_of(shared, 8), 1);
        private.handles = 8;
        assert_eq!(cu!(cuMemCreate(&mut handle, PIECE, &private, 0_u64)), 801);

        // What is no memory of the driver's is not imported.
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        assert_eq!(
            (import(file.as_raw_fd()), import(-1), import(1 << 20)),
            (Err(1), Err(1), Err(1))
        );
    });
}
