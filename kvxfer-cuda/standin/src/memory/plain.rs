//! Entry points of plain device memory.

use super::ledger;
use super::physical::Physical;
use super::space::{Kind, Ranges, ranges, ranges_mut};
use crate::abi::{Code, Out, Result};
use crate::exec;
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

/// Allocates on a device; the address.
///
/// # Errors
/// `INVALID_VALUE` for 0 bytes; `OUT_OF_MEMORY`.
pub(crate) fn allocate(gpu: Gpu, bytes: u64) -> Result<u64> {
    if bytes == 0 {
        return Err(Code::INVALID_VALUE);
    }
    let pages = bytes.checked_next_multiple_of(4096).ok_or(Code::OUT_OF_MEMORY)?;
    let physical = std::sync::Arc::new(Physical::create(gpu, pages, 0)?);
    let mut ranges = ranges_mut()?;
    let start = ranges.take(pages, 0)?;
    let kind = Kind::Plain(physical.clone());
    let count = Counted::new(Live::Mappings);
    ranges.map(start, bytes, kind, &physical.fd, count)?.rights.insert(gpu, true);
    Ok(start)
}

/// Frees what [`allocate`] gave. Work that will touch it ends in an error: nothing waits for it.
///
/// # Errors
/// `INVALID_VALUE` when it gave no such address.
pub(crate) fn free(start: u64) -> Result {
    let mut ranges = ranges_mut()?;
    if !is_plain(&ranges, start) {
        return Err(Code::INVALID_VALUE);
    }
    let gone = ranges.unmap(start)?;
    drop(ranges);
    drop(gone);
    Ok(())
}

fn is_plain(ranges: &Ranges, start: u64) -> bool {
    ranges.at(start).is_some_and(|mapping| matches!(mapping.kind, Kind::Plain(_)))
}

entries! {
    fn cuMemAlloc_v2(start: Out<u64>, bytes: usize) {
        let gpu = state::current()?;
        exec::may_wait()?;
        if start.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        start.put(allocate(gpu, bytes as u64)?)
    }

    fn cuMemFree_v2(start: u64) {
        exec::may_wait()?;
        if start != 0 {
            free(start)?;
        }
        state::current().map(|_| ())
    }

    fn cuMemAllocAsync(start: Out<u64>, bytes: usize, stream: u64) {
        let gpu = state::current()?;
        if start.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // The address is there at once; nothing but the order of the work says from when on it is good.
        exec::enqueue_job(gpu, stream, Box::new(|| Ok(())))?;
        start.put(allocate(gpu, bytes as u64)?)
    }

    fn cuMemFreeAsync(start: u64, stream: u64) {
        let gpu = state::current()?;
        if !is_plain(&*ranges()?, start) {
            return Err(Code::INVALID_VALUE);
        }
        exec::enqueue_job(gpu, stream, Box::new(move || free(start)))
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) {
        let gpu = state::current()?;
        let memory = state::config()?.memory;
        free.put(memory.saturating_sub(ledger::used(gpu)) as usize)?;
        total.put(memory as usize)
    }

    fn cuMemGetAddressRange_v2(start: Out<u64>, bytes: Out<usize>, addr: u64) {
        let ranges = ranges()?;
        let (at, mapping) = ranges.find(addr).ok_or(Code::NOT_FOUND)?;
        if !start.is_null() {
            start.put(at)?;
        }
        if bytes.is_null() { Ok(()) } else { bytes.put(mapping.len as usize) }
    }
}
