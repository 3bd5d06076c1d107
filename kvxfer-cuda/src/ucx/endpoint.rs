//! Connections of a worker, and keys to peers' memory.

use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::ptr;

use kvxfer_core::Result;
use ucx_sys::*;

use super::blob::{RemoteAddress, RemoteMemory, padded};
use super::inbox::{self, EndNotes, KeyNotes};
use super::operation::request;
use super::{Worker, compatible};

/// More lanes than an endpoint has.
const LANES: usize = 32;

/// A connection to a peer's worker. Never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId(u64);

/// A key to a peer's memory, good on one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId(u64);

/// A way that an endpoint takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lane {
    /// UCX's transport: "tcp", "rc_mlx5".
    pub transport: String,
    /// The device: "lo", "mlx5_0:1".
    pub device: String,
}

#[derive(Debug)]
pub(super) struct End {
    pub(super) raw: ucp_ep_h,
    pub(super) notes: *const EndNotes,
}

#[derive(Debug)]
pub(super) struct Key {
    pub(super) raw: ucp_rkey_h,
    pub(super) end: EndpointId,
    pub(super) ep: ucp_ep_h,
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) notes: *const KeyNotes,
}

impl Worker {
    /// Starts a connection. What is sent to it waits until it is there.
    ///
    /// # Errors `VersionMismatch`: the peer's UCX is too far from ours. `NoPath`: there is no transport that both
    /// have. Others of UCX.
    pub fn connect(&mut self, peer: &RemoteAddress) -> Result<EndpointId> {
        let ucp = self.context.ucp();
        compatible(self.context.library().version(), peer.version)?;
        let id = EndpointId(self.number());
        let notes = Box::into_raw(Box::new(EndNotes {
            id,
            inbox: self.inbox,
            free: ucp.ucp_request_free,
            failed: Cell::new(UCS_OK),
            closed: Cell::new(false),
        }));
        let packed = padded(&peer.packed);
        let params = ucp_ep_params_t {
            field_mask: UCP_EP_PARAM_FIELD_REMOTE_ADDRESS
                | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE
                | UCP_EP_PARAM_FIELD_ERR_HANDLER,
            address: packed.as_ptr().cast(),
            // Without it UCX can neither tell that a peer is gone nor cancel what it waits for.
            err_mode: UCP_ERR_HANDLING_MODE_PEER,
            err_handler: ucp_err_handler_t { cb: Some(inbox::peer_lost), arg: notes.cast() },
            ..zeroed()
        };
        let mut raw = ptr::null_mut();
        // SAFETY: the worker is alive; the address is whole, and only read during the call; the notes stay until UCX
        // is done with the endpoint.
        let status = unsafe { (ucp.ucp_ep_create)(self.raw, &params, &mut raw) };
        if let Err(error) = self.context.check("connecting", status) {
            // SAFETY: made above, and there is no endpoint that knows of it.
            drop(unsafe { Box::from_raw(notes) });
            return Err(error);
        }
        self.ends.insert(id, End { raw, notes });
        Ok(id)
    }

