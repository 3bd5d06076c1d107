//! Performs what `kvxfer-core` decides: sockets, memory, transports, threads.

pub mod fds;
