//! Types of `ucp.h`.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem;

/// `UCS_OK`, `UCS_INPROGRESS`, or an error below 0: an enum of one byte.
pub type ucs_status_t = i8;
/// A status or a request; see [`crate::status_of`].
pub type ucs_status_ptr_t = *mut c_void;
pub type ucs_memory_type_t = c_int;

macro_rules! opaque {
    ($($handle:ident -> $object:ident),* $(,)?) => {$(
        #[repr(C)]
        #[derive(Debug)]
        pub struct $object {
            _private: [u8; 0],
        }
        pub type $handle = *mut $object;
    )*};
}

opaque! {
    ucp_context_h -> ucp_context,
    ucp_config_h -> ucp_config,
    ucp_worker_h -> ucp_worker,
    ucp_address_h -> ucp_address,
    ucp_ep_h -> ucp_ep,
    ucp_mem_h -> ucp_mem,
    ucp_rkey_h -> ucp_rkey,
    ucp_conn_request_h -> ucp_conn_request,
}

pub type ucp_send_nbx_callback_t =
    unsafe extern "C" fn(request: *mut c_void, status: ucs_status_t, user_data: *mut c_void);
pub type ucp_am_recv_data_nbx_callback_t = unsafe extern "C" fn(
    request: *mut c_void,
    status: ucs_status_t,
    length: usize,
    user_data: *mut c_void,
);
pub type ucp_err_handler_cb_t =
    unsafe extern "C" fn(arg: *mut c_void, ep: ucp_ep_h, status: ucs_status_t);
pub type ucp_am_recv_callback_t = unsafe extern "C" fn(
    arg: *mut c_void,
    header: *const c_void,
    header_length: usize,
    data: *mut c_void,
    length: usize,
    param: *const ucp_am_recv_param_t,
) -> ucs_status_t;

/// Which callback it is, the call that takes it says.
#[repr(C)]
#[derive(Clone, Copy)]
pub union ucp_request_callback {
    pub send: Option<ucp_send_nbx_callback_t>,
    pub recv_am: Option<ucp_am_recv_data_nbx_callback_t>,
}

/// A structure that is valid when all its bytes are 0.
///
/// # Safety
/// It is.
pub unsafe trait Zeroable: Sized {}

/// A structure with no field set.
#[must_use]
pub fn zeroed<T: Zeroable>() -> T {
    // SAFETY: what the trait promises.
    unsafe { mem::zeroed() }
}

/// Structures, and a list of where their fields are for the test that compares that with C.
macro_rules! structs {
    ($($(#[$attr:meta])* $name:ident { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$attr])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name {
                $(pub $field: $type,)*
            }

            // SAFETY: integers, raw pointers, and functions that may be missing.
            unsafe impl Zeroable for $name {}
        )*

        /// Of each structure its name, its size, and its fields with their offsets.
        pub const STRUCTS: &[(&str, usize, &[(&str, usize)])] = &[$((
            stringify!($name),
            mem::size_of::<$name>(),
            &[$((stringify!($field), mem::offset_of!($name, $field)),)*],
        ),)*];
    };
}

structs! {
    ucp_params_t {
        field_mask: u64,
        features: u64,
        request_size: usize,
        request_init: Option<unsafe extern "C" fn(request: *mut c_void)>,
        request_cleanup: Option<unsafe extern "C" fn(request: *mut c_void)>,
        tag_sender_mask: u64,
        mt_workers_shared: c_int,
        estimated_num_eps: usize,
        estimated_num_ppn: usize,
        name: *const c_char,
        node_local_id: usize,
    }
    ucp_context_attr_t {
        field_mask: u64,
        request_size: usize,
        thread_mode: c_int,
        memory_types: u64,
        name: [c_char; 32],
        device_counter_size: usize,
    }
    /// A bit for each core.
    ucs_cpu_set_t {
        ucs_bits: [u64; 16],
    }
    ucp_worker_params_t {
        field_mask: u64,
        thread_mode: c_int,
        cpu_mask: ucs_cpu_set_t,
        events: c_uint,
        user_data: *mut c_void,
        event_fd: c_int,
        flags: u64,
        name: *const c_char,
        am_alignment: usize,
        client_id: u64,
    }
    ucp_worker_attr_t {
        field_mask: u64,
        thread_mode: c_int,
        address_flags: u32,
        address: ucp_address_h,
        address_length: usize,
        max_am_header: usize,
        name: [c_char; 32],
        max_debug_string: usize,
    }
    ucp_err_handler_t {
        cb: Option<ucp_err_handler_cb_t>,
        arg: *mut c_void,
    }
    ucs_sock_addr_t {
        addr: *const c_void,
        addrlen: u32,
    }
    ucp_ep_params_t {
        field_mask: u64,
        address: *const ucp_address,
        err_mode: c_int,
        err_handler: ucp_err_handler_t,
        user_data: *mut c_void,
        flags: c_uint,
        sockaddr: ucs_sock_addr_t,
        conn_request: ucp_conn_request_h,
        name: *const c_char,
        local_sockaddr: ucs_sock_addr_t,
    }
    ucp_transport_entry_t {
        transport_name: *const c_char,
        device_name: *const c_char,
    }
    ucp_transports_t {
        entries: *mut ucp_transport_entry_t,
        num_entries: c_uint,
        entry_size: usize,
    }
    ucp_ep_attr_t {
        field_mask: u64,
        name: [c_char; 32],
        local_sockaddr: [u64; 16],
        remote_sockaddr: [u64; 16],
        transports: ucp_transports_t,
        user_data: *mut c_void,
    }
    ucp_mem_map_params_t {
        field_mask: u64,
        address: *mut c_void,
        length: usize,
        flags: c_uint,
        prot: c_uint,
        memory_type: ucs_memory_type_t,
        exported_memh_buffer: *const c_void,
    }
    ucp_mem_attr_t {
        field_mask: u64,
        address: *mut c_void,
        length: usize,
        mem_type: ucs_memory_type_t,
    }
    ucp_request_param_t {
        op_attr_mask: u32,
        flags: u32,
        request: *mut c_void,
        cb: ucp_request_callback,
        datatype: u64,
        user_data: *mut c_void,
        reply_buffer: *mut c_void,
        memory_type: ucs_memory_type_t,
        recv_info: *mut c_void,
        memh: ucp_mem_h,
        remote_datatype: u64,
        remote: *const c_void,
        remote_count: usize,
    }
    ucp_am_handler_param_t {
        field_mask: u64,
        id: c_uint,
        flags: u32,
        cb: Option<ucp_am_recv_callback_t>,
        arg: *mut c_void,
    }
    ucp_am_recv_param_t {
        recv_attr: u64,
        reply_ep: ucp_ep_h,
    }
}
