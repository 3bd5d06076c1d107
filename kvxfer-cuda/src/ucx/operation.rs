//! What goes through a worker.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use kvxfer_core::{ErrorKind, Result};
use ucx_sys::*;

use super::inbox;
use super::worker::MESSAGE;
use super::{EndpointId, KeyId, Registration, Worker};

/// Memory of this process that puts read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(usize);

impl Worker {
    /// Memory that puts will read from; it is kept until the worker is dropped.
    ///
    /// # Errors
    /// `Config`: it is registered with another context.
    pub fn source(&mut self, memory: Arc<Registration>) -> Result<SourceId> {
        if !Arc::ptr_eq(memory.context(), &self.context) {
            return Err(ErrorKind::Config.error("memory of another UCX context"));
        }
        self.sources.push(memory);
        Ok(SourceId(self.sources.len() - 1))
    }

    /// Writes `len` bytes from `src` of a source to `dst` of a peer's memory. That they arrived is only known from a
    /// flush after it and an answer to a message after that.
    ///
    /// # Errors `OutOfBounds`: a range leaves its memory. `NotFound`: no such key or source. `PeerLost`, and others
    /// of UCX: nothing was written.
    pub fn put(
        &mut self,
        key: KeyId,
        dst: u64,
        source: SourceId,
        src: u64,
        len: u64,
    ) -> Result<()> {
        let key =
            self.keys.get(&key).ok_or_else(|| ErrorKind::NotFound.error("the key was let go"))?;
        let source = self
            .sources
            .get(source.0)
            .ok_or_else(|| ErrorKind::NotFound.error("no such source"))?;
        let from = source.at(src, len)?;
        if !crate::memory::inside(key.bytes, dst, len) {
            let about = format!("{len} bytes from {dst} leave a peer's {} bytes", key.bytes);
            return Err(ErrorKind::OutOfBounds.error(about));
        }
        let params = ucp_request_param_t {
            op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
                | UCP_OP_ATTR_FIELD_USER_DATA
                | UCP_OP_ATTR_FIELD_MEMORY_TYPE
                | UCP_OP_ATTR_FIELD_MEMH,
            cb: ucp_request_callback { send: Some(inbox::put_done) },
            user_data: key.notes.cast_mut().cast(),
            memory_type: source.kind(),
            memh: source.raw(),
            ..zeroed()
        };
        // SAFETY: the notes stay until the key is reaped, and its endpoint's as long.
        let (puts, end) = unsafe { (&(*key.notes).puts, &*(*key.notes).end) };
        // Some versions crash when they are asked after a failure.
        self.context.check("writing to a peer", end.failed.get())?;
        puts.set(puts.get() + 1);
        // SAFETY: the endpoint is alive while keys to its peer are; both ranges were checked; the source is kept for
        // as long as the worker, and so for as long as UCX reads it.
        let answer = unsafe {
            let ucp = self.context.ucp();
            (ucp.ucp_put_nbx)(key.ep, from, len as usize, key.address + dst, key.raw, &params)
        };
        match status_of(answer) {
            // Under way.
            None => Ok(()),
            Some(status) => {
                puts.set(puts.get() - 1);
                end.fail(status);
                self.context.check("writing to a peer", status)
            }
        }
    }

    /// Ends when all earlier puts to that endpoint did: they have left, and what they read may change.
    ///
    /// # Errors
    /// `Closed`: no such endpoint; there will be no event.
    pub fn flush(&mut self, endpoint: EndpointId, token: u64) -> Result<()> {
        let ucp = self.context.ucp();
        self.operate(endpoint, token, 0, |ep, params| {
            // SAFETY: the endpoint is alive; see `operate` for the rest.
            unsafe { (ucp.ucp_ep_flush_nbx)(ep, params) }
        })
    }

    /// Sends a message of at most 64 bytes. It ends when it has left.
    ///
    /// # Errors
    /// `Closed`: no such endpoint. `OutOfBounds`: it is too long. There will be no event.
    pub fn send(&mut self, endpoint: EndpointId, message: &[u8], token: u64) -> Result<()> {
        if message.len() > inbox::LONGEST {
            return Err(
                ErrorKind::OutOfBounds.error(format!("a message of {} bytes", message.len()))
            );
        }
        let ucp = self.context.ucp();
        let flags = UCP_AM_SEND_FLAG_EAGER | UCP_AM_SEND_FLAG_COPY_HEADER;
        self.operate(endpoint, token, flags, |ep, params| {
            let (header, len) = (message.as_ptr().cast(), message.len());
            // SAFETY: the endpoint is alive; the header is copied before the call returns; see `operate` for the
            // rest.
            unsafe { (ucp.ucp_am_send_nbx)(ep, MESSAGE, header, len, ptr::null(), 0, params) }
        })
    }

    /// Starts an operation that ends in an event with that token.
    fn operate(
        &mut self,
        endpoint: EndpointId,
        token: u64,
        flags: u32,
        start: impl FnOnce(ucp_ep_h, &ucp_request_param_t) -> ucs_status_ptr_t,
    ) -> Result<()> {
        let end = self.end(endpoint)?;
        let params = request(inbox::op_done, end.notes.cast_mut().cast(), flags);
        let answer = start(end.raw, &params);
        match status_of(answer) {
            // SAFETY: the context asked for that many bytes in each request, and its callback comes in a later call.
            None => unsafe { answer.cast::<u64>().write(token) },
            // SAFETY: the notes stay until the endpoint is closed.
            Some(status) => unsafe { &*end.notes }.op_ended(token, status),
        }
        Ok(())
    }
}

/// Parameters of a call whose end calls `done`.
pub(super) fn request(
    done: ucp_send_nbx_callback_t,
    user_data: *mut c_void,
    flags: u32,
) -> ucp_request_param_t {
    ucp_request_param_t {
        op_attr_mask: UCP_OP_ATTR_FIELD_CALLBACK
            | UCP_OP_ATTR_FIELD_USER_DATA
            | UCP_OP_ATTR_FIELD_FLAGS,
        flags,
        cb: ucp_request_callback { send: Some(done) },
        user_data,
        ..zeroed()
    }
}
