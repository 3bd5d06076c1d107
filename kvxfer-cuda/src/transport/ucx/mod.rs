//! Hosts with RDMA: UCX puts bytes straight from the engine's memory into pool pages.
//!
//! [`Ucx`] writes, into what a [`UcxTarget`] shows it. Where the network does RDMA, the consumer has no part in a put:
//! a [`Leave`](super::target::Leave) can't be asked for, and what keeps a writer to its pages is that it is a peer of
//! ours, its checks before it puts, and the keys: one for each segment, which reach nothing else. When
//! [`cut_off`](super::Target::cut_off) has returned, that writer's connections are destroyed, and nothing arrives over
//! them.
//!
//! **Without RDMA** UCX's own code in the consumer carries puts out, to whichever address they name, and ends the
//! process when a producer dies at the wrong moment (`docs/decisions/009-ucx.md`). So only RDMA is used, unless the
//! operator says that peers are trusted that far ([`Settings::trust`]).
//!
//! # Who connects to whom
//!
//! A producer has one worker, a consumer one for each writer. A producer's ability is its worker's address, which tells
//! its version of UCX, too. The first [handle](handle) that a writer gets has the address of the consumer's worker for
//! it; both connect then.
//!
//! # When a post has ended
//!
//! Puts of all posts that begin in one poll are followed by one flush, and when that has ended, by a ping; the consumer
//! answers it. A post ends with that answer, so when its bytes are there to be seen. Both messages are a number (8
//! bytes, little-endian) and what only the two sides of that connection know (16).

mod handle;
mod sender;
mod target;

use std::path::Path;
use std::sync::Arc;

use kvxfer_core::path::PathName;
use kvxfer_core::{ErrorKind, Result};

use crate::ucx::{Context, EndpointId, Library, Options, Worker};

pub use sender::Ucx;
pub use target::UcxTarget;

const NAME: PathName = PathName::Ucx;
/// Puts over these are RDMA. A transport that is left out here, `ud`, helps them to connect.
const RDMA: &str = "rc,dc";
/// Steps of UCX between two looks at something else.
const STEPS: usize = 1 << 10;

/// A secret of two ends.
type Secret = [u8; 16];
type Message = [u8; 24];

/// Which UCX is used, and how.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings<'a> {
    /// See [`Library::open`].
    pub library: Option<&'a Path>,
    /// See [`Library::open`].
    pub wheel: Option<&'a Path>,
    /// See [`Options::devices`].
    pub devices: Option<&'a str>,
    /// Whether TCP will do, which trusts peers with this process's memory, and with its life.
    pub trust: bool,
}

impl Settings<'_> {
    /// Starts UCX.
    ///
    /// # Errors
    /// There is none, or none that will do; `NoPath`: there is no RDMA here, and TCP is not trusted.
    pub fn start(&self) -> Result<Arc<Context>> {
        let library = Library::open(self.library, self.wheel)?;
        // UCX is not asked: it would log an ERROR where it finds nothing.
        let transports = match (has_rdma(), self.trust) {
            (true, true) => format!("{RDMA},tcp"),
            (true, false) => RDMA.into(),
            (false, true) => "tcp".into(),
            (false, false) => {
                let version = library.version();
                return Err(ErrorKind::NoPath.error(format!(
                    "UCX {version} has no RDMA here; tcp is as good without (trust_ucx_peers lets it use what it has)"
                )));
            }
        };
        let options = Options {
            transports: Some(transports),
            devices: self.devices.map(str::to_owned),
            ..Options::default()
        };
        Context::new(library, &options)
    }
}

fn has_rdma() -> bool {
    std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some())
}

fn message(number: u64, secret: &Secret) -> Message {
    let mut message = [0; 24];
    message[..8].copy_from_slice(&number.to_le_bytes());
    message[8..].copy_from_slice(secret);
    message
}

/// Its number and secret, if it is one.
fn read_message(message: &[u8]) -> Option<(u64, Secret)> {
    let (number, secret) = message.split_first_chunk()?;
    Some((u64::from_le_bytes(*number), secret.try_into().ok()?))
}

/// What an endpoint goes over, for people: "rc_mlx5/mlx5_0:1".
fn lanes(worker: &Worker, end: EndpointId) -> Option<String> {
    let mut lanes: Vec<_> = worker
        .lanes(end)
        .ok()?
        .into_iter()
        .map(|lane| format!("{}/{}", lane.transport, lane.device))
        .collect();
    lanes.sort_unstable();
    lanes.dedup();
    (!lanes.is_empty()).then(|| lanes.join(", "))
}
