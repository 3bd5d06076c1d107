//! UCP, the protocol layer of UCX, as far as kvxfer uses it.
//!
//! The crate of this name that others publish builds a UCX of 2017 with it and has none of the calls of today, and
//! the other one no longer builds; so this one is ours. It links nothing: [`Ucp`] is filled from a library that is
//! found at run time.
//!
//! The shapes are those of UCX 1.22. Structures of UCX grow at their end and say in a mask which of their fields are
//! set, so a structure that is zero but for the fields named in its mask is good for each library from 1.14 on: make
//! them with [`zeroed`]. To be told [`API_VERSION`] keeps an older library from complaining about a newer caller.
//!
//! Names, and what they mean, are those of `ucp/api/ucp.h`. `tests/layout.rs` compares each size, offset and constant
//! with that header.

#![expect(non_camel_case_types, reason = "C's own names, to be found in its documentation")]
#![expect(missing_docs, reason = "they are documented in ucp.h")]

mod constants;
mod structs;
mod table;

pub use constants::*;
pub use structs::*;
pub use table::{MissingSymbol, Ucp, Untyped};

/// What to give `ucp_init_version`: no newer than any library that is accepted.
pub const API_VERSION: (u32, u32) = (1, 13);

/// The status in the pointer that a call ended with, or `None` when that is a request.
#[must_use]
pub fn status_of(answer: ucs_status_ptr_t) -> Option<ucs_status_t> {
    // Null is `UCS_OK`; the last hundred addresses are errors; nothing else is a status.
    let value = answer.addr().cast_signed();
    (-100..=0).contains(&value).then_some(value as ucs_status_t)
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn an_answer_is_a_status_or_a_request() {
        assert_eq!(status_of(ptr::null_mut()), Some(UCS_OK));
        let at = |value: isize| status_of(ptr::without_provenance_mut(value.cast_unsigned()));
        assert_eq!(at(-25), Some(UCS_ERR_CONNECTION_RESET));
        assert_eq!(at(-100), Some(-100));
        assert_eq!(at(-101), None);
        assert_eq!(at(0x7f00_0000_1000), None);
    }
}
