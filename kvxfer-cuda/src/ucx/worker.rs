//! One side of connections.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::{ptr, slice};

use kvxfer_core::{Error, ErrorKind, Result};
use ucx_sys::*;

use super::blob::RemoteAddress;
use super::context::failed;
use super::endpoint::{End, Key};
use super::inbox::{self, EndNotes, Event, Inbox, Note};
use super::{Context, EndpointId, KeyId, Registration};

/// The one kind of message there is.
pub(super) const MESSAGE: u32 = 0;
/// How often a drop that has to wait for puts to be cancelled lets UCX work on that.
const CANCEL_ROUNDS: usize = 10_000;

/// One side of connections, and what goes through it. Any thread may own it, one at a time.
///
/// No call blocks, and none is cancelled alone: [`Worker::close`] ends all that an endpoint has under way, each with
/// its event.
///
/// # Drop Destroys it at once, and all that it made. Peers are told nothing, and no event comes; what they write from
/// then on arrives nowhere.
#[derive(Debug)]
pub struct Worker {
    pub(super) raw: ucp_worker_h,
    fd: RawFd,
    /// Made by a box, for UCX has its address.
    pub(super) inbox: *const Inbox,
    pub(super) ends: HashMap<EndpointId, End>,
    pub(super) keys: HashMap<KeyId, Key>,
    /// Let go of, while puts still name them.
    pub(super) old_keys: Vec<Key>,
    pub(super) closing: Vec<*const EndNotes>,
    next: u64,
    pub(super) sources: Vec<Arc<Registration>>,
    pub(super) context: Arc<Context>,
}

// SAFETY: UCX allows calls from any thread, one at a time (`UCS_THREAD_MODE_SERIALIZED`). The notes are reached
// through the worker, or by callbacks inside of such calls.
unsafe impl Send for Worker {}

impl Worker {
    /// A worker with no connections. It listens from now on, where UCX likes to.
    ///
    /// # Errors
    /// UCX's; that no transport of the context works here, say.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let ucp = context.ucp();
        let params = ucp_worker_params_t {
            field_mask: UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS,
            thread_mode: UCS_THREAD_MODE_SERIALIZED,
            flags: UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK,
            ..zeroed()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the context is alive, and is kept by the worker.
        let status = unsafe { (ucp.ucp_worker_create)(context.raw(), &params, &mut raw) };
        context.check("making a worker", status)?;
        let mut worker = Self {
            raw,
            fd: -1,
            inbox: Box::into_raw(Box::default()),
            ends: HashMap::new(),
            keys: HashMap::new(),
            old_keys: Vec::new(),
            closing: Vec::new(),
            next: 0,
            sources: Vec::new(),
            context: Arc::clone(context),
        };
        let handler = ucp_am_handler_param_t {
            field_mask: UCP_AM_HANDLER_PARAM_FIELD_ID
                | UCP_AM_HANDLER_PARAM_FIELD_FLAGS
                | UCP_AM_HANDLER_PARAM_FIELD_CB
                | UCP_AM_HANDLER_PARAM_FIELD_ARG,
            id: MESSAGE,
            flags: UCP_AM_FLAG_WHOLE_MSG,
            cb: Some(inbox::message),
            arg: worker.inbox.cast_mut().cast(),
        };
        // SAFETY: the worker is alive; the inbox is freed after the worker was destroyed.
        let status = unsafe { (ucp.ucp_worker_set_am_recv_handler)(raw, &handler) };
        context.check("taking messages", status)?;
        // SAFETY: the worker is alive. The descriptor stays the worker's.
        let status = unsafe { (ucp.ucp_worker_get_efd)(raw, &mut worker.fd) };
        context.check("waking up", status)?;
        Ok(worker)
    }