    /// Which ways a connection takes. They are final when something came over it.
    ///
    /// # Errors
    /// `Closed`: no such endpoint. UCX's.
    pub fn lanes(&self, endpoint: EndpointId) -> Result<Vec<Lane>> {
        let end = self.end(endpoint)?;
        let mut entries = [zeroed::<ucp_transport_entry_t>(); LANES];
        let mut attr = ucp_ep_attr_t {
            field_mask: UCP_EP_ATTR_FIELD_TRANSPORTS,
            transports: ucp_transports_t {
                entries: entries.as_mut_ptr(),
                num_entries: LANES as u32,
                entry_size: size_of::<ucp_transport_entry_t>(),
            },
            ..zeroed()
        };
        // SAFETY: the endpoint is alive; UCX is told how many entries of which size there are.
        let status = unsafe { (self.context.ucp().ucp_ep_query)(end.raw, &mut attr) };
        self.context.check("an endpoint's lanes", status)?;
        let text = |text: *const c_char| {
            // SAFETY: names are strings of the context, or missing.
            let known = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) });
            known.unwrap_or_default().to_string_lossy().into_owned()
        };
        let filled = &entries[..LANES.min(attr.transports.num_entries as usize)];
        Ok(filled
            .iter()
            .map(|one| Lane { transport: text(one.transport_name), device: text(one.device_name) })
            .collect())
    }

    /// Makes a peer's memory writable over that endpoint.
    ///
    /// # Errors
    /// `Closed`: no such endpoint. UCX's.
    pub fn open_key(&mut self, endpoint: EndpointId, memory: &RemoteMemory) -> Result<KeyId> {
        let end = self.end(endpoint)?;
        let packed = padded(&memory.packed);
        let mut raw = ptr::null_mut();
        // SAFETY: the endpoint is alive; the key is whole, and only read during the call.
        let status = unsafe {
            (self.context.ucp().ucp_ep_rkey_unpack)(end.raw, packed.as_ptr().cast(), &mut raw)
        };
        self.context.check("a key to a peer's memory", status)?;
        let notes = Box::into_raw(Box::new(KeyNotes { end: end.notes, puts: Cell::new(0) }));
        let (ep, RemoteMemory { address, bytes, .. }) = (end.raw, memory);
        let key = Key { raw, end: endpoint, ep, address: *address, bytes: *bytes, notes };
        let id = KeyId(self.number());
        self.keys.insert(id, key);
        Ok(id)
    }

    /// Lets a key go, as soon as no put names it any more.
    pub fn close_key(&mut self, key: KeyId) {
        self.old_keys.extend(self.keys.remove(&key));
        self.reap();
    }

    /// Ends a connection and, each with its event, what is under way on it. Keys to its peer are let go.
    pub fn close(&mut self, endpoint: EndpointId) {
        let Some(end) = self.ends.remove(&endpoint) else { return };
        self.old_keys
            .extend(self.keys.extract_if(|_, key| key.end == endpoint).map(|(_, key)| key));
        let params =
            request(inbox::close_done, end.notes.cast_mut().cast(), UCP_EP_CLOSE_FLAG_FORCE);
        // SAFETY: the endpoint is alive, and not used after this; the notes stay until it is closed.
        let answer = unsafe { (self.context.ucp().ucp_ep_close_nbx)(end.raw, &params) };
        if status_of(answer).is_some() {
            // SAFETY: they are still there.
            unsafe { &*end.notes }.closed.set(true);
        }
        self.closing.push(end.notes);
        self.reap();
    }

    /// Whether a connection that was [closed](Self::close) is not over: something of it may still be under way.
    pub fn closes(&self, endpoint: EndpointId) -> bool {
        // SAFETY: notes in the list are freed when they leave it.
        self.closing.iter().any(|&notes| unsafe { &*notes }.id == endpoint)
    }

    /// Destroys keys that no put names any more, and then what is left of closed endpoints that no key needs.
    pub(super) fn reap(&mut self) {
        let ucp = self.context.ucp();
        self.old_keys.retain(|key| {
            // SAFETY: they are freed here only.
            let busy = unsafe { &*key.notes }.puts.get() > 0;
            if !busy {
                // SAFETY: nothing names the key any more, and it is forgotten here.
                unsafe { key.destroy(ucp) };
            }
            busy
        });
        let old_keys = &self.old_keys;
        self.closing.retain(|&notes| {
            // SAFETY: they are freed here only.
            let closed = unsafe { &*notes }.closed.get();
            // SAFETY: as above.
            let needed = old_keys.iter().any(|key| unsafe { &*key.notes }.end == notes);
            if closed && !needed {
                // SAFETY: UCX is done with the endpoint, and it is forgotten here.
                drop(unsafe { Box::from_raw(notes.cast_mut()) });
            }
            !closed || needed
        });
    }
}

impl Key {
    /// # Safety
    /// No put names it, and it is not used afterwards.
    unsafe fn destroy(&self, ucp: &Ucp) {
        // SAFETY: as promised; the notes were made by a box.
        unsafe {
            (ucp.ucp_rkey_destroy)(self.raw);
            drop(Box::from_raw(self.notes.cast_mut()));
        }
    }
}
