//! What `run` and `serve` say to each other over TCP: a line of JSON each way, in turn.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use kvxfer_core::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Both sides have the same.
pub(super) const VERSION: u32 = 1;
/// The longest line, in bytes.
const LINE: u64 = 64 << 10;

/// What a request consists of, on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    /// Bytes of a block in one layer.
    pub(super) block_bytes: u32,
    pub(super) blocks: u32,
    pub(super) layers: u32,
}

impl Shape {
    /// Bytes of a request.
    pub(super) fn bytes(self) -> u128 {
        u128::from(self.block_bytes) * u128::from(self.blocks) * u128::from(self.layers)
    }
}

/// The client's side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// A consumer for requests like that, which takes that path alone. It takes the place of the one before.
    Start { shape: Shape, path: String, rounds: u32 },
    /// The request of that round was pushed: load it. With `check` it is also compared.
    Load { round: u32, check: bool },
}

/// The server's side.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// The first line, unasked.
    Hello {
        bench: u32,
        kvxfer: String,
    },
    Started {
        address: String,
    },
    Loaded(Load),
    /// No consumer can have that path here.
    Refused {
        why: String,
    },
    Failed {
        why: String,
    },
}

/// What the server says of a load.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Load {
    pub(super) seconds: f64,
    pub(super) bytes: u64,
    pub(super) path: String,
    /// Words that are not what was sent; `None`: not looked at.
    pub(super) wrong: Option<u64>,
    /// Seconds of processor time that the server's process has used so far.
    pub(super) cpu: f64,
}

/// One end of the connection.
pub(super) struct Wire {
    stream: BufReader<TcpStream>,
    peer: String,
}

impl Wire {
    /// Each read and each write has that long.
    pub(super) fn new(stream: TcpStream, patience: Duration) -> Result<Self> {
        let peer = stream.peer_addr().map_or("its peer".into(), |peer| peer.to_string());
        let ready = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_read_timeout(Some(patience)))
            .and_then(|()| stream.set_write_timeout(Some(patience)));
        ready.map_err(|error| broken(&peer, &error))?;
        Ok(Self { stream: BufReader::new(stream), peer })
    }

    /// The other side, for people.
    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// The address of ours that the other side reached.
    pub(super) fn local(&self) -> Result<IpAddr> {
        let local = self.stream.get_ref().local_addr();
        local.map(|local| local.ip()).map_err(|error| broken(&self.peer, &error))
    }

    pub(super) fn say(&mut self, what: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(what)
            .map_err(|error| ErrorKind::Protocol.error(error.to_string()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|error| broken(&self.peer, &error))
    }

    /// The next line; `None` when the other side is done.
    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let mut line = Vec::new();
        let read = self.stream.by_ref().take(LINE).read_until(b'\n', &mut line);
        if read.map_err(|error| broken(&self.peer, &error))? == 0 {
            return Ok(None);
        }
        serde_json::from_slice(&line).map(Some).map_err(|error| {
            ErrorKind::Protocol
                .error(format!("{} does not speak like kvxfer bench: {error}", self.peer))
                .fix("run the same release on both sides, and give the address that serve prints")
        })
    }
}

fn broken(peer: &str, error: &std::io::Error) -> Error {
    use std::io::ErrorKind::{TimedOut, WouldBlock};
    match error.kind() {
        TimedOut | WouldBlock => ErrorKind::Timeout
            .error(format!("{peer} does not answer in time"))
            .fix("look at what kvxfer bench serve says there, or raise --timeout"),
        _ => gone(peer, &error.to_string()),
    }
}

/// The other side went away.
pub(super) fn gone(peer: &str, how: &str) -> Error {
    ErrorKind::PeerLost
        .error(format!("the bench server at {peer} is gone: {how}"))
        .fix("look at what kvxfer bench serve says there, and start it again")
}
