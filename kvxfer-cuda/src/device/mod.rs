//! One GPU: the engine's memory on it, and the copies that it makes by itself.
//!
//! * [`DevicePool`]: the consumer's segments.
//! * [`DeviceRegions`]: what the engine registered, by number.
//! * [`Copier`]: copies between device addresses, with checksums, on a stream of its own.
//! * [`upload`]: bytes of the host's, once.
//!
//! Device memory is an address here, never a pointer: the host neither reads nor writes it.

mod calibrate;
mod copier;
mod kernels;
mod pool;
mod queue;
mod regions;
mod slots;
mod table;
mod waiter;

pub use copier::{Copier, CopierConfig, Done, Gate, Span, Summed};
pub use pool::{DevicePool, Fresh};
pub use regions::DeviceRegions;
#[cfg(feature = "faults")]
pub(crate) use waiter::finish;
pub use waiter::upload;
