//! Entry points about contexts. There are primary ones only.

use std::ffi::{c_int, c_uint};

use crate::abi::{Code, Out, Result};
use crate::exec;
use crate::state::{self, Gpu};

/// A context, as the caller holds it: made of the device's number, never dereferenced.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Context(usize);

const CONTEXTS: usize = 0x5ca1_0000;
const APART: usize = 0x100;

impl Context {
    pub(crate) fn of(gpu: Gpu) -> Self {
        Self(CONTEXTS + gpu.0 as usize * APART)
    }

    pub(crate) const NONE: Self = Self(0);

    /// Its device; none for null.
    ///
    /// # Errors
    /// `INVALID_CONTEXT` when it is no context of a device that this process sees.
    pub(crate) fn gpu(self) -> Result<Option<Gpu>> {
        if self.0 == 0 {
            return Ok(None);
        }
        let found = state::devices()?.iter().find(|gpu| Self::of(**gpu).0 == self.0);
        found.copied().map(Some).ok_or(Code::INVALID_CONTEXT)
    }

    pub(crate) fn value(self) -> u64 {
        self.0 as u64
    }

    fn some(self) -> Result<Gpu> {
        self.gpu()?.ok_or(Code::INVALID_CONTEXT)
    }
}

entries! {
    fn cuDevicePrimaryCtxRetain(context: Out<Context>, device: c_int) {
        let gpu = state::gpu(device)?;
        context.put(Context::of(gpu))?;
        state::retain(gpu)
    }

    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        let gpu = state::gpu(device)?;
        state::release(gpu)?;
        if !state::is_retained(gpu) {
            exec::forget_device(gpu);
        }
        Ok(())
    }

    fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) {
        let gpu = state::gpu(device)?;
        flags.put(0)?;
        active.put(c_int::from(state::is_retained(gpu)))
    }

    fn cuCtxGetCurrent(context: Out<Context>) {
        context.put(state::bound()?.map_or(Context::NONE, Context::of))
    }

    fn cuCtxSetCurrent(context: Context) {
        state::bind(context.gpu()?);
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: Context) {
        state::push(context.some()?);
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<Context>) {
        let gpu = state::pop()?;
        if context.is_null() { Ok(()) } else { context.put(Context::of(gpu)) }
    }

    fn cuCtxGetDevice(device: Out<c_int>) {
        let gpu = state::bound()?.ok_or(Code::INVALID_CONTEXT)?;
        device.put(state::ordinal(gpu).ok_or(Code::INVALID_CONTEXT)?)
    }

    fn cuCtxEnablePeerAccess(peer: Context, flags: c_uint) {
        let (from, to) = (state::current()?, peer.some()?);
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if from == to {
            return Err(Code::INVALID_DEVICE);
        }
        if !state::config()?.reaches(from, to) {
            return Err(Code::PEER_ACCESS_UNSUPPORTED);
        }
        match state::set_peer(from, to, true)? {
            true => Ok(()),
            false => Err(Code::PEER_ACCESS_ALREADY_ENABLED),
        }
    }

    fn cuCtxDisablePeerAccess(peer: Context) {
        match state::set_peer(state::current()?, peer.some()?, false)? {
            true => Ok(()),
            false => Err(Code::PEER_ACCESS_NOT_ENABLED),
        }
    }
}
