//! Performs what `kvxfer-core` decides: sockets, memory, transports, threads.

pub mod copy;
pub mod fds;
pub mod memory;