    /// Where peers reach it.
    ///
    /// # Errors
    /// UCX's.
    pub fn address(&self) -> Result<RemoteAddress> {
        let ucp = self.context.ucp();
        let (mut packed, mut len) = (ptr::null_mut(), 0);
        // SAFETY: the worker is alive; what is written is ours to release.
        let status = unsafe { (ucp.ucp_worker_get_address)(self.raw, &mut packed, &mut len) };
        self.context.check("a worker's address", status)?;
        // SAFETY: UCX says how many bytes it wrote there.
        let bytes =
            unsafe { slice::from_raw_parts(packed.cast_const().cast::<u8>(), len) }.to_vec();
        // SAFETY: got above, and released once.
        unsafe { (ucp.ucp_worker_release_address)(self.raw, packed) };
        Ok(RemoteAddress { version: self.context.library().version(), packed: bytes })
    }

    /// Lets UCX work. Whether there was something to do.
    pub fn progress(&mut self) -> bool {
        // SAFETY: the worker is alive, and this thread has it alone.
        let worked = unsafe { (self.context.ucp().ucp_worker_progress)(self.raw) } > 0;
        if !self.closing.is_empty() || !self.old_keys.is_empty() {
            self.reap();
        }
        worked
    }

    /// What happened next, if something did.
    pub fn next_event(&mut self) -> Option<Event> {
        // SAFETY: it is freed when the worker is dropped.
        let note = unsafe { &*self.inbox }.pop()?;
        Some(match note {
            Note::Message(bytes) => Event::Message(bytes),
            Note::Lost(id, status) => Event::Lost(id, self.failed("the peer is gone", status)),
            Note::Done(token, UCS_OK) => Event::Done { token, result: Ok(()) },
            Note::Done(token, status) => {
                Event::Done { token, result: Err(self.failed("an operation ended", status)) }
            }
        })
    }

    /// Makes the descriptor readable when something happens from now on. When it says false, something has: progress
    /// again.
    ///
    /// # Errors
    /// UCX's.
    pub fn arm(&mut self) -> Result<bool> {
        // SAFETY: the worker is alive.
        match unsafe { (self.context.ucp().ucp_worker_arm)(self.raw) } {
            UCS_ERR_BUSY => Ok(false),
            status => self.context.check("going to sleep", status).map(|()| true),
        }
    }

    /// Endpoints that are open, and those whose close has not ended.
    pub fn endpoints(&self) -> usize {
        self.ends.len() + self.closing.len()
    }

    pub(super) fn end(&self, id: EndpointId) -> Result<&End> {
        self.ends.get(&id).ok_or_else(|| ErrorKind::Closed.error("the UCX endpoint is closed"))
    }

    fn failed(&self, what: &str, status: ucs_status_t) -> Error {
        failed(self.context.library(), what, status)
    }

    pub(super) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl AsFd for Worker {
    /// Readable when something happens after [`Worker::arm`]; for epoll.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: UCX's descriptor, open for as long as the worker.
        unsafe { BorrowedFd::borrow_raw(self.fd) }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Keys go before the worker, and puts that name them before the keys. A consumer's worker has none.
        if !self.keys.is_empty() || !self.old_keys.is_empty() {
            for id in self.ends.keys().copied().collect::<Vec<_>>() {
                self.close(id);
            }
            let mut rounds = 0..CANCEL_ROUNDS;
            while !self.old_keys.is_empty() && rounds.next().is_some() {
                self.progress();
            }
            if !self.old_keys.is_empty() {
                tracing::warn!(
                    keys = self.old_keys.len(),
                    "UCX: puts were not cancelled; their keys are leaked"
                );
            }
        }
        // SAFETY: this is the last use of it, and no callback comes afterwards; only then is what they write to
        // freed. Notes of keys that are leaked stay.
        unsafe {
            (self.context.ucp().ucp_worker_destroy)(self.raw);
            let notes = self.ends.drain().map(|(_, end)| end.notes).chain(self.closing.drain(..));
            notes.for_each(|notes| drop(Box::from_raw(notes.cast_mut())));
            drop(Box::from_raw(self.inbox.cast_mut()));
        }
    }
}
