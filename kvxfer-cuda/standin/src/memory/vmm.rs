//! Entry points of virtual memory management: addresses, physical memory, and one behind the other.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::os::fd::IntoRawFd;

use rustix::io::fcntl_dupfd_cloexec;

use super::ipc::{self, Handle};
use super::name::{FABRIC, POSIX, RDMA};
use super::physical::{Physical, add_handle, behind, descriptor, release_handle};
use super::space::{Kind, ranges, ranges_mut};
use crate::abi::{Code, In, Out, Result};
use crate::devices::GRANULARITY;
use crate::report::{Counted, Live};
use crate::state::{self, Gpu};

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Location {
    kind: c_int,
    id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Properties {
    kind: c_int,
    handles: c_uint,
    location: Location,
    win32: usize,
    compression: u8,
    rdma: u8,
    usage: u16,
    reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Access {
    location: Location,
    rights: c_int,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const DEVICE: c_int = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_int = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_...`.
const NONE: c_int = 0;
const READ: c_int = 1;
const READ_WRITE: c_int = 3;

impl Location {
    fn of(gpu: Gpu) -> Result<Self> {
        let id = state::ordinal(gpu).unwrap_or(-1);
        Ok(Self { kind: DEVICE, id })
    }

    /// # Errors
    /// `INVALID_VALUE` when it is no device's; `INVALID_DEVICE` when there is no such device.
    fn gpu(self) -> Result<Gpu> {
        if self.kind != DEVICE {
            return Err(Code::INVALID_VALUE);
        }
        state::gpu(self.id)
    }
}

impl Properties {
    /// The device and the flags of memory's name.
    fn read(self) -> Result<(Gpu, u32)> {
        let gpu = self.location.gpu()?;
        if self.kind != PINNED || self.compression != 0 || self.handles & !(POSIX | FABRIC) != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if self.handles & FABRIC != 0 && !state::config()?.fabric {
            return Err(Code::NOT_SUPPORTED);
        }
        Ok((gpu, self.handles | if self.rdma == 0 { 0 } else { RDMA }))
    }
}

fn is_whole(bytes: u64) -> Result {
    let whole = bytes > 0 && bytes.is_multiple_of(GRANULARITY);
    whole.then_some(()).ok_or(Code::INVALID_VALUE)
}

entries! {
    fn cuMemGetAllocationGranularity(bytes: Out<usize>, properties: In<Properties>, option: c_int) {
        properties.get()?.read()?;
        match option {
            // The minimum, and what is recommended.
            0 | 1 => bytes.put(GRANULARITY as usize),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuMemAddressReserve(
        start: Out<u64>, bytes: usize, align: usize, _wish: u64, flags: c_ulonglong,
    ) {
        let bytes = bytes as u64;
        is_whole(bytes)?;
        if flags != 0 || !(align == 0 || align.is_power_of_two()) {
            return Err(Code::INVALID_VALUE);
        }
        let mut ranges = ranges_mut()?;
        let at = ranges.take(bytes, align as u64)?;
        start.put(at)?;
        ranges.reserved.insert(at, (bytes, Counted::new(Live::Reservations)));
        Ok(())
    }

    fn cuMemAddressFree(start: u64, bytes: usize) {
        let mut ranges = ranges_mut()?;
        let whole = ranges.reserved.get(&start).is_some_and(|(len, _)| *len == bytes as u64);
        if !whole || !ranges.is_free(start, bytes as u64) {
            return Err(Code::INVALID_VALUE);
        }
        ranges.reserved.remove(&start);
        Ok(())
    }

    fn cuMemCreate(
        handle: Out<u64>, bytes: usize, properties: In<Properties>, flags: c_ulonglong,
    ) {
        let (gpu, names) = properties.get()?.read()?;
        is_whole(bytes as u64)?;
        if flags != 0 || handle.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        state::check(gpu)?;
        handle.put(add_handle(Physical::create(gpu, bytes as u64, names)?.into()))
    }

    fn cuMemRelease(handle: u64) {
        release_handle(handle)
    }

    fn cuMemRetainAllocationHandle(handle: Out<u64>, addr: In<c_void>) {
        let ranges = ranges()?;
        let (_, mapping) = ranges.find(addr.addr()).ok_or(Code::INVALID_VALUE)?;
        let Kind::Virtual(physical) = &mapping.kind else { return Err(Code::INVALID_VALUE) };
        handle.put(add_handle(physical.clone()))
    }

    fn cuMemGetAllocationPropertiesFromHandle(properties: Out<Properties>, handle: u64) {
        let name = behind(handle)?.name;
        properties.put(Properties {
            kind: PINNED,
            handles: name.flags & (POSIX | FABRIC),
            location: Location::of(name.gpu)?,
            win32: 0,
            compression: 0,
            rdma: u8::from(name.flags & RDMA != 0),
            usage: 0,
            reserved: [0; 4],
        })
    }

    fn cuMemMap(start: u64, bytes: usize, offset: usize, handle: u64, flags: c_ulonglong) {
        let physical = behind(handle)?;
        let len = bytes as u64;
        is_whole(len)?;
        if flags != 0 || offset != 0 || len > physical.bytes || !start.is_multiple_of(GRANULARITY) {
            return Err(Code::INVALID_VALUE);
        }
        let mut ranges = ranges_mut()?;
        let reserved = ranges.reserved.range(..=start).next_back();
        let inside = reserved.is_some_and(|(at, (room, _))| {
            start.checked_add(len).is_some_and(|end| end <= at + room)
        });
        if !inside || !ranges.is_free(start, len) {
            return Err(Code::INVALID_VALUE);
        }
        let kind = Kind::Virtual(physical.clone());
        ranges.map(start, len, kind, &physical.fd, Counted::new(Live::Mappings))?;
        Ok(())
    }

    fn cuMemUnmap(start: u64, bytes: usize) {
        let mut ranges = ranges_mut()?;
        let mut gone = Vec::new();
        for at in ranges.whole(start, bytes as u64)? {
            gone.push(ranges.unmap(at)?);
        }
        drop(ranges);
        drop(gone);
        Ok(())
    }

    fn cuMemSetAccess(start: u64, bytes: usize, access: In<Access>, count: usize) {
        if count == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let mut ranges = ranges_mut()?;
        let whole = ranges.whole(start, bytes as u64)?;
        // Each is looked at before the first is changed.
        let mut changes = Vec::new();
        for Access { location, rights } in access.list(count)? {
            let gpu = location.gpu()?;
            state::check(gpu)?;
            if ![NONE, READ, READ_WRITE].contains(&rights) {
                return Err(Code::INVALID_VALUE);
            }
            changes.push((gpu, rights));
        }
        for at in &whole {
            let owner = ranges.at(*at).and_then(|mapping| mapping.physical()).map(|physical| physical.name.gpu);
            for (gpu, _) in &changes {
                if !owner.is_some_and(|owner| state::config().is_ok_and(|config| config.reaches(*gpu, owner))) {
                    return Err(Code::INVALID_DEVICE);
                }
            }
        }
        for at in whole {
            let Some(mapping) = ranges.at_mut(at) else { continue };
            for (gpu, rights) in &changes {
                match *rights {
                    NONE => mapping.rights.remove(gpu),
                    rights => mapping.rights.insert(*gpu, rights == READ_WRITE),
                };
            }
        }
        Ok(())
    }

    fn cuMemGetAccess(rights: Out<c_ulonglong>, location: In<Location>, addr: u64) {
        let gpu = location.get()?.gpu()?;
        let ranges = ranges()?;
        let (_, mapping) = ranges.find(addr).ok_or(Code::INVALID_VALUE)?;
        rights.put(match mapping.rights.get(&gpu) {
            None => NONE,
            Some(false) => READ,
            Some(true) => READ_WRITE,
        } as c_ulonglong)
    }

    fn cuMemExportToShareableHandle(
        out: Out<c_void>, handle: u64, kind: c_int, flags: c_ulonglong,
    ) {
        let physical = behind(handle)?;
        physical.shareable(kind as u32)?;
        if flags != 0 || out.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        match kind as u32 {
            POSIX => {
                let fd = fcntl_dupfd_cloexec(&physical.fd, 3).map_err(|_| Code::UNKNOWN)?;
                out.cast().put(fd.into_raw_fd())
            }
            FABRIC => out.cast().put(Handle::of(&physical)),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    fn cuMemImportFromShareableHandle(handle: Out<u64>, source: In<c_void>, kind: c_int) {
        state::devices()?;
        let physical = match kind as u32 {
            // The number itself is passed as the pointer.
            POSIX => Physical::import(descriptor(source.addr() as c_int)?)?,
            FABRIC if state::config()?.fabric => {
                ipc::open(&source.cast().get()?)?
            }
            FABRIC => return Err(Code::NOT_SUPPORTED),
            _ => return Err(Code::INVALID_VALUE),
        };
        handle.put(add_handle(physical.into()))
    }
}
