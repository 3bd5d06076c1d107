//! The entry points, by name.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::{fmt, mem};

use crate::structs::*;

/// An entry point of a type that is not known yet.
pub type Untyped = unsafe extern "C" fn();

/// The library lacks that entry point, so it is older than what we need, or something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingSymbol(pub &'static str);

impl fmt::Display for MissingSymbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "it has no {}", self.0)
    }
}

impl std::error::Error for MissingSymbol {}

macro_rules! table {
    (
        required { $($name:ident($($arg:ty),*) $(-> $answer:ty)?;)* }
        optional { $($new:ident($($new_arg:ty),*) $(-> $new_answer:ty)?;)* }
    ) => {
        /// The calls of one library, named as there.
        #[derive(Clone, Copy, Debug)]
        pub struct Ucp {
            $(pub $name: unsafe extern "C" fn($($arg),*) $(-> $answer)?,)*
            $(pub $new: Option<unsafe extern "C" fn($($new_arg),*) $(-> $new_answer)?>,)*
        }

        impl Ucp {
            /// Fills the table.
            ///
            /// # Errors
            /// One of those that are always needed is missing.
            ///
            /// # Safety
            /// `find` gives for each name what libucp, or a library it needs, has under it, and that stays loaded
            /// for as long as the table is used.
            pub unsafe fn load(
                find: impl Fn(&'static str) -> Option<Untyped>,
            ) -> Result<Self, MissingSymbol> {
                Ok(Self {
                    $($name: {
                        let name = stringify!($name);
                        let call = find(name).ok_or(MissingSymbol(name))?;
                        // SAFETY: UCX's headers declare that name with these types.
                        unsafe { mem::transmute::<Untyped, unsafe extern "C" fn($($arg),*) $(-> $answer)?>(call) }
                    },)*
                    $($new: {
                        // SAFETY: as above.
                        find(stringify!($new)).map(|call| unsafe {
                            mem::transmute::<Untyped, unsafe extern "C" fn($($new_arg),*) $(-> $new_answer)?>(call)
                        })
                    },)*
                })
            }
        }
    };
}

table! {
    required {
        ucp_get_version(*mut c_uint, *mut c_uint, *mut c_uint);
        ucp_get_version_string() -> *const c_char;
        ucs_status_string(ucs_status_t) -> *const c_char;

        ucp_config_read(*const c_char, *const c_char, *mut ucp_config_h) -> ucs_status_t;
        ucp_config_modify(ucp_config_h, *const c_char, *const c_char) -> ucs_status_t;
        ucp_config_release(ucp_config_h);
        ucp_init_version(c_uint, c_uint, *const ucp_params_t, ucp_config_h, *mut ucp_context_h) -> ucs_status_t;
        ucp_cleanup(ucp_context_h);
        ucp_context_query(ucp_context_h, *mut ucp_context_attr_t) -> ucs_status_t;

        ucp_worker_create(ucp_context_h, *const ucp_worker_params_t, *mut ucp_worker_h) -> ucs_status_t;
        ucp_worker_destroy(ucp_worker_h);
        ucp_worker_query(ucp_worker_h, *mut ucp_worker_attr_t) -> ucs_status_t;
        ucp_worker_progress(ucp_worker_h) -> c_uint;
        ucp_worker_arm(ucp_worker_h) -> ucs_status_t;
        ucp_worker_get_efd(ucp_worker_h, *mut c_int) -> ucs_status_t;
        ucp_worker_signal(ucp_worker_h) -> ucs_status_t;
        ucp_worker_get_address(ucp_worker_h, *mut ucp_address_h, *mut usize) -> ucs_status_t;
        ucp_worker_release_address(ucp_worker_h, ucp_address_h);
        ucp_worker_flush_nbx(ucp_worker_h, *const ucp_request_param_t) -> ucs_status_ptr_t;

        ucp_ep_create(ucp_worker_h, *const ucp_ep_params_t, *mut ucp_ep_h) -> ucs_status_t;
        ucp_ep_close_nbx(ucp_ep_h, *const ucp_request_param_t) -> ucs_status_ptr_t;
        ucp_ep_query(ucp_ep_h, *mut ucp_ep_attr_t) -> ucs_status_t;
        ucp_ep_flush_nbx(ucp_ep_h, *const ucp_request_param_t) -> ucs_status_ptr_t;

        ucp_mem_map(ucp_context_h, *const ucp_mem_map_params_t, *mut ucp_mem_h) -> ucs_status_t;
        ucp_mem_unmap(ucp_context_h, ucp_mem_h) -> ucs_status_t;
        ucp_mem_query(ucp_mem_h, *mut ucp_mem_attr_t) -> ucs_status_t;
        ucp_rkey_pack(ucp_context_h, ucp_mem_h, *mut *mut c_void, *mut usize) -> ucs_status_t;
        ucp_rkey_buffer_release(*mut c_void);
        ucp_ep_rkey_unpack(ucp_ep_h, *const c_void, *mut ucp_rkey_h) -> ucs_status_t;
        ucp_rkey_destroy(ucp_rkey_h);

        ucp_put_nbx(ucp_ep_h, *const c_void, usize, u64, ucp_rkey_h, *const ucp_request_param_t) -> ucs_status_ptr_t;
        ucp_get_nbx(ucp_ep_h, *mut c_void, usize, u64, ucp_rkey_h, *const ucp_request_param_t) -> ucs_status_ptr_t;

        ucp_am_send_nbx(ucp_ep_h, c_uint, *const c_void, usize, *const c_void, usize, *const ucp_request_param_t) -> ucs_status_ptr_t;
        ucp_worker_set_am_recv_handler(ucp_worker_h, *const ucp_am_handler_param_t) -> ucs_status_t;
        ucp_am_recv_data_nbx(ucp_worker_h, *mut c_void, *mut c_void, usize, *const ucp_request_param_t) -> ucs_status_ptr_t;
        ucp_am_data_release(ucp_worker_h, *mut c_void);

        ucp_request_check_status(*mut c_void) -> ucs_status_t;
        ucp_request_cancel(ucp_worker_h, *mut c_void);
        ucp_request_free(*mut c_void);
    }
    optional {
        // Internal to UCX, though each version has it: changes an option of the whole library.
        ucs_global_opts_set_value(*const c_char, *const c_char) -> ucs_status_t;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    unsafe extern "C" fn nothing() {}

    #[test]
    fn a_missing_entry_point_is_named_and_an_optional_one_may_be_missing() {
        let without = |missing: &'static str| {
            // SAFETY: nothing is called.
            unsafe { Ucp::load(|name| (name != missing).then_some(nothing as Untyped)) }
        };
        assert_eq!(without("ucp_put_nbx").unwrap_err().to_string(), "it has no ucp_put_nbx");
        assert!(without("").unwrap().ucs_global_opts_set_value.is_some());
        assert!(without("ucs_global_opts_set_value").unwrap().ucs_global_opts_set_value.is_none());
    }
}
