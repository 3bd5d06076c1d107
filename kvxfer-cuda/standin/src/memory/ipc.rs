//! Handles that are bytes: legacy IPC for plain memory, and fabric handles.

use std::ffi::c_uint;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use super::name::Name;
use super::physical::Physical;
use super::space::{Kind, ranges, ranges_mut};
use crate::abi::{Code, Out, Result};
use crate::report::{Counted, Live};
use crate::state;

/// `CUipcMemHandle` and `CUmemFabricHandle`: where the owner has the memory, and its name.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Handle {
    process: u32,
    fd: i32,
    name: [u8; 56],
}

/// `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY: c_uint = 1;

impl Handle {
    pub(super) fn of(physical: &Physical) -> Self {
        let mut name = [0; 56];
        name.iter_mut().zip(physical.name.to_string().bytes()).for_each(|(to, from)| *to = from);
        Self { process: std::process::id(), fd: physical.fd.as_raw_fd(), name }
    }

    fn name(&self) -> Option<Name> {
        let text = self.name.split(|byte| *byte == 0).next()?;
        Name::parse(std::str::from_utf8(text).ok()?)
    }
}

/// The memory of a handle, as long as its owner has it.
///
/// # Errors
/// `INVALID_HANDLE` when it is none; `MAP_FAILED` when the owner doesn't have the memory; those of
/// [`Physical::import`].
pub(super) fn open(handle: &Handle) -> Result<Physical> {
    let name = handle.name().ok_or(Code::INVALID_HANDLE)?;
    let path = format!("/proc/{}/fd/{}", handle.process, handle.fd);
    let file = File::options().read(true).write(true).open(path).map_err(|_| Code::MAP_FAILED)?;
    if Name::of(&file) != Some(name) {
        return Err(Code::MAP_FAILED);
    }
    Physical::import(file.as_fd())
}

entries! {
    fn cuIpcGetMemHandle(handle: Out<Handle>, addr: u64) {
        state::current()?;
        let ranges = ranges()?;
        match ranges.find(addr) {
            Some((_, mapping)) => match &mapping.kind {
                Kind::Plain(physical) if state::config()?.mig.contains(&physical.name.gpu.0) => {
                    Err(Code::NOT_SUPPORTED)
                }
                Kind::Plain(physical) => handle.put(Handle::of(physical)),
                _ => Err(Code::INVALID_VALUE),
            },
            None => Err(Code::INVALID_VALUE),
        }
    }

    fn cuIpcOpenMemHandle_v2(start: Out<u64>, handle: Handle, flags: c_uint) {
        let gpu = state::current()?;
        if flags != LAZY || start.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let owner = handle.name().ok_or(Code::INVALID_HANDLE)?;
        if owner.owner == std::process::id() {
            return Err(Code::INVALID_CONTEXT);
        }
        if !state::config()?.reaches(gpu, owner.gpu) {
            return Err(Code::PEER_ACCESS_UNSUPPORTED);
        }
        let physical = std::sync::Arc::new(open(&handle)?);
        let mut ranges = ranges_mut()?;
        let at = ranges.take(physical.bytes, 0)?;
        let kind = Kind::Opened(physical.clone());
        let count = Counted::new(Live::Mappings);
        ranges.map(at, physical.bytes, kind, &physical.fd, count)?.rights.insert(gpu, true);
        start.put(at)
    }

    fn cuIpcCloseMemHandle(start: u64) {
        state::devices()?;
        let mut ranges = ranges_mut()?;
        if !ranges.at(start).is_some_and(|mapping| matches!(mapping.kind, Kind::Opened(_))) {
            return Err(Code::INVALID_VALUE);
        }
        let gone = ranges.unmap(start)?;
        drop(ranges);
        drop(gone);
        state::current().map(|_| ())
    }
}
