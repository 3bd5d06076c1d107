//! What work may touch, and when.

use super::*;
use crate::memory::plain;
use crate::report::Live;

const HERE: Gpu = Gpu(0);
const THERE: Gpu = Gpu(1);

/// Two pieces of memory side by side; the first address.
fn two_pieces() -> u64 {
    state::start().unwrap();
    let mut ranges = ranges_mut().unwrap();
    let start = ranges.take(2 * GRANULARITY, 0).unwrap();
    for at in [start, start + GRANULARITY] {
        map(&mut ranges, at);
    }
    start
}

fn map(ranges: &mut Ranges, at: u64) {
    let physical = Arc::new(Physical::create(HERE, GRANULARITY, 0).unwrap());
    let kind = Kind::Virtual(physical.clone());
    let count = Counted::new(Live::Mappings);
    let mapping = ranges.map(at, GRANULARITY, kind, &physical.fd, count).unwrap();
    mapping.rights.insert(HERE, true);
}

fn put(at: *mut u8, value: u8) {
    // SAFETY: `resolve` gave it, for writing.
    unsafe { at.write_volatile(value) };
}

fn get(at: *mut u8) -> u8 {
    // SAFETY: `resolve` gave it.
    unsafe { at.read_volatile() }
}

const BAD: Result<*mut u8> = Err(Code::ILLEGAL_ADDRESS);

#[test]
fn ranges_may_cross_mappings_and_not_leave_them() {
    let start = two_pieces();
    let end = start + 2 * GRANULARITY;
    let all = resolve(start, 2 * GRANULARITY, true, HERE, now()).unwrap();
    let last = resolve(end - 1, 1, false, HERE, now()).unwrap();
    assert_eq!(last.addr() - all.addr(), 2 * GRANULARITY as usize - 1);
    put(last, 7);
    assert_eq!(get(all.wrapping_add(2 * GRANULARITY as usize - 1)), 7);
    for (at, len) in [(start - 1, 1), (start - 1, 2), (start, end - start + 1), (end, 1), (8, 1)] {
        assert_eq!(resolve(at, len, false, HERE, now()), BAD, "{} {len}", at.wrapping_sub(start));
    }
    assert_eq!(resolve(start + 1, u64::MAX, false, HERE, now()), BAD);
}

#[test]
fn rights_are_each_device_s_own() {
    let start = two_pieces();
    let read = |gpu| resolve(start, 1, false, gpu, now()).is_ok();
    let write = |gpu| resolve(start, 1, true, gpu, now()).is_ok();
    assert_eq!((read(THERE), write(THERE)), (false, false));
    ranges_mut().unwrap().at_mut(start).unwrap().rights.insert(THERE, false);
    assert_eq!((read(THERE), write(THERE)), (true, false));
    assert!(resolve(start, GRANULARITY + 1, false, THERE, now()).is_err());

    let plain = plain::allocate(HERE, 10).unwrap();
    let reach = |gpu, len| resolve(plain, len, true, gpu, now()).is_ok();
    assert_eq!((reach(HERE, 10), reach(HERE, 11), reach(THERE, 10)), (true, false, false));
    state::set_peer(THERE, HERE, true).unwrap();
    assert!(reach(THERE, 10));
    state::set_peer(THERE, HERE, false).unwrap();
    plain::free(plain).unwrap();
    assert!(!reach(HERE, 10));
}

#[test]
fn work_means_the_memory_that_was_there_when_it_was_submitted() {
    let start = two_pieces();
    let before = now();
    let pointer = resolve(start, 1, true, HERE, before).unwrap();
    put(pointer, 1);
    let mut ranges = ranges_mut().unwrap();
    let old = ranges.unmap(start).unwrap();
    drop(ranges);
    // Work that is under way harms nobody.
    put(pointer, 2);
    assert_eq!(resolve(start, 1, false, HERE, before), BAD);
    map(&mut ranges_mut().unwrap(), start);
    assert_eq!(resolve(start, 1, false, HERE, before), BAD);
    assert_eq!(get(resolve(start, 1, false, HERE, now()).unwrap()), 0);

    let mut byte = [9];
    rustix::io::pread(&old.physical().unwrap().fd, &mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
}
