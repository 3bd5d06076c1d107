//! Performs what `kvxfer-core` decides: sockets, memory, transports, threads.
//!
//! An engine rank's worker half starts an [`Agent`]; its scheduler half connects an [`ObserverHandle`] to the agents
//! of all ranks. Nothing here needs CUDA or UCX to build or to start.

pub mod agent;
mod config;
pub mod control;
pub mod copy;
pub mod device;
pub mod driver;
pub mod fds;
mod identity;
pub mod memory;
mod observer;
mod planted;
pub mod transport;
pub mod ucx;

pub use agent::{Agent, AgentStats, KvLayer, Loaded, Path};
#[cfg(feature = "faults")]
pub use config::Fault;
pub use config::{AgentConfig, Memory, Role, default_socket_dir};
pub use control::Address;
pub use observer::ObserverHandle;
