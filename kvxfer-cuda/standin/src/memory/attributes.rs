//! Entry points that say what an address is.

use std::ffi::{c_int, c_uint, c_void};

use super::name::{FABRIC, POSIX, RDMA};
use super::space::{Kind, Mapping, ranges};
use crate::abi::{Code, In, Out, Result};
use crate::contexts::Context;
use crate::state;

/// The value of an attribute, as wide as the driver writes it.
enum Value {
    Pointer(u64),
    Number(u32),
    Flag(bool),
}

impl Value {
    fn put(self, out: Out<c_void>) -> Result {
        match self {
            Self::Pointer(value) => out.cast().put(value),
            Self::Number(value) => out.cast().put(value),
            Self::Flag(value) => out.cast().put(value),
        }
    }
}

/// # Errors
/// `INVALID_VALUE` when the attribute is unknown, or has no meaning for that memory.
fn value(attribute: c_int, addr: u64, start: u64, mapping: &Mapping) -> Result<Value> {
    let physical = mapping.physical();
    let flags = physical.map_or(0, |physical| physical.name.flags);
    Ok(match attribute {
        // Context: memory of cuMemMap has none.
        1 => match &mapping.kind {
            Kind::Plain(physical) | Kind::Opened(physical) => {
                Value::Pointer(Context::of(physical.name.gpu).value())
            }
            _ => Value::Pointer(0),
        },
        // Memory type: host, device.
        2 => Value::Number(if physical.is_some() { 2 } else { 1 }),
        // Device pointer, host pointer.
        3 => Value::Pointer(addr),
        4 if physical.is_none() => Value::Pointer(addr),
        // Whether copies are synchronous.
        6 => Value::Flag(false),
        7 => Value::Pointer(mapping.number()),
        // Whether it is managed.
        8 => Value::Flag(false),
        9 => {
            let gpu = physical.map(|physical| physical.name.gpu);
            let ordinal = gpu.map_or(Some(0), state::ordinal);
            Value::Number(ordinal.unwrap_or(-1) as u32)
        }
        10 => Value::Flag(matches!(mapping.kind, Kind::Plain(_))),
        11 => Value::Pointer(start),
        12 => Value::Pointer(mapping.len),
        13 => Value::Flag(true),
        14 => Value::Pointer(u64::from(flags & (POSIX | FABRIC))),
        // A request is no promise.
        15 => Value::Flag(flags & RDMA != 0 && state::config()?.rdma),
        _ => return Err(Code::INVALID_VALUE),
    })
}

entries! {
    fn cuPointerGetAttribute(out: Out<c_void>, attribute: c_int, addr: u64) {
        let ranges = ranges()?;
        let (start, mapping) = ranges.find(addr).ok_or(Code::INVALID_VALUE)?;
        value(attribute, addr, start, mapping)?.put(out)
    }

    fn cuPointerGetAttributes(
        count: c_uint, attributes: In<c_int>, outs: In<Out<c_void>>, addr: u64,
    ) {
        let ranges = ranges()?;
        let found = ranges.find(addr);
        for index in 0..count as usize {
            let (attribute, out) = (attributes.get_at(index)?, outs.get_at(index)?);
            // What is not known reads 0, as of any address that isn't the driver's.
            let value = found.map(|(start, mapping)| value(attribute, addr, start, mapping));
            match value {
                Some(Ok(value)) => value.put(out)?,
                _ => out.cast().put(0_u32)?,
            }
        }
        Ok(())
    }

    fn cuPointerSetAttribute(value: In<c_uint>, attribute: c_int, addr: u64) {
        let ranges = ranges()?;
        ranges.find(addr).ok_or(Code::INVALID_VALUE)?;
        // Whether copies are synchronous: those of the stand-in are what the strictest reader expects.
        let known = attribute == 6 && value.get()? <= 1;
        known.then_some(()).ok_or(Code::INVALID_VALUE)
    }
}
