//! Kernels.

use crate::harness::{device, drain, get};

pub(super) const CLAUSES: &[super::Clause] = &[(
    "kernels::what_is_no_code_is_refused",
    "`cuModuleLoadData` refuses what is no PTX, and the device works on.",
)];

#[test]
fn what_is_no_code_is_refused() {
    let device = device!();
    for text in [c"", c"no code at all", c".version 99.9\n.target sm_80\n.address_size 64\n"] {
        let error = device.module(text).unwrap_err();
        assert!(!error.is_sticky(), "{error}");
    }
    let buffer = device.buffer(4096).unwrap();
    let stream = device.stream(kvxfer_cuda::driver::Priority::Default).unwrap();
    stream.fill(buffer.ptr(), 1, 4096).unwrap();
    drain(&stream);
    assert_eq!(get(&device, buffer.ptr(), 2), [1, 1]);
}
