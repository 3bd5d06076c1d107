//! Entry points of host memory that devices may touch. Its device address is its host address.

use std::ffi::{c_int, c_uint};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::space::{Kind, ranges, ranges_mut};
use crate::abi::{Code, Out, Result};
use crate::report::{Counted, Live};
use crate::{exec, state};

fn allocate(bytes: u64) -> Result<u64> {
    state::current()?;
    exec::may_wait()?;
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let fd = memfd_create("kvxfer-standin-pinned", MemfdFlags::CLOEXEC)
        .and_then(|fd| ftruncate(&fd, bytes).map(|()| fd))
        .map_err(|_| Code::OUT_OF_MEMORY)?;
    let mut ranges = ranges_mut()?;
    let start = ranges.take(bytes, 0)?;
    ranges.map(start, bytes, Kind::Pinned, &fd, Counted::new(Live::Pinned))?;
    Ok(start)
}

fn forget(start: u64, is_it: fn(&Kind) -> bool, otherwise: Code) -> Result {
    state::devices()?;
    exec::may_wait()?;
    let mut ranges = ranges_mut()?;
    if !ranges.at(start).is_some_and(|mapping| is_it(&mapping.kind)) {
        return Err(otherwise);
    }
    ranges.unmap(start)?;
    drop(ranges);
    state::current().map(|_| ())
}

entries! {
    fn cuMemHostAlloc(start: Out<u64>, bytes: usize, flags: c_uint) {
        // Portable, mapped, write-combined.
        if flags & !7 != 0 || start.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        start.put(allocate(bytes as u64)?)
    }

    fn cuMemAllocHost_v2(start: Out<u64>, bytes: usize) {
        if start.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        start.put(allocate(bytes as u64)?)
    }

    fn cuMemFreeHost(start: u64) {
        forget(start, |kind| matches!(kind, Kind::Pinned), Code::INVALID_VALUE)
    }

    fn cuMemHostRegister_v2(start: u64, bytes: usize, flags: c_uint) {
        state::current()?;
        let len = bytes as u64;
        if start == 0 || len == 0 || start.checked_add(len).is_none() || flags & !15 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let mut ranges = ranges_mut()?;
        if !ranges.is_free(start, len) {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        ranges.insert(start, len, Kind::Registered, Counted::new(Live::Pinned));
        Ok(())
    }

    fn cuMemHostUnregister(start: u64) {
        forget(start, |kind| matches!(kind, Kind::Registered), Code::HOST_MEMORY_NOT_REGISTERED)
    }

    fn cuMemHostGetDevicePointer_v2(addr: Out<u64>, host: u64, flags: c_uint) {
        let ranges = ranges()?;
        match ranges.find(host) {
            Some((_, mapping)) if mapping.physical().is_none() && flags == 0 => addr.put(host),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuMemHostGetFlags(flags: Out<c_int>, host: u64) {
        let ranges = ranges()?;
        match ranges.find(host) {
            Some((_, mapping)) if mapping.physical().is_none() => flags.put(0),
            _ => Err(Code::INVALID_VALUE),
        }
    }
}
