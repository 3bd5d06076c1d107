//! What UCX's callbacks note.
//!
//! They run inside of UCX's own calls, made by the thread that has the worker, so what they touch is in cells, and
//! nobody holds a borrow of it across such a call. They don't call UCX but to give a request back, which it allows.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::slice;

use ucx_sys::*;

use super::EndpointId;

/// What came out of a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The operation of that token ended.
    Done {
        /// As it was passed.
        token: u64,
        /// An error of an earlier put to that endpoint, too.
        result: kvxfer_core::Result<()>,
    },
    /// A peer sent a message.
    Message(Vec<u8>),
    /// The peer at that endpoint is gone. Nothing more goes through; close it.
    Lost(EndpointId, kvxfer_core::Error),
}

/// As [`Event`], in UCX's terms.
#[derive(Debug)]
pub(super) enum Note {
    Done(u64, ucs_status_t),
    Message(Vec<u8>),
    Lost(EndpointId, ucs_status_t),
}

/// The most bytes of a message.
pub(super) const LONGEST: usize = 64;
/// The most messages that wait to be taken; more are dropped, and whoever waits for an answer has a deadline.
const MESSAGES: usize = 1 << 12;

/// A worker's notes.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    notes: RefCell<VecDeque<Note>>,
    messages: Cell<usize>,
}

impl Inbox {
    pub(super) fn push(&self, note: Note) {
        self.notes.borrow_mut().push_back(note);
    }

    pub(super) fn pop(&self) -> Option<Note> {
        let note = self.notes.borrow_mut().pop_front();
        if let Some(Note::Message(_)) = note {
            self.messages.set(self.messages.get() - 1);
        }
        note
    }
}

/// An endpoint's part of that. It stays where it is for as long as UCX knows the endpoint.
#[derive(Debug)]
pub(super) struct EndNotes {
    pub(super) id: EndpointId,
    pub(super) inbox: *const Inbox,
    /// Its requests can be given back.
    pub(super) free: unsafe extern "C" fn(*mut c_void),
    /// The first put that failed, or why the peer is gone.
    pub(super) failed: Cell<ucs_status_t>,
    /// UCX has let go of it.
    pub(super) closed: Cell<bool>,
}

/// A key's part of it. It stays where it is until no put names it.
#[derive(Debug)]
pub(super) struct KeyNotes {
    pub(super) end: *const EndNotes,
    /// Puts that name it and have not ended.
    pub(super) puts: Cell<usize>,
}

impl EndNotes {
    /// Of several failures the first is kept.
    pub(super) fn fail(&self, status: ucs_status_t) {
        if self.failed.get() == UCS_OK {
            self.failed.set(status);
        }
    }

    pub(super) fn op_ended(&self, token: u64, status: ucs_status_t) {
        let status = if status == UCS_OK { self.failed.get() } else { status };
        // SAFETY: the inbox outlives the worker's endpoints.
        unsafe { &*self.inbox }.push(Note::Done(token, status));
    }
}

/// A put ended. `user_data` is its key's notes.
pub(super) unsafe extern "C" fn put_done(
    request: *mut c_void,
    status: ucs_status_t,
    user_data: *mut c_void,
) {
    // SAFETY: passed with the put; a key's notes stay until its puts have ended.
    let key = unsafe { &*user_data.cast::<KeyNotes>() };
    key.puts.set(key.puts.get() - 1);
    // SAFETY: an endpoint's notes are there for as long as keys to its peer are.
    let end = unsafe { &*key.end };
    end.fail(status);
    // SAFETY: the request is UCX's, and has ended.
    unsafe { (end.free)(request) };
}

/// A flush or a message ended. `user_data` is its endpoint's notes, and its token is in the request.
pub(super) unsafe extern "C" fn op_done(
    request: *mut c_void,
    status: ucs_status_t,
    user_data: *mut c_void,
) {
    // SAFETY: passed with the operation; an endpoint's notes stay until it is closed, which ends its operations.
    let end = unsafe { &*user_data.cast::<EndNotes>() };
    // SAFETY: the context asked for that many bytes in each request, and the token was put there.
    let token = unsafe { request.cast::<u64>().read() };
    end.op_ended(token, status);
    // SAFETY: the request is UCX's, and has ended.
    unsafe { (end.free)(request) };
}

/// A close ended. `user_data` is its endpoint's notes.
pub(super) unsafe extern "C" fn close_done(
    request: *mut c_void,
    _status: ucs_status_t,
    user_data: *mut c_void,
) {
    // SAFETY: passed with the close; the notes stay until this.
    let end = unsafe { &*user_data.cast::<EndNotes>() };
    end.closed.set(true);
    // SAFETY: the request is UCX's, and has ended.
    unsafe { (end.free)(request) };
}

/// The peer of an endpoint is gone. `arg` is the endpoint's notes.
pub(super) unsafe extern "C" fn peer_lost(arg: *mut c_void, _ep: ucp_ep_h, status: ucs_status_t) {
    // SAFETY: passed when the endpoint was made; they stay until it is closed.
    let end = unsafe { &*arg.cast::<EndNotes>() };
    end.fail(status);
    // SAFETY: the inbox outlives the worker's endpoints.
    unsafe { &*end.inbox }.push(Note::Lost(end.id, status));
}

/// A message came. `arg` is the inbox.
pub(super) unsafe extern "C" fn message(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    _data: *mut c_void,
    length: usize,
    _param: *const ucp_am_recv_param_t,
) -> ucs_status_t {
    // SAFETY: passed when the handler was set; the inbox outlives the worker.
    let inbox = unsafe { &*arg.cast::<Inbox>() };
    // Ours have a header and nothing else. What is not taken, UCX throws away.
    if length == 0 && header_length <= LONGEST && inbox.messages.get() < MESSAGES {
        let bytes = match header_length {
            0 => Vec::new(),
            // SAFETY: UCX says how many bytes are there for the time of this call.
            len => unsafe { slice::from_raw_parts(header.cast::<u8>(), len) }.to_vec(),
        };
        inbox.messages.set(inbox.messages.get() + 1);
        inbox.push(Note::Message(bytes));
    }
    UCS_OK
}
