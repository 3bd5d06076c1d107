//! Performs what `kvxfer-core` decides: sockets, memory, transports, threads.

pub mod control;
pub mod copy;
pub mod fds;
pub mod memory;
pub mod transport;
