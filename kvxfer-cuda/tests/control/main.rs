//! The control plane: links, strangers, limits.
//!
//! Controls are driven by hand, with a clock that the test moves. Sockets are real, so a test waits for
//! them, but only ever for something to become true, and never longer than [`harness::PATIENCE`].

mod harness;
mod limits;
mod links;
mod locate;
mod strangers;
mod time;
