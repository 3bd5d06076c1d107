//! UCX: what the transport to other hosts goes over.
//!
//! * [`Library`]: libucp, found and opened at run time. That there is none, or an old one, or two, is an error like
//!   any other.
//! * [`Context`]: which of UCX's transports are used; shared by threads.
//! * [`Worker`]: a side of connections, and all that goes through it: endpoints, keys to peers' memory, puts,
//!   messages. One thread owns it. What happens comes out of [`Worker::next_event`].
//! * [`Registration`]: memory of this process that UCX may read, or that peers may write to.
//!
//! All `unsafe` about UCX is in this module and in the crate `ucx_sys`. Three rules hold it together:
//!
//! * Everything of a worker is reached through `&mut` of it, by numbers. UCX's callbacks run inside of calls made
//!   that way, and do nothing but note what happened (`inbox`).
//! * Memory outlives its use: a worker keeps what puts read from until it is destroyed, a key is destroyed after the
//!   last put that names it, a registration keeps what it registered.
//! * Dropping a worker destroys it, at once and without a word to peers: no byte that they send arrives afterwards.
//!   That is how a writer is fenced.
//!
//! What was measured about UCX is in `docs/decisions/009-ucx.md`.

mod blob;
mod context;
mod endpoint;
mod environment;
mod inbox;
mod library;
mod mapped;
mod memory;
mod operation;
mod version;
mod worker;

pub use blob::{RemoteAddress, RemoteMemory};
pub use context::{Context, Options};
pub use endpoint::{EndpointId, KeyId, Lane};
pub use inbox::Event;
pub use library::{Library, Source};
pub use memory::{Memory, Registration};
pub use operation::SourceId;
pub use version::{MINIMUM, Version, compatible};
pub use worker::Worker;
