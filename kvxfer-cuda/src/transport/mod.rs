//! The ways to move bytes: implementations of [`kvxfer_core::transport::Transport`].
//!
//! `tests/conformance` holds each of them to the contract of that trait.
//!
//! | transport | reaches | how |
//! |---|---|---|
//! | [`Local`] | agents of this process | stores into their segments |
//! | [`Shm`] | processes of this host | the same, into their memfds |
//! | [`CudaIpc`] | GPUs of this host | copies of this GPU, into theirs |
//! | [`Tcp`] | any host | sends to a [`TcpTarget`], which stores what its owner gave leave for |
//! | [`Ucx`] | hosts with RDMA | puts into the memory of a [`UcxTarget`], which takes no part |

pub mod cuda_ipc;
pub mod fault;
pub mod local;
mod mapped;
mod overlap;
pub mod shm;
pub mod target;
pub mod tcp;
pub mod ucx;
mod watch;

use kvxfer_core::path::PathName;
use kvxfer_core::{ErrorKind, Result};

pub use cuda_ipc::CudaIpc;
pub use fault::Fault;
pub use local::Local;
pub use mapped::{Attach, Mapped};
pub use shm::Shm;
pub use target::Target;
pub use tcp::{Tcp, TcpTarget};
pub use ucx::{Ucx, UcxTarget};

/// Version of the blobs below.
const BLOB: u8 = 1;

/// A blob of a version and a number, which tells one segment's memory from any other.
fn blob(number: u64) -> Vec<u8> {
    [&[BLOB][..], &number.to_le_bytes()].concat()
}

fn read_blob(name: PathName, blob: &[u8]) -> Result<u64> {
    match blob.split_first() {
        Some((&BLOB, number)) if number.len() == 8 => {
            Ok(number.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
        }
        _ => Err(ErrorKind::Protocol
            .error(format!("{} bytes do not describe a segment for {name}", blob.len()))),
    }
}
