//! Device memory, and the host memory that devices may touch.

mod space;

pub(crate) use space::{Stamp, now, resolve};
