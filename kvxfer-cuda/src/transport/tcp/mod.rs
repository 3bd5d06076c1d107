//! Any host: our own frames, straight from the engine's memory into pool pages, over several connections to each peer.
//!
//! [`Tcp`] sends, [`TcpTarget`] receives. A target stores a byte only where its owner gives leave at that moment: it
//! asks before each call that may store, again for what is left of a frame when it goes on with it. Who writes
//! elsewhere is cut off, and when [`cut_off`](crate::transport::Target::cut_off) has returned, nothing more of that
//! writer's is stored. A post completes when the target has acknowledged it, so when its bytes are stored.
//!
//! # Who may connect
//!
//! The first handle that a writer gets over the control link names the target's address, and one secret token for each
//! connection. A token opens one connection, once, for that writer's incarnation, until the writer is cut off. Before
//! it is shown, 48 bytes are read and nothing else, for at most 5 s. Bytes are not encrypted.
//!
//! # The bytes
//!
//! Numbers are little-endian. The dialler opens, the target answers or closes:
//!
//! ```text
//! opening                                answer
//! offset  bytes                          offset  bytes
//!      0      8  KVXDATA\n                    0      8  KVXDATA\n
//!      8      4  version: 1                   8      4  version: 1
//!     12      4  number of the stream        12      4  number of the stream
//!     16     16  token                       16     16  incarnation of the target's owner
//!     32     16  incarnation of the writer
//! ```
//!
//! Then come frames, each a post or, where one has too many spans, a part of it; all parts on one connection:
//!
//! ```text
//! offset  bytes
//!      0      8  post
//!      8      8  grant; 0 in a probe
//!     16      8  bytes of all spans
//!     24      4  spans: 1 to 256
//!     28      4  flags: 1 the post ends here, 2 by a grant
//!     32    24n  spans: segment (4), generation of its memory (4), offset (8), bytes (8), at least 1
//!             …  the spans' bytes, one after the other
//! ```
//!
//! and against them acknowledgements, of posts in the order in which they came: post (8), then 1, or 0 when a
//! segment's memory had been replaced and bytes for the old one were dropped (8).

mod blob;
mod frame;
mod io;
mod peer;
mod queue;
mod receive;
mod sender;
mod socket;
mod stream;
mod target;
#[cfg(test)]
mod tests;

use std::time::Duration;

use kvxfer_core::path::PathName;

pub(super) use io::sum;
pub use sender::Tcp;
pub use target::TcpTarget;

const NAME: PathName = PathName::Tcp;
/// How long a connection may take to be made, and to show its token.
const OPEN: Duration = Duration::from_secs(5);
