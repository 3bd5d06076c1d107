//! Entry points about devices and what joins them.

use std::ffi::{c_char, c_int, c_uint};

use crate::abi::{Code, Out, Result, Text};
use crate::config::Link;
use crate::state::{self, Gpu};

/// The smallest piece of physical memory, and what its addresses are multiples of.
pub(crate) const GRANULARITY: u64 = 2 << 20;

entries! {
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        state::start()
    }

    fn cuDriverGetVersion(version: Out<c_int>) {
        version.put(state::config()?.driver)
    }

    fn cuDeviceGetCount(count: Out<c_int>) {
        count.put(state::devices()?.len() as c_int)
    }

    fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) {
        state::gpu(ordinal)?;
        device.put(ordinal)
    }

    fn cuDeviceGetName(name: Out<c_char>, len: c_int, device: c_int) {
        let gpu = state::gpu(device)?;
        let part = if state::config()?.mig.contains(&gpu.0) { " MIG 1g.10gb" } else { "" };
        let text = format!("kvxfer stand-in{part}");
        let room = usize::try_from(len).ok().and_then(|len| len.checked_sub(1));
        put_text(&name, &text, room.ok_or(Code::INVALID_VALUE)?)
    }

    fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: c_int) {
        uuid.put(state::config()?.uuid(state::gpu(device)?))
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: c_int) {
        uuid.put(state::config()?.uuid(state::gpu(device)?))
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) {
        state::gpu(device)?;
        bytes.put(state::config()?.memory as usize)
    }

    fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) {
        value.put(attribute_of(attribute, state::gpu(device)?)?)
    }

    fn cuDeviceGetPCIBusId(id: Out<c_char>, len: c_int, device: c_int) {
        let gpu = state::gpu(device)?;
        let room = usize::try_from(len).ok().and_then(|len| len.checked_sub(1));
        put_text(&id, &format!("0000:{:02X}:00.0", gpu.0 + 1), room.ok_or(Code::INVALID_VALUE)?)
    }

    fn cuDeviceGetByPCIBusId(device: Out<c_int>, id: Text) {
        let mut parts = id.get()?.split(':');
        let bus = parts.nth(1).and_then(|bus| u32::from_str_radix(bus, 16).ok());
        let gpu = bus.and_then(|bus| bus.checked_sub(1)).map(Gpu);
        device.put(gpu.and_then(state::ordinal).ok_or(Code::INVALID_DEVICE)?)
    }

    fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) {
        let link = state::config()?.link(state::gpu(device)?, state::gpu(peer)?);
        can.put(c_int::from(link != Link::None))
    }

    fn cuDeviceGetP2PAttribute(value: Out<c_int>, attribute: c_int, from: c_int, to: c_int) {
        let (from, to) = (state::gpu(from)?, state::gpu(to)?);
        if from == to {
            return Err(Code::INVALID_DEVICE);
        }
        let link = state::config()?.link(from, to);
        value.put(match attribute {
            // Rank of performance: smaller is faster.
            1 => c_int::from(link != Link::Nvlink),
            // Access, and access of arrays.
            2 | 4 => c_int::from(link != Link::None),
            // Native atomics.
            3 => c_int::from(link == Link::Nvlink),
            _ => return Err(Code::INVALID_VALUE),
        })
    }
}

fn attribute_of(attribute: c_int, gpu: Gpu) -> Result<c_int> {
    Ok(match attribute {
        // Threads of a block, threads of a warp, multiprocessors, threads of a multiprocessor.
        1 => 1024,
        10 => 32,
        16 => 16,
        39 => 2048,
        // Kernels run side by side; PCI bus; copy engines; one address space; compute capability 9.0.
        31 => 1,
        33 => gpu.0 as c_int + 1,
        40 => 2,
        41 => 1,
        75 => 9,
        // Priorities of streams, waiting for and writing of values, registration of host memory.
        78 | 92 | 93 | 94 | 99 | 122 | 123 => 1,
        // VMM, handles as POSIX fds, RDMA of VMM memory, RDMA.
        102 | 103 | 110 | 116 => 1,
        // Who is told when a write from outside is ordered: all devices.
        118 => 200,
        // Allocation in a stream's order.
        115 => 1,
        128 => c_int::from(state::config()?.fabric),
        133 => c_int::from(state::config()?.mps),
        2..=150 => 0,
        _ => return Err(Code::INVALID_VALUE),
    })
}

/// Writes as much of `text` as `room` takes, and NUL.
fn put_text(out: &Out<c_char>, text: &str, room: usize) -> Result {
    let text = &text.as_bytes()[..text.len().min(room)];
    for (index, byte) in text.iter().enumerate() {
        out.put_at(index, *byte as c_char)?;
    }
    out.put_at(text.len(), 0)
}
