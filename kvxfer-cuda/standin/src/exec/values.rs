//! Entry points for values in memory that streams write or wait for.

use super::streams::enqueue;
use super::transfers::Place;
use super::work::{Until, Value, Work};
use crate::abi::{Code, Result};
use crate::state;

/// `CU_STREAM_WAIT_VALUE_FLUSH`: nothing to do here.
const FLUSH: u32 = 1 << 30;
/// `CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER`: allowed, and not taken up.
const NO_BARRIER: u32 = 1;

fn until(flags: u32) -> Result<Until> {
    match flags & !FLUSH {
        0 => Ok(Until::Reached),
        1 => Ok(Until::Equal),
        2 => Ok(Until::And),
        3 => Ok(Until::Nor),
        _ => Err(Code::INVALID_VALUE),
    }
}

fn value(address: u64, value: u64, wide: bool, until: Until, write: bool) -> Result<Value> {
    let gpu = state::current()?;
    let len = if wide { 8 } else { 4 };
    if !address.is_multiple_of(len) {
        return Err(Code::INVALID_VALUE);
    }
    Place { address, gpu }.end(len, write)?;
    Ok(Value { address, value, wide, until })
}

fn await_value(stream: u64, address: u64, wanted: u64, wide: bool, flags: u32) -> Result {
    let value = value(address, wanted, wide, until(flags)?, false)?;
    enqueue(state::current()?, stream, Work::Await(value)).map(|_| ())
}

fn write_value(stream: u64, address: u64, new: u64, wide: bool, flags: u32) -> Result {
    if flags & !NO_BARRIER != 0 {
        return Err(Code::INVALID_VALUE);
    }
    let value = value(address, new, wide, Until::Equal, true)?;
    enqueue(state::current()?, stream, Work::Write(value)).map(|_| ())
}

entries! {
    fn cuStreamWaitValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        await_value(stream, address, value.into(), false, flags)
    }

    fn cuStreamWaitValue64_v2(stream: u64, address: u64, value: u64, flags: u32) {
        await_value(stream, address, value, true, flags)
    }

    fn cuStreamWriteValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        write_value(stream, address, value.into(), false, flags)
    }

    fn cuStreamWriteValue64_v2(stream: u64, address: u64, value: u64, flags: u32) {
        write_value(stream, address, value, true, flags)
    }
}
